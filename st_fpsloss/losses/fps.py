"""FPSLoss: the full product softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_fpsloss.batch.clicks import ClickBatch, Direction, renumbered
from st_fpsloss.batch.statistics import has_in_batch_negatives, masked_q
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.losses.arguments import LogQArguments
from st_fpsloss.losses.log_q import LogQLoss
from st_fpsloss.objectives.softmax import full_product_softmax

_SAMPLED_ANCHORS = 64  # whose negatives are looked at for a warning
_FEW_NEGATIVES, _OF_MANY = 2.0, 20
# From here on, in simulated logs of 12 queries and 30 documents, the gradient of "corrected" was off by .17 to 1 of the
# exact softmax's, that of "standard" with "keep" by less than .05.
_MUCH_MASKED_Q = 0.15


class FPSLoss(LogQLoss):
    """Full product softmax: every document of the batch is a negative for every other query.

    Given clicks (query, document, relevance r), each query should tell its document from all other documents of the
    batch:

    ``L = -1[r>0]ᵀ log diag softmax(α U Wᵀ + β)``, divided by the number of rows with r > 0,

    with U and W the query and document embeddings. The scale α (an inverse temperature) is learned; a scalar β cancels
    in a softmax, its exact gradient is 0, and it stays exactly where it starts.

    A click log repeats its queries and documents. Each distinct one is encoded once a batch and the loss is computed on
    distinct rows, with the same value and gradients.

    Args:
        bias: start of β.
        learn_bias: leave β a parameter. It has no effect in a softmax.
        directions: ``"query_to_doc"``, ``"doc_to_query"`` (the softmax over queries), or both: their mean.

    Relations:
        - ``MultipleNegativesRankingLoss`` is this loss with a fixed scale, every row encoded, and duplicates kept.

    Raises:
        ValueError: If an argument is none of its choices, or two do not go together.

    Example:
        >>> from st_fpsloss import FPSLoss, Tower, two_tower
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> loss = FPSLoss(model)
        >>> queries = model.preprocess(["red", "blue"], task="query")
        >>> documents = model.preprocess(["rose", "sky"], task="document")
        >>> loss([queries, documents]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        bias: float = 0.0,
        learn_bias: bool = True,
        directions: Sequence[Direction] = ("query_to_doc",),
        **shared: Unpack[LogQArguments],
    ) -> None:
        super().__init__(model, bias=bias, learn_bias=learn_bias, **shared)
        self.directions = _check_directions(directions)

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows]) -> list[Tensor | None]:
        """Query to document, rows with r ≤ 0 have no anchor; document to query knows no negative documents."""
        positive = relevance > 0
        if self.directions == ("query_to_doc",):
            return [positive, *[None] * (len(columns) - 1)]
        if self.directions == ("doc_to_query",):
            return [None, positive, *[torch.zeros_like(positive)] * (len(columns) - 2)]
        return [None] * len(columns)

    def add_corrections(self, batch: ClickBatch) -> ClickBatch:
        """Add known positives; count the batch's rows and look up their log Q."""
        batch = super().add_corrections(batch)
        if self.log_q is None:
            return batch
        query_log_q = document_log_q = None
        if "query_to_doc" in self.directions:
            document_log_q = self.count_and_look_up("document", batch.document, batch.document_fingerprints)
        if "doc_to_query" in self.directions:
            query_log_q = self.count_and_look_up("query", batch.query, batch.query_fingerprints)
        return replace(batch, query_log_q=query_log_q, document_log_q=document_log_q)

    def objective(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> Tensor:
        """Mean over the directions of the full product softmax."""
        alpha = self.logit_scale.exp()
        losses = []
        for direction in self.directions:
            self.check_log_q("document_log_q" if direction == "query_to_doc" else "query_log_q", batch)
            anchor_rows, candidates = (queries, documents) if direction == "query_to_doc" else (documents, queries)
            anchors, targets = batch.softmax_targets(direction, self.relevance, self.duplicates, self.log_q)
            losses.append(full_product_softmax(anchor_rows[anchors], candidates, alpha, targets))
        return torch.stack(losses).mean()

    def setting_warnings(self, model: SentenceTransformer) -> list[str]:
        """What is wrong with the settings, known before training; a sentence each, with its cure."""
        found = super().setting_warnings(model)
        if self.beta != 0:
            found.append(
                f"bias={self.beta:g} has no effect: β cancels in a softmax, its gradient is 0. Leave `bias` off, or "
                "train with SigmoidLoss, where β counts."
            )
        return found

    def has_negatives(self, batch: ClickBatch) -> bool:
        """Whether any row with r > 0 has a negative in one of the directions."""
        return any(has_in_batch_negatives(batch, direction, self.duplicates) for direction in self.directions)

    def statistics_of(self, queries: Tensor, documents: Tensor, batch: ClickBatch) -> dict[str, float]:
        """Figures of a batch; distinct and effective negatives in the first direction, the mean over some anchors."""
        figures = super().statistics_of(queries, documents, batch)
        direction: Direction = "query_to_doc" if "query_to_doc" in self.directions else "doc_to_query"
        anchor_rows, candidates = (queries, documents) if direction == "query_to_doc" else (documents, queries)
        anchors, targets = batch.softmax_targets(direction, self.relevance, "mask", self.log_q)
        if self.log_q == "corrected" and direction == "query_to_doc":
            figures["masked_q"] = masked_q(batch)
        sample = torch.arange(0, len(anchors), max(1, len(anchors) // _SAMPLED_ANCHORS), device=anchors.device)
        dtype = torch.promote_types(candidates.dtype, torch.float32)
        logits = self.alpha * anchor_rows[anchors[sample]].to(dtype) @ candidates.to(dtype).T
        logits += targets.candidate_log_weight.to(dtype)
        assert targets.false_negatives is not None
        row, candidate = renumbered(targets.false_negatives, sample, len(anchors))
        logits[row, candidate] = -torch.inf
        entropy = torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
        has_negatives = entropy.isfinite()  # without any, it is NaN
        if has_negatives.any():
            figures["distinct_negatives"] = float((logits > -torch.inf).sum(dim=1)[has_negatives].to(dtype).mean())
            figures["effective_negatives"] = float(entropy[has_negatives].exp().mean())
        return figures

    def training_warnings(self, means: Mapping[str, float]) -> list[str]:
        """What is wrong with a training by the means of its figures; a sentence each, with its cure."""
        found = super().training_warnings(means)
        if means.get("masked_q", 0.0) >= _MUCH_MASKED_Q:
            found.append(
                f"The other positives of a row's query have {means['masked_q']:.0%} of all draws, and "
                "`log_q='corrected'` leaves them out of the softmax, which then is another one than that over all "
                "documents. Take `log_q='standard'` with `duplicates='keep'`, which estimates the latter."
            )
        distinct, effective = means.get("distinct_negatives", 0.0), means.get("effective_negatives", 0.0)
        if distinct >= _OF_MANY and effective < _FEW_NEGATIVES:
            found.append(
                f"A row learns from {effective:.1f} negatives of its {distinct:.0f}: the softmax looks at nothing but "
                "the most similar one, which may be a positive that nobody clicked. Lower α (it is "
                f"{self.alpha:.3g}) by `scale`, `max_scale` or its learning rate."
            )
        return found

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), "directions": self.directions}


def _check_directions(directions: Sequence[Direction]) -> tuple[Direction, ...]:
    known = get_args(Direction)
    if isinstance(directions, str) or not directions or not set(directions) <= set(known):
        raise ValueError(
            f"`directions` must be a tuple of {' and '.join(map(repr, known))}, got {directions!r}; "
            'for one direction write ("query_to_doc",).'
        )
    return tuple(dict.fromkeys(directions))
