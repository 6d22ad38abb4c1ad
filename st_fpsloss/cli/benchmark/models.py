"""The models that are trained: this package's towers and loss, and what sentence-transformers has by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import set_seed

from st_fpsloss.cli.benchmark.budget import Budget, train
from st_fpsloss.cli.benchmark.task import MAX_HISTORY, Task
from st_fpsloss.cli.models import load_model
from st_fpsloss.data import next_item_pairs, next_item_windows
from st_fpsloss.losses import FPSLoss
from st_fpsloss.towers import Categorical, History, Tower, two_tower
from st_fpsloss.training import PrefixCollator

_COLUMNS: dict[str, Any] = {"user": "query", "item": "document", "time": "time", "max_history": MAX_HISTORY}
_ROUTES = {"query": "query", "document": "document"}
_ID_DIM, _ID_DROPOUT, _ID_SCALE, _ID_SCALE_RATE = 128, 0.2, 7.0, 1e-4  # as training_scripts/movielens.py found them
_TEXT_MAX_SCALE, _TEXT_SCALE_SPEED = 30.0, 10  # as st-fpsloss pretrain has them
_MAX_PAIRS = 1_000_000  # a stock data set holds each click with its whole history


@dataclass(frozen=True)
class Settings:
    """How the models are trained.

    Attributes:
        seconds: Of training for each.
        epochs: At most.
        encoder: Folder or Hub id of the encoder of texts.
        batch_size: Clicks in a batch.
        learning_rate: At most.
        seed: Of weights, dropout and the order of clicks.
    """

    seconds: float
    epochs: int
    encoder: str
    batch_size: int
    learning_rate: float
    seed: int = 0

    def arguments(self, rows_per_batch: int, **more: Any) -> dict[str, Any]:
        """The training arguments that all models share."""
        return {
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": rows_per_batch,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            **more,
        }


@dataclass(frozen=True)
class Trained:
    """A trained model, and how it got there."""

    model: SentenceTransformer
    budget: Budget
    facts: dict[str, Any]


def train_ours(task: Task, settings: Settings) -> Trained:
    """Two towers, with FPSLoss corrected for popularity."""
    set_seed(settings.seed)
    if task.user_items:
        return _ours_of_ids(task, settings)
    encoder = settings.encoder
    prompts = {name: prompt for name, prompt in load_model(encoder, False).prompts.items() if name in _ROUTES}
    model = two_tower(Tower(encoder), Tower(encoder), similarity="cosine", prompts=prompts)
    loss = FPSLoss(model, log_q="corrected", max_scale=_TEXT_MAX_SCALE)
    budget = Budget(model, task.validation_evaluator, settings.seconds)
    arguments = settings.arguments(
        settings.batch_size,
        router_mapping=_ROUTES,
        prompts=_prompts(model),
        learning_rate_mapping={"logit_scale": _TEXT_SCALE_SPEED * settings.learning_rate},
    )
    steps = train(model, loss, _text_rows(task), budget, **arguments)
    return Trained(model, budget, {"steps": steps, "alpha": round(loss.alpha, 2)})


def train_stock(task: Task, settings: Settings) -> Trained:
    """The stock loss: over the encoder of texts itself, or over the very id model that ours is."""
    set_seed(settings.seed)
    if task.user_items:
        model, rows = id_model(task), _id_pairs(task, settings.seed)
        more: dict[str, Any] = {"router_mapping": _ROUTES}
        loss = MultipleNegativesRankingLoss(model, scale=_ID_SCALE)
    else:
        model, rows = load_model(settings.encoder, False), _text_rows(task)
        # As the documentation of the loss recommends it.
        more = {"prompts": _prompts(model), "batch_sampler": BatchSamplers.NO_DUPLICATES}
        loss = MultipleNegativesRankingLoss(model)
    budget = Budget(model, task.validation_evaluator, settings.seconds)
    steps = train(model, loss, rows, budget, **settings.arguments(settings.batch_size, **more))
    return Trained(model, budget, {"steps": steps})


def id_model(task: Task) -> SentenceTransformer:
    """Users by the items of their history, weighted by recency, and items by their ids, in one table."""
    history = History(
        "items",
        shared_with="item",
        dim=_ID_DIM,
        max_length=MAX_HISTORY,
        num_hidden_layers=0,
        dropout=_ID_DROPOUT,
    )
    item = Categorical("item", dim=_ID_DIM).fit([str(number) for number in task.clicks])
    return two_tower(
        Tower(features=[history], hidden_dims=(), dropout=_ID_DROPOUT),
        Tower(features=[item], hidden_dims=(), dropout=_ID_DROPOUT),
        embedding_dim=_ID_DIM,
        similarity="cosine",
    )


def _ours_of_ids(task: Task, settings: Settings) -> Trained:
    windows = next_item_windows(task.train, **_COLUMNS)
    histories = windows["items"][:]
    clicks = sum(len(items) - 1 for items in histories)
    model = id_model(task)
    loss = FPSLoss(model, scale=_ID_SCALE, log_q="corrected", mini_batch_num_tokens=16384)
    budget = Budget(model, task.validation_evaluator, settings.seconds)
    documents = {str(number): document for number, document in task.document_inputs.items()}
    steps = train(
        model,
        loss,
        Dataset.from_dict({"query": [{"items": items} for items in histories]}),
        budget,
        PrefixCollator(model, history="items", documents=documents),
        **settings.arguments(
            max(1, round(settings.batch_size * len(histories) / clicks)),
            router_mapping=_ROUTES,
            learning_rate_mapping={"logit_scale": _ID_SCALE_RATE},
        ),
    )
    return Trained(model, budget, {"steps": steps, "alpha": round(loss.alpha, 2)})


def _id_pairs(task: Task, seed: int) -> Dataset:
    """A row for each click: the history before it, and the item."""
    pairs = next_item_pairs(task.train, **_COLUMNS)
    if len(pairs) > _MAX_PAIRS:
        pairs = pairs.select(np.random.default_rng(seed).permutation(len(pairs))[:_MAX_PAIRS])
    return Dataset.from_dict(
        {
            "query": [{"items": items.split()} for items in pairs["query"][:]],
            "document": [{"item": item} for item in pairs["document"][:]],
        }
    )


def _text_rows(task: Task) -> Dataset:
    return Dataset.from_dict(
        {
            "query": [task.queries[number] for number in task.train["query"][:]],
            "document": [task.documents[number] for number in task.train["document"][:]],
        }
    )


def _prompts(model: SentenceTransformer) -> dict[str, str] | None:
    """The prompts of the columns, as encoding puts them."""
    return {name: prompt for name, prompt in model.prompts.items() if name in _ROUTES and prompt} or None
