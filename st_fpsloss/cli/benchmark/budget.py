"""Training within a budget of time, keeping what ranked best on validation."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState

from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.training import LossStateCallback

_EVALUATIONS = 10  # on validation at most, spread over the run; fewer where they would take longer than training
_WARMUP = 0.05


@dataclass
class Budget(TrainerCallback):
    """Ends training when its time is over; the clock stands still during evaluation.

    Attributes:
        model: The model that is trained.
        evaluator: Of validation.
        seconds: Time to train.
        curve: (seconds, NDCG@10 on validation), one for each evaluation.
    """

    model: SentenceTransformer
    evaluator: RetrievalEvaluator
    seconds: float
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._best: Mapping[str, torch.Tensor] = {}
        self._started = self._paused = 0.0
        self._share = self._last_evaluation = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self._started - self._paused

    def rate(self, _: int) -> float:
        """The learning rate by the share of the run that is over: up at first, then down to 0."""
        if self._share < _WARMUP:
            return max(self._share / _WARMUP, 0.02)
        return max((1 - self._share) / (1 - _WARMUP), 0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Looks how far the run is: by time, or by steps where these are over first."""
        self._share = min(max(self.elapsed / self.seconds, state.global_step / state.max_steps), 1.0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluates when it is time to, and ends the run."""
        share = max(self.elapsed / self.seconds, state.global_step / state.max_steps)
        ends = share >= 1
        since = self.elapsed - (self.curve[-1][0] if self.curve else 0.0)
        if ends or (share * _EVALUATIONS >= len(self.curve) + 1 and since >= self._last_evaluation):
            self._evaluate()
        control.should_training_stop = control.should_training_stop or ends

    def restore_best(self) -> None:
        """Gives the model the weights that ranked best on validation."""
        self.model.load_state_dict(self._best)

    def _evaluate(self) -> None:
        seconds, started = self.elapsed, time.perf_counter()
        self.model.eval()
        value = float(self.evaluator.per_query(self.model)["ndcg@10"].mean())
        self.model.train()
        if not self.curve or value > max(before for _, before in self.curve):
            self._best = copy.deepcopy(self.model.state_dict())
        self.curve.append((round(seconds, 1), value))
        self._last_evaluation = time.perf_counter() - started
        self._paused += self._last_evaluation


class _Trainer(SentenceTransformerTrainer):
    """The stock trainer, its learning rate by the budget."""

    budget: Budget

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Makes the schedule of the budget."""
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, self.budget.rate)
        return self.lr_scheduler


def train(
    model: SentenceTransformer,
    loss: torch.nn.Module,
    rows: Dataset,
    budget: Budget,
    collator: Callable[..., Any] | None = None,
    **arguments: Any,
) -> int:
    """Trains a model within its budget, and leaves it as it ranked best on validation.

    Args:
        model: The model.
        loss: Its loss, one of this package or a stock one.
        rows: What to train on.
        budget: Of this model.
        collator: What makes batches of the rows; None is the stock one.
        **arguments: Of ``SentenceTransformerTrainingArguments``.

    Returns:
        The number of steps that were taken.
    """
    callbacks: list[TrainerCallback] = [budget]
    if isinstance(loss, ClickLoss):
        callbacks.append(LossStateCallback(loss))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder, save_strategy="no", logging_strategy="no", report_to=[], **arguments
            ),
            train_dataset=rows,
            loss=loss,
            callbacks=callbacks,
            data_collator=collator,
        )
        trainer.budget = budget
        trainer.train()
    budget.restore_best()
    model.eval()
    return trainer.state.global_step
