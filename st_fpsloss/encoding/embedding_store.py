"""What a model gave for rows, by their fingerprints: in memory within a budget, or in a folder for later runs."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SEGMENT_ROWS = 4096  # of a store in memory


class EmbeddingStore:
    """Embeddings by the fingerprint of their row.

    In a folder every process appends to a segment of its own, vectors before fingerprints: whatever moment a kill
    comes, the rows whose fingerprint is there are whole, and several processes may write at once. A process knows what
    was in the folder when it opened it, and what it adds itself.

    Args:
        dim: size of an embedding.
        dtype: what :meth:`get` returns; float16 and bfloat16 are kept as float32.
        folder: where to keep them; it must belong to one state of one model. None for memory.
        max_bytes: memory for embeddings; what does not fit is not kept. Of no account with a folder.

    Example::

        store = EmbeddingStore(dim=384, folder=Path("embeddings") / hash_of_the_model)
        store.add(fingerprints, model_output)
        found, embeddings = store.get(fingerprints)
    """

    def __init__(
        self, dim: int, dtype: torch.dtype = torch.float32, folder: Path | None = None, max_bytes: float = float("inf")
    ) -> None:
        self.dim, self.dtype = dim, dtype
        self._numpy_dtype = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self._max_rows = max_bytes / (dim * self._numpy_dtype.itemsize)
        self._place: dict[int, tuple[int, int]] = {}  # fingerprint -> number of the segment, row in it
        self._segments: list[np.ndarray] = []
        self._writer: _SegmentWriter | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.fingerprints")):
                self._open(path)
            self._writer = _SegmentWriter(folder / f"{os.getpid()}-{uuid.uuid4().hex}", dim, self._numpy_dtype)
            self._segments.append(self._writer.rows())
        self._filled = _SEGMENT_ROWS  # rows of the last segment, in memory

    def __len__(self) -> int:
        return len(self._place)

    def get(self, fingerprints: Tensor) -> tuple[Tensor, Tensor]:
        """Which of (N,) fingerprints are there, as bool, and their embeddings (found, dim), on the CPU."""
        places = [self._place.get(fingerprint) for fingerprint in fingerprints.tolist()]
        found = np.array([place is not None for place in places], dtype=bool)
        at = np.array([place for place in places if place is not None], dtype=np.int64).reshape(-1, 2)
        embeddings = np.empty((len(at), self.dim), dtype=self._numpy_dtype)
        for segment in np.unique(at[:, 0]):
            rows = at[:, 0] == segment
            embeddings[rows] = self._segments[segment][at[rows, 1]]
        return torch.from_numpy(found), torch.from_numpy(embeddings).to(self.dtype)

    def add(self, fingerprints: Tensor, embeddings: Tensor) -> None:
        """Keep the embeddings (N, dim) of rows with (N,) different fingerprints that are not there yet."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        vectors = embeddings.detach().to("cpu", exact).numpy()
        numbers = fingerprints.cpu().numpy()
        if self._writer is None:
            room = max(0, int(min(len(vectors), self._max_rows - len(self))))
            self._keep(numbers[:room].tolist(), vectors[:room])
            return
        first = self._writer.append(numbers, vectors)
        segment = len(self._segments) - 1
        self._segments[segment] = self._writer.rows()
        self._place |= {number: (segment, first + row) for row, number in enumerate(numbers.tolist())}

    def _keep(self, numbers: list[int], vectors: np.ndarray) -> None:
        while numbers:
            if self._filled == _SEGMENT_ROWS:
                self._segments.append(np.empty((_SEGMENT_ROWS, self.dim), dtype=self._numpy_dtype))
                self._filled = 0
            count = min(len(numbers), _SEGMENT_ROWS - self._filled)
            segment = len(self._segments) - 1
            self._segments[segment][self._filled : self._filled + count] = vectors[:count]
            self._place |= {number: (segment, self._filled + row) for row, number in enumerate(numbers[:count])}
            self._filled += count
            numbers, vectors = numbers[count:], vectors[count:]

    def _open(self, path: Path) -> None:
        vectors = path.with_suffix(".vectors")
        row = self.dim * self._numpy_dtype.itemsize
        count = min(path.stat().st_size // 8, vectors.stat().st_size // row) if vectors.exists() else 0
        if not count:
            return
        segment = len(self._segments)
        self._segments.append(np.memmap(vectors, self._numpy_dtype, mode="r", shape=(count, self.dim)))
        numbers = np.fromfile(path, dtype="<i8", count=count).tolist()
        self._place |= {number: (segment, place) for place, number in enumerate(numbers)}


class _SegmentWriter:
    """Appends to one process's files of vectors and of fingerprints, which begin to exist with the first row."""

    def __init__(self, path: Path, dim: int, dtype: np.dtype) -> None:
        self._vectors, self._fingerprints = path.with_suffix(".vectors"), path.with_suffix(".fingerprints")
        self._dim, self._dtype = dim, dtype
        self._count = 0

    def append(self, fingerprints: np.ndarray, vectors: np.ndarray) -> int:
        """Write rows; returns the number of those before them."""
        with self._vectors.open("ab") as file:
            file.write(np.ascontiguousarray(vectors, dtype=self._dtype).tobytes())
        with self._fingerprints.open("ab") as file:
            file.write(fingerprints.astype("<i8").tobytes())
        self._count += len(vectors)
        return self._count - len(vectors)

    def rows(self) -> np.ndarray:
        """All vectors written so far, mapped into memory."""
        if not self._count:
            return np.empty((0, self._dim), dtype=self._dtype)
        return np.memmap(self._vectors, self._dtype, mode="r", shape=(self._count, self._dim))
