"""Gradients of several ranks in every case, against those of one process."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch.nn.parallel import DistributedDataParallel

from st_fpsloss import FPSLoss, LossStateCallback
from st_fpsloss.frequencies.table import FrequencyTable
from st_fpsloss.losses.base import ClickLoss
from tests.distributed.cases import MODELS, Case, arguments, cases
from tests.losses.conftest import gradients

TOLERANCE = 1e-5


@dataclass
class Step:
    """What a step leaves: gradients of the encoders, of log α and of β, the loss, and the frequency tables."""

    encoders: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    value: torch.Tensor
    tables: dict[str, dict[int, float]]


def float64_model(name: str) -> SentenceTransformer:
    """In float64, so that only mistakes differ, not sums in another order."""
    return MODELS[name]().double().train()


def float64_loss(case: Case, model: SentenceTransformer) -> ClickLoss:
    model.zero_grad()
    loss = case.loss(model)
    loss.scale_and_bias.double()
    loss.has_state_callback = True  # no warning where it has none
    return loss


def of_one_process(case: Case, model: SentenceTransformer, ranks: int) -> Step:
    """The step with the batches of all ranks: as one batch, or, without gathering, the mean of the ranks' losses."""
    loss = float64_loss(case, model)
    whole_loss = case.at_every_dimension(loss)
    numbers = range(case.micro_batches)
    if case.gather:
        batches = [[case.global_batch(ranks, number) for number in numbers]]
    else:
        batches = [[case.batch(rank, number) for number in numbers] for rank in range(ranks)]
    total = torch.zeros(())
    counted = {side: FrequencyTable() for side in tables_of(loss)}
    for of_rank in batches:
        for table in tables_of(loss).values():  # a rank knows of the others' rows after the step
            table.import_state(FrequencyTable().export_state())
        for batch in of_rank:
            value = whole_loss(*arguments(model, batch)) / len(batches) / case.micro_batches
            value.backward()
            total = total + value.detach()
        for side, table in tables_of(loss).items():
            counted[side].update(*map(torch.from_numpy, table.counts()))
    return step(model, loss, total, counted)


def of_this_rank(case: Case, ddp: DistributedDataParallel) -> Step:
    """The step as the trainer takes it: no reduction before the last micro-batch, α by the callback."""
    model = ddp.module
    loss = float64_loss(case, model)
    callback = LossStateCallback(loss)
    whole_loss = case.at_every_dimension(loss)
    whole_loss.model = loss.model = ddp  # as the trainer does
    total = torch.zeros(())
    for micro_batch in range(case.micro_batches):
        ddp.require_backward_grad_sync = micro_batch == case.micro_batches - 1  # what no_sync() sets
        value = whole_loss(*arguments(model, case.batch(dist.get_rank(), micro_batch))) / case.micro_batches
        value.backward()
        total = total + value.detach()
    callback.on_pre_optimizer_step(None, None, None)
    dist.all_reduce(total)
    return step(model, loss, total / dist.get_world_size())


def step(
    model: SentenceTransformer,
    loss: ClickLoss,
    value: torch.Tensor,
    counted: dict[str, FrequencyTable] | None = None,
) -> Step:
    scale, bias = (
        torch.zeros(()) if parameter.grad is None else parameter.grad
        for parameter in (loss.logit_scale, loss.logit_bias)
    )
    tables = {
        side: dict(zip(*(part.tolist() for part in table.counts()), strict=True))
        for side, table in (tables_of(loss) if counted is None else counted).items()
    }
    return Step(gradients(model, loss), scale, bias, value, tables)


def tables_of(loss: ClickLoss) -> dict[str, FrequencyTable]:
    return getattr(loss, "frequencies", {})


def mismatches(ours: Step, reference: Step) -> dict[str, float]:
    """Relative errors above the tolerance."""
    errors = {
        name: float((getattr(ours, name) - getattr(reference, name)).norm())
        / max(float(getattr(reference, name).norm()), 1e-12)
        for name in ("encoders", "scale", "bias", "value")
    }
    errors["tables"] = float(ours.tables != reference.tables)
    return {name: error for name, error in errors.items() if not error < TOLERANCE}


def wrapped(name: str, find_unused_parameters: bool) -> DistributedDataParallel:
    model = copy.deepcopy(float64_model(name))
    if find_unused_parameters:  # the trainer's default: poolers may stay trainable
        model.requires_grad_(True)
    # Buckets of a few kilobytes: with one bucket alone, nothing could be reduced too early.
    return DistributedDataParallel(model, find_unused_parameters=find_unused_parameters, bucket_cap_mb=0.004)


def references(ranks: int, every: int) -> list[Step | None]:
    """Of one case after the other; each rank computes its share, before it has heard of the other ranks."""
    rank = int(os.environ["RANK"])
    models = {name: float64_model(name) for name in MODELS}
    return [
        of_one_process(case, models[case.model], ranks) if number % ranks == rank else None
        for number, case in enumerate(cases()[::every])
    ]


def compare(known: list[Step | None], every: int) -> dict[str, Any]:
    """The report of this rank: how many cases, and those that differ from their reference."""
    wrappers = {(name, flag): wrapped(name, flag) for name in MODELS for flag in (False, True)}
    found = []
    for number, case in enumerate(cases()[::every]):
        shared = [known[number]]
        dist.broadcast_object_list(shared, src=number % dist.get_world_size())
        ours = of_this_rank(case, wrappers[case.model, case.find_unused_parameters])
        if wrong := mismatches(ours, shared[0]):
            found.append({**wrong, **asdict(case)})
    return {"cases": len(known), "mismatches": found}


def compiled() -> dict[str, float]:
    """Relative error of the encoders' gradients under ``torch_compile``, kept and cached, against those without."""
    found = {}
    for mode in (False, True):
        of_form = []
        for compile_it in (False, True):
            ddp = DistributedDataParallel(float64_model("two towers"), find_unused_parameters=False)
            loss = FPSLoss(ddp.module, mini_batch_num_tokens=20, cache_gradients=mode, gather_across_devices=True)
            loss.scale_and_bias.double()
            loss.has_state_callback = True
            # As the trainer does it; what compiles does not matter, but that it stands around the other wrapper.
            loss.model = torch.compile(ddp, backend="eager") if compile_it else ddp
            loss(*arguments(ddp.module, cases()[0].batch(dist.get_rank(), 0))).backward()
            of_form.append(gradients(ddp.module, loss))
        found["cached" if mode else "kept"] = float((of_form[1] - of_form[0]).norm() / of_form[0].norm())
    return found


def ready_embeddings() -> dict[str, float]:
    """Relative error of the gradients of embeddings that no model made, with ids that ranks share and without ids."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    number = torch.arange(3 * ranks * 4).view(3, ranks, 4)  # query, document, negative document
    return {
        "without ids": _error_of_ready_embeddings(number, slice(rank, rank + 1), given=False),
        "with ids": _error_of_ready_embeddings(number % 5, slice(rank, rank + 1), given=True),
    }


def _error_of_ready_embeddings(ids: torch.Tensor, own: slice, given: bool) -> float:
    """Of the sum of gradients of each id, over ranks against one batch of all rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, int(ids.max()) + 1, 8, generator=generator, dtype=torch.float64)
    log_q = torch.randn(int(ids.max()) + 1, generator=generator) - 3
    sums = []
    for gather, ranks in ((True, own), (False, slice(None))):
        loss = FPSLoss(MODELS["two towers"](), log_q="standard", duplicates="keep", gather_across_devices=gather)
        loss.has_state_callback = True
        query, *documents = (column.flatten() for column in ids[:, ranks])
        embeddings = [rows[0, query].requires_grad_(), *(rows[1, column].requires_grad_() for column in documents)]
        loss.compute_loss_from_embeddings(
            embeddings,
            query_ids=query if given else None,
            document_ids=torch.stack(documents) if given else None,
            document_log_q=log_q[torch.stack(documents)],
        ).backward()
        by_id = torch.zeros_like(rows)
        for part, column in zip(embeddings, (query, *documents), strict=True):
            by_id[0 if part is embeddings[0] else 1].index_add_(0, column, part.grad)
        sums.append(by_id)
    ours, whole = sums
    dist.all_reduce(ours)
    return float((ours / dist.get_world_size() - whole).norm() / whole.norm())
