"""FPSLoss with a penalty on the norms of embeddings, for the comparison of dot product and cosine."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss import FPSLoss
from st_fpsloss.batch.clicks import ClickBatch


class NormPenaltyFPSLoss(FPSLoss):
    """FPSLoss plus ``norm_penalty`` times the mean squared norm of a batch's distinct queries and documents."""

    def __init__(self, model: SentenceTransformer, norm_penalty: float, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.norm_penalty = norm_penalty

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """The full product softmax and the penalty."""
        penalty = queries.square().sum(dim=1).mean() + documents.square().sum(dim=1).mean()
        return super().objective(queries, documents, batch) + self.norm_penalty * penalty
