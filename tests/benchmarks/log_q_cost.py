"""What log_q, masks and the guard's figures add to a training step, on the Zipf log's ids.

The loss stage (counting, looking up log Q, masks, forward and backward on ready embeddings) is timed with and without
them; variants take turns, and time is the processor's, which others on the machine do not lengthen. It is compared with
the time of a whole step with MiniLM documents and 2-layer MiniLM queries: measured at ``--step_batch_size`` rows and
scaled by the tokens of the distinct rows times the layers that they go through.

Run:
    python -m tests.benchmarks.log_q_cost --batch_size 4096
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from st_fpsloss import FPSLoss
from st_fpsloss.batch.clicks import ClickBatch
from tests.benchmarks.training_step import build_model
from tests.benchmarks.zipf import NUM_DISTINCT, zipf_clicks
from tests.losses.conftest import small_model

BOTH = ("query_to_doc", "doc_to_query")
VARIANTS = {
    "keep": {"duplicates": "keep"},
    "mask": {},
    "mask, log_q": {"log_q": "corrected"},
    "both directions: keep": {"duplicates": "keep", "directions": BOTH},
    "both directions: mask, log_q": {"log_q": "corrected", "directions": BOTH},
}
DIM = 256
QUERY_LAYERS, DOCUMENT_LAYERS = 2, 6


def stepper(settings: dict, batch_size: int) -> tuple[FPSLoss, Callable[[], float]]:
    """The loss, and a function that does its loss stage and returns the seconds."""
    numbers = []
    for column in zipf_clicks(batch_size):
        number_of = {text: number for number, text in enumerate(dict.fromkeys(column))}
        numbers.append(torch.tensor([number_of[text] for text in column]))
    query, document = numbers
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(2**62, (int(number.max()) + 1,), generator=generator) for number in numbers]
    leaves = [F.normalize(torch.randn(len(of), DIM, generator=generator), dim=1).requires_grad_() for of in keys]
    loss = FPSLoss(small_model(similarity="cosine"), **settings)
    for table, of in zip((loss.frequencies["query"], loss.frequencies["document"]), keys, strict=True):
        seen = torch.cat([of, torch.randint(2**62, (NUM_DISTINCT - len(of),), generator=generator)])
        table.update(seen, torch.randint(1, 100, (NUM_DISTINCT,), generator=generator))

    def stage() -> float:
        start = time.process_time()
        batch = ClickBatch(query, document[None], torch.ones(batch_size), *keys)
        loss._loss(*leaves, loss.add_corrections(batch)).backward()
        return time.process_time() - start

    return loss, stage


def stage_seconds(batch_size: int, runs: int) -> dict[str, float]:
    """Median seconds of each variant's loss stage, and of the figures at a logging step."""
    steppers = {name: stepper(settings, batch_size) for name, settings in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for run in range(runs + 1):
        for name, (_, stage) in steppers.items():
            taken = stage()
            if run:  # the first is the warm-up
                seconds[name].append(taken)
    loss, _ = steppers["mask, log_q"]
    figures = []
    for _ in range(runs):
        start = time.process_time()
        loss.batch_statistics()
        figures.append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in {**seconds, "the guard's figures": figures}.items()}


def step_seconds(batch_size: int, measured_batch_size: int, runs: int) -> float:
    """Seconds of a whole step, measured at one batch size and scaled to another."""
    model = build_model()
    loss = FPSLoss(model, learn_scale=False, duplicates="keep")
    columns = zipf_clicks(measured_batch_size)
    seconds = []
    for _ in range(runs + 1):
        start = time.process_time()
        features = [
            model.preprocess(texts, task=task) for texts, task in zip(columns, ("query", "document"), strict=True)
        ]
        loss(features).backward()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:]) * work(model, batch_size) / work(model, measured_batch_size)


def work(model: SentenceTransformer, batch_size: int) -> int:
    """Tokens of the distinct rows of a batch, times the layers that they go through."""
    total = 0
    for column, task, layers in zip(
        zipf_clicks(batch_size), ("query", "document"), (QUERY_LAYERS, DOCUMENT_LAYERS), strict=True
    ):
        features = model.preprocess(list(dict.fromkeys(column)), task=task)
        total += layers * int(features["attention_mask"].sum())
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--step_batch_size", type=int, default=256)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    stage = stage_seconds(options.batch_size, options.runs)
    whole = step_seconds(options.batch_size, options.step_batch_size, runs=3)
    print(f"a step of {options.batch_size} rows: {whole:.1f} s (from {options.step_batch_size} rows)")
    print(f"{'loss stage':32}{'seconds':>9}{'more than keep':>16}{'of a step':>11}")
    for name, seconds in stage.items():
        base = 0.0 if "figures" in name else stage["both directions: keep" if "both" in name else "keep"]
        print(f"{name:32}{seconds:9.3f}{seconds - base:16.3f}{(seconds - base) / whole:11.2%}")


if __name__ == "__main__":
    main()
