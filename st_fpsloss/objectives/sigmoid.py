"""The sigmoid loss, every index pair of U Wᵀ a decision: :func:`st_fpsloss.objectives.naive.sigmoid`, in tiles.

.. code-block:: text

    clicks q1→d1, q1→d2, q2→d1                      d1   d2   d1     the columns of the three rows
                              row q1→d1        q1   +    x    x      + positive, - negative,
                              row q1→d2        q1   x    +    x      x a positive of another row: left out by "mask",
                              row q2→d1        q2   x    -    +        a - by "keep"

Pairs are computed on unique queries and unique documents, in tiles of queries; the rows and columns that share a pair
enter as its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from st_fpsloss.objectives.softmax import row_tiles, scaled_gradients, tile_cuts


@dataclass(frozen=True)
class SigmoidTargets:
    """What all index pairs are to be.

    Args:
        query_weight: (A,) weight of each query's pairs, summed over its rows.
        count: (B,) how many columns hold each document.
        false_negatives: (2, K) index pairs (query, document), sorted by query, that are no plain negatives ...
        removed: (K,) ... and how much of their weight ``query_weight · count`` is none.
        positives: (2, P) index pairs that are positives, sorted by query.
        positive_weight: (P,) weight of each.
    """

    query_weight: Tensor
    count: Tensor
    false_negatives: Tensor
    removed: Tensor
    positives: Tensor
    positive_weight: Tensor


def sigmoid_over_pairs(
    queries: Tensor, documents: Tensor, alpha: Tensor, beta: Tensor, targets: SigmoidTargets
) -> Tensor:
    """Weighted sum over index pairs of ``-log σ(y (α R + β))``.

    Args:
        queries: (A, dim) embeddings of the unique queries.
        documents: (B, dim) embeddings of the unique documents.
        alpha: scalar that multiplies the dot products, above 0.
        beta: scalar that is added.
        targets: which pairs are positives, and the weights of all.

    Returns:
        Scalar loss.

    Example:
        >>> import torch
        >>> rows, one = torch.arange(2), torch.ones(2)
        >>> pairs = torch.stack([rows, rows])
        >>> targets = SigmoidTargets(one, one, pairs, one, pairs, one)
        >>> sigmoid_over_pairs(torch.eye(2), torch.eye(2), torch.tensor(0.0), torch.tensor(0.0), targets)  # 4 log 2
        tensor(2.7726)
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    with torch.autocast(device_type=queries.device.type, enabled=False):
        return _SigmoidOverPairs.apply(queries.to(dtype), documents.to(dtype), alpha.to(dtype), beta.to(dtype), targets)


class _SigmoidOverPairs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, queries: Tensor, documents: Tensor, alpha: Tensor, beta: Tensor, targets: SigmoidTargets
    ) -> Tensor:
        need_gradient = any(ctx.needs_input_grad)
        loss, d_beta = queries.new_zeros(()), queries.new_zeros(())
        d_queries = torch.zeros_like(queries) if need_gradient else None
        d_documents = torch.zeros_like(documents) if need_gradient else None
        count, query_weight = targets.count.to(queries.dtype), targets.query_weight.to(queries.dtype)
        removed, positive_weight = targets.removed.to(queries.dtype), targets.positive_weight.to(queries.dtype)

        tiles = row_tiles(queries, documents)
        removed_cuts, positive_cuts = (
            tile_cuts(pairs[0], tiles) for pairs in (targets.false_negatives, targets.positives)
        )
        for rows, removed_part, positive_part in zip(tiles, removed_cuts, positive_cuts, strict=True):
            logits = torch.addmm(beta, queries[rows] * alpha, documents.T)
            weights = query_weight[rows, None] * count
            _add_(weights, targets.false_negatives[:, removed_part], rows, -removed[removed_part])
            positive_row, positive_document = targets.positives[:, positive_part]
            at_positive = logits[positive_row - rows.start, positive_document]
            loss += (weights * softplus(logits)).sum() + positive_weight[positive_part] @ softplus(-at_positive)
            if d_queries is None or d_documents is None:
                continue
            d_logits = weights.mul_(logits.sigmoid_())
            d_positive = -positive_weight[positive_part] * torch.sigmoid(-at_positive)
            _add_(d_logits, targets.positives[:, positive_part], rows, d_positive)
            d_queries[rows] = d_logits @ documents
            d_documents.addmm_(d_logits.T, queries[rows])
            d_beta += d_logits.sum()

        if d_queries is not None and d_documents is not None:
            d_alpha = (queries * d_queries).sum()
            ctx.save_for_backward(d_queries.mul_(alpha), d_documents.mul_(alpha), d_alpha, d_beta)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return (*scaled_gradients(ctx, grad_output), None)


def _add_(tile: Tensor, pairs: Tensor, rows: slice, values: Tensor) -> None:
    tile.index_put_((pairs[0] - rows.start, pairs[1]), values, accumulate=True)
