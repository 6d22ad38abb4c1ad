"""What is not finite ends a run, and leaves what was saved before it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import nn
from transformers import TrainerCallback

from st_fpsloss import FPSLoss, LossStateCallback, last_complete_checkpoint
from st_fpsloss.training.divergence import all_finite
from tests.losses.conftest import small_model
from tests.training.runs import trainer, weights


class BreakingLoss(FPSLoss):
    """Is not finite in one of its calls."""

    calls, broken_call = 0, 0

    def objective(self, queries, documents, batch):
        self.calls += 1
        value = super().objective(queries, documents, batch)
        return value * math.inf if self.calls == self.broken_call else value


class BreakingCallback(TrainerCallback):
    """Spoils a parameter after a step."""

    def __init__(self, parameter: nn.Parameter, step: int) -> None:
        self.parameter, self.step = parameter, step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.parameter.data.view(-1)[-1] = math.nan


@pytest.mark.parametrize(("micro_batches", "step"), [(1, 5), (2, 3)])  # of two, the first one
@pytest.mark.parametrize("learn_scale", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_in_its_step(tmp_path, learn_scale, micro_batches, step):
    model = small_model()
    loss = BreakingLoss(model, learn_scale=learn_scale)
    loss.broken_call = 5
    training = trainer(
        tmp_path, model=model, loss=loss, save_strategy="steps", save_steps=1, gradient_accumulation_steps=micro_batches
    )
    message = rf"diverged in step {step}: the loss is not finite.*`learning_rate`.*`max_grad_norm`"
    with pytest.raises(FloatingPointError, match=message):
        training.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step - 1}")
    assert weights(model).isfinite().all()


def test_a_learning_rate_that_is_far_too_high_ends_in_an_error_not_in_a_model(tmp_path):
    training = trainer(
        tmp_path, learning_rate=1e30, optim="sgd", max_grad_norm=0.0, save_strategy="steps", save_steps=1
    )
    with pytest.raises(FloatingPointError, match=r"learning_rate=1e\+30, max_grad_norm=0"):
        training.train()
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        assert "NaN" not in path.read_text()


@pytest.mark.parametrize("of", ["model", "loss"])
@pytest.mark.parametrize("moment", ["save", "evaluation", "end"])
def test_parameters_that_are_not_finite_are_neither_saved_nor_evaluated_nor_the_result(tmp_path, of, moment):
    model = small_model()
    loss = FPSLoss(model)
    evaluated = []

    class Evaluator(BaseEvaluator):
        def __call__(self, *args, **kwargs):
            evaluated.append(1)

    options = {
        "save": {"save_strategy": "steps", "save_steps": 2},
        "evaluation": {"eval_strategy": "steps", "eval_steps": 4},
    }
    training = trainer(
        tmp_path, model=model, loss=loss, max_steps=4, callback=False,
        evaluator=Evaluator(), **options.get(moment, {}),
    )  # fmt: skip
    name, parameter = next(iter(model.named_parameters())) if of == "model" else ("logit_scale", loss.logit_scale)
    training.add_callback(BreakingCallback(parameter, step=4))
    training.add_callback(LossStateCallback(loss))
    with pytest.raises(FloatingPointError, match=rf"parameters of {'the model' if of == 'model' else 'loss'}.*{name}"):
        training.train()
    assert not evaluated
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == ({"checkpoint-2"} if moment == "save" else set())


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
def test_a_checkpoint_with_an_alpha_that_is_not_finite_is_passed_over(tmp_path, value):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    path = tmp_path / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["LossStateCallback"]["attributes"]["losses"][""]["logit_scale"] = json.loads(value)
    path.write_text(json.dumps(state))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_every_number_is_looked_at():
    tensors = [torch.zeros(0), torch.ones(3, dtype=torch.float16) * 6e4, torch.ones(2, 2, dtype=torch.float64)]
    assert all_finite(tensors) and all_finite([])
    for value in (math.nan, math.inf, -math.inf):
        for tensor in tensors[1:]:
            broken = tensor.clone()
            broken.view(-1)[-1] = value
            assert not all_finite([*tensors, broken])
