"""Exact search by inner products, block by block: over vectors that are mapped into memory, and over some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

ROWS_PER_BLOCK = 65_536


def exact_search(
    parts: Sequence[np.ndarray], queries: np.ndarray, depth: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows with the largest inner products.

    Args:
        parts: Arrays (N_i, dim) float32, whose rows are numbered on from one to the next.
        queries: (Q, dim) float32.
        depth: Rows a query.
        allowed: (sum of N_i,) bool, the rows that count; None: all.

    Returns:
        scores and rows, (Q, depth), best first; rows are -1 where there are no more.
    """
    import faiss

    best_scores = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    best_rows = np.full((len(queries), 0), -1, dtype=np.int64)
    first = 0
    for part in parts:
        for block, rows in _blocks(part, None if allowed is None else allowed[first : first + len(part)]):
            scores, found = faiss.knn(queries, block, min(depth, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            best_scores, best_rows = _best(
                np.concatenate([best_scores, scores], axis=1),
                np.concatenate([best_rows, first + rows[found]], axis=1),
                depth,
            )
        first += len(part)
    missing = depth - best_rows.shape[1]
    if missing > 0:
        best_scores = np.pad(best_scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        best_rows = np.pad(best_rows, ((0, 0), (0, missing)), constant_values=-1)
    return best_scores, best_rows


def _blocks(part: np.ndarray, allowed: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut an array, or the rows of it that count, into blocks of bounded size, with their row numbers."""
    rows = np.arange(len(part)) if allowed is None else np.flatnonzero(allowed)
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        chunk = rows[start : start + ROWS_PER_BLOCK]
        whole = chunk[-1] - chunk[0] + 1 == len(chunk)
        yield part[chunk[0] : chunk[-1] + 1] if whole else part[chunk], chunk


def _best(scores: np.ndarray, rows: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest scores of each query, in order; of equal ones the first row."""
    order = np.lexsort((rows, -scores))[:, :depth]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
