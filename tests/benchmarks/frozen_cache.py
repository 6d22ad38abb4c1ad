"""Epochs over frozen encoders, with what they give for a row kept and without.

MiniLM documents (6 layers) and 2-layer MiniLM queries, both frozen, with MLPs that learn, on a Zipf click log. Each
batch is tokenized as the trainer's collator does it. Seconds are CPU seconds of this process, so that others on the
machine count little.

Run:
    python -m tests.benchmarks.frozen_cache --rows 20000 --epochs 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from st_fpsloss import FPSLoss, Tower, two_tower
from st_fpsloss.training.collator import preprocess_distinct
from tests.benchmarks.training_step import minilm
from tests.benchmarks.zipf import zipf_clicks


def build_model() -> SentenceTransformer:
    """Frozen encoders and MLPs that learn, the same at every call."""
    torch.manual_seed(0)
    query = Tower(minilm(), num_hidden_layers=2, hidden_dims=(512,), frozen=True)
    return two_tower(query, Tower(minilm(), hidden_dims=(512,), frozen=True), embedding_dim=256).train()


def batches(model: SentenceTransformer, rows: int, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """An epoch, tokenized batch by batch."""
    queries, documents = zipf_clicks(rows)
    for start in range(0, rows, batch_size):
        chunk = slice(start, start + batch_size)
        yield [
            preprocess_distinct(model.preprocess, queries[chunk], task="query"),
            preprocess_distinct(model.preprocess, documents[chunk], task="document"),
        ]


def epochs(cache_frozen: bool | str, num_epochs: int, rows: int, batch_size: int) -> tuple[list[float], list[float]]:
    """CPU seconds of each epoch, and the losses of all batches."""
    model = build_model()
    loss = FPSLoss(model, learn_scale=False, cache_frozen=cache_frozen)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    seconds, losses = [], []
    for _ in range(num_epochs):
        start = time.process_time()
        for features in batches(model, rows, batch_size):
            value = loss(features)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        seconds.append(time.process_time() - start)
    return seconds, losses


def main() -> None:
    """Print seconds an epoch and the greatest difference of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--epochs_without", type=int, default=1, help="epochs without the cache, each as long")
    options = parser.parse_args()
    plain_seconds, plain = epochs(False, options.epochs_without, options.rows, options.batch_size)
    print(f"without: {', '.join(f'{s:.1f}' for s in plain_seconds)} CPU seconds an epoch", flush=True)
    with TemporaryDirectory() as folder:
        for name, cache in (("memory", True), ("folder", folder), ("folder, again", folder)):
            seconds, losses = epochs(cache, options.epochs, options.rows, options.batch_size)
            later = sorted(seconds[1:])[len(seconds[1:]) // 2]
            difference = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=False))
            print(
                f"{name}: {', '.join(f'{s:.1f}' for s in seconds)} CPU seconds an epoch; later epochs "
                f"{plain_seconds[0] / later:.1f} times faster than without; losses differ by {difference:.1e} at most",
                flush=True,
            )
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.vectors"))
        print(f"{size / 2**20:.1f} MiB in the folder")


if __name__ == "__main__":
    main()
