"""`cache_gradients="auto"`: as many graphs as fit into the memory that is free."""

from __future__ import annotations

import ctypes
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from st_fpsloss import FPSLoss
from st_fpsloss.encoding.memory import MemoryBudget, free_memory
from tests.benchmarks.memory import MIB, _status
from tests.losses.conftest import clicks, gradients, small_model

CPU = torch.device("cpu")


@contextmanager
def at_most(num_bytes: float) -> Iterator[None]:
    """Let this process take so many bytes more and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(_status("VmSize") + num_bytes), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def step(loss: FPSLoss, columns) -> tuple[int, int]:
    """Runs a step; mini-batches encoded, and how many of them once more."""
    calls: list[int] = []
    hook = loss.model[0].register_forward_hook(lambda *_: calls.append(1))
    loss.model.zero_grad()
    value = loss([dict(column) for column in columns])
    first = len(calls)
    value.backward()
    hook.remove()
    return first, len(calls) - first


def bytes_of_graph(model, features) -> float:
    budget = MemoryBudget()
    with budget.measured(model, 0, 1):
        model(dict(features))
    return budget.cost(0, 1)


def test_where_all_fits_nothing_is_encoded_twice_and_that_is_logged_once(caplog):
    model = small_model()
    features, _ = clicks(model, 12)
    loss = FPSLoss(model, mini_batch_num_tokens=40)
    assert loss.cache_gradients == "auto"
    with caplog.at_level(logging.INFO, "st_fpsloss.encoding.memory"):
        (num_mini_batches, twice), _ = step(loss, features()), step(loss, features())
    assert twice == 0
    (message,) = [record.message for record in caplog.records if "cache_gradients" in record.message]
    assert f"of {num_mini_batches} mini-batches {num_mini_batches} keep their graphs" in message


def test_where_memory_is_short_the_rest_is_encoded_twice_with_equal_gradients():
    model = small_model()
    features, _ = clicks(model, 2000)
    all_kept = FPSLoss(model, mini_batch_num_tokens=1024, cache_gradients=False)
    step(all_kept, features())
    needed = bytes_of_graph(model, features()[1])
    expected = gradients(model, all_kept)
    loss = FPSLoss(model, mini_batch_num_tokens=1024)
    columns = features()
    with at_most(needed / 2):
        num_mini_batches, twice = step(loss, columns)
    assert 0 < twice < num_mini_batches - 2  # the first of each tower is always kept, and some others here
    assert (gradients(model, loss) - expected).norm() < 1e-5 * expected.norm()


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "hblkhd", "e", "f", "uordblks", "g", "h")]


def allocated() -> int:
    """Bytes that the C library has given out."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.hblkhd + found.uordblks


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
def test_the_bytes_of_a_graph_are_those_that_it_holds_and_measuring_leaks_none():
    model = small_model(dropout=0.1).train()
    features = model.preprocess(["quick brown fox jumps over a lazy dog " * 5] * 200, task="document")
    bytes_of_graph(model, features)  # what stays
    before = allocated()
    embeddings = model(dict(features))["sentence_embedding"]
    held = allocated() - before
    assert embeddings.requires_grad
    del embeddings
    before = allocated()
    assert bytes_of_graph(model, features) == pytest.approx(held, rel=0.05)
    assert allocated() - before < 0.01 * held


def test_free_memory_follows_the_limit_of_the_process_and_its_fellows(monkeypatch):
    free = free_memory(CPU)
    assert 0 < free < 2**50
    with at_most(100 * MIB):
        assert free_memory(CPU) <= 100 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(CPU) < 0.9 * free
