"""Confidence intervals of metrics, by the bootstrap over queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

_RESAMPLED_VALUES = 2**20  # in memory at a time


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, num_samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of a mean over queries (percentiles of the means of resampled queries).

    Args:
        values: (num_queries,) metric of each query, as ``RetrievalEvaluator.per_query`` gives it.
        num_samples: How many times the queries are resampled.
        confidence: Share of those means that lies inside the interval, between 0 and 1.
        seed: Seed of the draws.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: If there are no values or a NaN among them, or ``num_samples`` or ``confidence`` is out of range.

    Example:
        >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
        >>> 0.35 < low < 0.5 < high < 0.65
        True
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or np.isnan(sample).any():
        raise ValueError(f"values of shape {sample.shape} has to be one number a query, at least one, and no NaN.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} has to be 1 or more.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} has to lie between 0 and 1, such as 0.95.")
    if len(sample) == 1:  # scipy needs two
        return float(sample[0]), float(sample[0])
    interval = bootstrap(
        (sample,),
        np.mean,
        n_resamples=num_samples,
        batch=max(1, _RESAMPLED_VALUES // len(sample)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    num_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean difference of two systems on the same queries, with its bootstrap interval.

    Far sharper than two separate intervals, since a query that is hard for one system is hard for the other: an
    interval that leaves out 0 says that the systems differ.

    Args:
        a: (num_queries,) metric of each query for one system.
        b: (num_queries,) the same for the other one, in the same order.
        num_samples: How many times the queries are resampled.
        confidence: Share of the means that lies inside the interval.
        seed: Seed of the draws.

    Returns:
        The mean of ``a - b``, and the lower and the upper end of its interval.

    Raises:
        ValueError: If the two have different lengths, and as in :func:`bootstrap_interval`.

    Example:
        >>> paired_difference([0.5, 1.0, 0.75], [0.25, 0.75, 0.5])
        (0.25, 0.25, 0.25)
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"a has the shape {first.shape} and b {second.shape}: give the same queries in the same order."
        )
    difference = first - second
    low, high = bootstrap_interval(difference, num_samples, confidence, seed)
    return float(difference.mean()), low, high
