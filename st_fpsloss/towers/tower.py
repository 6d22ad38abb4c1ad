"""What a tower is made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling, StaticEmbedding, Transformer
from torch import nn

from st_fpsloss.towers.features.kinds import Feature, checked_features
from st_fpsloss.utils.checks import positive_int, probability


@dataclass(frozen=True, eq=False)
class Tower:
    """Describes one tower of a two-tower model: what reads the input, and the MLP on top of it.

    A tower is an encoder (a transformer and its pooling, or a light :class:`StaticEmbedding`), then one
    ``Dense`` layer with ReLU for every entry of ``hidden_dims``, then a linear layer to the embedding size that
    :func:`~st_fpsloss.two_tower` is given. Nothing is loaded before :func:`~st_fpsloss.two_tower` builds the model.
    Two towers that are described alike are still two; the same ``Tower`` object on both sides is one shared encoder.

    Over a pretrained encoder the MLP starts linear, and so ranks as the encoder does: it passes the encoder's embedding
    on, as a whole or projected where there is no room for it (:mod:`st_fpsloss.towers.start`). Pretrained is what is
    named by a hub id or a folder, and a ready module that was loaded from one. Over side features alone, and over
    encoders from scratch (:func:`~st_fpsloss.towers.id_transformer`, :func:`~st_fpsloss.towers.id_embedding`, a
    StaticEmbedding with ``embedding_dim``), it starts random.

    Args:
        transformer: A hub id, a folder (of a transformer, or of a saved sentence-transformers model, which is taken
            with its pooling and its layers after that), or a ready ``Transformer`` or ``StaticEmbedding``. A ready
            module is used as it is, so that two towers may share it under different MLPs; where ``num_hidden_layers``
            or ``max_seq_length`` changes it, the tower works on a copy. None is for a tower of ``features`` alone.
        num_hidden_layers: Keep so many layers of the transformer: the first, the last, and those at even distances
            between them. None keeps all of them.
        max_seq_length: Cut inputs at so many tokens. None keeps what the transformer comes with.
        pooling: How token embeddings become one embedding: ``"mean"``, ``"cls"``, ``"max"``,
            ``"mean_sqrt_len_tokens"``, ``"weightedmean"`` or ``"lasttoken"``. None takes what a saved
            sentence-transformers model has after its transformer, else the mean. StaticEmbedding pools by itself.
        features: Side features of the input, fitted: :class:`Categorical`, :class:`Numerical`, :class:`Tags`,
            :class:`History`. What they say is added to the text's embedding, at first nothing, before the hidden
            layers; with ``transformer=None`` they are the input of the hidden layers. Their tables of embeddings start
            from scratch: beside a pretrained transformer let them learn faster, by the training argument
            ``learning_rate_mapping={"encoders": 1e-3}``.
        hidden_dims: Width of each hidden layer of the MLP; ``()`` is a linear tower. None is one layer of twice the
            embedding's size. A layer of width w passes w/2 dimensions of a pretrained encoder on at the start: narrower
            than twice the encoder's embedding (or twice ``embedding_dim``, where that is less) it starts from a
            projection to w/2 dimensions, with a warning.
        dropout: Probability with which training zeroes a unit of a hidden layer, or, without hidden layers, of the
            encoder's embedding.
        frozen: Fix the encoder: its weights do not learn, and it stays in eval mode, without dropout, while the MLP and
            the side features learn. A ready module is frozen in place. Saving does not keep it.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import Tower
        >>> Tower("sentence-transformers/all-MiniLM-L6-v2", num_hidden_layers=2, hidden_dims=(768, 768)).hidden_dims
        (768, 768)
    """

    transformer: str | os.PathLike[str] | InputModule | None = None
    num_hidden_layers: int | None = None
    max_seq_length: int | None = None
    pooling: str | None = None
    features: Sequence[Feature] = ()
    hidden_dims: Sequence[int] | None = None
    dropout: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        _check_transformer(self.transformer)
        object.__setattr__(self, "features", checked_features(self.features))
        if self.transformer is None:
            _check_featured(self)
        for name in ("num_hidden_layers", "max_seq_length"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if self.pooling is not None and self.pooling not in Pooling.POOLING_MODES:
            raise ValueError(f"pooling={self.pooling!r} is unknown: choose one of {', '.join(Pooling.POOLING_MODES)}.")
        if self.hidden_dims is not None:
            object.__setattr__(self, "hidden_dims", _checked_hidden_dims(self.hidden_dims))
        object.__setattr__(self, "dropout", probability("dropout", self.dropout))
        if not isinstance(self.frozen, bool):
            raise ValueError(f"frozen={self.frozen!r} must be True or False.")

    def widths(self, embedding_dim: int) -> tuple[int, ...]:
        """Widths of the hidden layers under embeddings of a size."""
        return (2 * embedding_dim,) if self.hidden_dims is None else tuple(self.hidden_dims)


def _check_transformer(transformer: object) -> None:
    """Refuses what cannot be the start of a tower, with the way to what was probably meant."""
    cure = "give a hub id, a folder, a Transformer or a StaticEmbedding."
    if transformer is None:
        return
    if isinstance(transformer, SentenceTransformer):
        raise ValueError("transformer is a whole SentenceTransformer: give its first module, model[0].")
    if isinstance(transformer, InputModule):
        check_input_module(transformer, "transformer")
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in transformer.parameters()):
            raise ValueError("transformer is not in float32, as the layers on top of it are: call its .float() first.")
    elif not isinstance(transformer, (str, os.PathLike)) or not os.fspath(transformer):
        raise ValueError(f"transformer={transformer!r} is no input of a tower: {cure}")


def _check_featured(tower: Tower) -> None:
    """Refuses a tower without a transformer that has no features either, or settings for a transformer."""
    if not tower.features:
        raise ValueError(
            "transformer=None leaves the tower without input: give a hub id, a folder, a Transformer, a "
            "StaticEmbedding, or features."
        )
    for name in ("num_hidden_layers", "max_seq_length", "frozen"):
        if getattr(tower, name):
            raise ValueError(f"{name}={getattr(tower, name)} needs a transformer, but transformer is None.")


def check_input_module(module: nn.Module, name: str) -> None:
    """Refuses modules whose output is not one embedding a token or a text."""
    if not isinstance(module, (Transformer, StaticEmbedding)):
        hint = ' such as router.sub_modules["document"][0]' if type(module).__name__ == "Router" else ""
        raise ValueError(
            f"{name} starts with a {type(module).__name__}: give a Transformer or a StaticEmbedding{hint}."
        )
    if isinstance(module, Transformer) and module.transformer_task != "feature-extraction":
        raise ValueError(
            f"{name} has transformer_task={module.transformer_task!r}, which yields no embeddings: load it with "
            'transformer_task="feature-extraction".'
        )


def _checked_hidden_dims(hidden_dims: object) -> tuple[int, ...]:
    """Returns the widths as a tuple of ints."""
    if isinstance(hidden_dims, str) or not isinstance(hidden_dims, Sequence):
        raise ValueError(f"hidden_dims={hidden_dims!r} must be a sequence of widths, such as (512,).")
    return tuple(positive_int(f"hidden_dims[{index}]", width) for index, width in enumerate(hidden_dims))
