"""Ranking quality of a model over a whole corpus: :class:`RetrievalEvaluator`."""

from __future__ import annotations

import csv
import logging
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm.autonotebook import trange

from st_fpsloss.evaluation.metrics import (
    best_documents,
    check_at,
    check_grades,
    ranking_metrics,
    relevant_ranks,
)
from st_fpsloss.evaluation.popularity import PopularityMetrics
from st_fpsloss.retrieval.encode import checked_similarity, embed_in_chunks

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

ScoreFunction = Callable[[list[Any]], Any]
"""Query ids -> (number of ids, number of documents) array of scores, columns in the order of ``corpus_ids``."""

CELLS_PER_CHUNK = 2**23
"""Scores in memory at a time; a chunk has 16 to 1,024 queries."""

DOCUMENTS_PER_CHUNK = 8192
"""Documents in one matrix product."""


class RetrievalEvaluator(BaseEvaluator):
    """Ranks the whole corpus for every query, and measures where the relevant documents stand.

    The protocol is strict, so that figures can be compared: every document is a candidate, documents that the query
    has already seen are left out of its ranking, and ties count against the model: a relevant document stands behind
    every candidate without relevance of equal score, so a model that scores everything alike gains nothing. Scores
    are the model's own similarity (dot or cosine), computed in float64 and rounded to float32: equal embeddings get
    equal scores wherever they stand in the matrix product.

    Metrics, each at every k of ``at``, the mean over queries: ``hr`` (hit rate: is any relevant document among the
    first k), ``ndcg`` (the grade is the gain, as trec_eval; the ideal ranking has all relevant documents, cut at k),
    ``recall``, ``mrr``, and ``map`` (divided by min(k, number of relevant documents)). Where ``popularity`` is given
    there are two more, for a good mean may be that of the popular documents alone:

    - ``ndcg@k_decile_1`` to ``ndcg@k_decile_10``: ndcg by the popularity of the relevant document, over the queries
      that have one in the decile; those of other deciles count as not relevant, and keep their places in the ranking.
      The deciles are tenths of the clicks, not of the documents: 10 holds the few most clicked documents that drew a
      tenth of all clicks, 1 the many least clicked ones that drew another. Deciles without a relevant document are
      left out.
    - ``coverage@k``: the share of the corpus that is among the first k of any query.

    Memory: the embeddings of queries and corpus (4 · dim bytes each) and chunks of about 150 MB, or of 16 rows of the
    corpus where that is more; there is never a matrix of all queries by all documents. Each call embeds the corpus
    once and the queries once.

    Args:
        queries: Query id to input: a string, or a dict with ``"text"`` and features.
        corpus: Document id to input, the same.
        relevant_docs: Query id to ``{document id: grade}``, or to a set or list of document ids (grade 1). A grade of 0
            or below is not relevant. A query without relevant documents is left out with a warning.
        seen_docs: Query id to the ids of documents that are left out of its ranking. A document that is both seen and
            relevant stays a candidate, with a warning: what the judgments ask for must be findable.
        at: The cutoffs k.
        name: Prefix of the metrics' names, and part of the name of the CSV file.
        batch_size: Inputs in one forward pass.
        show_progress_bar: Whether to show progress bars.
        popularity: Document id to its number of clicks in the training log, for the metrics by popularity. A document
            that is missing has none.

    Attributes:
        query_ids: Ids of the queries that are evaluated: those with relevant documents, in the order of ``queries``.
        corpus_ids: Ids of the documents, in the order of ``corpus``.
        primary_metric: ``{name_}ndcg@10``, or ndcg at the largest k where ``at`` has no 10. As the trainer's
            ``metric_for_best_model`` it is ``eval_{name_}ndcg@10``.

    Raises:
        ValueError: If queries or corpus are empty, no query has a relevant document, the judgments, the seen documents
            or the popularity name a query or a document that is not there, a grade or a number of clicks is not
            finite, or ``at`` is unusable.

    Example:
        >>> evaluator = RetrievalEvaluator(
        ...     queries={"q1": "toys come alive"},
        ...     corpus={"d1": "Toy Story", "d2": "Heat", "d3": "Fargo"},
        ...     relevant_docs={"q1": {"d1": 1}},
        ...     seen_docs={"q1": ["d3"]},
        ...     at=(1, 2),
        ... )
        >>> popularity = np.array([10, 20, 30])
        >>> evaluator.evaluate_scores(lambda query_ids: np.tile(popularity, (len(query_ids), 1)))["mrr@2"]
        0.5

        Two models, or score functions, on the same queries: the mean difference and its interval.

        >>> from st_fpsloss.evaluation import paired_difference
        >>> good = evaluator.per_query(lambda query_ids: [[3, 2, 1]])["ndcg@2"]
        >>> paired_difference(good, evaluator.per_query(lambda query_ids: [popularity])["ndcg@2"], confidence=0.95)
        (0.36..., 0.36..., 0.36...)
    """

    def __init__(
        self,
        queries: Mapping[Any, Any],
        corpus: Mapping[Any, Any],
        relevant_docs: Mapping[Any, Mapping[Any, float] | Iterable[Any]],
        seen_docs: Mapping[Any, Iterable[Any]] | None = None,
        at: Iterable[int] = (1, 10, 20, 100),
        name: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        popularity: Mapping[Any, float] | None = None,
    ) -> None:
        super().__init__()
        self.at = check_at(at)
        self.name = name
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.csv_file = f"retrieval_evaluation{'_' + name.replace('/', '-') if name else ''}_results.csv"
        self.primary_metric = self._prefixed(f"ndcg@{10 if 10 in self.at else self.at[-1]}")
        _check_mapping("queries", queries, "query id to input")
        _check_mapping("corpus", corpus, "document id to input")
        _check_mapping("relevant_docs", relevant_docs, "query id to relevant documents")
        self.corpus_ids = list(corpus)
        self._corpus = list(corpus.values())
        self._read_judgments(queries, relevant_docs)
        self._read_seen(queries, seen_docs or {})
        self._popularity: PopularityMetrics | None = None
        if popularity is not None:
            _check_mapping("popularity", popularity, "document id to clicks")
            _check_known("popularity", "corpus", popularity, self._position)
            self._popularity = PopularityMetrics(popularity, self.corpus_ids, self.at)

    def _read_judgments(
        self, queries: Mapping[Any, Any], relevant_docs: Mapping[Any, Mapping[Any, float] | Iterable[Any]]
    ) -> None:
        """Keep, for each query with relevant documents, their positions in the corpus and their grades."""
        _check_known("relevant_docs", "queries", relevant_docs, queries)
        grades_of = {
            query_id: check_grades(relevant, f"relevant_docs[{query_id!r}]")
            for query_id, relevant in relevant_docs.items()
        }
        self._position = {document_id: position for position, document_id in enumerate(self.corpus_ids)}
        _check_known("relevant_docs", "corpus", _documents_of(grades_of), self._position)
        self.query_ids: list[Any] = []
        self._relevant: list[np.ndarray] = []
        self._grades: list[np.ndarray] = []
        for query_id in queries:
            positive = {d: grade for d, grade in grades_of.get(query_id, {}).items() if grade > 0}
            if positive:
                self.query_ids.append(query_id)
                self._relevant.append(np.array([self._position[document_id] for document_id in positive]))
                self._grades.append(np.array(list(positive.values())))
        if not self.query_ids:
            raise ValueError(
                f"relevant_docs has no document of a grade above 0 for any of the {len(queries)} queries: "
                "there is nothing to evaluate."
            )
        if left_out := len(queries) - len(self.query_ids):
            logger.warning("%d of %d queries have no relevant documents: they are left out.", left_out, len(queries))
        self._queries = [queries[query_id] for query_id in self.query_ids]

    def _read_seen(self, queries: Mapping[Any, Any], seen_docs: Mapping[Any, Iterable[Any]]) -> None:
        """Keep, for each evaluated query, the positions of the documents that are left out of its ranking."""
        if not isinstance(seen_docs, Mapping):
            raise ValueError(f"seen_docs={repr(seen_docs)[:200]} is no dict: give query id to document ids.")
        _check_known("seen_docs", "queries", seen_docs, queries)
        seen_of: dict[Any, list[Any]] = {}
        for query_id, seen in seen_docs.items():
            if isinstance(seen, str) or not isinstance(seen, Iterable):
                raise ValueError(f"seen_docs[{query_id!r}] is {seen!r}: give a set or list of document ids.")
            seen_of[query_id] = list(seen)
        _check_known("seen_docs", "corpus", _documents_of(seen_of), self._position)
        self._seen: list[np.ndarray] = []
        num_both = 0
        for query_id, relevant in zip(self.query_ids, self._relevant, strict=True):
            seen = {self._position[document_id] for document_id in seen_of.get(query_id, ())}
            num_both += len(both := seen & set(relevant.tolist()))
            self._seen.append(np.array(sorted(seen - both), dtype=np.int64))
        if num_both:
            logger.warning("%d documents are both seen and relevant for a query: they stay candidates.", num_both)

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a model; the trainer calls this when the model is its ``model`` and this is its ``evaluator``.

        Args:
            model: The model to evaluate.
            output_path: Folder of ``retrieval_evaluation_{name}_results.csv``, to which the metrics are appended; None:
                no file.
            epoch: Epoch of the evaluation, for the log and the CSV file; -1 outside of training.
            steps: Steps of the evaluation, the same.

        Returns:
            ``{name_}hr@k``, ``ndcg@k``, ``recall@k``, ``mrr@k``, ``map@k`` for every k, and those of ``popularity``.

        Raises:
            ValueError: If the model gives NaN embeddings, or its similarity is neither dot nor cosine.
        """
        logger.info("Retrieval evaluation %s (epoch %s, step %s):", self.name, epoch, steps)
        metrics = self._evaluate(model)
        for metric, value in metrics.items():
            logger.info("%s: %.4f", metric, value)
        if output_path is not None:
            self._append_csv(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def evaluate_scores(self, score_fn: ScoreFunction) -> dict[str, float]:
        """Evaluate ready scores under the same protocol, such as those of a popularity baseline.

        Args:
            score_fn: Gets a list of query ids, and returns their scores for the whole corpus: (number of ids, number of
                documents), columns in the order of ``corpus_ids``, higher is better. Only the order counts.

        Returns:
            The same metrics as a call.

        Raises:
            ValueError: If the scores have another shape, or there is a NaN among them.
        """
        return self._evaluate(score_fn)

    def per_query(self, source: SentenceTransformer | ScoreFunction) -> dict[str, np.ndarray]:
        """Metrics of each query, to build intervals and paired comparisons on.

        Args:
            source: A model, or a score function as in :meth:`evaluate_scores`.

        Returns:
            ``hr@k``, ... without the prefix, to an array of (number of ``query_ids``,) in their order.
        """
        return self._rank(source)[0]

    def top_k(self, source: SentenceTransformer | ScoreFunction, k: int) -> dict[Any, list[tuple[Any, float]]]:
        """Best documents of each evaluated query: the beginning of the very ranking that the metrics are read from.

        Args:
            source: A model, or a score function as in :meth:`evaluate_scores`.
            k: Documents a query; fewer where fewer candidates are left.

        Returns:
            Query id to (document id, score), best first, seen documents left out. Ties stand as the metrics count them:
            documents without relevance first, then in the order of the corpus.

        Raises:
            ValueError: If ``k`` is no integer of 1 or more.
        """
        if not isinstance(k, numbers.Integral) or k < 1:
            raise ValueError(f"k={k!r} has to be an integer of 1 or more.")
        best = {}
        for query_id, (scores, *judgments) in zip(self.query_ids, self._score_rows(source), strict=True):
            positions = best_documents(scores, k, *judgments)
            best[query_id] = [(self.corpus_ids[position], float(scores[position])) for position in positions]
        return best

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says of this evaluation."""
        return {"at": list(self.at), "num_queries": len(self.query_ids), "num_documents": len(self.corpus_ids)}

    def _evaluate(self, source: SentenceTransformer | ScoreFunction) -> dict[str, float]:
        per_query, of_all = self._rank(source, with_popularity=True)
        means = {metric: float(values.mean()) for metric, values in per_query.items()}
        return {self._prefixed(metric): value for metric, value in (means | of_all).items()}

    def _rank(
        self, source: SentenceTransformer | ScoreFunction, with_popularity: bool = False
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Metrics of each query, and, if they are asked for, the metrics by popularity of all queries together."""
        popularity = self._popularity if with_popularity else None
        ranks = []
        best_rank = np.full(len(self.corpus_ids), np.inf)
        for scores, *judgments in self._score_rows(source):
            ranks.append(relevant_ranks(scores, *judgments))
            if popularity is not None:
                best = best_documents(scores, popularity.depth, *judgments)
                best_rank[best] = np.minimum(best_rank[best], np.arange(1, len(best) + 1))
        offsets = np.cumsum([0, *map(len, ranks)])
        flat_ranks, grades = np.concatenate(ranks), np.concatenate(self._grades)
        of_all: dict[str, float] = {}
        if popularity is not None:
            of_all = popularity(np.concatenate(self._relevant), flat_ranks, grades, offsets, best_rank)
        return ranking_metrics(flat_ranks, grades, offsets, self.at), of_all

    def _score_rows(
        self, source: SentenceTransformer | ScoreFunction
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield for each query its scores of the corpus, its relevant documents, their grades, its seen documents."""
        score = self._model_scores(source) if hasattr(source, "encode_document") else self._function_scores(source)
        step = min(max(CELLS_PER_CHUNK // len(self.corpus_ids), 16), 1024)
        for start in trange(0, len(self.query_ids), step, desc="Ranking", disable=not self.show_progress_bar):
            chunk = slice(start, start + step)
            yield from zip(score(chunk), self._relevant[chunk], self._grades[chunk], self._seen[chunk], strict=True)

    def _model_scores(self, model: SentenceTransformer) -> Callable[[slice], np.ndarray]:
        """Embed queries and corpus, and return the function that scores a chunk of queries."""
        cosine = checked_similarity(model) == "cosine"
        queries = self._embed(model.encode_query, self._queries)
        corpus = self._embed(model.encode_document, self._corpus)
        # Not every accelerator has float64.
        device = model.device if model.device.type == "cuda" else torch.device("cpu")

        def prepare(embeddings: torch.Tensor) -> torch.Tensor:
            embeddings = embeddings.to(device, torch.float64)
            return torch.nn.functional.normalize(embeddings, dim=1) if cosine else embeddings

        def score(chunk: slice) -> np.ndarray:
            rows = prepare(queries[chunk])
            scores = torch.empty(len(rows), len(corpus), dtype=torch.float32)
            for start in range(0, len(corpus), DOCUMENTS_PER_CHUNK):
                columns = slice(start, start + DOCUMENTS_PER_CHUNK)
                scores[:, columns] = rows @ prepare(corpus[columns]).T
            return scores.numpy()

        return score

    def _embed(self, encode: Callable[..., Any], inputs: Sequence[Any]) -> torch.Tensor:
        """Embed all inputs into one float32 tensor on the CPU."""
        embeddings, filled = torch.empty(0), 0
        for chunk in embed_in_chunks(encode, inputs, self.batch_size, self.show_progress_bar):
            if not filled:
                embeddings = torch.empty(len(inputs), chunk.shape[1], dtype=torch.float32)
            embeddings[filled : filled + len(chunk)] = torch.from_numpy(chunk)
            filled += len(chunk)
        return embeddings

    def _function_scores(self, score_fn: ScoreFunction) -> Callable[[slice], np.ndarray]:
        """Check what a score function returns."""

        def score(chunk: slice) -> np.ndarray:
            query_ids = self.query_ids[chunk]
            scores = np.asarray(score_fn(query_ids), dtype=np.float64)
            if scores.shape != (len(query_ids), len(self.corpus_ids)):
                raise ValueError(
                    f"score_fn returned scores of shape {scores.shape} for {len(query_ids)} queries and "
                    f"{len(self.corpus_ids)} documents: return one row a query, one column a document of corpus_ids."
                )
            broken = np.isnan(scores).any(axis=1)
            if broken.any():
                raise ValueError(f"score_fn returned NaN for query {query_ids[int(np.argmax(broken))]!r}.")
            return scores

        return score

    def _prefixed(self, metric: str) -> str:
        return f"{self.name}_{metric}" if self.name else metric

    def _append_csv(self, folder: Path, row: Mapping[str, Any]) -> None:
        """Append one line to the CSV file, with a header where the file is new or has other columns."""
        os.makedirs(folder, exist_ok=True)
        path = folder / self.csv_file
        header = ",".join(row)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        headers = [line for line in lines if line.startswith("epoch,")]
        if headers and headers[-1] != header:
            logger.warning("%s has other columns than this evaluation: the new ones follow under a new header.", path)
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if headers[-1:] != [header]:
                writer.writeheader()
            writer.writerow(row)


def _check_mapping(argument: str, value: Any, content: str) -> None:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{argument}={repr(value)[:200]} has to be a dict of {content} with at least one entry.")


def _check_known(argument: str, of: str, ids: Iterable[Any], known: Mapping[Any, Any]) -> None:
    """Refuse ids that queries or corpus do not have; most often they differ in type alone."""
    unknown = list(dict.fromkeys(some_id for some_id in ids if some_id not in known))
    if unknown:
        raise ValueError(
            f"{argument} names {len(unknown)} ids that are not in {of}, the first {unknown[0]!r}: add them to {of} or "
            f"drop them from {argument}. (Ids of {of} look like {next(iter(known))!r}; 1 and '1' are different ids.)"
        )


def _documents_of(judgments: Mapping[Any, Iterable[Any]]) -> Iterator[Any]:
    for documents in judgments.values():
        yield from documents
