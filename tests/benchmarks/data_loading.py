"""What data loading (reading rows, collating, tokenizing) costs beside the rest of a step of the stock trainer.

The Zipf click log (see ``zipf.py``), through the stock trainer's own data loader, with the stock collator and with
:class:`st_fpsloss.training.DeduplicatingCollator`. Towers: ``text``: MiniLM documents, 2-layer MiniLM queries;
``static`` a StaticEmbedding of 256 dimensions for both; ``features`` those of ``feature_cost.py`` without text, a
history of up to 50 ids for queries. The step is forward, backward and AdamW.

Run:
    python -m tests.benchmarks.data_loading --batch_size 4096 --towers static features
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch.optim import Optimizer
from transformers import AutoTokenizer

from st_fpsloss import FPSLoss, Tower, two_tower
from st_fpsloss.training.collator import DeduplicatingCollator
from tests.benchmarks import feature_cost
from tests.benchmarks.training_step import minilm
from tests.benchmarks.zipf import zipf_clicks

ROUTES = {"query": "query", "document": "document"}


def text_towers() -> SentenceTransformer:
    """MiniLM documents, 2-layer MiniLM queries."""
    return two_tower(Tower(minilm(), num_hidden_layers=2), Tower(minilm()))


def static_towers() -> SentenceTransformer:
    """Bags of word pieces."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    query, document = (Tower(StaticEmbedding(tokenizer, embedding_dim=256), hidden_dims=()) for _ in range(2))
    return two_tower(query, document)


TOWERS: dict[str, Callable[[], SentenceTransformer]] = {
    "text": text_towers,
    "static": static_towers,
    "features": lambda: two_tower(*(Tower(features=side) for side in feature_cost.side_features())),
}


def clicks(towers: str, num_rows: int) -> Dataset:
    """The log in the form that the towers read."""
    queries, documents = zipf_clicks(num_rows)
    if towers != "features":
        return Dataset.from_dict({"query": queries, "document": documents})
    users = [{k: v for k, v in feature_cost.user_of(text).items() if k != "text"} for text in queries]
    items = [{k: v for k, v in feature_cost.item_of(text).items() if k != "text"} for text in documents]
    return Dataset.from_dict({"query": users, "document": items})


def trainer(towers: str, batch_size: int, num_steps: int) -> SentenceTransformerTrainer:
    """The trainer that a user would build."""
    torch.manual_seed(0)
    model = TOWERS[towers]().train()
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=batch_size,
            router_mapping=ROUTES,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=clicks(towers, batch_size * num_steps),
        loss=FPSLoss(model, learn_scale=False, cache_gradients=towers == "text"),
    )


def measure(towers: str, batch_size: int, num_steps: int) -> tuple[float, float, float]:
    """Median seconds of data loading, the same with DeduplicatingCollator, and of the rest of a step."""
    training = trainer(towers, batch_size, num_steps)
    optimizer = torch.optim.AdamW([p for p in training.model.parameters() if p.requires_grad], lr=2e-5)
    loadings = []
    rest: list[float] = []
    for collator in (training.data_collator, DeduplicatingCollator(training.model, training.args)):
        training.data_collator = collator
        batches: Iterator[dict[str, Any]] = iter(training.get_train_dataloader())
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            batch = next(batches)
            seconds.append(time.perf_counter() - start)
            if not loadings:
                rest.append(seconds_of_a_step(training, batch, optimizer))
        loadings.append(statistics.median(seconds))
    return loadings[0], loadings[1], statistics.median(rest)


def seconds_of_a_step(training: SentenceTransformerTrainer, batch: dict[str, Any], optimizer: Optimizer) -> float:
    """Forward, backward and update."""
    start = time.perf_counter()
    features, labels = training.collect_features(batch)
    training.loss(features, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS))
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.batch_size} rows, medians of {options.steps} steps, {torch.get_num_threads()} threads\n")
    print("| towers | data loading, s | with DeduplicatingCollator, s | the rest of the step, s | share | ours |")
    print("|---|---|---|---|---|---|")
    for towers in options.towers:
        stock, ours, rest = measure(towers, options.batch_size, options.steps)
        shares = (loading / (loading + rest) for loading in (stock, ours))
        print(f"| {towers} | {stock:.3f} | {ours:.3f} | {rest:.3f} | {' | '.join(map('{:.0%}'.format, shares))} |")


if __name__ == "__main__":
    main()
