"""A batch of clicks in row numbers: who clicked what, what is a negative of whom, and how often each column occurs.

The step between the encoders and the mathematics. Encoding gives *unique* rows of queries and documents; this module
turns the batch's M rows and columns into positives, masks, counts and log Q over those unique rows, O(rows + pairs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from st_fpsloss.objectives.softmax import SoftmaxTargets

Direction = Literal["query_to_doc", "doc_to_query"]
Relevance = Literal["mask", "weight"]
Duplicates = Literal["mask", "keep"]
LogQ = Literal["standard", "corrected"]


@dataclass(frozen=True)
class ClickBatch:
    """M rows (query, document, negatives..., relevance) in numbers of unique queries and unique documents.

    Args:
        query: (M,) number of each row's query; -1 where the loss has no use for it and it is not encoded.
        document: (columns - 1, M) number of the positive and of each negative document; -1 likewise.
        relevance: (M,) r, in the precision that counts and weights are to have; a row with r ≤ 0 is no positive.
        query_fingerprints: (A,) int64 identity of each unique query.
        document_fingerprints: (B,) int64 identity of each unique document.
        query_log_q: (M,) log probability that one draw of a row's query is this one, or None.
        document_log_q: (columns - 1, M) log probability that one draw of a column is this document, or None.
        known_positives: (2, K) further index pairs (query, document) that are no negatives, or None.
        local_rows: the rows whose positives this process is to learn; all of them unless the batch spans processes.
    """

    query: Tensor
    document: Tensor
    relevance: Tensor
    query_fingerprints: Tensor
    document_fingerprints: Tensor
    query_log_q: Tensor | None = None
    document_log_q: Tensor | None = None
    known_positives: Tensor | None = None
    local_rows: slice = field(default_factory=lambda: slice(None))

    def pair_weights(self, relevance: Relevance) -> Tensor:
        """Weights (M,) of the rows' losses: they sum to 1 over the whole batch, and are 0 where r ≤ 0."""
        positive = self.relevance > 0
        weights = self.relevance * positive if relevance == "weight" else positive.to(self.relevance.dtype)
        return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)

    def false_negatives(self) -> Tensor:
        """Index pairs (2, K), query and document, that are positives anywhere in the batch, or known ones; sorted."""
        rows = self.relevance > 0
        pairs = torch.stack([self.query[rows], self.document[0, rows]])
        if self.known_positives is not None:
            pairs = torch.cat([pairs, self.known_positives], dim=1)
        width = max(1, len(self.document_fingerprints))
        flat = torch.unique(pairs[0] * width + pairs[1])
        return torch.stack([flat // width, flat % width])

    def softmax_targets(
        self, direction: Direction, relevance: Relevance, duplicates: Duplicates, log_q: LogQ | None
    ) -> tuple[Tensor, SoftmaxTargets]:
        """What the full product softmax is to learn in one direction.

        Query to document: the queries of the rows with r > 0 are the anchors, every document column is a candidate;
        document to query: the documents of these rows are the anchors, every row's query is a candidate.

        Returns:
            (anchors, targets): the numbers of the queries (or documents) that are anchors, and the targets of
            :func:`~st_fpsloss.objectives.softmax.full_product_softmax` over these and all documents (or queries).
        """
        rows = torch.arange(len(self.relevance), device=self.relevance.device)[self.local_rows]
        rows = rows[self.relevance[rows] > 0]
        masked = self.false_negatives() if duplicates == "mask" else None
        if direction == "query_to_doc":
            anchor_of, candidate_of, num_anchors, num_candidates = self.query, self.document[0], *self._sizes
            columns, column_log_q = self.document, self.document_log_q
        else:
            candidate_of, anchor_of, num_candidates, num_anchors = self.query, self.document[0], *self._sizes
            columns, column_log_q = self.query[None], None if self.query_log_q is None else self.query_log_q[None]
            masked = None if masked is None else masked.flip(0)

        anchors, anchor = torch.unique(anchor_of[rows], return_inverse=True)
        false_negatives = None if masked is None else renumbered(masked, anchors, num_anchors)
        frequencies = _ColumnFrequencies.count(
            columns, column_log_q if log_q else None, num_candidates, self.relevance.dtype
        )
        positive_offset = negative_offset = None
        if log_q == "standard" and column_log_q is not None:
            positive_offset = -column_log_q[0, rows]
        elif log_q == "corrected" and false_negatives is not None:
            # Known positives are masked wherever they are drawn, and the batch holds few of them: what share of Q all
            # of them have, it cannot tell.
            negative_offset = (
                frequencies.correction(false_negatives, len(anchors))
                if self.known_positives is None
                else frequencies.correction_by_columns(len(anchors))
            )
        return anchors, SoftmaxTargets(
            anchor=anchor,
            candidate=candidate_of[rows],
            weight=self.pair_weights(relevance)[rows],
            candidate_log_weight=frequencies.log_weight,
            false_negatives=false_negatives,
            positive_offset=positive_offset,
            negative_offset=negative_offset,
        )

    def log_unmasked_q(self) -> Tensor:
        """``log(1 - ΣQ of the query's positives)`` (A,) of each query: the part of Q that its negatives come from."""
        frequencies = _ColumnFrequencies.count(
            self.document, self.document_log_q, len(self.document_fingerprints), self.relevance.dtype
        )
        return frequencies.log_unmasked_q(self.false_negatives(), len(self.query_fingerprints))

    @property
    def _sizes(self) -> tuple[int, int]:
        return len(self.query_fingerprints), len(self.document_fingerprints)


@dataclass(frozen=True)
class _ColumnFrequencies:
    count_of: Tensor  # (B,) how many columns hold the candidate
    log_weight: Tensor  # (B,) log count, less log Q where it is given
    q: Tensor | None  # (B,) probability that one draw is the candidate

    @staticmethod
    def count(columns: Tensor, log_q: Tensor | None, num_candidates: int, dtype: torch.dtype) -> _ColumnFrequencies:
        """Count the columns (any shape, -1 where a row was not encoded) of each candidate, and average its Q."""
        encoded = columns >= 0
        index = columns[encoded]
        count_of = torch.bincount(index, minlength=num_candidates).to(dtype)
        if log_q is None:
            return _ColumnFrequencies(count_of, count_of.log(), None)
        # Columns of one document may come from different samplers, each with a log Q of its own.
        column_log_q = log_q[encoded].to(dtype)
        inverse = torch.zeros_like(count_of).index_add_(0, index, torch.exp(-column_log_q))
        q = torch.zeros_like(count_of).index_add_(0, index, torch.exp(column_log_q)) / count_of
        return _ColumnFrequencies(count_of, inverse.log(), q)

    def correction(self, false_negatives: Tensor, num_anchors: int) -> Tensor:
        """``log( (1 - ΣQ of the masked) / n )`` of each anchor, n the number of its unmasked columns."""
        taken = self.count_of.new_zeros(num_anchors).index_add(0, false_negatives[0], self.count_of[false_negatives[1]])
        n = self.count_of.sum() - taken
        # n = 0 leaves no negative to correct.
        return self.log_unmasked_q(false_negatives, num_anchors) - torch.log(n.clamp_min(1))

    def correction_by_columns(self, num_anchors: int) -> Tensor:
        """The same with n / N for 1 - ΣQ, N the number of columns beside the positive's: ``log(1 / N)``.

        Right on average, whatever is masked, where ΣQ over the batch's masked documents leaves out those that no column
        holds; but it varies more from batch to batch.
        """
        return (self.count_of.sum() - 1).clamp_min(1).log().neg().expand(num_anchors)

    def log_unmasked_q(self, false_negatives: Tensor, num_anchors: int) -> Tensor:
        """``log(1 - ΣQ of the masked)`` of each anchor."""
        assert self.q is not None
        masked_q = self.q.new_zeros(num_anchors).index_add(0, false_negatives[0], self.q[false_negatives[1]])
        # An estimated Q may sum to 1 and more over the false_negatives.
        return torch.log((1 - masked_q).clamp_min(1e-6))


def renumbered(pairs: Tensor, kept_rows: Tensor, num_rows: int) -> Tensor:
    """Index pairs whose first entry is among ``kept_rows``, with its position there in its place."""
    position = torch.full((num_rows,), -1, dtype=torch.int64, device=pairs.device)
    position[kept_rows] = torch.arange(len(kept_rows), device=pairs.device)
    row = position[pairs[0]]
    return torch.stack([row, pairs[1]])[:, row >= 0]
