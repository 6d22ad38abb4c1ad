"""Gradients of histories of documents on several ranks, against one process."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from st_fpsloss import FPSLoss, LossStateCallback
from tests.distributed.gradients import mismatches, step
from tests.encoding.test_document_histories import CLICKED, ITEMS, make_model, queries

MODES: dict[str, dict[str, Any]] = {
    "kept": {"cache_gradients": False},
    "cached": {"cache_gradients": True, "mini_batch_num_tokens": 6},
    "as memory allows": {"mini_batch_num_tokens": 6},
}


def compare() -> dict[str, dict[str, float]]:
    """Relative errors above the tolerance, for every mode; a rank has one to four histories, some of them empty."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = make_model(words=True, pooling="mean")
    documents = [ITEMS[number] for number in CLICKED]

    def columns(rows: slice) -> list[dict[str, Any]]:
        return [model.preprocess(queries()[rows], task="query"), model.preprocess(documents[rows], task="document")]

    reference = FPSLoss(copy.deepcopy(model), scale=3.0).double()
    reference.has_state_callback = True
    expected = reference(columns(slice(None)))
    expected.backward()
    found = {}
    for mode, settings in MODES.items():
        model.zero_grad()
        ddp = DistributedDataParallel(model, find_unused_parameters=mode == "cached", bucket_cap_mb=0.004)
        loss = FPSLoss(model, scale=3.0, gather_across_devices=True, **settings).double()
        callback = LossStateCallback(loss)
        loss.model = ddp  # as the trainer does
        value = loss(columns(slice(rank, None, ranks)))
        value.backward()
        callback.on_pre_optimizer_step(None, None, None)
        total = value.detach().clone()
        dist.all_reduce(total)
        ours = step(model, loss, total / ranks)
        found[mode] = mismatches(ours, step(reference.model, reference, expected.detach()))
    return found
