"""Rows a second with 10 sampled negatives each, on one core: their numbers, their texts, and out of the data set.

Run:
    python -m tests.benchmarks.negatives --num_rows 1000000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from datasets import Dataset

from st_fpsloss.negatives.sampled import with_negatives

NUM_NEGATIVES, CHUNK = 10, 200_000


def log(num_rows: int, num_documents: int = 100_000, num_queries: int = 100_000, seed: int = 0) -> Dataset:
    """Clicks on documents with p ∝ 1/rank, by queries that are all alike."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, num_documents + 1)
    documents = rng.choice(num_documents, num_rows, p=p / p.sum())
    queries = rng.integers(0, num_queries, num_rows)
    return Dataset.from_dict({"query": [f"query {q}" for q in queries], "document": [f"item {d}" for d in documents]})


def rows_a_second(call: Callable[[], object], num_rows: int, runs: int = 5) -> float:
    """By the processor's time, which others on the machine do not lengthen; the median of some runs."""
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return num_rows / float(np.median(seconds))


def measure(num_rows: int) -> dict[str, float]:
    """Rows a second of each stage."""
    clicks = log(num_rows)
    start = time.process_time()
    dataset = with_negatives(clicks, NUM_NEGATIVES)
    built = num_rows / (time.process_time() - start)
    draws = dataset.format["format_kwargs"]["transform"]
    rows = np.random.default_rng(1).permutation(num_rows)[:CHUNK]
    batch = {name: rows.tolist() for name in draws.columns}
    some = rows[:20_000]

    def fetch(source: Dataset) -> None:
        for begin in range(0, len(some), 1024):
            source.__getitems__(some[begin : begin + 1024].tolist())

    return {
        "preparing the data set": built,
        "numbers of negatives": rows_a_second(lambda: draws.numbers(rows), len(rows)),
        "texts of negatives": rows_a_second(lambda: draws(batch), len(rows)),
        "rows out of the data set": rows_a_second(lambda: fetch(dataset), len(some)),
        "... without negatives": rows_a_second(lambda: fetch(clicks), len(some)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=1_000_000)
    for name, value in measure(parser.parse_args().num_rows).items():
        print(f"{name:<28} {value:>12,.0f} rows a second")


if __name__ == "__main__":
    main()
