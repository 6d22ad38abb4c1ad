"""Histories of documents: what a user has seen, each item as the document tower reads it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from st_fpsloss.towers.features.base import Feature, check_name
from st_fpsloss.towers.features.ids import padded
from st_fpsloss.towers.features.values import plain
from st_fpsloss.utils.checks import positive_int, probability

POOLINGS = ("last", "mean", "recency")


@dataclass(frozen=True)
class DocumentHistory(Feature):
    """A sequence of documents, the newest last, each encoded by the document tower of the model.

    A small causal transformer reads the documents' embeddings, so that a document that is new, in a history or in the
    corpus, needs no training. Only the query tower can have it. In training with the losses of this package each
    distinct document of a batch is encoded once, whether it is in histories, among the candidates, or both; gradients
    flow through the histories into the document tower. An empty history is a missing value.

    A value is a list of documents, of whatever the document tower takes. With
    :func:`~st_fpsloss.towers.history_documents` it is a list of their ids.

    Args:
        name: Key of the value in an input.
        max_length: Documents at most; of a longer history the newest are kept.
        num_hidden_layers: Number of transformer layers; 0 to pool the documents' embeddings as they are.
        num_attention_heads: Attention heads a layer; has to divide the size of the embeddings.
        dropout: Dropout probability of the transformer, or of the embeddings where there is none.
        pooling: How the states at the documents become one vector: ``"last"`` takes the newest, ``"mean"`` their mean,
            ``"recency"`` their sum, each weighted by a learned number for its place from the newest.
        detach: Let no gradient flow from the histories into the document tower; it learns as candidates' tower alone.
        dim: Size of the documents' embeddings, which :func:`~st_fpsloss.two_tower` fills in.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import DocumentHistory, Tower, id_embedding, two_tower
        >>> user = Tower(features=[DocumentHistory("seen", num_hidden_layers=1)], hidden_dims=())
        >>> model = two_tower(user, Tower(id_embedding(["alien", "brazil"], 8)), embedding_dim=8)
        >>> model.encode_query([{"seen": ["alien", "brazil"]}, {"seen": []}]).shape
        (2, 8)
    """

    name: str
    max_length: int = 50
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    dropout: float = 0.1
    pooling: str = "last"
    detach: bool = False
    dim: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_name(self.name)
        for name in ("max_length", "num_attention_heads"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if type(self.num_hidden_layers) is not int or self.num_hidden_layers != 0:
            object.__setattr__(self, "num_hidden_layers", positive_int("num_hidden_layers", self.num_hidden_layers))
        object.__setattr__(self, "dropout", probability("dropout", self.dropout))
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is unknown: choose one of {', '.join(POOLINGS)}.")
        if not isinstance(self.detach, bool):
            raise ValueError(f"detach={self.detach!r} must be True or False.")
        if self.dim is not None:
            object.__setattr__(self, "dim", positive_int("dim", self.dim))
            if self.num_hidden_layers and self.dim % self.num_attention_heads != 0:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} of {self.name!r} does not divide {self.dim}, the "
                    "size of the documents' embeddings."
                )

    @property
    def is_fitted(self) -> bool:
        """There is nothing to fit."""
        return True

    def fit(self, values: Iterable[Any]) -> DocumentHistory:
        """Returns the feature itself: it learns nothing before training."""
        return self

    def documents(self, value: Any) -> list[Any]:
        """Returns the documents of a history, oldest first, at most ``max_length``; those that are None are left out.

        Raises:
            ValueError: It is no list.
        """
        value = plain(value)
        if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
            value = value.tolist()
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise ValueError(
                f"{self.name!r} got {reprlib.repr(value)} (a {type(value).__name__}): a DocumentHistory needs a list "
                "of documents, the newest last, or None where it is missing."
            )
        return [document for document in value if document is not None][-self.max_length :]

    def array(self, values: Sequence[Any]) -> np.ndarray:
        """Numbers (N, width) of the distinct documents of N histories, from 1, oldest first, 0 behind them."""
        return numbered([self.documents(value) for value in values])[0]

    def example(self, number: int) -> list[str]:
        """Two documents, as a document tower of texts takes them."""
        return [f"document {number}", f"document {number + 1}"]

    def __str__(self) -> str:
        return f"a list of documents, the newest last, at most {self.max_length} of them"


def numbered(histories: Sequence[Sequence[Any]]) -> tuple[np.ndarray, list[Any]]:
    """Numbers (N, width) of the distinct documents of histories, from 1, 0 behind them; and these documents."""
    from st_fpsloss.data.inputs import canonical_string  # features are read without `datasets` where queries are served

    number_of: dict[Any, int] = {}
    distinct: list[Any] = []
    numbers: list[list[int]] = []
    for history in histories:
        numbers.append([])
        for document in history:
            key = type(document), canonical_string(document)
            number = number_of.setdefault(key, len(distinct) + 1)
            if number > len(distinct):
                distinct.append(document)
            numbers[-1].append(number)
    return padded(numbers), distinct
