"""Run by torchrun, once for everything, since starting processes takes longer than what they do.

``worker.py REPORT EVERY [training]``: compare the gradients of every ``EVERY``-th case, then train; each rank writes
what it found to ``REPORT`` with its number.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import document_histories, gradients, whole_histories
from tests.distributed.training_runs import RUNS


def main(report: str, every: int, training: bool) -> None:
    torch.set_num_threads(1)
    known = gradients.references(int(os.environ["WORLD_SIZE"]), every)  # in one process: there is no group yet
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {
        "gradients": gradients.compare(known, every),
        "compiled": gradients.compiled(),
        "ready embeddings": gradients.ready_embeddings(),
        "whole histories": whole_histories.compare(),
        "document histories": document_histories.compare(),
    }
    for name, run in RUNS.items() if training else ():
        folder = Path(f"{report} {name}")
        folder.mkdir(exist_ok=True)
        found[name] = run(folder)
    torch.save(found, f"{report} {dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "training" in sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still run when the interpreter is torn down, which then aborts
