"""Exact counts by fingerprint, and arrays as text for JSON."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


class FingerprintCounts:
    """One float64 count for each distinct fingerprint.

    Example:
        >>> counts = FingerprintCounts()
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
    def fingerprints(self) -> np.ndarray:
        """(N,) int64, in the order in which they came."""
        return np.fromiter(self._slot_of, dtype=np.int64, count=len(self))

    @property
    def values(self) -> np.ndarray:
        """(N,) float64 counts of :attr:`fingerprints`."""
        return self._counts[: len(self)]

    def add(self, fingerprints: np.ndarray, amounts: np.ndarray) -> None:
        """Add (N,) amounts to the counts of (N,) int64 fingerprints."""
        slot_of = self._slot_of
        new = (slot_of.setdefault(one, len(slot_of)) for one in fingerprints.tolist())
        slots = np.fromiter(new, np.int64, len(fingerprints))
        if len(self) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(self))])
        np.add.at(self._counts, slots, amounts)

    def of(self, fingerprints: np.ndarray) -> np.ndarray:
        """Counts (N,) of (N,) int64 fingerprints; 0 where there is none."""
        known = (self._slot_of.get(one, -1) for one in fingerprints.tolist())
        slots = np.fromiter(known, np.int64, len(fingerprints))
        counts = np.zeros(len(fingerprints))
        counts[slots >= 0] = self._counts[slots[slots >= 0]]
        return counts

    def scale(self, factor: float) -> None:
        """Multiply all counts."""
        self._counts *= factor

    def keep(self, kept: np.ndarray) -> None:
        """Forget the fingerprints that are not ``kept``, (N,) bool."""
        if kept.all():
            return
        fingerprints, values = self.fingerprints[kept], self.values[kept]
        self._slot_of = {one: slot for slot, one in enumerate(fingerprints.tolist())}
        self._counts = np.concatenate([values, np.zeros(1024)])

    def export_state(self) -> dict[str, Any]:
        """Fingerprints and counts as text, exact to the bit."""
        return {"fingerprints": encode(self.fingerprints), "counts": encode(self.values)}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave."""
        stored = decode(state["fingerprints"], np.int64)
        self._slot_of = {one: slot for slot, one in enumerate(stored.tolist())}
        self._counts = decode(state["counts"], np.float64)


def encode(array: np.ndarray) -> str:
    """An array as text for JSON, compressed."""
    return base64.b64encode(zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes())).decode("ascii")


def decode(text: str, dtype: type[np.generic]) -> np.ndarray:
    """The array (N,) that :func:`encode` was given."""
    raw = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)
