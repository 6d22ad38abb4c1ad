"""The side feature of a number: standardised, with a flag for the missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from st_fpsloss.towers.features.base import Feature, check_name, each_value
from st_fpsloss.towers.features.values import number

_MAX_DEVIATIONS = 10.0
_NUM_QUANTILES = 101
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Numerical(Feature):
    """A number: an age, a year, a price; standardised, with a flag that says whether it is missing.

    A missing number is read as the mean. Values beyond 10 standard deviations are cut there, so that one outlier does
    not drown a batch.

    Args:
        name: Key of the value in an input.
        mean: Mean of the (transformed) training values. None: :meth:`fit` finds it.
        std: Their standard deviation, above 0. None: :meth:`fit` finds it.
        transform: What is done first. None; ``"log"``, ``sign(x) log(1 + |x|)``, for counts and prices;
            ``"quantile"``, the share of the training values below x, for any distribution (it takes no mean and std).
        quantiles: For ``"quantile"``, ascending training values at equal shares. None: :meth:`fit` finds them.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import Numerical
        >>> age = Numerical("age").fit([20, 30, None, 40])
        >>> age.tensor([30, 40, None])  # value, missing
        tensor([[0.0000, 0.0000],
                [1.2247, 0.0000],
                [0.0000, 1.0000]])
    """

    name: str
    mean: float | None = None
    std: float | None = None
    transform: str | None = None
    quantiles: tuple[float, ...] | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.transform not in (None, "log", "quantile"):
            raise ValueError(f"transform={self.transform!r} is unknown: choose None, log or quantile.")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean={self.mean!r}, std={self.std!r}: {self.name!r} needs both, or neither and fit().")
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None:
                object.__setattr__(self, name, number(f"{name} of {self.name}", given))
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std={self.std!r} of {self.name!r} must be above 0.")
        if (self.transform == "quantile" and self.mean is not None) or (
            self.transform != "quantile" and self.quantiles is not None
        ):
            raise ValueError(f'{self.name!r}: transform="quantile" takes quantiles, the others mean and std.')
        if self.quantiles is not None:
            object.__setattr__(self, "quantiles", _checked_quantiles(self.name, self.quantiles))

    @property
    def is_fitted(self) -> bool:
        """Whether the statistics are there."""
        return self.mean is not None or self.quantiles is not None

    def fit(self, values: Iterable[Any]) -> Numerical:
        """Returns a copy with the statistics of the values.

        Args:
            values: One number an example; a list, a column of a data set or any other iterable, read once. None is a
                missing value.

        Raises:
            ValueError: There is no number, or a value is no finite number.
        """
        read = (number(self.name, value) for value in each_value(self.name, values))
        found = np.fromiter((value for value in read if not math.isnan(value)), np.float64)
        if not len(found):
            raise ValueError(f"fit of {self.name!r} found no number: every value is missing.")
        if self.transform == "quantile":
            return replace(self, quantiles=tuple(np.quantile(found, np.linspace(0, 1, _NUM_QUANTILES)).tolist()))
        found = self._transformed(found)
        mean, std = float(found.mean()), float(found.std())
        # A constant has nothing to divide by, rounding errors apart.
        return replace(self, mean=mean, std=std if std > _ROUNDING * abs(mean) else 1.0)

    def array(self, values: Sequence[Any]) -> np.ndarray:
        """Standardised values and missing flags (N, 2)."""
        self.check_fitted()
        read = np.array([number(self.name, value) for value in values], dtype=np.float64)
        missing = np.isnan(read)
        if self.transform == "quantile":
            standard = self._share_below(read)
        else:
            standard = (self._transformed(read) - (self.mean or 0.0)) / (self.std or 1.0)
        standard = np.where(missing, 0.0, standard).clip(-_MAX_DEVIATIONS, _MAX_DEVIATIONS)
        return np.stack([standard + 0.0, missing], axis=1).astype(np.float32)

    def _transformed(self, values: np.ndarray) -> np.ndarray:
        return np.sign(values) * np.log1p(np.abs(values)) if self.transform == "log" else values

    def _share_below(self, values: np.ndarray) -> np.ndarray:
        """Shares of training values below, half of the equal ones counted, scaled to mean 0 and deviation 1."""
        quantiles = np.array(self.quantiles)
        shares = np.linspace(0, 1, len(quantiles))
        from_below = np.interp(values, quantiles, shares)
        from_above = 1 - np.interp(-values, -quantiles[::-1], shares)
        return ((from_below + from_above) / 2 - 0.5) * math.sqrt(12)

    def example(self, number: int) -> float:
        """A common number."""
        if self.quantiles is not None:
            return self.quantiles[(len(self.quantiles) // 2 + 10 * number) % len(self.quantiles)]
        value = (self.mean or 0.0) + number % 3 * (self.std or 0.0) / 4
        return round(math.copysign(math.expm1(abs(value)), value) if self.transform == "log" else value, 2)

    def __str__(self) -> str:
        return "a number"


def _checked_quantiles(name: str, quantiles: Iterable[Any]) -> tuple[float, ...]:
    values = tuple(number(f"quantiles of {name}", value) for value in quantiles)
    if len(values) < 2 or not all(low <= high for low, high in pairwise(values)):  # NaN is neither
        raise ValueError(f"quantiles of {name!r} must be at least two ascending numbers.")
    return values
