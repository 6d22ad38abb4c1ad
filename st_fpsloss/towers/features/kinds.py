"""Side features of a tower: their kinds, and the checks of several of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from st_fpsloss.towers.features.base import Feature
from st_fpsloss.towers.features.documents import DocumentHistory
from st_fpsloss.towers.features.ids import Categorical, History, Tags
from st_fpsloss.towers.features.numerical import Numerical

__all__ = [
    "KINDS",
    "Categorical",
    "DocumentHistory",
    "Feature",
    "History",
    "Numerical",
    "Tags",
    "checked_features",
    "feature_from_dict",
]

KINDS: dict[str, type[Feature]] = {
    kind.__name__: kind for kind in (Categorical, Numerical, Tags, History, DocumentHistory)
}


def feature_from_dict(held: Mapping[str, Any]) -> Feature:
    """Returns the feature that :meth:`Feature.to_dict` wrote down."""
    arguments = dict(held)
    return KINDS[arguments.pop("type")](**arguments)


def checked_features(features: object) -> tuple[Feature, ...]:
    """Returns the features of a tower as a tuple.

    Raises:
        ValueError: They are not fitted features with names of their own.
    """
    if isinstance(features, (str, Mapping)) or not isinstance(features, Iterable):
        raise ValueError(f"features={features!r} must be a list of features, such as [Categorical('genre', ...)].")
    checked = tuple(features)
    for feature in checked:
        if not isinstance(feature, Feature):
            raise ValueError(
                f"features holds {feature!r}: give Categorical, Numerical, Tags, History or DocumentHistory."
            )
        feature.check_fitted()
    names = [feature.name for feature in checked]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"features has {name!r} more than once: a name is the key of one value.")
    return checked
