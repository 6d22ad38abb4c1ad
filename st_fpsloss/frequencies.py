"""How often each row is drawn: a streaming estimate of Q for the ``log_q`` correction of in-batch negatives.

In-batch negatives are drawn by popularity, so plain training learns p(d|q)/p(d). Subtracting ``log Q(d)`` from the
logits of the negatives restores p(d|q) (Yi et al. 2019, *Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
Recommendations*). Rows are known by the key of what is encoded (:meth:`st_fpsloss.rows.Rows.keys`): no id columns.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FrequencyTable:
    """Exact counts of the rows seen so far, one entry a distinct row.

    Args:
        prior: added to every count. A row that was seen once in a short stream is rarer than the stream makes it look,
            and a row that was never seen is not impossible.
        frozen: do not count during training; for counts taken from the whole log beforehand.

    Example:
        >>> import torch
        >>> table = FrequencyTable(prior=0.0)
        >>> table.update(torch.tensor([7, 9]), torch.tensor([3, 1]))
        >>> table.log_q(torch.tensor([9, 7])).exp()
        tensor([0.2500, 0.7500])
    """

    def __init__(self, prior: float = 1.0, frozen: bool = False) -> None:
        if not prior >= 0:
            raise ValueError(f"`prior` must not be negative, got {prior!r}. 0 takes the counts as they are.")
        self.prior = prior
        self.frozen = frozen
        self._slot_of: dict[int, int] = {}
        self._counts = np.zeros(1024)

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def total(self) -> float:
        """Number of draws counted."""
        return float(self._counts[: len(self)].sum())

    def update(self, keys: Tensor, counts: Tensor) -> None:
        """Count draws.

        Args:
            keys: (N,) int64 distinct keys.
            counts: (N,) how often each was drawn.
        """
        slots = np.fromiter((self._slot(key) for key in keys.tolist()), dtype=np.int64, count=len(keys))
        if len(self) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(self))])
        np.add.at(self._counts, slots, counts.cpu().numpy())

    def _slot(self, key: int) -> int:
        return self._slot_of.setdefault(key, len(self._slot_of))

    def log_q(self, keys: Tensor) -> Tensor:
        """Log probability (N,) float32 that one draw is each of the ``keys`` (N,) int64."""
        slots = np.fromiter((self._slot_of.get(key, -1) for key in keys.tolist()), dtype=np.int64, count=len(keys))
        counts = np.where(slots >= 0, self._counts[slots], 0.0) + self.prior
        total = self.total + self.prior * max(1, len(self))
        q = np.maximum(counts, np.finfo(np.float32).tiny) / max(total, 1.0)
        return torch.as_tensor(np.log(q), dtype=torch.float32, device=keys.device)

    def export_state(self) -> dict[str, Any]:
        """Prior, keys and counts as plain values, exact to the bit."""
        keys = np.fromiter(self._slot_of, dtype=np.int64, count=len(self))
        return {"prior": self.prior, "keys": _encode(keys), "counts": _encode(self._counts[: len(self)])}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave."""
        self.prior = state["prior"]
        self._slot_of = {key: slot for slot, key in enumerate(_decode(state["keys"], np.int64).tolist())}
        self._counts = _decode(state["counts"], np.float64)


def _encode(array: np.ndarray) -> str:
    """An array as text for JSON, compressed."""
    return base64.b64encode(zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes())).decode("ascii")


def _decode(text: str, dtype: type[np.generic]) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)
