"""Losses of the gap R⁺ - R⁻ of a positive and a negative: :func:`st_fpsloss.objectives.naive.pairwise`, in tiles.

With explicit negatives the pairs are few (:mod:`st_fpsloss.objectives.sampled_softmax` computes them). In-batch,
every document column of the batch makes a pair with every row:

.. code-block:: text

    clicks q1→d1, q1→d2, q2→d1; c = (2, 1)          d1   d2
                              row q1→d1        q1   x    x      pairs: none, d2 is a positive of q1 as well
                              row q1→d2        q1   x    x
                              row q2→d1        q2   x    -      one pair: (d1, d2)

A row against all *unique* documents is one row of a tile, and a document that occurs c times counts c times.
Each tile computes its loss and its share of every gradient in the same pass: nothing M×M ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from st_fpsloss.objectives.softmax import row_tiles, scaled_gradients


class PairObjective(Protocol):
    """A loss of the gap R⁺ - R⁻ of a pair, and which pairs it looks at."""

    def value(self, gap: Tensor) -> Tensor:
        """Loss of each gap, differentiable."""

    def slope(self, gap: Tensor) -> Tensor:
        """Derivative of the loss by the gap."""

    def selected(self, gap: Tensor) -> Tensor | None:
        """Pairs that count, as bool; None for all of them."""


@dataclass(frozen=True)
class Logistic:
    """``softplus(-gap)``, the cross-entropy of 1 with σ(gap)."""

    def value(self, gap: Tensor) -> Tensor:
        """Loss of each gap."""
        return softplus(-gap)

    def slope(self, gap: Tensor) -> Tensor:
        """Derivative of the loss by the gap."""
        return -torch.sigmoid(-gap)

    def selected(self, gap: Tensor) -> None:
        """All pairs count."""


@dataclass(frozen=True)
class Hinge:
    """``max(0, margin - gap)``.

    Args:
        margin: the gap from which on a pair has no loss.
        semi_hard: look only at pairs in the right order whose gap is below the margin.
    """

    margin: float
    semi_hard: bool = False

    def value(self, gap: Tensor) -> Tensor:
        """Loss of each gap."""
        return torch.relu(self.margin - gap)

    def slope(self, gap: Tensor) -> Tensor:
        """Derivative of the loss by the gap."""
        return -(gap < self.margin).to(gap.dtype)

    def selected(self, gap: Tensor) -> Tensor | None:
        """Pairs that count: all, or the semi-hard ones."""
        return (gap > 0) & (gap < self.margin) if self.semi_hard else None


@dataclass(frozen=True)
class InBatchPairs:
    """Rows that each make a pair with every candidate.

    Args:
        positive: (P,) number of the candidate that is each row's positive.
        weight: (P,) weight of each of the row's pairs.
        group: (P,) number of each row's group, in ascending order; rows of one group have the same negatives.
        count: (B,) how many columns hold each candidate.
        false_negatives: (2, K) index pairs (group, candidate), sorted by group, with columns that are no negatives...
        removed: (K,) ... and how many.
    """

    positive: Tensor
    weight: Tensor
    group: Tensor
    count: Tensor
    false_negatives: Tensor
    removed: Tensor

    def pairs_of_each_row(self) -> Tensor:
        """Number of pairs (P,) of each row."""
        num_groups = int(self.group[-1]) + 1 if len(self.group) else 0
        taken = self.removed.new_zeros(num_groups).index_add_(0, self.false_negatives[0], self.removed)
        return (self.count.sum() - taken).clamp_min(0)[self.group]

    def counts_by_tile(self, tiles: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Each tile of rows, and how many negatives (T, B) each candidate stands for."""
        for rows in tiles:
            group = self.group[rows]
            first, last = int(group[0]), int(group[-1])
            cuts = torch.searchsorted(self.false_negatives[0], torch.tensor([first, last + 1], device=group.device))
            of_tile = slice(*cuts.tolist())
            counts = self.count.repeat(last + 1 - first, 1)
            of_group, candidate = self.false_negatives[:, of_tile]
            counts.index_put_((of_group - first, candidate), -self.removed[of_tile], accumulate=True)
            yield rows, counts if last + 1 - first == len(group) else counts[group - first]


def in_batch_pairs(
    anchors: Tensor, candidates: Tensor, alpha: Tensor, pairs: InBatchPairs, objective: PairObjective
) -> tuple[Tensor, Tensor]:
    """Weighted sum of an objective over the pairs of every row with every candidate, and the sum of the weights.

    Args:
        anchors: (P, dim) embedding of each row's query.
        candidates: (B, dim) embeddings of the unique documents.
        alpha: scalar that multiplies the dot products, above 0.
        pairs: positives, weights and what is no negative.
        objective: the loss of a gap.

    Returns:
        (loss, weight): scalars; the mean over pairs is their quotient. The weight has no gradient.

    Example:
        >>> import torch
        >>> rows, one = torch.arange(2), torch.ones(2)
        >>> pairs = InBatchPairs(rows, one, rows, one, torch.stack([rows, rows]), removed=one)
        >>> loss, weight = in_batch_pairs(torch.eye(2), torch.eye(2), torch.tensor(1.0), pairs, Hinge(margin=1.5))
        >>> loss / weight  # R⁺ is 1 and R⁻ is 0
        tensor(0.5000)
    """
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
    with torch.autocast(device_type=anchors.device.type, enabled=False):
        return _InBatchPairs.apply(anchors.to(dtype), candidates.to(dtype), alpha.to(dtype), pairs, objective)


class _InBatchPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors: Tensor, candidates: Tensor, alpha: Tensor, pairs: InBatchPairs, objective: PairObjective):  # type: ignore[no-untyped-def]
        need_gradient = any(ctx.needs_input_grad)
        loss, weight = anchors.new_zeros(()), anchors.new_zeros(())
        d_anchors = torch.zeros_like(anchors) if need_gradient else None
        d_candidates = torch.zeros_like(candidates) if need_gradient else None

        for rows, counts in pairs.counts_by_tile(row_tiles(anchors, candidates)):
            gap, at_positive = _gaps(anchors[rows] * alpha, candidates, pairs.positive[rows])
            weights = counts.to(gap.dtype) * pairs.weight[rows, None].to(gap.dtype)
            selected = objective.selected(gap)
            if selected is not None:
                weights *= selected
            loss += (weights * objective.value(gap)).sum()
            weight += weights.sum()
            if d_anchors is None or d_candidates is None:
                continue
            d_gap = weights.mul_(objective.slope(gap))
            d_logits = d_gap.neg()
            d_logits[at_positive] += d_gap.sum(dim=1)
            d_anchors[rows] = d_logits @ candidates
            d_candidates.addmm_(d_logits.T, anchors[rows])

        if d_anchors is not None and d_candidates is not None:
            d_alpha = (anchors * d_anchors).sum()
            ctx.save_for_backward(d_anchors.mul_(alpha), d_candidates.mul_(alpha), d_alpha)
        ctx.mark_non_differentiable(weight)
        return loss, weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return (*scaled_gradients(ctx, grad_output), None, None)


def _gaps(scaled_anchors: Tensor, candidates: Tensor, positive: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """R⁺ - R (T, B) of a tile, and where the positives are."""
    logits = scaled_anchors @ candidates.T
    at_positive = torch.arange(len(positive), device=positive.device), positive
    return logits.neg_().sub_(logits[at_positive][:, None]), at_positive


@torch.no_grad()
def hardest_negatives(
    anchors: Tensor, candidates: Tensor, pairs: InBatchPairs, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k negatives of each row that are most similar to its query; a document that is c columns fills c places.

    Args:
        anchors: (P, dim) embedding of each row's query.
        candidates: (B, dim) embeddings.
        pairs: what is no negative.
        k: negatives a row; a row that has fewer keeps them all.

    Returns:
        (row, candidate, count): (K,) each; the index pairs, and how many of the k places each fills.
    """
    k_distinct = min(k, len(candidates))
    found = []
    for rows, counts in pairs.counts_by_tile(row_tiles(anchors, candidates)):
        logits = anchors[rows] @ candidates.T
        logits[counts <= 0] = -torch.inf
        candidate = logits.topk(k_distinct, dim=1).indices
        count = counts.gather(1, candidate)
        places = (k - (count.cumsum(dim=1) - count)).clamp_min(0).minimum(count)
        tile_row, place = (places > 0).nonzero(as_tuple=True)
        found.append((tile_row + rows.start, candidate[tile_row, place], places[tile_row, place]))
    if not found:
        nothing = pairs.positive.new_empty(0)
        return nothing, nothing, pairs.weight.new_empty(0)
    row, candidate, count = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, candidate, count
