"""Sums over tiles that are differentiated one by one, so that memory holds the graph of one tile alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tile = TypeVar("Tile")


def sum_over_tiles(
    function: Callable[..., tuple[Tensor, Tensor]], tiles: Iterable[Tile], *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """``(Σ loss, Σ weight)`` of ``function(tile, *inputs) -> (loss, weight)`` over tiles.

    The gradient is that of the sum. Each tile's is computed with its value, and only their sum is kept.

    Args:
        function: two scalars of a tile; only the first is differentiated.
        tiles: what the function takes, of any kind.
        inputs: tensors that the function may be differentiated by, all of one precision.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> total, _ = sum_over_tiles(lambda i, x: (x[i] ** 2, x.new_ones(())), range(3), x)
        >>> total.backward()
        >>> x.grad
        tensor([2., 4., 6.])
    """
    return _SumOverTiles.apply(function, tiles, torch.is_grad_enabled(), *inputs)


def in_float32(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Tensors in one precision, float32 or better."""
    dtype = torch.float32
    for one in inputs:
        dtype = torch.promote_types(dtype, one.dtype)
    return tuple(one.to(dtype) for one in inputs)


class _SumOverTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, tiles, with_gradient: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        total, weight = inputs[0].new_zeros(()), inputs[0].new_zeros(())
        needed = [with_gradient and one for one in ctx.needs_input_grad[3:]]
        gradients = [torch.zeros_like(one) if needs else None for one, needs in zip(inputs, needed, strict=True)]
        with torch.set_grad_enabled(any(needed)):
            for tile in tiles:
                leaves = [one.detach().requires_grad_(needs) for one, needs in zip(inputs, needed, strict=True)]
                loss, tile_weight = function(tile, *leaves)
                if loss.requires_grad:
                    wanted = [leaf for leaf in leaves if leaf.requires_grad]
                    sums = [gradient for gradient in gradients if gradient is not None]
                    for gradient, part in zip(sums, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                        if part is not None:
                            gradient.add_(part)
                total = total + loss.detach()
                weight = weight + tile_weight.detach()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(weight)
        return total, weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        scaled = (None if gradient is None else grad_output * gradient for gradient in ctx.saved_tensors)
        return (None, None, None, *scaled)
