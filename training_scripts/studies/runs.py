"""One training run of a study: what it is made of, its budget, and the file that collects the results."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from st_fpsloss import (
    FPSLoss,
    FullSoftmaxLoss,
    LossStateCallback,
    PairCELoss,
    SampledSoftmaxLoss,
    SigmoidLoss,
    Tower,
    TripletLoss,
    two_tower,
)
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.negatives.sampled import mixture_frequencies, with_negatives
from st_fpsloss.towers import id_embedding
from st_fpsloss.utils.files import append_json_line, json_lines
from training_scripts.studies.data import Task
from training_scripts.studies.norm_penalty import NormPenaltyFPSLoss

logger = logging.getLogger(__name__)

# The fixed small configuration of all runs.
EMBEDDING_DIM = 128
BATCH_SIZE = 512
LEARNING_RATE = 2e-3
NUM_NEGATIVES = 10
LOSSES: dict[str, type[ClickLoss]] = {
    "fps": FPSLoss,
    "fps_norm_penalty": NormPenaltyFPSLoss,
    "full_softmax": FullSoftmaxLoss,
    "pair_ce": PairCELoss,
    "triplet": TripletLoss,
    "sampled_softmax": SampledSoftmaxLoss,
    "sigmoid": SigmoidLoss,
}


@dataclass(frozen=True)
class Stage:
    """A part of a run with a loss of its own.

    Args:
        loss: a key of ``LOSSES``.
        settings: arguments of the loss.
        negatives: explicit negatives a row, drawn anew every epoch; 0 for in-batch negatives.
        power: they are drawn in proportion to clicks to this power.
        graded: learn from a better and a worse document of a query instead of clicks.
        share: part of the run's tokens.
        batch_size: rows of a batch.
        scale_learning_rate: learning rate of log α.
    """

    loss: str
    settings: Mapping[str, Any]
    negatives: int = 0
    power: float = 0.75
    graded: bool = False
    share: float = 1.0
    batch_size: int = BATCH_SIZE
    scale_learning_rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Run:
    """All that a result depends on."""

    data: str
    stages: tuple[Stage, ...]
    seed: int
    num_tokens: int  # that the encoders read in training; each distinct row of a batch counts once
    similarity: str = "cosine"

    @property
    def key(self) -> str:
        """The same for equal runs, whatever study they belong to."""
        return json.dumps(asdict(self), sort_keys=True)


class ResultsFile:
    """Results as lines of JSON, each appended when its run ends: a study can be stopped and started again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.by_key: dict[str, dict[str, Any]] = {result["key"]: result for result in json_lines(path)}

    def append(self, run: Run, result: dict[str, Any]) -> None:
        """Keep the result of a run."""
        self.by_key[run.key] = {"key": run.key, **result}
        append_json_line(self.path, self.by_key[run.key])


class TokenBudget(TrainerCallback, AbstractContextManager["TokenBudget"]):
    """Ends training when the encoders have read so many tokens, and counts them while it is entered."""

    def __init__(self, model: SentenceTransformer, num_tokens: float) -> None:
        self.left = num_tokens
        self.used = 0
        self._hooks = [
            module.register_forward_pre_hook(self._count)
            for module in model.modules()
            if isinstance(module, StaticEmbedding)
        ]

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self.used += inputs[0]["input_ids"].numel()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the step that reached the budget."""
        control.should_training_stop = self.used >= self.left

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def execute(run: Run, task: Task) -> dict[str, Any]:
    """Train and evaluate; NDCG@10 of each query at the end of training, no step chosen."""
    set_seed(run.seed)
    started = time.time()
    model = _model(task, run.similarity)
    losses = []
    for stage in run.stages:
        with TokenBudget(model, stage.share * run.num_tokens) as budget:
            losses.append({"name": stage.loss, **_train(run, stage, task, model, budget), "tokens": budget.used})
    result: dict[str, Any] = {"losses": losses, "seconds": round(time.time() - started, 1)}
    for name, evaluator in (("validation", task.validation), ("test", task.test)):
        values = evaluator.per_query(model)["ndcg@10"]
        result[name] = round(float(values.mean()), 5)
        result[f"{name}_per_query"] = [round(float(value), 4) for value in values]
    return result


def _model(task: Task, similarity: str) -> SentenceTransformer:
    """Both towers read a bag of words from one table; each has a linear layer of its own."""
    table = id_embedding(task.words, embedding_dim=EMBEDDING_DIM)
    query, document = (Tower(table, hidden_dims=(), dropout=0.2) for _ in range(2))
    return two_tower(query, document, embedding_dim=EMBEDDING_DIM, similarity=similarity)


def _pairs(run: Run, stage: Stage, task: Task) -> Dataset:
    if stage.graded:
        assert task.graded is not None, f"{run.data} has no grades"
        return task.graded
    if stage.negatives:
        return with_negatives(task.pairs, num_negatives=stage.negatives, power=stage.power, seed=run.seed)
    return task.pairs


def _train(run: Run, stage: Stage, task: Task, model: SentenceTransformer, budget: TokenBudget) -> dict[str, Any]:
    settings = dict(stage.settings)
    if stage.loss == "full_softmax":
        settings["corpus"] = list(task.documents.values())
    pairs = _pairs(run, stage, task)
    if stage.negatives and settings.get("log_q"):
        settings["frequencies"] = mixture_frequencies(pairs, model, in_batch=False)
    loss = LOSSES[stage.loss](model, mini_batch_num_tokens=2**17, **settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=10**6,  # the budget of tokens ends it
            per_device_train_batch_size=stage.batch_size,
            learning_rate=LEARNING_RATE,
            learning_rate_mapping={"logit_scale": stage.scale_learning_rate},
            lr_scheduler_type="constant",
            router_mapping={
                column: "document" if number else "query" for number, column in enumerate(pairs.column_names)
            },
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=run.seed,
        )
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=pairs,
            loss=loss,
            callbacks=[LossStateCallback(loss), budget],
        ).train()
    return {"alpha": round(loss.alpha, 3)}
