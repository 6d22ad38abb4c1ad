"""Popularity metrics: NDCG by the popularity of the relevant document, and how much of the corpus is ever shown."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from st_fpsloss.evaluation.metrics import ranking_metrics

NUM_DECILES = 10


class PopularityMetrics:
    """What :class:`st_fpsloss.RetrievalEvaluator` adds where it is told how often each document was clicked.

    Args:
        popularity: Document id to clicks; a document that is missing has none.
        corpus_ids: Ids of the documents of the corpus.
        at: The cutoffs k.

    Raises:
        ValueError: If a number of clicks is negative or not finite, or there are no clicks at all.
    """

    def __init__(self, popularity: Mapping[Any, float], corpus_ids: Sequence[Any], at: Iterable[int]) -> None:
        for document_id, clicks in popularity.items():
            if not isinstance(clicks, numbers.Real) or not 0 <= clicks < math.inf:
                raise ValueError(
                    f"popularity has {clicks!r} clicks for document {document_id!r}: give the number of its clicks in "
                    "the training log, 0 or more."
                )
        self._decile = click_deciles([popularity.get(document_id, 0.0) for document_id in corpus_ids])
        self._at = tuple(at)
        self.depth = min(max(self._at), len(corpus_ids))  # as far as rankings are looked at

    def __call__(
        self,
        relevant: np.ndarray,
        ranks: np.ndarray,
        grades: np.ndarray,
        offsets: np.ndarray,
        best_rank: np.ndarray,
    ) -> dict[str, float]:
        """Metrics of all queries together.

        Args:
            relevant: (num_judgments,) positions of the relevant documents of all queries, query after query.
            ranks: (num_judgments,) their ranks.
            grades: (num_judgments,) their grades.
            offsets: (num_queries + 1,) where each query begins.
            best_rank: (num_documents,) the best rank that each document has for any query, ``inf`` beyond ``depth``.

        Returns:
            ``ndcg@k_decile_1`` to ``ndcg@k_decile_10``, without those that no relevant document is in, and
            ``coverage@k``.
        """
        query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        ndcg: dict[int, dict[int, float]] = {k: {} for k in self._at}
        for decile in np.unique(self._decile[relevant]).tolist():
            chosen = self._decile[relevant] == decile
            num_relevant = np.bincount(query[chosen])
            own_offsets = np.cumsum([0, *num_relevant[num_relevant > 0]])
            metrics = ranking_metrics(ranks[chosen], grades[chosen], own_offsets, self._at)
            for k in self._at:
                ndcg[k][decile] = float(metrics[f"ndcg@{k}"].mean())
        values = {f"ndcg@{k}_decile_{decile}": ndcg[k][decile] for k in self._at for decile in ndcg[k]}
        return values | {f"coverage@{k}": float((best_rank <= k).mean()) for k in self._at}


def click_deciles(clicks: Sequence[float] | np.ndarray) -> np.ndarray:
    """Popularity decile of each document: tenths of the clicks, not of the documents.

    Documents are sorted by clicks, ties in their order, and laid end to end, each as long as its clicks are many; the
    decile is where the middle of a document lies. A document with more than a tenth of all clicks leaves deciles empty.

    Args:
        clicks: (num_documents,) clicks of each document.

    Returns:
        (num_documents,) integers from 1, the tenth of the clicks that fell on the least clicked documents, to 10, the
        tenth on the most clicked ones.

    Raises:
        ValueError: If there are no clicks.

    Example:
        >>> click_deciles([10, 1, 1, 1, 1, 1, 1, 1, 1, 2])
        array([8, 1, 1, 2, 2, 3, 3, 4, 4, 5])
    """
    clicks = np.asarray(clicks, dtype=np.float64)
    total = clicks.sum()
    if not total > 0:
        raise ValueError("popularity has no clicks for any document of the corpus: count them in the training log.")
    order = np.argsort(clicks, kind="stable")
    middle = np.empty_like(clicks)
    middle[order] = np.cumsum(clicks[order]) - clicks[order] / 2
    return np.minimum(1 + np.floor(NUM_DECILES * middle / total), NUM_DECILES).astype(np.int64)
