"""What whole histories save: an epoch of MovieLens-100K with the stock trainer, each prefix a row or each history one.

The users' histories of up to 50 films go through the transformer of ``History`` (2 layers, dim 64), the films are id,
genres and year; FPSLoss. Both epochs learn the same 97,171 clicks. Time is the processor's.

Run:
    python -m tests.benchmarks.prefixes
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from st_fpsloss import FPSLoss, LossStateCallback
from st_fpsloss.data.movielens import load_movielens_100k
from st_fpsloss.data.next_item import next_item_windows
from st_fpsloss.towers import Categorical, History, Numerical, Tags, Tower, two_tower
from st_fpsloss.training.prefix_collator import PrefixCollator

MAX_HISTORY = 50
WINDOWS_A_BATCH, CLICKS_A_BATCH = 16, 512


def films_and_windows() -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """Films as documents, and the users' histories in training, in windows."""
    data = load_movielens_100k()
    films = {
        str(film["item_id"]): {"item": str(film["item_id"]), "genres": film["genres"], "year": film["year"]}
        for film in data.items
    }
    log = data.splits()["train"]
    windows = next_item_windows(log, user="user_id", item="item_id", time="timestamp", max_history=MAX_HISTORY)
    return films, windows["items"][:]


def two_towers(films: dict[str, dict[str, Any]]) -> SentenceTransformer:
    """Users by their history, films by features."""
    torch.manual_seed(0)
    film = [
        Categorical("item", vocabulary=tuple(films), dim=64),
        Tags("genres").fit([row["genres"] for row in films.values()]),
        Numerical("year").fit([row["year"] for row in films.values()]),
    ]
    user = History("seen", shared_with="item", max_length=MAX_HISTORY, num_hidden_layers=2, dim=64)
    return two_tower(Tower(features=[user]), Tower(features=film), embedding_dim=64)


def seconds_an_epoch(whole: bool, max_steps: int) -> tuple[float, float]:
    """Processor seconds of an epoch, and clicks of a batch; from the time of ``max_steps`` steps, -1 for all."""
    films, windows = films_and_windows()
    model = two_towers(films)
    num_clicks = sum(len(window) - 1 for window in windows)
    collator = None
    if whole:
        batch_size, collator = WINDOWS_A_BATCH, PrefixCollator(model, "seen", films)
        rows = Dataset.from_dict({"query": [{"seen": window} for window in windows]})
    else:
        batch_size = CLICKS_A_BATCH
        clicks = [(window[:place], window[place]) for window in windows for place in range(1, len(window))]
        queries, documents = [{"seen": seen} for seen, _ in clicks], [films[film] for _, film in clicks]
        rows = Dataset.from_dict({"query": queries, "document": documents})
    steps = -(-len(rows) // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            router_mapping={"query": "query", "document": "document"},
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        loss = FPSLoss(model, mini_batch_num_tokens=16384)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            loss=loss,
            data_collator=collator,
            callbacks=[LossStateCallback(loss)],
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    return seconds * steps / (steps if max_steps < 0 else max_steps), num_clicks / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_steps", type=int, default=-1, help="steps of each that are timed; all by default")
    parser.add_argument("--runs", type=int, default=1, help="each is the faster of so many runs")
    options = parser.parse_args()
    times = {}
    for whole in (True, False):
        times[whole], clicks = min(seconds_an_epoch(whole, options.max_steps) for _ in range(options.runs))
        kind = "whole histories" if whole else "prefix by prefix"
        print(f"{kind}: {times[whole]:.1f} s an epoch, {clicks:.0f} clicks a batch", flush=True)
    print(f"whole histories are {times[False] / times[True]:.1f} times as fast")
