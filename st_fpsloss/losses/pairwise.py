"""What the losses on pairs (positive, negative) of one query share: which pairs there are, and their mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.batch.distributed import over_ranks
from st_fpsloss.batch.negatives import (
    NegativePairs,
    Positives,
    explicit_negatives,
    explicit_tiles,
    in_batch_negatives,
    pair_products,
)
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.losses.arguments import ClickArguments
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.losses.negative_strategy import NegativeStrategy
from st_fpsloss.objectives.pairwise import PairObjective, in_batch_pairs
from st_fpsloss.objectives.tiles import in_float32, sum_over_tiles


class PairwiseLoss(ClickLoss):
    """Base of the losses that are a mean over pairs of a row with r > 0 and one of its negatives."""

    def __init__(
        self, model: SentenceTransformer, strategy: NegativeStrategy, **shared: Unpack[ClickArguments]
    ) -> None:
        # β cancels in R⁺ - R⁻.
        super().__init__(model, bias=0.0, learn_bias=False, **shared)
        self.strategy = strategy

    @property
    @abstractmethod
    def pair_objective(self) -> PairObjective:
        """The loss of a pair's gap R⁺ - R⁻."""

    def check_batch(self, num_columns: int, labels: Tensor | None) -> None:
        """Explicit negatives need columns, or rows that were shown and not clicked."""
        self.strategy.check(num_columns, labels)

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """Rows with r ≤ 0 have no positive; what they are negatives of depends on the choice of negatives."""
        return self.strategy.needed_rows(relevance, columns, self._gathers)

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Weighted mean of the loss over all pairs of the batch."""
        positives = Positives.of(batch, self.relevance)
        over = self._explicit if self.strategy.is_explicit(len(batch.document)) else self._in_batch
        loss, total = over(queries, documents, batch, positives)
        return loss / total.clamp_min(torch.finfo(total.dtype).tiny)

    def _explicit(
        self, queries: Tensor, documents: Tensor, batch: ClickBatch, positives: Positives
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum over this process's pairs, and the weight of the pairs of all processes."""
        is_local = positives.is_local(batch)

        def over_tile(rows: slice, queries: Tensor, documents: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
            part, local = positives.select(rows), is_local[rows]
            negatives = explicit_negatives(batch, part, self.duplicates)
            total = (part.weight[negatives.positive] * negatives.count).sum()
            return self._over_pairs(queries, documents, alpha, part.select(local), negatives.of(local)), total

        tiles = explicit_tiles(batch, positives)
        return sum_over_tiles(over_tile, tiles, *in_float32(queries, documents, self.logit_scale.exp()))

    def _in_batch(
        self, queries: Tensor, documents: Tensor, batch: ClickBatch, positives: Positives
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum over this process's pairs, and the weight of the pairs of all processes."""
        pairs = in_batch_negatives(batch, positives, self.duplicates)
        num_pairs = pairs.pairs_of_each_row()
        local = positives
        if self._gathers:
            local = positives.select(positives.is_local(batch))
            pairs = in_batch_negatives(batch, local, self.duplicates)
        if self.strategy.hardest is not None:
            num_pairs = num_pairs.clamp_max(self.strategy.hardest)
            negatives = self.strategy.hardest_of(pairs, queries[local.query], documents)
            loss = self._over_pairs(queries, documents, self.logit_scale.exp(), local, negatives)
        else:
            alpha = self.logit_scale.exp()
            loss, weight = in_batch_pairs(queries[local.query], documents, alpha, pairs, self.pair_objective)
            if self.strategy.semi_hard:  # which pairs count depends on the embeddings
                return loss, over_ranks(weight, "sum") if self._gathers else weight
        return loss, (positives.weight * num_pairs).sum()

    def _over_pairs(
        self, queries: Tensor, documents: Tensor, alpha: Tensor, positives: Positives, negatives: NegativePairs
    ) -> Tensor:
        positive, negative = pair_products(queries, documents, positives, negatives)
        gap = alpha * (positive[negatives.positive] - negative)  # this order, else rounding hides α's gradient
        weight = positives.weight[negatives.positive] * negatives.count
        return (weight * self.pair_objective.value(gap)).sum()

    def has_negatives(self, batch: ClickBatch) -> bool:
        """Whether any row with r > 0 has a negative."""
        return self.strategy.has_negatives(batch, self.relevance, self.duplicates)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), **self.strategy.get_config_dict()}
