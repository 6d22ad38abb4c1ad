"""Gradients of whole histories on several ranks, against all their prefixes in one process."""

from __future__ import annotations

import copy

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from st_fpsloss import FPSLoss, LossStateCallback
from tests.distributed.gradients import mismatches, step
from tests.encoding.test_prefixes import HISTORIES, make_model, one_by_one, whole


def compare() -> dict[str, dict[str, float]]:
    """Relative errors above the tolerance, for both modes; the ranks have 2 histories each, or 3, or 1."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shares = [HISTORIES[number::ranks] for number in range(ranks)]
    found = {}
    for cache_gradients in (False, True):
        model = make_model()
        reference = FPSLoss(copy.deepcopy(model), scale=3.0).double()
        reference.has_state_callback = True
        expected = reference(one_by_one(model, [row for share in shares for row in share]))
        expected.backward()

        ddp = DistributedDataParallel(model, find_unused_parameters=cache_gradients, bucket_cap_mb=0.004)
        loss = FPSLoss(
            model, scale=3.0, gather_across_devices=True, cache_gradients=cache_gradients, mini_batch_num_tokens=5
        ).double()
        callback = LossStateCallback(loss)
        loss.model = ddp  # as the trainer does
        value = loss(whole(model, shares[rank]))
        value.backward()
        callback.on_pre_optimizer_step(None, None, None)
        total = value.detach().clone()
        dist.all_reduce(total)
        ours = step(model, loss, total / ranks)
        found["cached" if cache_gradients else "kept"] = mismatches(
            ours, step(reference.model, reference, expected.detach())
        )
    return found
