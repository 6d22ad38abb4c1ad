"""What every loss learns beside the encoders: the scale α and the bias β."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class ScaleAndBias(nn.Module):
    """Holds log α and β.

    A module of its own for its name in the loss: transformers exempts parameters from weight decay by name, and
    ``scale_and_bias.logit_scale`` contains "bias" where a bare ``logit_scale`` would be decayed.
    """

    def __init__(self, scale: float, bias: float, learn_scale: bool, learn_bias: bool) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn_bias)


class ScaledLoss(nn.Module):
    """Base of the losses: α and β, their bound, and their state.

    Args:
        scale: start of α.
        bias: start of β.
        learn_scale: learn α.
        learn_bias: learn β.
        max_scale: bound of α.

    Raises:
        ValueError: If ``scale`` is not above 0, or above ``max_scale``, or that is not finite.
    """

    def __init__(self, scale: float, bias: float, learn_scale: bool, learn_bias: bool, max_scale: float) -> None:
        super().__init__()
        if not 0 < max_scale < math.inf:
            raise ValueError(f"`max_scale` must be a finite number above 0, got {max_scale!r}.")
        if not 0 < scale <= max_scale:
            raise ValueError(f"`scale` must be above 0 and at most `max_scale` = {max_scale}, got {scale!r}.")
        if not math.isfinite(bias):
            raise ValueError(f"`bias` must be a finite number, got {bias!r}.")
        self.max_scale = max_scale
        self.scale_and_bias = ScaleAndBias(scale, bias, learn_scale, learn_bias)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The parameter log α."""
        return self.scale_and_bias.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter:
        """The parameter β."""
        return self.scale_and_bias.logit_bias

    @property
    def alpha(self) -> float:
        """α, what the similarities are multiplied by."""
        return self.logit_scale.detach().exp().item()

    @property
    def beta(self) -> float:
        """β, what is added to the scaled similarities."""
        return self.logit_bias.item()

    @property
    def temperature(self) -> float:
        """1/α."""
        return 1 / self.alpha

    def clamp_(self) -> None:
        """Bring α back to at most ``max_scale`` (CLIP's bound), which an optimizer step may have overshot."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_scale))

    def export_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of the loss, as plain values that JSON keeps exactly."""
        return {
            "class": type(self).__name__,
            "logit_scale": self.logit_scale.item(),
            "logit_bias": self.logit_bias.item(),
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave.

        Raises:
            ValueError: If it is the state of another kind of loss.
        """
        if state["class"] != type(self).__name__:
            raise ValueError(
                f"The checkpoint holds the state of a {state['class']}, not of a {type(self).__name__}. Resume with "
                "the loss that the run was started with, or start a new run from the checkpoint's model."
            )
        with torch.no_grad():
            self.logit_scale.fill_(state["logit_scale"])
            self.logit_bias.fill_(state["logit_bias"])

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {
            "scale": round(self.alpha, 4),
            "learn_scale": self.logit_scale.requires_grad,
            "max_scale": self.max_scale,
        }
