"""What each stage of a large click log costs: seconds and memory a million rows, at several sizes.

The log is synthetic Parquet: ``rows`` clicks of rows/10 queries (p ∝ rank^-0.7) on rows/20 documents (p ∝ rank^-1),
texts of some 30 characters. Each stage runs in a process of its own; memory is what it needs at its peak beyond what
the process had before. CPU seconds are given, for a machine that has other work too. Fingerprints of texts are those
of a small bag of words, so that the figures are not a tokenizer's.

Run:
    python -m tests.benchmarks.log_stages --rows 1000000 5000000
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset, disable_progress_bars

from st_fpsloss.batch.known_positives import KnownPositives
from st_fpsloss.data import load_clicks
from st_fpsloss.frequencies.sketch import FrequencySketch
from st_fpsloss.frequencies.table import Frequencies, FrequencyTable
from st_fpsloss.negatives.sampled import with_negatives
from st_fpsloss.towers import Tower, id_embedding, two_tower
from st_fpsloss.utils.hashing import mix
from tests.benchmarks.memory import MIB, peak, reset_peak, resident

MILLION = 1_000_000
SAMPLE = 200_000  # rows that are read one batch after the other, where the cost of a row is the same everywhere
BATCH = 4096


def write_log(path: Path, rows: int, seed: int = 0) -> None:
    """Write the log, a million rows at a time."""
    rng = np.random.default_rng(seed)
    schema = pa.schema([("query", pa.string()), ("document", pa.string())])
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, MILLION):
            count = min(MILLION, rows - start)
            queries = power_law(rng, rows // 10, 0.7, count)
            documents = power_law(rng, rows // 20, 1.0, count)
            texts = {
                "query": [f"query of {rank // 1000} {rank % 1000} words" for rank in queries],
                "document": [f"title of {rank // 1000} {rank % 1000} by" for rank in documents],
            }
            writer.write_table(pa.table(texts, schema))


def power_law(rng: np.random.Generator, num_items: int, power: float, count: int) -> list[int]:
    """Ranks from 0, by inversion of the continuous distribution p ∝ rank^-power."""
    uniform = rng.random(count)
    if power == 1.0:
        ranks = np.exp(uniform * np.log(num_items + 1))
    else:
        ranks = (1 + uniform * ((num_items + 1) ** (1 - power) - 1)) ** (1 / (1 - power))
    return np.minimum(ranks.astype(np.int64) - 1, num_items - 1).tolist()


class Stage:
    """A stage: what it needs first, and what is measured.

    Args:
        prepare: path -> what the stage is given.
        run: what :meth:`prepare` gave -> number of rows that were handled.
    """

    def __init__(self, prepare: Callable[[Path], Any], run: Callable[[Any], int]) -> None:
        self.prepare, self.run = prepare, run


def clicks_of(path: Path) -> Any:
    """The log, memory-mapped as a data set from the Hub is."""
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))


def read(path: Path) -> int:
    return len(load_clicks(path))


def stream(path: Path) -> int:
    return sum(1 for _ in load_clicks(path, streaming=True))


def shuffle(clicks: Any) -> int:
    return len(clicks.shuffle(seed=0))


def read_shuffled(clicks: Any) -> int:
    for start in range(0, SAMPLE, BATCH):
        clicks.__getitems__(list(range(start, min(start + BATCH, SAMPLE))))
    return SAMPLE


def keys_of(path: Path) -> np.ndarray:
    """Keys of the documents, as random-looking as fingerprints."""
    values = pa.parquet.read_table(path, columns=["document"])["document"].combine_chunks().dictionary_encode()
    return mix(values.indices.to_numpy().astype(np.uint64)).view(np.int64)


def count_into(kind: type[Frequencies]) -> Callable[[np.ndarray], int]:
    def count(keys: np.ndarray) -> int:
        table = kind()
        for start in range(0, len(keys), BATCH):
            some, counts = np.unique(keys[start : start + BATCH], return_counts=True)
            table.update(torch.from_numpy(some), torch.from_numpy(counts))
        return len(keys)

    return count


def with_model(path: Path) -> tuple[Any, Any]:
    """The log, and towers that read its words."""
    words = [*map(str, range(10_000)), "query", "title", "of", "by", "words"]
    return clicks_of(path), two_tower(*(Tower(id_embedding(words, 4), hidden_dims=()) for _ in range(2)))


def count_inputs(prepared: tuple[Any, Any]) -> int:
    clicks, model = prepared
    FrequencyTable.from_inputs(model, clicks["document"], "document")
    return len(clicks)


def pairs(clicks: Any) -> Iterator[tuple[str, str]]:
    for batch in clicks.iter(BATCH):
        yield from zip(batch["query"], batch["document"], strict=True)


def know_positives(prepared: tuple[Any, Any]) -> int:
    clicks, model = prepared
    KnownPositives(model, pairs(clicks))
    return len(clicks)


def known_of(path: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Known positives of the log by keys, and the keys."""
    table = pa.parquet.read_table(path)
    queries, documents = (
        mix(table[name].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.uint64)).view(np.int64)
        for name in ("query", "document")
    )
    known = KnownPositives.__new__(KnownPositives)
    order = np.argsort(queries, kind="stable")
    known._queries, known._documents = queries[order], documents[order]
    return known, queries, documents


def mask(prepared: tuple[Any, np.ndarray, np.ndarray]) -> int:
    known, queries, documents = prepared
    for start in range(0, SAMPLE, BATCH):
        chosen = slice(start, min(start + BATCH, SAMPLE))
        known.cells(*(torch.from_numpy(np.unique(keys[chosen])) for keys in (queries, documents)))
    return SAMPLE


def prepare_negatives(clicks: Any) -> int:
    return len(with_negatives(clicks, 10))


def sampled_rows(path: Path) -> Any:
    return with_negatives(clicks_of(path), 10)


def shuffled(path: Path) -> Any:
    return clicks_of(path).shuffle(seed=0)


STAGES = {
    "read Parquet": Stage(Path, read),
    "read Parquet as a stream": Stage(Path, stream),
    "shuffle": Stage(clicks_of, shuffle),
    "read shuffled rows": Stage(shuffled, read_shuffled),
    "count, FrequencyTable": Stage(keys_of, count_into(FrequencyTable)),
    "count, FrequencySketch": Stage(keys_of, count_into(FrequencySketch)),
    "count, from_inputs": Stage(with_model, count_inputs),
    "known positives": Stage(with_model, know_positives),
    "masks of batches": Stage(known_of, mask),
    "negatives, prepared": Stage(clicks_of, prepare_negatives),
    "negatives, rows with 10": Stage(sampled_rows, read_shuffled),
}


def measure(stage: str, path: str) -> tuple[float, float]:
    """CPU seconds a million rows, and MiB at the peak."""
    disable_progress_bars()
    chosen = STAGES[stage]
    prepared = chosen.prepare(Path(path))
    reset_peak()
    before, start = resident(), time.process_time()
    rows = chosen.run(prepared)
    return (time.process_time() - start) / rows * MILLION, (peak() - before) / MIB


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[MILLION, 5 * MILLION])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    options = parser.parse_args()
    print("| stage | " + " | ".join(f"{rows / MILLION:g} M rows: s a M rows, MiB" for rows in options.rows) + " |")
    print("|---|" + "---|" * len(options.rows))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for rows in options.rows:
            paths.append(Path(folder) / str(rows) / "log.parquet")
            paths[-1].parent.mkdir()
            write_log(paths[-1], rows)
        for stage in options.stages:
            cells = []
            for path in paths:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, memory = pool.apply(measure, (stage, str(path)))
                cells.append(f"{seconds:.2f}, {memory:,.0f}")
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
