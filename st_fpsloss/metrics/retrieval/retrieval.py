"""Ranking metrics as an ``evaluate`` module: the numbers of :func:`st_fpsloss.evaluation.metrics.ranking_metrics`."""

# evaluate reads the imports of this file line by line, and takes `import a, b` for one package: one import a line.
from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np

from st_fpsloss.evaluation.metrics import check_at, check_grades, list_ranks, ranking_metrics

logger = logging.getLogger(__name__)

_DESCRIPTION = """
Ranking quality of retrieval: hit rate, ndcg (linear gain), recall, mrr and map at cutoffs, the mean over queries.
"""

_INPUTS = """
Args:
    predictions: For each query the ids of the ranked documents, best first, each once.
    references: For each query its relevant documents: a dict of document id to grade, or a list of ids (grade 1).
        A grade of 0 or below is not relevant; a query without relevant documents is left out with a warning.
        Ids are compared as strings.
    at: The cutoffs, (1, 10, 20, 100) by default.

Returns:
    A dict of floats: hr@k, ndcg@k, recall@k, mrr@k, map@k for every k in `at`.
"""


class Retrieval(evaluate.Metric):
    """Hit rate, ndcg, recall, mrr and map of ready rankings."""

    def _info(self) -> evaluate.MetricInfo:
        judgments = [{"id": datasets.Value("string"), "grade": datasets.Value("float64")}]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": [datasets.Value("string")], "references": judgments}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add the rankings and judgments of several queries."""
        if predictions is None or references is None or len(predictions) != len(references):
            raise ValueError("predictions and references have to be lists of one length, one entry a query.")
        rankings = [_ranking(prediction) for prediction in predictions]
        judgments = [_judgments(reference) for reference in references]
        super().add_batch(predictions=rankings, references=judgments, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add the ranking and judgments of one query."""
        super().add(prediction=_ranking(prediction), reference=_judgments(reference), **kwargs)

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[list[dict[str, Any]]],
        at: Iterable[int] = (1, 10, 20, 100),
    ) -> dict[str, float]:
        at = check_at(at)
        ranks: list[np.ndarray] = []
        grades: list[float] = []
        offsets = [0]
        for prediction, reference in zip(predictions, references, strict=True):
            relevant = {judgment["id"]: judgment["grade"] for judgment in reference if judgment["grade"] > 0}
            if not relevant:
                continue
            ranks.append(list_ranks(prediction, relevant))
            grades.extend(relevant.values())
            offsets.append(len(grades))
        if not ranks:
            raise ValueError("references has no query with a relevant document: there is nothing to average over.")
        if len(ranks) < len(predictions):
            logger.warning("%d queries without relevant documents are left out.", len(predictions) - len(ranks))
        metrics = ranking_metrics(np.concatenate(ranks), np.array(grades), np.array(offsets), at)
        return {name: float(values.mean()) for name, values in metrics.items()}


def _ranking(prediction: Any) -> list[str]:
    """Spell the ids of a ranking as strings, the one type that Arrow can hold them all in."""
    if isinstance(prediction, (str, Mapping)) or not isinstance(prediction, Iterable):
        raise ValueError(f"a prediction is {prediction!r}: give the list of document ids of a query, best first.")
    return [str(document_id) for document_id in prediction]


def _judgments(reference: Any) -> list[dict[str, Any]]:
    """Spell the judgments of a query as Arrow can hold them: a list of id and grade."""
    grades = check_grades(reference, "a reference")
    return [{"id": str(document_id), "grade": grade} for document_id, grade in grades.items()]
