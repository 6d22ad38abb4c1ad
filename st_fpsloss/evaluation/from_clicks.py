"""From rows of a click log to the evaluator that ranks the corpus for their queries."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from datasets import Dataset

from st_fpsloss.data.inputs import LABEL_COLUMNS, canonical_strings, check_columns, distinct, is_positive
from st_fpsloss.evaluation.evaluator import RetrievalEvaluator


def clicks_evaluator(
    clicks: Dataset,
    documents: Iterable[Any] = (),
    seen: Dataset | None = None,
    at: Iterable[int] = (1, 10, 20, 100),
    name: str = "",
    batch_size: int = 32,
    judged_only: bool = False,
) -> RetrievalEvaluator:
    """Makes the evaluator of rows (query, document), such as those that were held out of training.

    Equal inputs are one: rows of one query, a text or a dict, are judged together. A row's ``label``, where there is
    one, is the grade of its document; of a pair that occurs more than once the best one counts. Rows with a grade of 0
    or below give the corpus their document, and no relevance.

    Args:
        clicks: The rows, with the columns ``query`` and ``document``, and ``label`` where they are graded.
        documents: Further documents that are ranked: those of the training log, or the whole corpus.
        seen: Rows whose documents are left out of the rankings of their queries, such as the training log where
            nobody is recommended the same twice.
        at: The cutoffs k.
        name: Prefix of the metrics' names.
        batch_size: Inputs in one forward pass.
        judged_only: Rank for each query the documents of its own rows alone: how well the order of the grades is met.

    Returns:
        A :class:`st_fpsloss.RetrievalEvaluator`; the id of a query or document is its canonical string.

    Raises:
        ValueError: If a column is missing or no row has a grade above 0.

    Example:
        >>> from datasets import Dataset
        >>> held_out = Dataset.from_dict({"query": ["red shoes", "red shoes"], "document": ["Sneaker", "Runner 3"]})
        >>> evaluator = clicks_evaluator(held_out, documents=["Sneaker", "Parka"])
        >>> evaluator.query_ids, evaluator.corpus_ids
        (['red shoes'], ['Sneaker', 'Parka', 'Runner 3'])
    """
    check_columns(clicks, ["query", "document"])
    rows = clicks.with_format(None)
    queries, corpus = distinct(rows["query"]), distinct(chain(documents, rows["document"]))
    relevant: dict[str, dict[str, float]] = {}
    for query, document, grade in zip(*_canonical_pairs(clicks), _grades(clicks), strict=True):
        of_query = relevant.setdefault(query, {})
        of_query[document] = max(grade, of_query.get(document, grade))
    left_out = _seen_docs(seen, queries, corpus)
    if judged_only:
        left_out = {query: corpus.keys() - of_query.keys() for query, of_query in relevant.items()}
    return RetrievalEvaluator(queries, corpus, relevant, left_out, at=at, name=name, batch_size=batch_size)


def _canonical_pairs(rows: Dataset) -> tuple[list[str], list[str]]:
    return canonical_strings(rows, "query"), canonical_strings(rows, "document")


def _grades(rows: Dataset) -> list[float]:
    for name in LABEL_COLUMNS:
        if name in rows.column_names:
            return rows.with_format(None)[name][:]
    return [1.0] * len(rows)


def _seen_docs(seen: Dataset | None, queries: dict[str, Any], corpus: dict[str, Any]) -> dict[str, set[str]]:
    """Query -> documents of the clicks among ``seen`` that are both there."""
    found: dict[str, set[str]] = {}
    if seen is not None:
        check_columns(seen, ["query", "document"], argument="seen")
        for query, document, clicked in zip(*_canonical_pairs(seen), is_positive(seen), strict=True):
            if clicked and query in queries and document in corpus:
                found.setdefault(query, set()).add(document)
    return found
