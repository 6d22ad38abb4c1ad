"""How many graphs of mini-batches may be kept: a number of tokens, or as much as fits into the memory that is free."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

logger = logging.getLogger(__name__)

# The rest is for the loss, the backward pass, other programs, and the holes that an allocator leaves between graphs
# (measured with glibc: 2% to 46% of their size).
_SHARE_OF_FREE_MEMORY = 0.6
# Gradients and Adam's two moments, which are not there yet at the first step.
_COPIES_OF_PARAMETERS = 3


class GraphBudget(Protocol):
    """What the graphs of kept mini-batches may cost together, in any unit."""

    def total(self, model: nn.Module, device: torch.device) -> float:
        """The cost of all graphs that may be kept in one step."""

    def cost(self, route: int, num_tokens: int) -> float:
        """The cost of keeping a mini-batch of a tower of which :meth:`measured` has seen one."""

    def measured(self, model: nn.Module, route: int, num_tokens: int) -> Any:
        """A context in which one mini-batch of a tower is encoded with its graph."""

    def log(self, num_kept: int, num_mini_batches: int, cost: float) -> None:
        """Take note of what was chosen."""


class TokenBudget:
    """As many tokens, padding included, as the user says.

    Args:
        num_tokens: tokens whose graphs may be kept.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def total(self, model: nn.Module, device: torch.device) -> float:
        """The number of tokens."""
        return self.num_tokens

    def cost(self, route: int, num_tokens: int) -> float:
        """A token costs one."""
        return num_tokens

    @contextmanager
    def measured(self, model: nn.Module, route: int, num_tokens: int) -> Iterator[None]:
        """Nothing to measure."""
        yield

    def log(self, num_kept: int, num_mini_batches: int, cost: float) -> None:
        """Nothing that the user does not know."""


class MemoryBudget:
    """As many bytes as are free at the first step, less what the loss, gradients and the optimizer will need.

    A tower's bytes a token are those of its first mini-batch, the one of the longest rows, in each step.
    """

    def __init__(self) -> None:
        self._total: float | None = None
        self._bytes_per_token: dict[int, float] = {}
        self._logged = False

    def total(self, model: nn.Module, device: torch.device) -> float:
        """Bytes; infinite where the device does not tell what is free."""
        if self._total is None:
            parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            free = free_memory(device) - _COPIES_OF_PARAMETERS * parameters
            self._total = max(0.0, _SHARE_OF_FREE_MEMORY * free)
        return self._total

    def cost(self, route: int, num_tokens: int) -> float:
        """Bytes of the graph of a mini-batch."""
        return self._bytes_per_token[route] * num_tokens

    @contextmanager
    def measured(self, model: nn.Module, route: int, num_tokens: int) -> Iterator[None]:
        """Count the bytes of the graph that arises."""
        storages = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor.detach()  # the tensor itself would keep the graph alive that keeps it

        with saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self._bytes_per_token[route] = sum(storages.values()) / max(1, num_tokens)

    def log(self, num_kept: int, num_mini_batches: int, cost: float) -> None:
        """Log the choice of the first step."""
        if self._logged:
            return
        self._logged = True
        twice = num_mini_batches - num_kept
        logger.info(
            "cache_gradients='auto': of %d mini-batches %d keep their graphs (%.2f of %.2f GiB) and %s.",
            num_mini_batches, num_kept, cost / 2**30, (self._total or 0.0) / 2**30,
            f"{twice} are encoded twice" if twice else "none is encoded twice",
        )  # fmt: skip


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take on a device; infinite where nobody tells.

    On a CPU: what the system has available, less where a control group (a container) or ``ulimit -v`` allows less,
    shared evenly among the processes that torchrun started on this machine.
    """
    if device.type != "cpu":
        return _free_on_accelerator(device)
    return min(_available(), _control_group(), _address_space()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_on_accelerator(device: torch.device) -> float:
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):
        return float("inf")
    # What the allocator has reserved and nobody uses is free too.
    unused = backend.memory_reserved(device) - backend.memory_allocated(device)
    return float(backend.mem_get_info(device)[0] + unused)


def _available() -> float:
    kilobytes = _fields("/proc/meminfo").get("MemAvailable")
    return float("inf") if kilobytes is None else kilobytes * 1024


def _control_group() -> float:
    """Bytes left in the control groups around this process, of version 2 or 1; file cache that can go is free."""
    left = float("inf")
    for group in _lines("/proc/self/cgroup"):
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            root, limit, used, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = Path(root + path)
        for parent in (folder, *folder.parents):
            at_most, now = _number(parent / limit), _number(parent / used)
            if at_most is not None and now is not None:
                left = min(left, at_most - now + _fields(parent / "memory.stat").get(cache, 0))
            if str(parent) == root:
                break
    return max(0.0, left)


def _address_space() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    return max(0.0, limit - _fields("/proc/self/status").get("VmSize", 0) * 1024)


def _fields(path: str | Path) -> dict[str, int]:
    """Lines "name: 12 kB" or "name 12" of a file of the Linux kernel."""
    lines = [line.replace(":", " ").split() for line in _lines(path)]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The number in a file of the Linux kernel; None for "max", which is no limit."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _lines(path: str | Path) -> list[str]:
    """Lines of a file of the Linux kernel; none on another system."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
