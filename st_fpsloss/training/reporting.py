"""The figures of a loss in what the trainer logs: early enough for TensorBoard, W&B and all that reads them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.training.diagnostics import LossDiagnostics

logger = logging.getLogger(__name__)


class LossFigures(TrainerCallback):
    """Adds α, β and the figures of the last batch to the log entries of the training loss.

    A callback of its own, since it has to run before those that ``report_to`` brings, while LossStateCallback has to
    run after the callbacks that decide about saving.

    Args:
        losses: the losses by data set; ``""`` is the name of a single one.
    """

    def __init__(self, losses: Mapping[str, ClickLoss]) -> None:
        self._losses = losses
        self.alpha_gradients: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Start a new run."""
        self._diagnostics = {name: LossDiagnostics() for name in self._losses}
        # Of the steps 1, 2, 4, 8, ...: for a run that ends before it logs.
        self._early = {name: LossDiagnostics() for name in self._losses}
        self.alpha_gradients.clear()
        for loss in self._losses.values():
            loss.last_batch = None

    def look(self, step: int) -> None:
        """Take the figures of an early step."""
        if step & (step - 1) == 0:
            for name, loss in self._losses.items():
                self._early[name].add(loss.batch_statistics())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the entry, and to its copy in ``log_history``."""
        if logs is None or "loss" not in logs:
            return
        for name, loss in self._losses.items():
            prefix = f"loss/{name}/" if name else "loss/"
            values = {"alpha": loss.alpha, "temperature": loss.temperature, "beta": loss.beta}
            if name in self.alpha_gradients:
                values["alpha_grad"] = self.alpha_gradients[name]
            figures = loss.batch_statistics()
            self._diagnostics[name].add(figures)
            loss.last_batch = None
            entries = {prefix + key: value for key, value in (values | figures).items()}
            logs.update(entries)
            if state.log_history:
                state.log_history[-1].update(entries)

    def sum_up(self) -> None:
        """Log a line about each loss, and warn of what went wrong."""
        for name, loss in self._losses.items():
            means = self._diagnostics[name].means() or self._early[name].means()
            logger.info("%s%s", f"{name}: " if name else "", loss.summary(means))
            warn(name, loss.training_warnings(means))


def warn(name: str, sentences: list[str]) -> None:
    """Log sentences about a loss as warnings."""
    for sentence in sentences:
        logger.warning("%s%s", f"{name}: " if name else "", sentence)


def run_first(callback: TrainerCallback) -> None:
    """Make the trainer that is calling run a callback before all its others.

    transformers runs callbacks in their order, those of ``report_to`` before those that a user passes, and tells a
    callback neither the trainer nor the others; so they are looked for among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            others = [other for other in handler.callbacks if not isinstance(other, type(callback))]
            handler.callbacks = [callback, *others]  # a new list: the old one is being gone through
            return
        frame = frame.f_back
