"""Query embeddings for many clients at once: a cache of the latest, and one forward pass for those that wait."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

_Waiting = tuple[bytes, Any, "Future[np.ndarray]"]


class Overloaded(RuntimeError):
    """More queries wait for their embedding than may."""


class QueryVectors:
    """Embeds queries that arrive one by one, from any number of threads.

    One thread embeds. While it does, queries gather, and the next forward pass takes them together: nobody waits for a
    batch to fill. A query that is being embedded is not embedded twice, and the latest vectors are kept. A query that
    cannot be embedded fails alone.

    Args:
        encode: Gives the embeddings (N, dim) of a list of queries, as :meth:`QueryEncoder.encode` does.
        cache_size: Vectors that are kept, those least recently used dropped first; 0 for no cache.
        max_batch_size: Queries in one forward pass at most.
        max_waiting: Queries that may wait; one more is refused.

    Attributes:
        hits: Queries whose vector was kept, or on its way.
        misses: Queries that had to be embedded.
        batches: Forward passes.

    Example:
        >>> import numpy as np
        >>> from st_fpsloss.serving.query_vectors import QueryVectors
        >>> vectors = QueryVectors(lambda queries: np.array([[len(query["text"])] for query in queries]))
        >>> [vectors.submit(query).result().tolist() for query in ("tent", "boots", {"text": "tent"})]
        [[4], [5], [4]]
        >>> vectors.hits, vectors.misses
        (1, 2)
        >>> vectors.close()
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], np.ndarray],
        cache_size: int = 10_000,
        max_batch_size: int = 32,
        max_waiting: int = 1024,
    ) -> None:
        for name, value, least in (
            ("cache_size", cache_size, 0),
            ("max_batch_size", max_batch_size, 1),
            ("max_waiting", max_waiting, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.hits = self.misses = self.batches = 0
        self._encode = encode
        self._cache_size, self._max_batch_size, self._max_waiting = cache_size, max_batch_size, max_waiting
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._under_way: dict[bytes, Future[np.ndarray]] = {}
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="query-vectors", daemon=True)
        self._thread.start()

    def submit(self, query: Any) -> Future[np.ndarray]:
        """Returns the vector (dim,) to come of a query, a string or a dict of plain values.

        The future must not be cancelled: others may wait for the same one. Its exception is that of ``encode``.

        Raises:
            Overloaded: Too many queries wait.
            RuntimeError: :meth:`close` was called.
        """
        row = {"text": query} if isinstance(query, str) else query
        key = _key(row)
        with self._changed:
            if self._closed:
                raise RuntimeError("The embedding of queries has stopped.")
            if key in self._cache:
                self.hits += 1
                self._cache.move_to_end(key)
                done: Future[np.ndarray] = Future()
                done.set_result(self._cache[key])
                return done
            if key in self._under_way:
                self.hits += 1
                return self._under_way[key]
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(f"{len(self._waiting)} queries wait for their embedding: try again later.")
            self.misses += 1
            future: Future[np.ndarray] = Future()
            self._under_way[key] = future
            self._waiting.append((key, row, future))
            self._changed.notify()
            return future

    def close(self) -> None:
        """Embeds what waits, then stops."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __len__(self) -> int:
        return len(self._cache)

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                self._embed(batch)
            except Exception as error:
                if len(batch) == 1:
                    self._finish(batch[0], error)
                    continue
                for waiting in batch:  # to find the one that cannot be embedded
                    try:
                        self._embed([waiting])
                    except Exception as of_this_one:
                        self._finish(waiting, of_this_one)

    def _next_batch(self) -> list[_Waiting]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch_size))]

    def _embed(self, batch: Sequence[_Waiting]) -> None:
        vectors = self._encode([row for _, row, _ in batch])
        self.batches += 1
        for waiting, vector in zip(batch, vectors, strict=True):
            self._finish(waiting, np.array(vector))  # a copy: a view would keep the whole batch

    def _finish(self, waiting: _Waiting, result: np.ndarray | Exception) -> None:
        key, _, future = waiting
        with self._changed:
            del self._under_way[key]
            if isinstance(result, np.ndarray) and self._cache_size:
                self._cache[key] = result
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        if isinstance(result, np.ndarray):
            future.set_result(result)
        else:
            future.set_exception(result)


def _key(row: Any) -> bytes:
    """A short fingerprint of a query: a long one must not lie in memory as long as its vector."""
    present = {name: value for name, value in row.items() if value is not None}
    text = json.dumps(present, sort_keys=True, ensure_ascii=False, default=lambda value: value.tolist())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
