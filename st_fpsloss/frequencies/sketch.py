"""How often each row is drawn, in memory that does not grow with the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.isotonic import isotonic_regression

from st_fpsloss.frequencies.counts import FingerprintCounts, decode, encode
from st_fpsloss.frequencies.table import FORGOTTEN, Frequencies
from st_fpsloss.utils.checks import positive_int
from st_fpsloss.utils.hashing import mix

_SALT = np.uint64(0x9E3779B97F4A7C15)
_SAMPLE_SIZE = 16_384  # fingerprints counted exactly, at most
_ABSENT = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 4096)  # fingerprints of no row


class FrequencySketch(Frequencies):
    """Counts of any number of distinct rows in fixed memory, right for frequent rows and rough for rare ones.

    A count-min sketch (Cormode and Muthukrishnan 2005) with conservative update (Estan and Varghese 2002): each row
    has one of ``width`` counters in each of ``depth`` lines, only the smallest of which grow, and its reading is the
    smallest. A reading is never too small. It is too large for rows that are rarer than what shares their counters;
    by how much is told by a uniform sample of the rows that is counted exactly (Wegman's adaptive sampling: the rows
    whose hash is below a bound, which is halved when they become too many). A reading such as a row that never came
    could have (99% of them have no larger one) is replaced by what drawn rows with this reading have in the sample: the
    mean of their log counts, made monotone. The size of the sample also tells the number of distinct rows.

    Memory is 4 bytes a counter and some megabytes beside, 22 MB by default. In a checkpoint's ``trainer_state.json``
    the default takes about 7 MB, and with a half-life, whose counts are no whole numbers, 22 MB. After 500 million
    draws of 50 million distinct rows (p ∝ 1/rank; ``tests/benchmarks/frequencies.py``) the default is off by .07% in Q,
    on average over the 100,000 most frequent rows, and by .23 in log Q, on average over draws (.73 without the sample);
    four times the width by .09.

    Args:
        width: counters in a line. TokenizedRows rarer than about 1 in ``width`` draws cannot be told apart.
        depth: number of lines.
        prior: added to every count, so that a row that was never seen is not impossible.
        frozen: do not count during training; for counts taken from the whole log beforehand.
        half_life: number of draws after which a draw counts half, for a log that drifts; None never forgets.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> sketch = FrequencySketch(width=1024, prior=0.0)
        >>> sketch.update(torch.tensor([7, 9]), torch.tensor([3, 1]))
        >>> sketch.log_q(torch.tensor([9, 7])).exp()
        tensor([0.2500, 0.7500])
    """

    def __init__(
        self,
        width: int = 2**20,
        depth: int = 4,
        prior: float = 1.0,
        frozen: bool = False,
        half_life: float | None = None,
    ) -> None:
        super().__init__(prior, frozen, half_life)
        self.width = positive_int("width", width)
        self.depth = positive_int("depth", depth)
        # Counts above 2^24 are rounded. An addition is lost only where a row has 2^24 times the draws of one batch.
        self._counters = np.zeros(width * depth, dtype=np.float32)
        self._sample = FingerprintCounts()
        self._halvings = 0

    def _cells(self, fingerprints: np.ndarray) -> np.ndarray:
        """Positions (depth, N) of the counters of (N,) fingerprints."""
        lines = np.arange(self.depth)[:, None]
        hashes = mix(fingerprints.astype(np.uint64) + (lines.astype(np.uint64) + np.uint64(1)) * _SALT)
        return lines * self.width + (hashes % np.uint64(self.width)).astype(np.int64)

    def _readings(self, fingerprints: np.ndarray) -> np.ndarray:
        return self._counters[self._cells(fingerprints)].min(axis=0)

    def _add(self, fingerprints: np.ndarray, weighted: np.ndarray) -> None:
        cells = self._cells(fingerprints)
        # Keys that share a counter do not add up in it: it need not be more than what the largest of them needs.
        needed = self._counters[cells].min(axis=0) + weighted.astype(np.float32)
        np.maximum.at(self._counters, cells.ravel(), np.tile(needed, self.depth))  # numpy 2.4 broadcasts wrongly here
        sampled = self._is_sampled(fingerprints)
        self._sample.add(fingerprints[sampled], weighted[sampled])
        while len(self._sample) > _SAMPLE_SIZE:
            self._halvings += 1
            self._sample.keep(self._is_sampled(self._sample.fingerprints))

    def _is_sampled(self, fingerprints: np.ndarray) -> np.ndarray:
        bound = np.uint64(2**64 - 1) >> np.uint64(self._halvings)
        return mix(fingerprints.astype(np.uint64)) <= bound

    def _scale(self, factor: float) -> None:
        self._counters *= np.float32(factor)
        self._sample.scale(factor)
        self._sample.keep(self._sample.values >= FORGOTTEN)

    def _counts_of(self, fingerprints: np.ndarray) -> np.ndarray:
        readings = self._readings(fingerprints).astype(np.float64)
        read, log_counts = self._log_counts_by_reading()
        if not len(read):
            return readings
        with np.errstate(divide="ignore"):  # log 0 is where nothing was counted
            log_readings = np.log(readings)
        corrected = np.exp(np.interp(log_readings, np.log(read), log_counts))
        noise = np.quantile(self._readings(_ABSENT), 0.99)
        return np.where(readings > noise, readings, np.minimum(readings, corrected))

    def _log_counts_by_reading(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct readings (K,) of the sample, ascending, and the mean log count (K,) of a draw with each of them."""
        drawn = self._sample.values > 0
        counts = self._sample.values[drawn]
        read, group = np.unique(self._readings(self._sample.fingerprints[drawn]), return_inverse=True)
        draws = np.bincount(group, counts)
        mean = np.bincount(group, counts * np.log(counts)) / draws
        return read.astype(np.float64), isotonic_regression(mean, sample_weight=draws)

    def _known_counts(self) -> np.ndarray:
        return self._sample.values

    def _num_distinct(self) -> float:
        return len(self._sample) * 2.0**self._halvings

    def _export_counts(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "depth": self.depth,
            "counters": encode(self._counters),
            "halvings": self._halvings,
            "sample": self._sample.export_state(),
        }

    def _import_counts(self, state: Mapping[str, Any]) -> None:
        for name in ("width", "depth"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint holds the counts of a FrequencySketch with `{name}={state[name]}`, not "
                    f"{getattr(self, name)}. Resume with the `frequencies` that the run was started with."
                )
        self._counters = decode(state["counters"], np.float32)
        self._halvings = state["halvings"]
        self._sample.import_state(state["sample"])
