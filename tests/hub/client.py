"""What users' processes do with the Hub: ``python -m tests.hub.client author|reader FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from st_fpsloss import Categorical, FPSLoss, History, LossStateCallback, Numerical, Tower, two_tower
from st_fpsloss.towers import id_embedding

WORDS = ["red", "shoes", "rain", "coat"]
QUERIES = {
    "text": ["red shoes", "rain coat"],
    "feature": [{"text": "red shoes", "user": "u1", "age": 30}, {"text": "rain coat", "user": "u2"}],
    "history": [{"seen": ["d1", "d2"]}, {"seen": []}],
}


def query_tower(kind: str) -> Tower:
    """A small query tower of each kind of model."""
    if kind == "history":
        return Tower(None, features=[History("seen", vocabulary=["d1", "d2"], dim=8)], hidden_dims=(8,))
    table = id_embedding(WORDS, 8)
    if kind == "text":
        return Tower(table, hidden_dims=(8,))
    features = [Categorical("user", vocabulary=["u1", "u2"], dim=4), Numerical("age", mean=30, std=5)]
    return Tower(table, features=features, hidden_dims=(8,))


def build(kind: str) -> SentenceTransformer:
    """An untrained model."""
    return two_tower(query_tower(kind), Tower(id_embedding(WORDS, 8), hidden_dims=(8,)), embedding_dim=8)


def push(kind: str, folder: Path) -> None:
    """Push a model, and keep its embeddings of the queries."""
    model = build(kind)
    model.push_to_hub(f"tester/{kind}", private=kind == "text")
    np.save(folder / f"{kind}-pushed.npy", model.encode_query(QUERIES[kind]))


def load(kind: str, folder: Path) -> None:
    """Load a model by its repository id, and keep its embeddings of the queries."""
    model = SentenceTransformer(f"tester/{kind}", trust_remote_code=kind != "text")
    np.save(folder / f"{kind}-loaded.npy", model.encode_query(QUERIES[kind]))


def train(folder: Path) -> None:
    """Train, and push every checkpoint; keep the learned log α."""
    model = build("text")
    loss = FPSLoss(model)
    clicks = Dataset.from_dict({"query": QUERIES["text"] * 8, "document": ["shoes", "coat"] * 8})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        push_to_hub=True,
        hub_model_id="tester/trained",
        hub_strategy="all_checkpoints",
        hub_always_push=True,  # also while an earlier push is under way
        router_mapping={"query": "query", "document": "document"},
        report_to=[],
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=clicks, loss=loss, callbacks=[LossStateCallback(loss)]
    )
    trainer.train()
    trainer.push_to_hub()
    (folder / "logit_scale.json").write_text(json.dumps(loss.logit_scale.item()))


def author(folder: Path) -> None:
    """Push one of each kind, one that fails on its way, and checkpoints during training."""
    for kind in QUERIES:
        push(kind, folder)
    try:
        build("text").push_to_hub("tester/broken")
    except HfHubHTTPError as error:
        (folder / "broken.txt").write_text(str(error))
    train(folder)


def reader(folder: Path) -> None:
    """Load what was pushed, and try a private model without a token."""
    for kind in QUERIES:
        load(kind, folder)
    try:
        SentenceTransformer("tester/text", token=False, cache_folder=str(folder / "another-cache"))
    except Exception as error:
        (folder / "private.txt").write_text(repr(error))


if __name__ == "__main__":
    {"author": author, "reader": reader}[sys.argv[1]](Path(sys.argv[2]))
