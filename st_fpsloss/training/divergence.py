"""Divergence: a loss, an α or a weight that is not finite ends the run before it is saved over what was good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from st_fpsloss.losses.base import ClickLoss


class LossValues:
    """The sum of all values that losses have returned in training since it was last taken.

    It stays on the losses' device, so that a step has one figure to read, whatever it accumulates.

    Args:
        losses: the losses by data set.
    """

    def __init__(self, losses: Mapping[str, ClickLoss]) -> None:
        self.seen: set[str] = set()
        """Names of the losses that have seen a batch."""
        self._total: Tensor | None = None
        for name, loss in losses.items():
            loss.register_forward_hook(self._hook(name))

    def take(self, like: Tensor) -> Tensor:
        """The sum () with the device and dtype of another tensor; 0 if no loss was called. Starts again at 0."""
        total, self._total = self._total, None
        return torch.zeros_like(like) if total is None else total.to(like)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: Any, value: Tensor) -> None:
            if torch.is_grad_enabled():
                self.seen.add(name)
                self._total = value.detach() if self._total is None else self._total + value.detach()

        return add


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number in every tensor is finite, with one synchronisation for all of them."""
    ends = [torch.stack(tensor.detach().aminmax()).double() for tensor in tensors if tensor.numel()]
    return not ends or bool(torch.stack([end.cpu() for end in ends]).isfinite().all())


def check_weights(model: nn.Module, losses: Mapping[str, ClickLoss], args: TrainingArguments, step: int) -> None:
    """Refuse to go on with, and to save, parameters that are not finite.

    Raises:
        FloatingPointError: If a parameter of the model, an α or a β is not finite.
    """
    modules = {"the model": model, **{f"loss {name}".strip(): loss.scale_and_bias for name, loss in losses.items()}}
    for title, module in modules.items():
        if not all_finite(module.parameters()):
            names = [name for name, parameter in module.named_parameters() if not all_finite([parameter])]
            raise diverged(f"{len(names)} parameters of {title} are not finite, {names[0]!r} the first", args, step)


def diverged(what: str, args: TrainingArguments | None, step: int) -> FloatingPointError:
    """The error of a run that cannot recover, with what to change."""
    rate = "" if args is None else f" (learning_rate={args.learning_rate:g}, max_grad_norm={args.max_grad_norm:g})"
    fp16 = " Train with bf16 instead of fp16." if args is not None and args.fp16 else ""
    return FloatingPointError(
        f"Training diverged in step {step}: {what}. This step is not saved; earlier checkpoints are untouched. "
        f"Lower `learning_rate`, warm it up, and keep `max_grad_norm` above 0{rate}; give α a smaller `scale` or "
        f'`max_scale`, or a lower rate, learning_rate_mapping={{"logit_scale": ...}}.{fp16} Then start again, or go on '
        "with resume_from_checkpoint=last_complete_checkpoint(output_dir)."
    )
