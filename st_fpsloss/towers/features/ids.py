"""Side features of ids: one category, a bag of them, or a sequence; by vocabulary or by hash buckets."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from st_fpsloss.towers.features.base import Feature, check_name, each_value
from st_fpsloss.towers.features.values import bucket, categories, category
from st_fpsloss.utils.checks import positive_int, probability

MISSING_ID, UNKNOWN_ID = 0, 1
"""Ids that every id feature has, before those of its vocabulary or buckets; 0 is also what fills up lists."""

_FIRST_ID = 2

SomeIdFeature = TypeVar("SomeIdFeature", bound="IdFeature")


class IdFeature(Feature):
    """What the features of ids share: a vocabulary, or hash buckets."""

    vocabulary: tuple[str, ...] | None
    buckets: int | None
    dim: int | None
    id_dropout: float

    def _check(self) -> None:
        check_name(self.name)
        if self.vocabulary is not None and self.buckets is not None:
            raise ValueError(f"{self.name!r} has a vocabulary and buckets={self.buckets!r}: give one of them.")
        if self.vocabulary is not None:
            object.__setattr__(self, "vocabulary", _checked_vocabulary(self.name, self.vocabulary))
        for name in ("buckets", "dim"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        object.__setattr__(self, "id_dropout", probability("id_dropout", self.id_dropout))

    @property
    def is_fitted(self) -> bool:
        """Whether there is a vocabulary, or buckets."""
        return self.vocabulary is not None or self.buckets is not None

    @property
    def num_ids(self) -> int:
        """Ids that there are, the missing and the unknown one included."""
        self.check_fitted()
        return _FIRST_ID + (self.buckets or len(self.vocabulary or ()))

    @property
    def embedding_dim(self) -> int:
        """Size of an id's embedding."""
        return self.dim or min(64, round(1.6 * self.num_ids**0.56))

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {value: number for number, value in enumerate(self.vocabulary or (), start=_FIRST_ID)}

    def id(self, value: str | None) -> int:
        """The number of a category."""
        if value is None:
            return MISSING_ID
        if self.buckets is not None:
            return _FIRST_ID + bucket(value, self.buckets)
        return self._id_of.get(value, UNKNOWN_ID)

    def fit(self: SomeIdFeature, values: Iterable[Any]) -> SomeIdFeature:
        """Returns a copy whose vocabulary are the values that occur, the most frequent first.

        Args:
            values: One value an example, as inputs hold them: a list, a column of a data set or any other iterable,
                read once. None is a missing value.

        Raises:
            ValueError: There is no value, or one is of the wrong kind.
        """
        if self.buckets is not None:
            return self
        counts: Counter[str] = Counter()
        for value in each_value(self.name, values):
            counts.update(self._parts(value))
        if not counts:
            raise ValueError(f"fit of {self.name!r} found no value: every one is missing.")
        vocabulary = tuple(value for value, _ in counts.most_common())
        return replace(self, vocabulary=vocabulary)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """The feature as plain values, the size of its embeddings included."""
        return {**super().to_dict(), **({} if self.dim else {"dim": self.embedding_dim})}

    @abstractmethod
    def _parts(self, value: Any) -> list[str]:
        """The categories in one value."""

    def _some(self, first: int, count: int) -> list[str]:
        known = self.vocabulary or [f"{self.name} {number}" for number in range(_FIRST_ID)]
        return [known[(first + number) % len(known)] for number in range(min(count, len(known)))]

    def _extent(self) -> str:
        return f"{self.buckets} hash buckets" if self.buckets else f"{self.num_ids - _FIRST_ID} known values"


@dataclass(frozen=True)
class Categorical(IdFeature):
    """One category of a closed set, or an id: a genre, an occupation, the id of the item itself.

    A value is a string or a whole number; 3 and "3" are the same. A value that is not in the vocabulary is the unknown
    category, a missing one (None, or no such key) the missing category; both have an embedding of their own, that
    starts at zero.

    Args:
        name: Key of the value in an input.
        vocabulary: The categories, each once. None: :meth:`fit` finds them.
        buckets: Instead of a vocabulary, the number of buckets that values are hashed into, where there are too many
            values to list, or new ones appear all the time. Two values may share a bucket.
        dim: Size of the embedding. None: ``1.6 * n**0.56`` for n values, at most 64.
        id_dropout: Probability with which training replaces the value by the unknown one. With it the unknown category
            learns, and the tower learns to do without: an unseen id falls back on the text and the other features.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import Categorical
        >>> genre = Categorical("genre").fit(["drama", "comedy", None, "drama"])
        >>> genre.vocabulary
        ('drama', 'comedy')
        >>> genre.tensor(["comedy", "western", None])  # known, unknown, missing
        tensor([3, 1, 0])
    """

    name: str
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)
    buckets: int | None = None
    dim: int | None = None
    id_dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self._check()

    def array(self, values: Sequence[Any]) -> np.ndarray:
        """Ids (N,)."""
        self.check_fitted()
        return np.array([self.id(category(self.name, value)) for value in values], dtype=np.int64)

    def _parts(self, value: Any) -> list[str]:
        found = category(self.name, value)
        return [] if found is None else [found]

    def example(self, number: int) -> str:
        """A category."""
        return self._some(number, 1)[0]

    def __str__(self) -> str:
        return f"a category, {self._extent()}"


@dataclass(frozen=True)
class Tags(IdFeature):
    """A bag of categories: the genres of a film, the topics of an article.

    A value is a list (or a set) of categories, each as for :class:`Categorical`; order and repeats do not matter.
    Categories that are not in the vocabulary count as one unknown category. An empty list is a missing value.

    Args:
        name: Key of the value in an input.
        vocabulary: The categories, each once. None: :meth:`fit` finds them.
        buckets: Instead of a vocabulary, the number of buckets that categories are hashed into.
        dim: Size of the embedding. None: ``1.6 * n**0.56`` for n categories, at most 64.
        pooling: ``"mean"`` of the embeddings, or ``"attention"``: their mean by weights that are learned.
        id_dropout: Probability with which training replaces a category by the unknown one.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import Tags
        >>> Tags("genres", vocabulary=["drama", "comedy"]).tensor([["comedy", "drama", "new"], ["drama"], None])
        tensor([[1, 2, 3],
                [2, 0, 0],
                [0, 0, 0]])
    """

    name: str
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)
    buckets: int | None = None
    dim: int | None = None
    pooling: str = "mean"
    id_dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self._check()
        if self.pooling not in ("mean", "attention"):
            raise ValueError(f"pooling={self.pooling!r} is unknown: choose mean or attention.")

    def array(self, values: Sequence[Any]) -> np.ndarray:
        """Ids (N, width), ascending, 0 behind them."""
        self.check_fitted()
        return padded([sorted({self.id(part) for part in self._parts(value)}) for value in values])

    def _parts(self, value: Any) -> list[str]:
        return categories(self.name, value)

    def example(self, number: int) -> list[str]:
        """Two categories."""
        return self._some(number, 2)

    def __str__(self) -> str:
        return f"a list of categories, {self._extent()}"


@dataclass(frozen=True)
class History(IdFeature):
    """A sequence of ids, the newest last: the films that a user has seen, read by a small causal transformer.

    The transformer has learned positions, counted from the oldest id that is kept, and sees at each id those before
    it alone, so that what it knows after t ids does not depend on what comes later. The feature is its state at the
    newest id. An empty history is a missing value.

    With ``num_hidden_layers=0`` there is no transformer: the feature is the sum of the ids' embeddings, each weighted
    by a learned number for its place, counted from the newest. On small logs this often ranks better.

    Args:
        name: Key of the value in an input.
        vocabulary: The ids, each once. None: :meth:`fit` finds them.
        max_length: Ids at most; of a longer history the newest are kept.
        num_hidden_layers: Number of transformer layers; 0 for a sum weighted by recency.
        dim: Size of embeddings, states and output.
        num_attention_heads: Attention heads a layer; has to divide ``dim``.
        dropout: Dropout probability of the transformer, or of the embeddings where there is none.
        id_dropout: Probability with which training replaces an id by the unknown one.
        buckets: Instead of a vocabulary, the number of buckets that ids are hashed into.
        shared_with: Name of a :class:`Categorical` somewhere in the model, as a rule the item's id in the document
            tower. The history then reads ids with that feature's vocabulary and its table of embeddings, which is
            held, trained and saved once; it needs no ``fit`` of its own. The Categorical's ``dim`` has to be the same.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import History
        >>> History("seen", vocabulary=["f1", "f2", "f3"], max_length=2).tensor([["f1", "f2", "f3"], ["f2"], []])
        tensor([[3, 4],
                [3, 0],
                [0, 0]])
    """

    name: str
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)
    max_length: int = 50
    num_hidden_layers: int = 2
    dim: int = 64
    num_attention_heads: int = field(default=2, kw_only=True)
    dropout: float = field(default=0.1, kw_only=True)
    id_dropout: float = field(default=0.0, kw_only=True)
    buckets: int | None = field(default=None, kw_only=True)
    shared_with: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check()
        for name in ("max_length", "dim", "num_attention_heads"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if type(self.num_hidden_layers) is not int or self.num_hidden_layers != 0:
            object.__setattr__(self, "num_hidden_layers", positive_int("num_hidden_layers", self.num_hidden_layers))
        object.__setattr__(self, "dropout", probability("dropout", self.dropout))
        if self.dim % self.num_attention_heads != 0:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} does not divide dim={self.dim}.")
        if self.shared_with is not None:
            check_name(self.shared_with, "shared_with")
            if super().is_fitted:
                raise ValueError(f"{self.name!r} has a vocabulary, or buckets, and shared_with={self.shared_with!r}.")

    @property
    def is_fitted(self) -> bool:
        """Whether the vocabulary is there, or comes from another feature."""
        return self.shared_with is not None or super().is_fitted

    def fit(self, values: Iterable[Any]) -> History:
        """Returns a copy whose vocabulary are the ids in the histories, see :meth:`IdFeature.fit`."""
        return self if self.shared_with is not None else super().fit(values)

    def reading(self, owner: Categorical) -> History:
        """Returns a history that reads ids as the feature does that it shares an embedding table with.

        Raises:
            ValueError: The tables are not of one size.
        """
        if owner.embedding_dim != self.dim:
            raise ValueError(
                f"History {self.name!r} has dim={self.dim}, but Categorical {owner.name!r}, whose table it shares, has "
                f"dim={owner.embedding_dim}: give both the same dim."
            )
        return replace(self, vocabulary=owner.vocabulary, buckets=owner.buckets, shared_with=None)

    def array(self, values: Sequence[Any]) -> np.ndarray:
        """Ids (N, width), oldest first, 0 behind them."""
        self.check_fitted()
        if self.shared_with is not None:
            raise ValueError(f"History {self.name!r} reads with {self.shared_with!r}: make it part of a model first.")
        return padded([[self.id(part) for part in self._parts(value)[-self.max_length :]] for value in values])

    def _parts(self, value: Any) -> list[str]:
        return categories(self.name, value, ordered=True)

    def example(self, number: int) -> list[str]:
        """Three ids."""
        return self._some(number, 3)

    def __str__(self) -> str:
        return f"a list of ids, the newest last, at most {self.max_length} of them, {self._extent()}"


def padded(ids: Sequence[list[int]]) -> np.ndarray:
    """Ids (N, width) with 0 behind them, at least one wide."""
    width = max(1, *map(len, ids)) if ids else 1
    rows = [row + [MISSING_ID] * (width - len(row)) for row in ids]
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _checked_vocabulary(name: str, vocabulary: object) -> tuple[str, ...]:
    """Returns the values of a vocabulary as strings."""
    if isinstance(vocabulary, (str, bytes)) or not isinstance(vocabulary, Iterable):
        raise ValueError(f"vocabulary of {name!r} is a {type(vocabulary).__name__}: give a list of values.")
    values = tuple(category(name, value) for value in vocabulary)
    if None in values:
        raise ValueError(f"vocabulary of {name!r} holds None: a missing value needs no entry, leave it out.")
    if not values:
        raise ValueError(f"vocabulary of {name!r} is empty: give the values that there are.")
    if len(set(values)) < len(values):
        repeated, _ = Counter(values).most_common(1)[0]
        raise ValueError(f"vocabulary of {name!r} holds {repeated!r} more than once: give each value once.")
    return tuple(value for value in values if value is not None)
