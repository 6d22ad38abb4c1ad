"""Checks of arguments: each a ValueError that names the argument, the value and the cure."""

from __future__ import annotations

from numbers import Integral, Real


def positive_int(name: str, value: object) -> int:
    """Returns ``value`` as an int of at least 1; anything else is a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)


def probability(name: str, value: object) -> float:
    """Returns ``value`` as a float in [0, 1); anything else is a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{name}={value!r} must be a number from 0 to below 1.")
    return float(value)
