"""The full product softmax on unique rows, in tiles: :func:`st_fpsloss.objectives.naive.full_product_softmax`.

One function serves both directions: *anchors* are queries, or documents in the direction document to query, and
*candidates* the others. Both are **unique** rows; how often a candidate occurs among the columns of the batch enters as
the logarithm of its count, so an M×M batch of repeated clicks costs (unique × unique):

.. code-block:: text

    keep   loss = log Σ_j c_j·exp(s_aj) - s_ap                              s_aj = α·u_a·w_j
    mask   loss = log( exp(s_ap) + Σ_{j not a positive of a} c_j·exp(s_aj) ) - s_ap

    clicks q1→d1, q1→d2, q2→d1; c = (2, 1)          d1   d2
                              row q1→d1        q1   +    x          + the positive, x neither, - a negative
                              row q1→d2        q1   x    +          ("keep" counts every x as a -)
                              row q2→d1        q2   +    -

Rows of anchors are worked off in tiles. Each tile computes its loss and, in the same pass, its share of every gradient
(three matrix products), so memory is O(tile × candidates) and nothing M×M ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Index pairs of one tile: 64 MB in float32 on a CPU. Smaller ones make slower matrix products, down to a third.
_TILE_PAIRS_CPU = 2**24
_TILE_PAIRS_ACCELERATOR = 2**26


@dataclass(frozen=True)
class SoftmaxTargets:
    """What the full product softmax is to learn: positives, and how each candidate counts as a negative.

    Args:
        anchor: (P,) row of the anchors of each positive pair.
        candidate: (P,) row of the candidates of each positive pair.
        weight: (P,) weight of each pair's loss; the loss is the weighted sum.
        candidate_log_weight: (B,) what is added to a candidate's logit where it stands in the sum: the logarithm of
            its count among the columns, less ``log Q`` where sampling is corrected for.
        false_negatives: None for ``keep``; else (2, K) index pairs (anchor, candidate), every positive pair among
            them, that are not negatives.
        positive_offset: (P,) added to the positive's own logit (``-log Q`` in the standard correction), or None.
        negative_offset: (A,) added to every negative's logit of an anchor (the corrected form), or None.
    """

    anchor: Tensor
    candidate: Tensor
    weight: Tensor
    candidate_log_weight: Tensor
    false_negatives: Tensor | None = None
    positive_offset: Tensor | None = None
    negative_offset: Tensor | None = None


def full_product_softmax(anchors: Tensor, candidates: Tensor, alpha: Tensor, targets: SoftmaxTargets) -> Tensor:
    """Weighted sum over positive pairs of ``-log softmax(α U Wᵀ)`` at the pair.

    Sums are taken in float32 whatever the embeddings' precision or autocast say; float64 stays float64. Gradients of
    ``anchors``, ``candidates`` and ``alpha`` are exact, and computed in the forward pass; a second derivative is not
    available.

    Args:
        anchors: (A, dim) embeddings of the unique anchors.
        candidates: (B, dim) embeddings of the unique candidates.
        alpha: scalar that multiplies the dot products, above 0.
        targets: positives, weights and masks, as row numbers of ``anchors`` and ``candidates``.

    Returns:
        Scalar loss; 0, connected to the graph, if there are no pairs.

    Example:
        >>> import torch
        >>> U, W = torch.eye(2), torch.eye(2)
        >>> rows = torch.arange(2)
        >>> targets = SoftmaxTargets(rows, rows, weight=torch.full((2,), 0.5), candidate_log_weight=torch.zeros(2))
        >>> loss = full_product_softmax(U, W, torch.tensor(1.0), targets)
        >>> bool(torch.isclose(loss, torch.nn.functional.cross_entropy(U @ W.T, rows)))
        True
    """
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
    with torch.autocast(device_type=anchors.device.type, enabled=False):
        return _FullProductSoftmax.apply(anchors.to(dtype), candidates.to(dtype), alpha.to(dtype), targets)


class _FullProductSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors: Tensor, candidates: Tensor, alpha: Tensor, targets: SoftmaxTargets) -> Tensor:  # type: ignore[no-untyped-def]
        need_gradient = any(ctx.needs_input_grad)
        loss = anchors.new_zeros(())
        d_anchors = torch.zeros_like(anchors) if need_gradient else None
        d_candidates = torch.zeros_like(candidates) if need_gradient else None

        for tile in _tiles(anchors, candidates, alpha, targets):
            loss += (tile.pair_weight * tile.pair_loss).sum()
            if d_anchors is None or d_candidates is None:
                continue
            row_factor = tile.d_logits_()[:, None]
            d_anchors[tile.rows] = row_factor * (tile.logits @ candidates)
            d_candidates.addmm_(tile.logits.T, row_factor * anchors[tile.rows])

        if d_anchors is not None and d_candidates is not None:
            # α multiplies u·w, so Σ dS·(u·w) is already in ∂U: no further pass over the tile.
            d_alpha = (anchors * d_anchors).sum()
            ctx.save_for_backward(d_anchors.mul_(alpha), d_candidates.mul_(alpha), d_alpha)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return (*scaled_gradients(ctx, grad_output), None)


def scaled_gradients(ctx, grad_output: Tensor) -> list[Tensor | None]:  # type: ignore[no-untyped-def]
    """Gradients that the forward pass saved ready, multiplied by what comes in; None for inputs that need none."""
    return [
        grad_output * gradient if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]


@dataclass
class _Tile:
    """Some anchors against all candidates."""

    rows: slice
    logits: Tensor  # (T, B) exp(s - max), 0 where masked; ∂loss/∂s after `d_logits_`, up to a factor a row
    row_sum: Tensor  # (T,)
    pair_row: Tensor  # (p,) within the tile
    pair_candidate: Tensor
    pair_weight: Tensor
    pair_loss: Tensor
    pair_gradient: Tensor  # (p,) -∂loss/∂(positive's logit), weights included

    def d_logits_(self) -> Tensor:
        """Turn ``logits`` in place into ∂loss/∂s divided by the (T,) row factor that is returned.

        The factor stays outside, so that the matrix products apply it to (T, dim) instead of (T, B). The positive is
        subtracted inside the tile: p - 1 before the sum over candidates, as the plain formula does, loses nothing
        where p is close to 1.
        """
        mass = torch.zeros_like(self.row_sum).index_add_(0, self.pair_row, self.pair_gradient)
        share = torch.where(self.pair_gradient > 0, self.pair_gradient / mass[self.pair_row], 0.0)
        at_positive = -share * self.row_sum[self.pair_row]
        self.logits.index_put_((self.pair_row, self.pair_candidate), at_positive, accumulate=True)
        return torch.where(mass > 0, mass / self.row_sum, 0.0)


def _tiles(anchors: Tensor, candidates: Tensor, alpha: Tensor, targets: SoftmaxTargets) -> Iterator[_Tile]:
    """Yield the anchors tile by tile: scale, then correct, then mask, then sum."""
    tiles = row_tiles(anchors, candidates)
    log_weight = targets.candidate_log_weight.to(anchors.dtype)
    weight = targets.weight.to(anchors.dtype)
    # Pairs in the order of anchors: those of a tile are then one slice.
    pair_order = torch.argsort(targets.anchor, stable=True)
    pair_cuts = tile_cuts(targets.anchor[pair_order], tiles)
    false_negatives = (
        None
        if targets.false_negatives is None
        else targets.false_negatives[:, torch.argsort(targets.false_negatives[0])]
    )
    false_negative_cuts = None if false_negatives is None else tile_cuts(false_negatives[0], tiles)

    for number, rows in enumerate(tiles):
        pairs = pair_order[pair_cuts[number]]
        pair_row, pair_candidate = targets.anchor[pairs] - rows.start, targets.candidate[pairs]

        logits = torch.addmm(log_weight, anchors[rows] * alpha, candidates.T)
        positive = logits[pair_row, pair_candidate] - log_weight[pair_candidate]
        if targets.positive_offset is not None:
            positive = positive + targets.positive_offset[pairs].to(positive.dtype)
        if false_negatives is not None and false_negative_cuts is not None:
            masked = false_negatives[:, false_negative_cuts[number]]
            logits[masked[0] - rows.start, masked[1]] = -torch.inf
        if targets.negative_offset is not None:
            logits += targets.negative_offset[rows, None].to(logits.dtype)

        # A row without any negative has the maximum -inf; 0 keeps its sum at 0 instead of NaN.
        largest = logits.amax(dim=1).nan_to_num(neginf=0.0)
        row_sum = logits.sub_(largest[:, None]).exp_().sum(dim=1)
        # log Σ exp(s) - s⁺, the large terms subtracted first: nothing is lost where the positive is the maximum.
        margin = row_sum.log()[pair_row] + (largest[pair_row] - positive)
        if false_negatives is None:
            pair_loss, pair_gradient = margin, weight[pairs]
        else:
            pair_loss = -torch.nn.functional.logsigmoid(-margin)
            pair_gradient = weight[pairs] * torch.sigmoid(margin)
        yield _Tile(rows, logits, row_sum, pair_row, pair_candidate, weight[pairs], pair_loss, pair_gradient)


def row_tiles(anchors: Tensor, candidates: Tensor) -> list[slice]:
    """Rows of the anchors in tiles that, against all candidates, fit the budget of the device."""
    limit = _TILE_PAIRS_CPU if anchors.device.type == "cpu" else _TILE_PAIRS_ACCELERATOR
    height = max(1, limit // max(1, len(candidates)))
    return [slice(start, min(start + height, len(anchors))) for start in range(0, len(anchors), height)]


def tile_cuts(sorted_rows: Tensor, tiles: list[slice]) -> list[slice]:
    """Where each tile's entries stand among ``sorted_rows``."""
    edges = torch.tensor([0, *(rows.stop for rows in tiles)], device=sorted_rows.device)
    cuts = torch.searchsorted(sorted_rows, edges).tolist()
    return [slice(begin, end) for begin, end in pairwise(cuts)]
