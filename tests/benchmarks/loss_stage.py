"""The loss stage alone, forward and backward on ready embeddings, against ``F.cross_entropy(α U Wᵀ)``.

Run:
    python -m tests.benchmarks.loss_stage --batch_size 8192 --dim 256
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from st_fpsloss.objectives.softmax import SoftmaxTargets, full_product_softmax
from tests.benchmarks.memory import MIB, peak, reset_peak, resident


def step(kind: str, queries: torch.Tensor, documents: torch.Tensor, alpha: torch.Tensor) -> None:
    """One forward and backward."""
    rows = torch.arange(len(queries))
    if kind == "cross_entropy":
        loss = F.cross_entropy(alpha * queries @ documents.T, rows)
    else:
        masked = torch.stack([rows, rows]) if kind == "mask" else None
        weight = torch.full((len(rows),), 1 / len(rows))
        loss = full_product_softmax(
            queries, documents, alpha, SoftmaxTargets(rows, rows, weight, torch.zeros(len(rows)), masked)
        )
    loss.backward()


def measure(kind: str, batch_size: int, dim: int, runs: int) -> tuple[float, float]:
    """Median seconds, and MiB above the embeddings and their gradients."""
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(batch_size, dim), dim=1).requires_grad_() for _ in range(2)]
    alpha = torch.tensor(1 / 0.07, requires_grad=True)
    step(kind, *leaves, alpha)  # warm up; gradients exist from here on
    before, seconds = resident(), []
    reset_peak()
    for _ in range(runs):
        start = time.perf_counter()
        step(kind, *leaves, alpha)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), (peak() - before) / MIB


def compare(batch_size: int, dim: int, runs: int = 5) -> dict[str, tuple[float, float]]:
    """Each kind in a process of its own: seconds and MiB."""
    results = {}
    for kind in ("cross_entropy", "keep", "mask"):
        command = [sys.executable, "-m", "tests.benchmarks.loss_stage", "--kind", kind]
        command += ["--batch_size", str(batch_size), "--dim", str(dim), "--runs", str(runs)]
        seconds, mib = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        results[kind] = float(seconds), float(mib)
    return results


def main() -> None:
    """Print the table, or, as a child process, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kind", choices=["cross_entropy", "keep", "mask"])
    options = parser.parse_args()
    if options.kind:
        print(*measure(options.kind, options.batch_size, options.dim, options.runs))
        return
    results = compare(options.batch_size, options.dim, options.runs)
    plain_seconds, plain_mib = results["cross_entropy"]
    print(f"{'':16}{'seconds':>9}{'ratio':>7}{'MiB':>8}{'ratio':>7}")
    for kind, (seconds, mib) in results.items():
        print(f"{kind:16}{seconds:9.3f}{seconds / plain_seconds:7.2f}{mib:8.0f}{mib / plain_mib:7.2f}")


if __name__ == "__main__":
    main()
