"""Sampling of negatives by number: from a distribution over documents, and never a known positive of the query.

Every draw is a function of (seed, epoch, row, column) alone, through a counter-based generator. So a row has the same
negatives whatever batch, process or worker it is read in, a resumed run goes on with those of the interrupted one, and
the next epoch has others, without any state to save.
"""

from __future__ import annotations

import numpy as np

from st_fpsloss.utils.hashing import mix

_ATTEMPTS = 32  # after which a query with nearly everything for a positive is drawn for exactly
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class NegativeSampler:
    """Draws documents that are no positives of a query, with replacement.

    Args:
        weights: (D,) not negative; a document is drawn in proportion to its weight.
        queries: (K,) number of the query of each known positive.
        documents: (K,) number of its document.
        num_queries: how many queries there are.
        seed: another seed gives other draws.

    Raises:
        ValueError: If a query has every document that can be drawn for a positive; ``args[1]`` is its number.

    Example:
        >>> import numpy as np
        >>> sampler = NegativeSampler(np.ones(3), np.array([0, 0]), np.array([0, 2]), num_queries=1, seed=0)
        >>> sampler.draw(rows=np.array([5]), queries=np.array([0]), epoch=0, num_negatives=4)
        array([[1, 1, 1, 1]])
    """

    def __init__(
        self, weights: np.ndarray, queries: np.ndarray, documents: np.ndarray, num_queries: int, seed: int
    ) -> None:
        self.probability = weights / weights.sum()
        self._cumulative = np.cumsum(self.probability)
        self._cumulative /= self._cumulative[-1]
        buckets = 4 * len(weights)
        self._guide = np.searchsorted(self._cumulative, np.arange(buckets) / buckets, side="right")
        self._positives = np.unique(queries * len(weights) + documents)
        of_query, document = np.divmod(self._positives, len(weights))
        mass = np.bincount(of_query, self.probability[document], minlength=num_queries)
        drawable = np.bincount(of_query, self.probability[document] > 0, minlength=num_queries)
        nothing_left = drawable == np.count_nonzero(weights)
        if nothing_left.any():
            raise ValueError("A query has every document for a positive.", int(np.argmax(nothing_left)))
        self._free_mass = np.maximum(1 - mass, 1e-12)
        self._seed = seed

    def is_positive(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Whether each pair, (N,), is a known positive."""
        if not len(self._positives):
            return np.zeros(queries.shape, dtype=bool)
        keys = queries * len(self.probability) + documents
        found = np.minimum(np.searchsorted(self._positives, keys), len(self._positives) - 1)
        return self._positives[found] == keys

    def draw(self, rows: np.ndarray, queries: np.ndarray, epoch: int, num_negatives: int) -> np.ndarray:
        """Documents (N, num_negatives) for rows (N,) int64 with these queries (N,)."""
        order = np.argsort(queries, kind="stable")  # neighbours in memory are looked up together
        row = np.repeat(rows[order], num_negatives)
        query = np.repeat(queries[order], num_negatives)
        column = np.tile(np.arange(num_negatives), len(rows))
        drawn = np.empty(len(row), dtype=np.int64)
        left = np.arange(len(row))
        for attempt in range(_ATTEMPTS):
            chosen = self._invert(self._uniform(row[left], column[left], epoch, attempt))
            drawn[left] = chosen
            left = left[self.is_positive(query[left], chosen)]
            if not len(left):
                break
        for number in left:
            uniform = self._uniform(row[[number]], column[[number]], epoch, _ATTEMPTS)
            drawn[number] = self._draw_exactly(query[number], uniform[0])
        result = np.empty((len(rows), num_negatives), dtype=np.int64)
        result[order] = drawn.reshape(len(rows), num_negatives)
        return result

    def choose(self, rows: np.ndarray, pools: Pools, epoch: int, num_negatives: int) -> np.ndarray:
        """Different documents (N, num_negatives) out of each row's pool, -1 where it has too few."""
        lengths = pools.offsets[rows + 1] - pools.offsets[rows]
        width = max(int(lengths.max(initial=0)), num_negatives)
        position = np.arange(width)
        is_filled = position < lengths[:, None]
        at = np.minimum(pools.offsets[rows][:, None] + position, max(len(pools.documents) - 1, 0))
        documents = np.where(is_filled, pools.documents[at] if len(pools.documents) else -1, -1)
        keys = self._uniform(np.repeat(rows, width), np.tile(position, len(rows)), epoch, _ATTEMPTS + 1)
        keys = np.where(is_filled, keys.reshape(len(rows), width), 2.0)
        return np.take_along_axis(documents, np.argsort(keys, axis=1)[:, :num_negatives], axis=1)

    def marginal(self, draws_of_query: np.ndarray) -> np.ndarray:
        """How often (D,) each document is drawn in expectation, given how many draws (A,) are made for each query."""
        per_query = draws_of_query / self._free_mass
        of_query, document = np.divmod(self._positives, len(self.probability))
        excluded = np.bincount(document, per_query[of_query], minlength=len(self.probability))
        return self.probability * np.maximum(per_query.sum() - excluded, 0)

    def _invert(self, uniform: np.ndarray) -> np.ndarray:
        """The document at each point of the cumulative distribution: the first that exceeds it."""
        document = self._guide[(uniform * len(self._guide)).astype(np.int64)]
        for _ in range(4):
            short = self._cumulative[document] <= uniform
            if not short.any():
                return document
            document = document + short
        left = np.flatnonzero(self._cumulative[document] <= uniform)  # many rare documents share a bucket
        document[left] = np.searchsorted(self._cumulative, uniform[left], side="right")
        return document

    def _draw_exactly(self, query: int, uniform: float) -> int:
        weights = self.probability.copy()
        first, last = np.searchsorted(self._positives, [query * len(weights), (query + 1) * len(weights)])
        weights[self._positives[first:last] - query * len(weights)] = 0
        cumulative = np.cumsum(weights)
        return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))

    def _uniform(self, rows: np.ndarray, columns: np.ndarray, epoch: int, attempt: int) -> np.ndarray:
        """Numbers in [0, 1) that depend on the arguments and the seed alone."""
        with np.errstate(over="ignore"):
            stream = np.zeros(1, dtype=np.uint64)
            for part in (self._seed, epoch, attempt):
                stream = mix(stream + _GOLDEN * np.uint64(part + 1))
            bits = mix(mix(stream + rows.astype(np.uint64) * _GOLDEN) + columns.astype(np.uint64) * _GOLDEN)
        return (bits >> np.uint64(11)) * 2.0**-53


class Pools:
    """A list of documents for every row.

    Args:
        lengths: (N,) how many documents each row has.
        documents: all of them, row after row.
    """

    def __init__(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.documents = documents

    @classmethod
    def empty(cls, num_rows: int) -> Pools:
        """Pools without a document."""
        return cls(np.zeros(num_rows, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def marginal(self, rows: np.ndarray, num_negatives: int, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`NegativeSampler.choose` gives for rows (N,).

        Returns:
            (expected, missing): (D,) how often each document is chosen in expectation, and (N,) how many of its
            negatives each row lacks.
        """
        wanted = np.zeros(len(self.lengths), dtype=np.int64)
        wanted[rows] = num_negatives
        taken = np.minimum(self.lengths, wanted)
        share = np.repeat(taken / np.maximum(self.lengths, 1), self.lengths)
        return np.bincount(self.documents, share, minlength=num_documents), (wanted - taken)[rows]
