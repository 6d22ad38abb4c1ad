"""Exact counts by key, and arrays as text for JSON."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


class KeyCounts:
    """One float64 count for each distinct key.

    Example:
        >>> counts = KeyCounts()
        >>> counts.add(np.array([7, 9]), np.array([3.0, 1.0]))
        >>> counts.of(np.array([9, 8, 7]))
        array([1., 0., 3.])
    """

    def __init__(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._counts = np.zeros(1024)

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def keys(self) -> np.ndarray:
        """(N,) int64, in the order in which they came."""
        return np.fromiter(self._slot_of, dtype=np.int64, count=len(self))

    @property
    def values(self) -> np.ndarray:
        """(N,) float64 counts of :attr:`keys`."""
        return self._counts[: len(self)]

    def add(self, keys: np.ndarray, amounts: np.ndarray) -> None:
        """Add (N,) amounts to the counts of (N,) int64 keys."""
        slot_of = self._slot_of
        slots = np.fromiter((slot_of.setdefault(key, len(slot_of)) for key in keys.tolist()), np.int64, len(keys))
        if len(self) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(self))])
        np.add.at(self._counts, slots, amounts)

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Counts (N,) of (N,) int64 keys; 0 where there is none."""
        slots = np.fromiter((self._slot_of.get(key, -1) for key in keys.tolist()), np.int64, len(keys))
        counts = np.zeros(len(keys))
        counts[slots >= 0] = self._counts[slots[slots >= 0]]
        return counts

    def scale(self, factor: float) -> None:
        """Multiply all counts."""
        self._counts *= factor

    def keep(self, kept: np.ndarray) -> None:
        """Forget the keys that are not ``kept``, (N,) bool."""
        if kept.all():
            return
        keys, values = self.keys[kept], self.values[kept]
        self._slot_of = {key: slot for slot, key in enumerate(keys.tolist())}
        self._counts = np.concatenate([values, np.zeros(1024)])

    def export_state(self) -> dict[str, Any]:
        """Keys and counts as text, exact to the bit."""
        return {"keys": encode(self.keys), "counts": encode(self.values)}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave."""
        self._slot_of = {key: slot for slot, key in enumerate(decode(state["keys"], np.int64).tolist())}
        self._counts = decode(state["counts"], np.float64)


def encode(array: np.ndarray) -> str:
    """An array as text for JSON, compressed."""
    return base64.b64encode(zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes())).decode("ascii")


def decode(text: str, dtype: type[np.generic]) -> np.ndarray:
    """The array (N,) that :func:`encode` was given."""
    raw = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)
