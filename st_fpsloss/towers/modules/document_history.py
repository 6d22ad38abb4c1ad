"""What turns the embeddings of a history's documents into one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from st_fpsloss.towers.features.documents import DocumentHistory
from st_fpsloss.towers.modules.feature_encoders import SequenceEncoder, causal_layers, recency_weights


class DocumentHistoryEncoder(SequenceEncoder):
    """Reads a sequence of documents' embeddings with a causal transformer, and pools its states.

    A document's bias (:class:`~st_fpsloss.towers.modules.document_bias.BiasDimension`), which stands behind its
    embedding, is not read. A missing document is a learned vector that starts at zero.
    """

    def __init__(self, feature: DocumentHistory) -> None:
        super().__init__(feature)
        if feature.dim is None:
            raise ValueError(f"DocumentHistory {feature.name!r} is no feature of a tower yet: two_tower builds it.")
        self.output_dim = feature.dim
        self.detach = feature.detach
        self.pooling = feature.pooling
        self.missing = nn.Parameter(torch.zeros(feature.dim))
        self.dropout = nn.Dropout(feature.dropout)
        self.recency = nn.Parameter(recency_weights(feature.max_length)) if feature.pooling == "recency" else None
        self.positions: nn.Parameter | None = None
        if feature.num_hidden_layers:
            self.positions = nn.Parameter(0.02 * torch.randn(feature.max_length, feature.dim))
            self.layers = causal_layers(
                feature.dim, feature.num_hidden_layers, feature.num_attention_heads, feature.dropout
            )
            self.norm = nn.LayerNorm(feature.dim)

    def states(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the pooled states (N, width, dim) up to every document; see :meth:`SequenceEncoder.states`.

        Args:
            ids: (N, width) numbers of the documents, from 1, oldest first, 0 behind them.
            documents: (D, at least dim) the documents' embeddings; None where there are none.
        """
        vectors = self.missing[None]
        if documents is not None:
            vectors = torch.cat([vectors, self._read(documents)])
        states = vectors[ids]
        if self.positions is None:
            return self._pooled(self.dropout(states))
        return self._pooled(self.norm(self.layers(self.dropout(states + self.positions[: ids.shape[1]]))))

    def _read(self, documents: Tensor) -> Tensor:
        if documents.shape[1] < self.output_dim:
            raise ValueError(
                f"The documents of a history have embeddings of size {documents.shape[1]}, but the query tower reads "
                f"{self.output_dim}: give them whole, not truncated (MatryoshkaLoss needs cache_gradients)."
            )
        documents = documents[:, : self.output_dim].to(self.missing.dtype)
        return documents.detach() if self.detach else documents

    def _pooled(self, states: Tensor) -> Tensor:
        if self.pooling == "last":
            return states
        places = torch.arange(states.shape[1], device=states.device)
        ages = places[:, None] - places
        if self.recency is None:
            weights = (ages >= 0) / (places[:, None] + 1)
        else:
            weights = self.recency[ages.clamp_min(0)] * (ages >= 0)
        return weights.to(states.dtype) @ states
