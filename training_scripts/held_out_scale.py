"""FPSLoss whose α is learned on clicks that the encoders do not learn from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss import FPSLoss
from st_fpsloss.click_batch import ClickBatch
from st_fpsloss.objectives import full_product_softmax

_HASH_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as int64


class HeldOutScaleFPSLoss(FPSLoss):
    """FPSLoss from query to document: a share of the clicks moves α alone, all others move the encoders alone."""

    def __init__(self, model: SentenceTransformer, held_out: float, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.held_out = held_out

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """The encoders' loss; its gradient by α is that of the held-out clicks."""
        anchors, targets = batch.softmax_targets("query_to_doc", self.relevance, self.duplicates, self.log_q)
        rows = torch.arange(len(batch.relevance), device=batch.relevance.device)[batch.own]
        rows = rows[batch.relevance[rows] > 0]
        keys = batch.query_keys[batch.query[rows]] * 3 + batch.document_keys[batch.document[0, rows]]
        held = ((keys * _HASH_FACTOR) >> 40) % 1000 < 1000 * self.held_out

        def loss(queries: Tensor, documents: Tensor, alpha: Tensor, chosen: Tensor) -> Tensor:
            weight = targets.weight * chosen
            chosen_targets = replace(targets, weight=weight / weight.sum().clamp_min(1e-12))
            return full_product_softmax(queries[anchors], documents, alpha, chosen_targets)

        alpha = self.logit_scale.exp()
        encoders = loss(queries, documents, alpha.detach(), ~held)
        scale = loss(queries.detach(), documents.detach(), alpha, held)
        return encoders + (scale - scale.detach())
