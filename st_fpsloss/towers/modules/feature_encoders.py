"""What turns the tensors of side features into vectors, and what joins the vectors to the text's embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from st_fpsloss.towers.features.ids import MISSING_ID, UNKNOWN_ID, IdFeature
from st_fpsloss.towers.features.kinds import Feature, History, Tags
from st_fpsloss.towers.modules.base import PackageModule

_RECENT = 4.0


def recency_weights(max_length: int) -> Tensor:
    """Returns weights (max_length,) by age, 0 the age of the newest: about the last ten count."""
    return torch.exp(-torch.arange(max_length) / _RECENT)


class FeatureEncoder(nn.Module):
    """Turns a feature's tensor, N rows, into vectors (N, ``output_dim``)."""

    output_dim: int

    def __init__(self, feature: Feature) -> None:
        super().__init__()


class NumericalEncoder(FeatureEncoder):
    """Passes on a standardised number and its missing flag."""

    output_dim = 2

    def forward(self, values: Tensor) -> Tensor:
        """Returns the values (N, 2) as they are."""
        return values


class IdEncoder(FeatureEncoder):
    """Holds a table with the embeddings of ids.

    Rows start normal with standard deviation ``1/sqrt(dim)``, so at a length of about 1; the rows of the missing and
    the unknown id start at zero, so that they say nothing until training finds something to say.
    """

    table: nn.Embedding | None

    def __init__(self, feature: IdFeature) -> None:
        super().__init__(feature)
        self.id_dropout = feature.id_dropout
        if isinstance(feature, History) and feature.shared_with is not None:
            self.output_dim = feature.dim
            self.register_module("table", None)  # the other feature's; see FeatureInput.on_model_ready
            return
        self.output_dim = feature.embedding_dim
        self.table = nn.Embedding(feature.num_ids, self.output_dim)
        nn.init.normal_(self.table.weight, std=self.output_dim**-0.5)
        nn.init.zeros_(self.table.weight[: UNKNOWN_ID + 1])

    def embed(self, ids: Tensor) -> Tensor:
        """Returns embeddings of ids; while training, of some as if they were unknown."""
        if self.table is None:
            raise RuntimeError("The encoder has no table of embeddings: it shares that of another feature of a model.")
        if self.training and self.id_dropout > 0:
            dropped = torch.rand(ids.shape, device=ids.device) < self.id_dropout
            ids = ids.masked_fill(dropped & (ids != MISSING_ID), UNKNOWN_ID)
        return self.table(ids)


class CategoricalEncoder(IdEncoder):
    """Looks up the embedding of a category."""

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the embeddings of ids (N,)."""
        return self.embed(ids)


class TagsEncoder(IdEncoder):
    """Averages the embeddings of a bag of categories, evenly or by learned weights."""

    def __init__(self, feature: Tags) -> None:
        super().__init__(feature)
        self.weight = nn.Linear(self.output_dim, 1, bias=False) if feature.pooling == "attention" else None
        if self.weight is not None:
            nn.init.zeros_(self.weight.weight)  # starts as the mean

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the mean of each row of ids (N, width), the missing id for an empty one."""
        held = ids != MISSING_ID
        held[:, 0] |= ~held.any(dim=1)
        embeddings = self.embed(ids)
        scores = torch.zeros_like(embeddings[..., 0]) if self.weight is None else self.weight(embeddings)[..., 0]
        weights = scores.masked_fill(~held, -torch.inf).softmax(dim=1)
        return (weights[..., None] * embeddings).sum(dim=1)


class SequenceEncoder(FeatureEncoder):
    """Reads a sequence of ids from the oldest to the newest: what it knows at an id depends on those before it."""

    def states(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the state at every id.

        Args:
            ids: (N, width) ids, oldest first, 0 behind them.
            documents: (D, dim) what the ids count, from 1, in a history of documents.

        Returns:
            (N, width, dim). The state at place t is what :meth:`forward` gives for the first t + 1 ids alone.
        """
        raise NotImplementedError

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the state (N, dim) at the newest of ids (N, width), at a missing id where there is none."""
        lengths = (ids != MISSING_ID).sum(dim=1).clamp_min(1)
        # An exported graph is given no wider ids than its longest, and could not cut them.
        width = ids.shape[1] if torch.compiler.is_exporting() else int(lengths.max())
        states = self.states(ids[:, :width], documents)
        return states[torch.arange(ids.shape[0], device=ids.device), lengths - 1]

    def prefixes(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns what :meth:`forward` gives for every prefix of ids (N, width), those of the first row first."""
        held = ids != MISSING_ID
        width = int(held.sum(dim=1).max())
        return self.states(ids[:, :width], documents)[held[:, :width]]


class RecencyEncoder(SequenceEncoder, IdEncoder):
    """Adds up the embeddings of ids, each weighted by a learned number for its place from the newest.

    The weights start at ``exp(-age / 4)``, 0 the age of the newest: about the last ten ids count.
    """

    def __init__(self, feature: History) -> None:
        super().__init__(feature)
        self.recency = nn.Parameter(recency_weights(feature.max_length))
        self.dropout = nn.Dropout(feature.dropout)

    def states(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the weighted sum (N, width, dim) up to every id; see :meth:`SequenceEncoder.states`."""
        places = torch.arange(ids.shape[1], device=ids.device)
        ages = places[:, None] - places
        weights = self.recency[ages.clamp_min(0)] * (ages >= 0)  # (width, width): at a place, of each one before it
        return weights @ self.dropout(self.embed(ids))


class HistoryEncoder(SequenceEncoder, IdEncoder):
    """Reads the sequence with a causal transformer."""

    def __init__(self, feature: History) -> None:
        super().__init__(feature)
        self.positions = nn.Parameter(0.02 * torch.randn(feature.max_length, feature.dim))
        self.dropout = nn.Dropout(feature.dropout)
        self.layers = causal_layers(
            feature.dim, feature.num_hidden_layers, feature.num_attention_heads, feature.dropout
        )
        self.norm = nn.LayerNorm(feature.dim)

    def states(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the transformer's state (N, width, dim) at every id; see :meth:`SequenceEncoder.states`."""
        embeddings = self.embed(ids) + self.positions[: ids.shape[1]]
        return self.norm(self.layers(self.dropout(embeddings)))


def causal_layers(dim: int, num_layers: int, num_heads: int, dropout: float) -> nn.Sequential:
    """Returns a transformer over (N, width, dim) in which a place sees itself and those before it."""
    return nn.Sequential(*(_CausalLayer(dim, num_heads, dropout) for _ in range(num_layers)))


class _CausalLayer(nn.Module):
    """A transformer layer, normalised first, in which a place sees itself and those before it."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Returns new states (N, width, dim)."""
        parts = self.query_key_value(self.attention_norm(states)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout.p if self.training else 0.0, is_causal=True
        )
        states = states + self.dropout(self.attention_output(attended.transpose(1, 2).flatten(2)))
        return states + self.dropout(self.mlp(states))


class FeatureFusion(PackageModule):
    """Adds what the side features say to the embedding of the text.

    A hidden layer reads both, a linear layer reads the hidden layer and the features, and its output is added to the
    text's embedding. That linear layer starts at zero: it is the gate, through which at first nothing passes, so that
    a pretrained text tower starts as it was.

    Args:
        embedding_dim: Size of the text's embedding, and of the output.
        feature_dim: Size of the features' vector.
        dropout: Probability with which training zeroes a unit of the hidden layer.
    """

    config_keys = ["embedding_dim", "feature_dim", "dropout"]  # noqa: RUF012

    def __init__(self, embedding_dim: int, feature_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.feature_dim = feature_dim
        self.dropout = dropout
        self.hidden = nn.Linear(embedding_dim + feature_dim, embedding_dim)
        self.gate = nn.Linear(embedding_dim + feature_dim, embedding_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replaces ``sentence_embedding`` (N, embedding_dim); reads ``feature_embedding`` (N, feature_dim)."""
        text = features["sentence_embedding"]
        if "prefix_of" in features:
            text = text[features["prefix_of"]]
        side = features["feature_embedding"].to(text.dtype)
        hidden = relu(self.hidden(torch.cat([text, side], dim=1)))
        hidden = nn.functional.dropout(hidden, self.dropout, self.training)
        features["sentence_embedding"] = text + self.gate(torch.cat([hidden, side], dim=1))
        return features

    def get_embedding_dimension(self) -> int:
        """Size of the output."""
        return self.embedding_dim
