"""Losses over a few negatives a row: :func:`st_fpsloss.objectives.naive.sampled_softmax`, on listed index pairs.

Where every row has a handful of negatives, computing U Wᵀ would be wasteful: only the listed index pairs (row of U, row
of W) are computed. The list may be ragged: some rows have more negatives than others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers that are gathered at a time, so that memory stays at the embeddings and one value a pair.
_CHUNK_NUMBERS = 2**22


def indexed_dot(anchors: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Dot products at chosen index pairs of ``anchors @ candidates.T``, in float32 or better.

    Args:
        anchors: (A, dim) embeddings.
        candidates: (B, dim) embeddings.
        rows: (K,) row of each pair.
        columns: (K,) column of each pair.

    Returns:
        (K,) products.

    Example:
        >>> import torch
        >>> indexed_dot(torch.eye(2), torch.tensor([[3.0, 4.0]]), torch.tensor([1, 0]), torch.tensor([0, 0]))
        tensor([4., 3.])
    """
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
    with torch.autocast(device_type=anchors.device.type, enabled=False):
        return _IndexedDot.apply(anchors.to(dtype), candidates.to(dtype), rows, columns)


class _IndexedDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(anchors, candidates, rows, columns)
        values = anchors.new_empty(len(rows))
        for part in _chunks(len(rows), anchors.shape[1]):
            values[part] = (anchors[rows[part]] * candidates[columns[part]]).sum(dim=1)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        anchors, candidates, rows, columns = ctx.saved_tensors
        d_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        d_candidates = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(rows), anchors.shape[1]):
            factor = gradient[part, None]
            if d_anchors is not None:
                d_anchors.index_add_(0, rows[part], factor * candidates[columns[part]])
            if d_candidates is not None:
                d_candidates.index_add_(0, columns[part], factor * anchors[rows[part]])
        return d_anchors, d_candidates, None, None


def _chunks(num_pairs: int, dim: int) -> list[slice]:
    size = max(1, _CHUNK_NUMBERS // max(1, dim))
    return [slice(start, min(start + size, num_pairs)) for start in range(0, num_pairs, size)]


def sampled_softmax(positive: Tensor, negative: Tensor, row: Tensor) -> Tensor:
    """``-log( exp(s⁺) / (exp(s⁺) + Σ exp(s⁻)) )`` of each row over its own negatives.

    Args:
        positive: (P,) logit of each row's positive.
        negative: (K,) logits of the negatives.
        row: (K,) row that each negative belongs to; every row has at least one.

    Returns:
        (P,) losses.
    """
    largest = torch.full_like(positive, -torch.inf).scatter_reduce(0, row, negative.detach(), "amax")
    total = torch.zeros_like(positive).index_add(0, row, torch.exp(negative - largest[row]))
    # The large terms are subtracted first: nothing is lost where the positive is close to certain.
    return -torch.nn.functional.logsigmoid(-(total.log() + (largest - positive)))
