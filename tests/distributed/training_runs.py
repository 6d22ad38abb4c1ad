"""Training runs of several ranks through the stock trainer; what each rank saw, for the tests to judge."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from st_fpsloss import FPSLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss
from st_fpsloss.frequencies.sketch import FrequencySketch
from st_fpsloss.losses.base import ClickLoss
from tests.losses.conftest import small_model
from tests.training.runs import click_log, trainer, weights

BOTH = ("query_to_doc", "doc_to_query")
GATHERED = {"directions": BOTH, "gather_across_devices": True, "log_q": "corrected"}
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": 6}


MIXED: list[dict[str, tuple[type[ClickLoss], dict[str, Any]]]] = [
    {"clicks": (FPSLoss, {"log_q": "corrected"}), "sales": (PairCELoss, {})},
    {"clicks": (FPSLoss, {"log_q": "corrected"}), "sales": (FPSLoss, {"log_q": "standard", "directions": BOTH})},
    {"clicks": (SigmoidLoss, {}), "sales": (SampledSoftmaxLoss, {"log_q": "corrected"})},
]


class Recorder(TrainerCallback):
    """α after every step."""

    def __init__(self, loss: FPSLoss) -> None:
        self.loss, self.alphas = loss, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alphas.append(self.loss.alpha)


def run(output_dir: Path, loss_options: dict[str, Any], resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Train, and tell the course of α, the weights, and what the loss would save."""
    model = options.pop("model", None) or small_model(dropout=options.pop("dropout", 0.1))
    loss = FPSLoss(model, **copy.deepcopy(loss_options))  # frequencies are counted by each run for itself
    training = trainer(output_dir, model=model, loss=loss, **options)
    recorder = Recorder(loss)
    training.add_callback(recorder)
    training.train(resume_from_checkpoint=resume)
    return {"alphas": recorder.alphas, "weights": weights(model), "state": loss.export_state()}


def straight_and_resumed(output_dir: Path, loss_options: dict[str, Any], **options: Any) -> dict[str, Any]:
    """8 steps, and 4 + 4."""
    straight = run(output_dir, loss_options, save_strategy="steps", save_steps=4, **options)
    resumed = run(output_dir / "resumed", loss_options, resume=str(output_dir / "checkpoint-4"), **options)
    return {"straight": straight, "resumed": resumed, "output_dir": output_dir}


def defaults(output_dir: Path) -> dict[str, Any]:
    """Nothing set but the callback, with an evaluation in between whose rows do not divide among ranks."""
    return straight_and_resumed(
        output_dir, {"log_q": "corrected"}, eval_dataset=click_log(rows=27, seed=9), eval_strategy="steps", eval_steps=2
    )


def cached_and_accumulated(output_dir: Path) -> dict[str, Any]:
    """Gradient caching with many mini-batches, negatives from all ranks, two micro-batches a step; sketched Q."""
    sketch = FrequencySketch(width=16, half_life=50.0)
    options = {**GATHERED, "cache_gradients": True, "mini_batch_num_tokens": 40, "frequencies": {"document": sketch}}
    return straight_and_resumed(output_dir, options, gradient_accumulation_steps=2, ddp_find_unused_parameters=False)


def like_one_process(output_dir: Path) -> dict[str, Any]:
    """What one process does with batches of as many rows as all ranks here have together."""
    return run(output_dir, GATHERED, per_device_train_batch_size=4, dropout=0.0, **SGD)


def without_callback(output_dir: Path) -> dict[str, Any]:
    """α is nobody's business."""
    return run(output_dir, {}, callback=False)


def fine_tuning_with_a_trainable_pooler(output_dir: Path) -> dict[str, Any]:
    """A folder that was saved and loaded: its poolers take gradients again, and none comes."""
    made = small_model()
    if dist.get_rank() == 0:
        made.save_pretrained(str(output_dir / "model"))
    dist.barrier()
    model = SentenceTransformer(str(output_dir / "model"), device="cpu")
    before = trainable_poolers(model)
    messages = Messages()
    logger = logging.getLogger("st_fpsloss.training.callbacks")
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    done = run(output_dir, {}, model=model, max_steps=2, ddp_find_unused_parameters=False)
    return {**done, "before": before, "after": trainable_poolers(model), "messages": messages.texts}


def several_data_sets(output_dir: Path, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Ranks that draw from different data sets at one step, for one epoch; and the refusal to gather over them."""
    data = DatasetDict({name: click_log(rows=16, seed=number) for number, name in enumerate(("clicks", "sales"))})
    options = {"dataset": data, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    runs = []
    for seed, kinds in itertools.product(seeds, MIXED):
        model = small_model()
        losses = {name: kind(model, **given) for name, (kind, given) in kinds.items()}
        trainer(output_dir, model=model, loss=losses, seed=seed, **options).train()
        tables = {name: getattr(loss, "frequencies", {}) for name, loss in losses.items() if getattr(loss, "log_q", 0)}
        runs.append(
            {
                "counts": {
                    name: {side: table.counts() for side, table in of_loss.items()} for name, of_loss in tables.items()
                },
                "alphas": [loss.alpha for loss in losses.values()],
                "betas": [loss.beta for loss in losses.values()],
                "weights": weights(model),
            }
        )
    model = small_model()
    try:
        trainer(output_dir, model=model, loss=FPSLoss(model, gather_across_devices=True), **options).train()
    except ValueError as error:
        return {"runs": runs, "refusal": str(error)}
    return {"runs": runs, "refusal": ""}


def trainable_poolers(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if "pooler" in name and parameter.requires_grad]


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        defaults,
        cached_and_accumulated,
        like_one_process,
        without_callback,
        fine_tuning_with_a_trainable_pooler,
        several_data_sets,
    )
}
