"""Ranks of relevant documents, and the metrics that are read off them: numpy alone, no model.

Every metric here depends only on where the relevant documents stand. So the work is split in two:
:func:`relevant_ranks` turns the scores of one query into the ranks of its relevant documents, and
:func:`ranking_metrics` turns the ranks of all queries into hr, ndcg, recall, mrr and map at every cutoff, vectorised
over the queries (:mod:`st_fpsloss.evaluation.bootstrap` says how sure the means are).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

METRIC_NAMES = ("hr", "ndcg", "recall", "mrr", "map")


def check_at(at: Iterable[int]) -> tuple[int, ...]:
    """Check the cutoffs of a ranking and return them sorted, each once.

    Args:
        at: Positive integers: how many of the best documents count.

    Returns:
        The cutoffs in ascending order.

    Raises:
        ValueError: If there is no cutoff, or one is no positive integer.

    Example:
        >>> check_at([10, 1, 10])
        (1, 10)
    """
    cutoffs = list(at) if isinstance(at, Iterable) and not isinstance(at, str) else [at]
    if not cutoffs:
        raise ValueError("at is empty: give at least one cutoff, such as at=(10,).")
    for k in cutoffs:
        if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
            raise ValueError(f"at has the cutoff {k!r}: every cutoff has to be an integer of 1 or more.")
    return tuple(sorted({int(k) for k in cutoffs}))


def check_grades(relevant: Mapping[Any, float] | Iterable[Any], argument: str) -> dict[Any, float]:
    """Read the judgments of one query: a mapping of document id to grade, or ids that all get grade 1.

    Args:
        relevant: Mapping of document id to grade, or an iterable of document ids.
        argument: What the judgments are called in an error message, such as ``"relevant_docs['q1']"``.

    Returns:
        Document id to grade, the grades as floats. Grades of 0 and below are still in it.

    Raises:
        ValueError: If it is neither of the two, or a grade is no finite number.

    Example:
        >>> check_grades({"d1": 2, "d2": 0}, "relevant_docs['q1']")
        {'d1': 2.0, 'd2': 0.0}
        >>> check_grades(["d1"], "relevant_docs['q1']")
        {'d1': 1.0}
    """
    if isinstance(relevant, (str, bytes)) or not isinstance(relevant, Iterable):
        raise ValueError(
            f"{argument} is {relevant!r}: give a dict of document id to grade, or a set or list of document ids."
        )
    if not isinstance(relevant, Mapping):
        return dict.fromkeys(relevant, 1.0)
    for document_id, grade in relevant.items():
        if not isinstance(grade, (numbers.Real, np.bool_)) or not math.isfinite(grade):
            raise ValueError(
                f"{argument} has the grade {grade!r} for document {document_id!r}: a grade has to be a finite number; "
                "leave out documents that were not judged."
            )
    return {document_id: float(grade) for document_id, grade in relevant.items()}


def relevant_ranks(scores: np.ndarray, relevant: np.ndarray, grades: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Ranks of the relevant documents of one query, ties counting against the model.

    A relevant document stands behind every document without relevance of equal score; among relevant documents of equal
    score the lower grade stands first.

    Args:
        scores: (num_documents,) scores, higher is better.
        relevant: (num_relevant,) positions of the relevant documents.
        grades: (num_relevant,) their grades.
        seen: (num_seen,) positions of the documents that are left out of the ranking; none of them is relevant.

    Returns:
        (num_relevant,) ranks from 1, in the order of ``relevant``.

    Example:
        >>> scores = np.array([3.0, 2.0, 2.0, 1.0])
        >>> relevant_ranks(scores, np.array([1, 3]), np.array([1.0, 1.0]), seen=np.array([0]))
        array([2, 3])
    """
    relevant_scores = scores[relevant]
    no_rivals = scores[np.concatenate([relevant, seen])]
    order = np.lexsort((grades, -relevant_scores))
    ranks = np.empty(len(relevant), dtype=np.int64)
    for position, index in enumerate(order.tolist()):
        score = relevant_scores[index]
        rivals = np.count_nonzero(scores >= score) - np.count_nonzero(no_rivals >= score)
        ranks[index] = rivals + position + 1
    return ranks


def best_documents(
    scores: np.ndarray, k: int, relevant: np.ndarray, grades: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """Positions of the k best documents of one query, in the very order that :func:`relevant_ranks` counts by.

    Args:
        scores: (num_documents,) scores, higher is better.
        k: How many documents to return; fewer where fewer are left.
        relevant: (num_relevant,) positions of the relevant documents.
        grades: (num_relevant,) their grades.
        seen: (num_seen,) positions of the documents that are left out.

    Returns:
        (min(k, num_documents - num_seen),) positions, best first. Documents of equal score and grade keep their order.

    Example:
        >>> scores = np.array([3.0, 2.0, 2.0, 1.0])
        >>> best_documents(scores, 2, np.array([1]), np.array([1.0]), seen=np.array([0]))
        array([2, 1])
    """
    candidates = np.delete(np.arange(len(scores)), seen)
    k = min(k, len(candidates))
    if k == 0:
        return candidates
    remaining = scores[candidates]
    threshold = np.partition(remaining, len(remaining) - k)[len(remaining) - k]
    candidates = candidates[remaining >= threshold]
    grade_of = np.zeros(len(scores))
    grade_of[relevant] = grades
    order = np.lexsort((candidates, grade_of[candidates], -scores[candidates]))
    return candidates[order[:k]]


def list_ranks(ranking: Iterable[Any], relevant: Iterable[Any]) -> np.ndarray:
    """Ranks of the relevant documents in a ready ranking.

    Args:
        ranking: Document ids, best first, each once.
        relevant: Ids of the relevant documents.

    Returns:
        (num_relevant,) ranks from 1, ``inf`` where the ranking does not have the document.

    Raises:
        ValueError: If the ranking has a document twice.

    Example:
        >>> list_ranks(["d2", "d1"], ["d1", "d3"])
        array([ 2., inf])
    """
    rank_of: dict[Any, int] = {}
    for rank, document_id in enumerate(ranking, start=1):
        if rank_of.setdefault(document_id, rank) != rank:
            raise ValueError(f"the ranking has document {document_id!r} more than once: keep its best place alone.")
    return np.array([rank_of.get(document_id, math.inf) for document_id in relevant], dtype=np.float64)


def ranking_metrics(
    ranks: np.ndarray, grades: np.ndarray, offsets: np.ndarray, at: Iterable[int]
) -> dict[str, np.ndarray]:
    """Ranking metrics of every query from the ranks of its relevant documents.

    With the ranks of the relevant documents of a query as ``r_1 < r_2 < ...``, their grades as gains and ``n`` as their
    number:

    - ``hr@k``: 1 if ``r_1 <= k``, else 0;
    - ``recall@k``: relevant documents among the first k, divided by n;
    - ``mrr@k``: ``1 / r_1`` if ``r_1 <= k``, else 0;
    - ``map@k``: the sum of ``j / r_j`` over ``r_j <= k``, divided by ``min(k, n)``;
    - ``ndcg@k``: the sum of ``grade / log2(rank + 1)`` over the first k (linear gain, as trec_eval), divided by the
      same sum for the best possible order of all n relevant documents, cut at k.

    Args:
        ranks: (num_judgments,) ranks from 1 of all relevant documents, query after query; different ones within a
            query, or ``inf`` for a document that was not ranked.
        grades: (num_judgments,) their grades, all above 0.
        offsets: (num_queries + 1,) where each query begins in ``ranks``; every query has at least one document.
        at: The cutoffs k.

    Returns:
        ``"hr@1"``, ... to a (num_queries,) float64 array.

    Raises:
        ValueError: If a query has no relevant document, or a grade is not above 0.

    Example:
        >>> metrics = ranking_metrics(np.array([1, 3, 2]), np.array([1.0, 1.0, 1.0]), np.array([0, 2, 3]), at=[2])
        >>> metrics["recall@2"].tolist(), metrics["mrr@2"].tolist()
        ([0.5, 1.0], [1.0, 0.5])
    """
    at = check_at(at)
    ranks, grades, offsets = np.asarray(ranks, np.float64), np.asarray(grades, np.float64), np.asarray(offsets)
    num_relevant = np.diff(offsets)
    if (num_relevant < 1).any():
        raise ValueError(f"query number {int(np.argmin(num_relevant))} has no relevant document: leave it out.")
    if not (grades > 0).all():
        raise ValueError(f"grades has {grades[~(grades > 0)][0]}: only documents of a grade above 0 are relevant.")
    query = np.repeat(np.arange(len(num_relevant)), num_relevant)
    position = np.arange(len(ranks)) - np.repeat(offsets[:-1], num_relevant) + 1
    by_rank = np.lexsort((ranks, query))
    ranks = ranks[by_rank]
    gains = grades[by_rank] / np.log2(ranks + 1)
    ideal_gains = grades[np.lexsort((-grades, query))] / np.log2(position + 1)
    precisions = position / ranks
    first = ranks[offsets[:-1]]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(query, weights=values, minlength=len(num_relevant))

    metrics: dict[str, dict[int, np.ndarray]] = {name: {} for name in METRIC_NAMES}
    for k in at:
        found = ranks <= k
        metrics["hr"][k] = (first <= k).astype(np.float64)
        metrics["ndcg"][k] = total(gains * found) / total(ideal_gains * (position <= k))
        metrics["recall"][k] = total(found) / num_relevant
        metrics["mrr"][k] = (first <= k) / first
        metrics["map"][k] = total(precisions * found) / np.minimum(k, num_relevant)
    return {f"{name}@{k}": values for name, of_k in metrics.items() for k, values in of_k.items()}
