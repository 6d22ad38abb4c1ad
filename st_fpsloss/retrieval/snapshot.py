"""The documents of an index at one moment: nothing in it changes, so that threads search it while others add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from st_fpsloss.retrieval.exact import exact_search
from st_fpsloss.retrieval.faiss_backend import Approximate

QUERY_CHUNK_SIZE = 256
EXACT_UP_TO = 20_000
"""Documents left by a filter up to which they are all scored: faster than a graph, and exact."""
_MAX_APPROXIMATE_DEPTH = 4096
ID, LIVE = "id", "live"


@dataclass(frozen=True)
class Snapshot:
    """Stored rows, those that were added since, and which of both are live.

    Args:
        stored: The table of the generation, mapped into memory.
        vectors: (stored rows, dim) float32, mapped into memory.
        added: The table of documents that were added since.
        added_vectors: (added rows, dim) float32.
        live: (all rows,) bool: False for what was removed or replaced.
        approximate: An index of the stored vectors; None: exact search.
    """

    stored: pa.Table
    vectors: np.ndarray
    added: pa.Table
    added_vectors: np.ndarray
    live: np.ndarray
    approximate: Approximate | None

    def __len__(self) -> int:
        return self._num_live

    @cached_property
    def _num_live(self) -> int:
        return int(np.count_nonzero(self.live))

    @cached_property
    def id_column(self) -> pa.ChunkedArray:
        """The ids of all rows."""
        stored = self.stored[ID].combine_chunks()
        chunks = stored.chunks if isinstance(stored, pa.ChunkedArray) else [stored]
        return pa.chunked_array([*chunks, *self.added[ID].chunks], self.stored.schema.field(ID).type)

    @cached_property
    def ids(self) -> list[Any]:
        """The ids of the live rows."""
        return self.id_column.filter(pa.array(self.live)).to_pylist()

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """The values of some columns of one row."""
        table = self.stored
        if number >= len(self.stored):
            table, number = self.added, number - len(self.stored)
        return {name: table[name][number].as_py() for name in columns}

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of some rows."""
        stored = len(self.vectors)
        if not len(self.added_vectors):
            return self.vectors[rows]
        found = np.empty((len(rows), self.vectors.shape[1]), dtype=np.float32)
        is_stored = rows < stored
        found[is_stored] = self.vectors[rows[is_stored]]
        found[~is_stored] = self.added_vectors[rows[~is_stored] - stored]
        return found

    def search(
        self, queries: np.ndarray, k: int, excluded: Sequence[np.ndarray], allowed: np.ndarray | None
    ) -> list[list[tuple[Any, float]]]:
        """Find the best documents of each query.

        Args:
            queries: (Q, dim) float32.
            k: Documents a query.
            excluded: For each query the rows to leave out.
            allowed: (all rows,) bool, the rows that a filter leaves; None: all.

        Returns:
            For each query (id, score), best first; equal scores in the order of the rows.
        """
        if allowed is not None:
            allowed = allowed & self.live
        elif self._num_live < len(self.live):
            allowed = self.live
        available = self._num_live if allowed is None else int(np.count_nonzero(allowed))
        if allowed is not None:
            excluded = [rows[allowed[rows]] for rows in excluded]
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        # Queries that need about the same depth are searched together: one long exclusion is paid for once.
        depths = np.array([min(available, k + len(rows)) for rows in excluded], dtype=np.int64)
        order = np.argsort(depths, kind="stable")[np.count_nonzero(depths == 0) :]
        for start in range(0, len(order), QUERY_CHUNK_SIZE):
            chunk = order[start : start + QUERY_CHUNK_SIZE]
            candidates = self._candidates(queries[chunk], int(depths[chunk].max()), allowed, available)
            for number, rows in zip(chunk.tolist(), candidates, strict=True):
                kept = _without(rows, excluded[number])
                if len(kept) < min(k, available - len(excluded[number])):
                    exact = self._exact(queries[number : number + 1], int(depths[number]), allowed)
                    kept = _without(exact[0], excluded[number])
                found[number] = self._best(queries[number], kept, k)
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])
        ids = iter(self.id_column.take(pa.array(rows)).to_pylist())
        return [[(next(ids), score) for score in scores.tolist()] for _, scores in found]

    def _candidates(self, queries: np.ndarray, depth: int, allowed: np.ndarray | None, available: int) -> np.ndarray:
        """Rows that hold the best ones: all of them where the search is exact."""
        if self.approximate is None or available <= max(EXACT_UP_TO, depth) or depth > _MAX_APPROXIMATE_DEPTH:
            return self._exact(queries, depth, allowed)
        stored = len(self.vectors)
        rows = self.approximate.search(queries, depth, None if allowed is None else allowed[:stored])
        if not len(self.added_vectors):
            return rows
        _, added = exact_search(
            [self.added_vectors], queries, min(depth, len(self.added)), None if allowed is None else allowed[stored:]
        )
        return np.concatenate([rows, np.where(added >= 0, added + stored, -1)], axis=1)

    def _exact(self, queries: np.ndarray, depth: int, allowed: np.ndarray | None) -> np.ndarray:
        return exact_search([self.vectors, self.added_vectors], queries, depth, allowed)[1]

    def _best(self, query: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first k of some rows by their full vectors; row by row, so that equal vectors have equal scores."""
        scores = np.einsum("nd,d->n", self.vectors_of(rows), query)
        best = np.lexsort((rows, -scores))[:k]
        return rows[best], scores[best]


def _without(rows: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """Rows that exist (others are -1) and are not excluded."""
    return rows[(rows >= 0) & ~np.isin(rows, excluded)] if len(excluded) else rows[rows >= 0]
