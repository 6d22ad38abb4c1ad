"""A small two-tower model with every kind of side feature, and inputs of all shapes for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import InputModule
from torch import nn

import st_fpsloss
from st_fpsloss import FPSLoss, LossStateCallback
from st_fpsloss.towers import Categorical, History, Numerical, Tags, Tower, id_transformer, two_tower
from st_fpsloss.towers.modules import base as package_module
from st_fpsloss.towers.modules.document_bias import DocumentBias
from st_fpsloss.towers.modules.feature_encoders import FeatureFusion
from st_fpsloss.towers.modules.feature_input import FeatureInput

IDS = [f"i{n}" for n in range(20)]
GENRES = ["drama", "comedy", "horror"]

CLICKS = 12
QUERIES: list[Any] = [
    {"seen": ["i1", "i2", "i3"], "age": 31, "job": "nurse"},
    {"seen": [], "age": None, "job": None},
    {},
    {"seen": None, "job": "astronaut"},
    {"seen": np.array(["i4", "never seen"]), "age": np.float32(44.5)},
    {"seen": [f"i{n % 20}" for n in range(300)], "age": np.int64(20), "job": np.str_("cook")},
]
DOCUMENTS: list[Any] = [
    "i1 i2 i3",
    {"text": "i1 i2 i3"},
    {"text": "i4", "item_id": "i4", "genres": ["drama", "horror"], "year": 1994},
    {"text": None, "item_id": "never seen", "genres": ["western"], "year": np.float64(1950)},
    {"item_id": "i7", "genres": [], "year": None},
    {},
    {"text": "i9 " * 3334, "item_id": np.str_("i9"), "genres": ("comedy",), "year": np.int32(2001)},
]


def features(id_dropout: float = 0.0) -> tuple[list, list]:
    """Features of queries and of documents; the history shares the documents' table."""
    query = [
        History("seen", max_length=5, dim=16, num_hidden_layers=1, dropout=id_dropout, shared_with="item_id"),
        Numerical("age").fit([20, 30, 40]),
        Categorical("job", vocabulary=["nurse", "cook"], dim=3),
    ]
    document = [
        Categorical("item_id", vocabulary=IDS, dim=16, id_dropout=id_dropout),
        Tags("genres", vocabulary=GENRES, pooling="attention"),
        Numerical("year", transform="quantile").fit(range(1930, 2000)),
    ]
    return query, document


def words() -> InputModule:
    return id_transformer(IDS, hidden_size=16, num_hidden_layers=1, max_seq_length=12, dropout=0.0)


def open_gates(model: SentenceTransformer) -> SentenceTransformer:
    """Gives what starts at zero values of a trained model, so that features and bias have an effect."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        for linear in (getattr(module, "gate", None), getattr(module, "linear", None)):
            if isinstance(module, (FeatureFusion, DocumentBias)) and isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, generator=generator)
    return model


def featured_model(
    text: Any = "words", id_dropout: float = 0.0, document_bias: bool = True, **arguments: Any
) -> SentenceTransformer:
    """Users of features alone; items of a text (``text=None``: none) and features."""
    torch.manual_seed(0)
    query, document = features(id_dropout)
    encoder = words() if text == "words" else text
    model = two_tower(
        Tower(None, features=query, hidden_dims=(16,)),
        Tower(encoder, features=document, hidden_dims=(16,), **arguments),
        embedding_dim=8,
        document_bias=document_bias,
    )
    return open_gates(model)


def first(model: SentenceTransformer, route: str) -> FeatureInput:
    """The input module of a tower."""
    return model[0].sub_modules[route][0]


def kinds(model: SentenceTransformer, route: str) -> list[str]:
    """What a tower is made of."""
    return [type(module).__name__ for module in model[0].sub_modules[route]]


def columns(num_rows: int = CLICKS) -> dict[str, list[dict]]:
    """Clicks with the struct columns that Arrow makes of dicts: every key in every row."""
    users = [{"seen": [f"i{n % 4}", "i5"][: n % 3], "age": None if n % 3 else 20 + n, "job": "cook"} for n in range(5)]
    items = [
        {"text": f"i{n}", "item_id": f"i{n}", "genres": ["drama", "horror"][: n % 3], "year": 1990 + n}
        for n in range(7)
    ]
    return {
        "query": [users[n % 5] for n in range(num_rows)],
        "document": [items[n % 7] for n in range(num_rows)],
        "negative": [items[3 * n % 7] for n in range(num_rows)],
    }


def train(
    model: SentenceTransformer,
    data: Dataset,
    folder: Path,
    checkpoint: str | None = None,
    learning_rate_mapping: dict[str, float] | None = None,
) -> None:
    """Three steps of the stock trainer, or the rest of them from a checkpoint."""
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        learning_rate_mapping=learning_rate_mapping or {r"\.encoders\.": 5e-2},
        router_mapping={"query": "query", "document": "document", "negative": "document"},
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = FPSLoss(model)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=loss, callbacks=[LossStateCallback(loss)]
    )
    trainer.train(resume_from_checkpoint=checkpoint)


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The package as if version 0.0.7 were installed; the environment of a process that sees it so."""
    site = tmp_path_factory.mktemp("site")
    (site / "st_fpsloss-0.0.7.dist-info").mkdir()
    (site / "st_fpsloss-0.0.7.dist-info" / "METADATA").write_text("Name: st-fpsloss\nVersion: 0.0.7\n")
    monkeypatch.syspath_prepend(str(site))
    package_module.installed_version.cache_clear()
    root = Path(st_fpsloss.__file__).parents[1]
    yield {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(root)])}
    package_module.installed_version.cache_clear()
