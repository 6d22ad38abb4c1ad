"""What every side feature of a tower has: a name, what it learns from data, and a tensor for a batch of values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Keys of an input that sentence-transformers takes for something else, and the text.
_RESERVED = frozenset(
    ("text", "image", "audio", "video", "message", "array", "content", "role", "sampling_rate", "video_metadata")
)

SomeFeature = TypeVar("SomeFeature", bound="Feature")


class Feature(ABC):
    """A side feature; frozen, so that :meth:`fit` returns a new one."""

    name: str

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether vocabulary or statistics are there."""

    @property
    def tensor_name(self) -> str:
        """Name of the feature's tensor among those of a batch."""
        return f"{self.name}.values"

    @abstractmethod
    def fit(self: SomeFeature, values: Iterable[Any]) -> SomeFeature:
        """Returns a copy that has learned its vocabulary or statistics from one pass over ``values``."""

    @abstractmethod
    def array(self, values: Sequence[Any]) -> np.ndarray:
        """Turns the values of N inputs, None where missing, into an array with N rows."""

    def tensor(self, values: Sequence[Any]) -> Tensor:
        """What :meth:`array` gives, as a tensor."""
        import torch  # features are read without it where queries are encoded without it

        return torch.from_numpy(self.array(values))

    @abstractmethod
    def example(self, number: int) -> Any:
        """A value that an input may have, for documentation."""

    @abstractmethod
    def __str__(self) -> str:
        """What a reader of the model should know of the feature."""

    def to_dict(self) -> dict[str, Any]:
        """The feature as plain values, without those that are left at their default; see :func:`from_dict`."""
        held: dict[str, Any] = {"type": type(self).__name__}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if entry.default is MISSING or value != entry.default:
                held[entry.name] = list(value) if isinstance(value, tuple) else value
        return held

    def check_fitted(self) -> None:
        """Refuses to go on without vocabulary or statistics."""
        if not self.is_fitted:
            kind = type(self).__name__
            raise ValueError(
                f"The {kind} {self.name!r} is not fitted: call {kind}({self.name!r}).fit(values) with the values of "
                "the training data, or give it a vocabulary or statistics."
            )


def check_name(name: object, argument: str = "name") -> None:
    """Refuses names that cannot be keys of an input."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{argument}={name!r} must be the key of the feature in an input, a string.")
    if name in _RESERVED:
        raise ValueError(f"{argument}={name!r} has another meaning in an input: rename the feature.")


def each_value(name: str, values: object) -> Iterable[Any]:
    """Returns the values to fit on, if they can be one value an example."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(
            f"fit of {name!r} got a {type(values).__name__}: give one value an example, a list or a column such as "
            f"dataset[{name!r}]."
        )
    return values
