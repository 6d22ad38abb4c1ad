"""Run by torchrun: gradients of this rank in every case, against those of one process, as a JSON report.

The references are computed before the process group exists: they are truly of one process.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch.nn.parallel import DistributedDataParallel

from st_fpsloss import FPSLoss, LossStateCallback
from tests.distributed.cases import MODELS, Case, arguments, cases
from tests.losses.conftest import gradients

TOLERANCE = 1e-5


@dataclass
class Step:
    """What a step leaves: gradients of the encoders and of log α, the loss, and the frequency tables."""

    encoders: torch.Tensor
    scale: torch.Tensor
    value: torch.Tensor
    tables: dict[str, dict[int, float]]


def float64_model(name: str) -> SentenceTransformer:
    """In float64, so that only mistakes differ, not sums in another order."""
    return MODELS[name]().double().train()


def float64_loss(case: Case, model: SentenceTransformer) -> FPSLoss:
    model.zero_grad()
    loss = case.loss(model)
    loss.scale_and_bias.double()
    loss.has_state_callback = True  # no warning where it has none
    return loss


def of_one_process(case: Case, model: SentenceTransformer, ranks: int) -> Step:
    """The step with the batches of all ranks: as one batch, or, without gathering, the mean of the ranks' losses."""
    loss = float64_loss(case, model)
    total = torch.zeros(())
    for micro_batch in range(case.micro_batches):
        whole = loss(*arguments(model, case.global_batch(ranks, micro_batch)))
        if case.gather:
            values = [whole]
        else:  # the forward pass above has counted the rows of all ranks
            for table in loss.frequencies.values():
                table.frozen = True
            values = [loss(*arguments(model, case.batch(rank, micro_batch))) for rank in range(ranks)]
            for table in loss.frequencies.values():
                table.frozen = False
        for value in values:
            (value / len(values) / case.micro_batches).backward()
            total = total + value.detach() / len(values) / case.micro_batches
    return Step(gradients(model, loss), loss.logit_scale.grad, total, tables_of(loss))


def of_this_rank(case: Case, ddp: DistributedDataParallel) -> Step:
    """The step as the trainer takes it: no reduction before the last micro-batch, α by the callback."""
    model = ddp.module
    loss = float64_loss(case, model)
    callback = LossStateCallback(loss)
    loss.model = ddp  # as the trainer does
    total = torch.zeros(())
    for micro_batch in range(case.micro_batches):
        ddp.require_backward_grad_sync = micro_batch == case.micro_batches - 1  # what no_sync() sets
        value = loss(*arguments(model, case.batch(dist.get_rank(), micro_batch))) / case.micro_batches
        value.backward()
        total = total + value.detach()
    callback.on_pre_optimizer_step(None, None, None)
    dist.all_reduce(total)
    return Step(gradients(model, loss), loss.logit_scale.grad, total / dist.get_world_size(), tables_of(loss))


def tables_of(loss: Any) -> dict[str, dict[int, float]]:
    return {
        side: {key: float(table._counts[slot]) for key, slot in table._slot_of.items()}
        for side, table in loss.frequencies.items()
    }


def mismatches(ours: Step, reference: Step) -> dict[str, float]:
    """Relative errors above the tolerance."""
    errors = {
        name: float((getattr(ours, name) - getattr(reference, name)).norm())
        / max(float(getattr(reference, name).norm()), 1e-12)
        for name in ("encoders", "scale", "value")
    }
    errors["tables"] = float(ours.tables != reference.tables)
    return {name: error for name, error in errors.items() if not error < TOLERANCE}


def wrapped(name: str, find_unused_parameters: bool) -> DistributedDataParallel:
    model = copy.deepcopy(float64_model(name))
    if find_unused_parameters:  # the trainer's default: poolers may stay trainable
        model.requires_grad_(True)
    # Buckets of a few kilobytes: with one bucket alone, nothing could be reduced too early.
    return DistributedDataParallel(model, find_unused_parameters=find_unused_parameters, bucket_cap_mb=0.004)


def main(report: Path) -> None:
    rank, ranks = int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    models = {name: float64_model(name) for name in MODELS}
    references = [
        of_one_process(case, models[case.model], ranks) if case.seed % ranks == rank else None for case in cases()
    ]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    wrappers = {(name, flag): wrapped(name, flag) for name in MODELS for flag in (False, True)}
    found = []
    for case, reference in zip(cases(), references, strict=True):
        shared = [reference]
        dist.broadcast_object_list(shared, src=case.seed % ranks)
        step = of_this_rank(case, wrappers[case.model, case.find_unused_parameters])
        if wrong := mismatches(step, shared[0]):
            found.append({"rank": rank, **wrong, **asdict(case)})
    everything: list[Any] = [None] * ranks
    dist.all_gather_object(everything, found)
    if rank == 0:
        report.write_text(json.dumps({"cases": len(references), "mismatches": sum(everything, [])}))
    dist.destroy_process_group()


if __name__ == "__main__":
    import os

    sys.argv[2:] = [os.environ["RANK"], os.environ["WORLD_SIZE"]]
    main(Path(sys.argv[1]))
