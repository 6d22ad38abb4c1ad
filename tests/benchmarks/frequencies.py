"""What counting rows costs, and how right a sketch is about far more distinct rows than it has counters.

``python -m tests.benchmarks.frequencies``: tens of millions of distinct keys stream through a FrequencySketch in
batches of 4096, drawn with p ∝ log(1 + 1/rank), which is 1/rank but for the first ranks. The truth are the exact counts
of the same draws. Memory is what the process needs beyond the benchmark's own arrays.

``python -m tests.benchmarks.frequencies --cost``: seconds of ``count_and_look_up`` in a batch of 4096 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from st_fpsloss import FPSLoss
from st_fpsloss.frequencies.sketch import FrequencySketch
from st_fpsloss.frequencies.table import Frequencies, FrequencyTable
from st_fpsloss.utils.hashing import mix
from tests.benchmarks.memory import MIB, peak, reset_peak, resident
from tests.losses.conftest import small_model

BATCH_SIZE = 4096


def keys_of(ranks: np.ndarray) -> torch.Tensor:
    """The keys of rows of these ranks, as random-looking as those of encoded rows."""
    return torch.from_numpy(mix(ranks.astype(np.uint64)).view(np.int64))


class Log:
    """Endless clicks on a catalogue, and how often each rank came.

    Args:
        catalogue: number of rows that can be drawn.
    """

    def __init__(self, catalogue: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._log_catalogue = np.log(catalogue + 1)
        self.counts = np.full(catalogue + 1, 0, dtype=np.uint32)  # written now, so that its memory is not the sketch's
        self.num_distinct = 0

    def ranks(self, num_draws: int) -> np.ndarray:
        """Ranks of draws, from 1 on."""
        return np.exp(self._rng.random(num_draws) * self._log_catalogue).astype(np.int64)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct keys of the next batch, and their counts."""
        ranks, counts = np.unique(self.ranks(BATCH_SIZE), return_counts=True)
        self.num_distinct += int(np.count_nonzero(self.counts[ranks] == 0))
        self.counts[ranks] += counts.astype(np.uint32)
        return keys_of(ranks), torch.from_numpy(counts)


def stream(num_distinct: int, width: int) -> dict[str, float]:
    """Stream until there were so many distinct keys; sizes, seconds and errors."""
    log = Log(catalogue=2 * num_distinct)
    reset_peak()
    before, spent, num_draws = resident(), 0.0, 0
    sketch = FrequencySketch(width=width)
    with tqdm(total=num_distinct, unit="key", unit_scale=True, mininterval=5) as progress:
        while log.num_distinct < num_distinct:
            known = log.num_distinct
            keys, counts = log.batch()
            start = time.perf_counter()
            sketch.update(keys, counts)
            spent += time.perf_counter() - start
            num_draws += BATCH_SIZE
            progress.update(log.num_distinct - known)
    memory = peak() - before
    start = time.perf_counter()
    state = json.dumps(sketch.export_state())
    found = {
        "distinct keys": log.num_distinct,
        "draws": num_draws,
        "counters": sketch.width * sketch.depth,
        "MiB in memory": memory / MIB,
        "MB in a checkpoint": len(state) / 1e6,
        "seconds to export": time.perf_counter() - start,
        "seconds of an update": spent / (num_draws / BATCH_SIZE),
        "distinct keys estimated / true": sketch._num_distinct() / log.num_distinct,
    }
    return {**found, **errors(sketch, log, num_draws)}


def errors(sketch: FrequencySketch, log: Log, num_draws: int) -> dict[str, float]:
    """Of Q for the most frequent keys, and of log Q over draws, against exact counts."""

    def log_errors(ranks: np.ndarray) -> np.ndarray:
        q = (log.counts[ranks] + sketch.prior) / (num_draws + sketch.prior * log.num_distinct)
        return sketch.log_q(keys_of(ranks)).double().numpy() - np.log(q)

    found = {}
    for top in (1000, 10_000, 100_000):
        if top < log.num_distinct:
            relative = np.abs(np.expm1(log_errors(np.arange(1, top + 1))))
            found[f"relative error of Q, top {top}: mean"] = float(relative.mean())
            found[f"relative error of Q, top {top}: 99%"] = float(np.quantile(relative, 0.99))
    ranks = log.ranks(200_000)
    drawn = log_errors(ranks[log.counts[ranks] > 0])
    found["error of log Q over draws: mean absolute"] = float(np.abs(drawn).mean())
    found["error of log Q over draws: mean"] = float(drawn.mean())
    keys = np.flatnonzero(log.counts)
    counts = log.counts[keys]
    draws = np.random.default_rng(1).choice(len(keys), 200_000, p=counts / counts.sum())
    readings = sketch._readings(keys_of(keys[draws]).numpy())
    found["the same of the bare count-min sketch"] = float(np.log(readings / counts[draws]).mean())
    return found


def cost(table: Frequencies, num_known: int, runs: int = 50) -> float:
    """Median seconds that counting a batch and looking up its log Q take, with so many keys in the table."""
    log = Log(catalogue=2 * num_known)
    known = np.arange(1, num_known + 1)
    for ranks in np.array_split(known, max(1, num_known // 100_000)):
        table.update(keys_of(ranks), torch.ones(len(ranks)))
    loss = FPSLoss(small_model(), log_q="corrected", frequencies={"document": table}).train()
    seconds = []
    for _ in range(runs):
        ranks, index = np.unique(log.ranks(BATCH_SIZE), return_inverse=True)
        arguments = torch.from_numpy(index)[None], keys_of(ranks)
        start = time.perf_counter()
        loss.count_and_look_up("document", *arguments)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


TABLES: dict[str, Callable[[], Frequencies]] = {
    "FrequencyTable": FrequencyTable,
    "FrequencySketch": FrequencySketch,
    "FrequencySketch, half-life": lambda: FrequencySketch(half_life=10**7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_distinct", type=int, default=50_000_000)
    parser.add_argument("--width", type=int, default=2**20)
    parser.add_argument("--cost", action="store_true", help="measure seconds instead of errors")
    options = parser.parse_args()
    if options.cost:
        for num_known in (100_000, 1_000_000):
            for name, make in TABLES.items():
                print(f"{name:<28} {num_known:>9,} keys: {cost(make(), num_known):.5f} s")
        return
    for name, value in stream(options.num_distinct, options.width).items():
        print(f"{name:<45} {value:>16,.4f}")


if __name__ == "__main__":
    main()
