"""SampledSoftmaxLoss: softmax over the positive and a few negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.batch.negatives import (
    NegativePairs,
    Positives,
    explicit_negatives,
    explicit_tiles,
    in_batch_negatives,
    pair_products,
)
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.losses.arguments import LogQArguments
from st_fpsloss.losses.log_q import LogQLoss
from st_fpsloss.losses.negative_strategy import Negatives, NegativeStrategy
from st_fpsloss.objectives.sampled_softmax import sampled_softmax
from st_fpsloss.objectives.softmax import full_product_softmax
from st_fpsloss.objectives.tiles import in_float32, sum_over_tiles


class SampledSoftmaxLoss(LogQLoss):
    """Softmax over a query's positive and its n sampled negatives: the classic choice after pretraining.

    ``-log( exp R(q, d⁺) / Σ exp R(q, d_i) )`` over d⁺ and the negatives d_i,

    the mean over rows with r > 0. R is α times the dot product or the cosine; α is learned. 5 to 20 negatives are
    usual; :mod:`st_fpsloss.negatives` samples and mines them. In-batch, it is :class:`FPSLoss` from query to document.

    Args:
        **shared: those of :class:`st_fpsloss.losses.arguments.LogQArguments`.

    Relations:
        - :class:`FPSLoss` takes the documents of all rows of the batch for negatives.
        - :class:`FullSoftmaxLoss` takes all documents of a small corpus.
        - :class:`PairCELoss` takes the negatives one by one.

    Raises:
        ValueError: If an argument is none of its choices, two do not go together, or there are no negatives.

    Example:
        >>> from st_fpsloss import SampledSoftmaxLoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = SampledSoftmaxLoss(model)
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents, negatives = (model.preprocess(d, task="document") for d in (["rose", "sky"], ["sky", "rose"]))
        >>> loss([queries, documents, negatives]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        negatives: Negatives | None = None,
        hardest: int | None = None,
        **shared: Unpack[LogQArguments],
    ) -> None:
        super().__init__(model, bias=0.0, learn_bias=False, **shared)  # β cancels in a softmax
        self.strategy = NegativeStrategy(negatives, hardest)
        if hardest is not None and self.log_q is not None:
            raise ValueError("`log_q` corrects for drawn negatives, `hardest` does not draw: pass one of them.")

    def check_batch(self, num_columns: int, labels: Tensor | None) -> None:
        """Explicit negatives need columns, or rows that were shown and not clicked."""
        self.strategy.check(num_columns, labels)

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """Rows with r ≤ 0 have no positive; what they are negatives of depends on the choice of negatives."""
        return self.strategy.needed_rows(relevance, columns, self._gathers)

    def add_corrections(self, batch: ClickBatch) -> ClickBatch:
        """Add known positives and log Q."""
        batch = super().add_corrections(batch)
        if self.log_q is None:
            return batch
        drawn = slice(1, None) if self.strategy.is_explicit(len(batch.document)) else slice(None)
        log_q = self.count_and_look_up("document", batch.document, batch.document_fingerprints, drawn)
        return replace(batch, document_log_q=log_q)

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Mean over the rows with r > 0."""
        self.check_log_q("document_log_q", batch)
        explicit = self.strategy.is_explicit(len(batch.document))
        if not explicit and self.strategy.hardest is None:
            anchors, targets = batch.softmax_targets("query_to_doc", self.relevance, self.duplicates, self.log_q)
            return full_product_softmax(queries[anchors], documents, self.logit_scale.exp(), targets)
        positives = Positives.of(batch, self.relevance)
        positives = positives.select(positives.is_local(batch))
        alpha = self.logit_scale.exp()
        if not explicit:
            pairs = in_batch_negatives(batch, positives, self.duplicates)
            negatives = self.strategy.hardest_of(pairs, queries[positives.query], documents)
            return self._over_pairs(queries, documents, alpha, batch, positives, negatives)
        log_unmasked_q = batch.log_unmasked_q() if self.log_q == "corrected" else None

        def over_tile(rows: slice, queries: Tensor, documents: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
            part = positives.select(rows)
            negatives = explicit_negatives(batch, part, self.duplicates)
            loss = self._over_pairs(queries, documents, alpha, batch, part, negatives, log_unmasked_q)
            return loss, loss.new_zeros(())

        tiles = explicit_tiles(batch, positives)
        return sum_over_tiles(over_tile, tiles, *in_float32(queries, documents, alpha))[0]

    def _over_pairs(
        self,
        queries: Tensor,
        documents: Tensor,
        alpha: Tensor,
        batch: ClickBatch,
        positives: Positives,
        negatives: NegativePairs,
        log_unmasked_q: Tensor | None = None,
    ) -> Tensor:
        """Softmax of each positive over its negatives; a positive without any has no loss."""
        positive, negative = pair_products(queries, documents, positives, negatives)
        positive, negative = alpha * positive, alpha * negative + negatives.count.log()
        if self.log_q is not None and batch.document_log_q is not None and negatives.column is not None:
            log_q = batch.document_log_q.to(negative.dtype)
            if self.log_q == "standard":
                positive = positive - log_q[0, positives.row]
            of_positive = None if log_unmasked_q is None else log_unmasked_q[positives.query]
            negative = negative + self._log_weights(log_q, of_positive, negatives, len(positives.row))
        with_negatives, row = torch.unique(negatives.positive, return_inverse=True)
        return (positives.weight[with_negatives] * sampled_softmax(positive[with_negatives], negative, row)).sum()

    def _log_weights(
        self, log_q: Tensor, log_unmasked_q: Tensor | None, negatives: NegativePairs, num_positives: int
    ) -> Tensor:
        """What ``log_q`` adds to each explicit negative (K,).

        A document that was shown and not clicked (it stands in column 0) was not drawn, so it is not corrected for
        that: it counts as one document does in the sum that the drawn ones estimate.

        Args:
            log_q: (columns - 1, M).
            log_unmasked_q: (P,) log share of Q that the negatives of each positive come from; None for "standard".
            negatives: the negatives.
            num_positives: P.
        """
        assert negatives.column is not None
        is_drawn = negatives.column[0] > 0
        drawn = torch.bincount(negatives.positive[is_drawn], minlength=num_positives).clamp_min(1).to(log_q.dtype)
        of_drawn = -log_q[negatives.column[0], negatives.column[1]]
        if log_unmasked_q is None:
            return torch.where(is_drawn, of_drawn, drawn.log()[negatives.positive])
        return torch.where(is_drawn, of_drawn + (log_unmasked_q - drawn.log())[negatives.positive], 0.0)

    def has_negatives(self, batch: ClickBatch) -> bool:
        """Whether any row with r > 0 has a negative."""
        return self.strategy.has_negatives(batch, self.relevance, self.duplicates)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), **self.strategy.get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return f"""
@article{{bengio2008adaptive,
    title={{Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model}},
    author={{Bengio, Yoshua and Senécal, Jean-Sébastien}},
    journal={{IEEE Transactions on Neural Networks}},
    year={{2008}},
}}
{super().citation.strip()}
"""
