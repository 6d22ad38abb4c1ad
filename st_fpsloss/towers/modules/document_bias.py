"""A score of a document's own, whatever the query: learned by the document tower, exported as one more dimension."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from st_fpsloss.towers.modules.base import PackageModule


class DocumentBias(PackageModule):
    """Learns the score from the document tower's last hidden layer and from its side features.

    The features are read directly as well, so that a document's id can carry a score of its own. The score is linear,
    without a constant, which would be the same for all documents, and starts at 0.

    Args:
        embedding_dim: Size of the last hidden layer.
        feature_dim: Size of the features' vector; 0 for a tower of text alone.
    """

    config_keys = ["embedding_dim", "feature_dim"]  # noqa: RUF012

    def __init__(self, embedding_dim: int, feature_dim: int = 0) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.feature_dim = feature_dim
        self.linear = nn.Linear(embedding_dim + feature_dim, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds ``document_bias`` (N, 1)."""
        hidden = features["sentence_embedding"]
        if self.feature_dim:
            hidden = torch.cat([hidden, features["feature_embedding"].to(hidden.dtype)], dim=1)
        features["document_bias"] = self.linear(hidden)
        return features

    def get_embedding_dimension(self) -> int:
        """Size of the embedding, which this module leaves as it is."""
        return self.embedding_dim


class BiasDimension(PackageModule):
    """Appends the document's score to its embedding, and a 1 to a query's.

    The dot product of the two then is the one of the embeddings plus the score, in an index too.

    Args:
        embedding_dim: Size of the embedding without the dimension.
    """

    config_keys = ["embedding_dim"]  # noqa: RUF012

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replaces ``sentence_embedding`` (N, embedding_dim) by (N, embedding_dim + 1)."""
        embedding = features["sentence_embedding"]
        bias = features.get("document_bias")
        last = torch.ones_like(embedding[:, :1]) if bias is None else bias.to(embedding.dtype)
        features["sentence_embedding"] = torch.cat([embedding, last], dim=1)
        return features

    def get_embedding_dimension(self) -> int:
        """Size of the embedding with the dimension."""
        return self.embedding_dim + 1
