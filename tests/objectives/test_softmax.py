from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import st_fpsloss.objectives.softmax as objectives
from st_fpsloss.objectives.softmax import SoftmaxTargets, full_product_softmax


def plain_targets(rows: int) -> SoftmaxTargets:
    """Row i's positive is column i, and nothing repeats."""
    numbers = torch.arange(rows)
    return SoftmaxTargets(numbers, numbers, torch.full((rows,), 1 / rows), torch.zeros(rows))


def value_and_gradients(function, *inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("cells", [1, 50, 10**6])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_without_repetition_it_is_cross_entropy_whatever_the_tile(monkeypatch, rows, cells):
    monkeypatch.setattr(objectives, "_TILE_PAIRS_CPU", cells)
    torch.manual_seed(rows)
    inputs = torch.randn(rows, 5).double(), torch.randn(rows, 5).double(), torch.tensor(2.5).double()
    ours = value_and_gradients(lambda U, W, a: full_product_softmax(U, W, a, plain_targets(rows)), *inputs)
    plain = value_and_gradients(lambda U, W, a: F.cross_entropy(a * U @ W.T, torch.arange(rows)), *inputs)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
def test_float32_is_as_close_to_float64_as_the_plain_float32_formula(sharpness, masked):
    rows = 64
    torch.manual_seed(0)
    U = F.normalize(torch.randn(rows, 16), dim=1)
    W = F.normalize(U + 0.1 * torch.randn(rows, 16), dim=1)  # easy positives: p close to 1 at the higher scales
    alpha = torch.tensor(sharpness)
    targets = plain_targets(rows)
    if masked:
        numbers = torch.arange(rows)
        targets = SoftmaxTargets(
            numbers, numbers, targets.weight, targets.candidate_log_weight, torch.stack([numbers] * 2)
        )

    def plain(U, W, a):
        return F.cross_entropy(a * U @ W.T, torch.arange(rows))

    truth = value_and_gradients(plain, U.double(), W.double(), alpha.double())
    naive = value_and_gradients(plain, U, W, alpha)
    ours = value_and_gradients(lambda U, W, a: full_product_softmax(U, W, a, targets), U, W, alpha)
    for true, simple, mine in zip(truth, naive, ours, strict=True):
        allowed = (simple - true).norm() + 2e-6 * true.norm() + 1e-7  # 1e-7: one rounding of a probability near 1
        assert (mine - true).norm() <= allowed


def test_sums_stay_in_float32_under_bfloat16():
    torch.manual_seed(0)
    rows = 256
    U = F.normalize(torch.randn(rows, 32), dim=1).bfloat16()
    W = F.normalize(U.float() + 0.05 * torch.randn(rows, 32), dim=1).bfloat16()
    alpha = torch.tensor(20.0)
    truth = F.cross_entropy(20.0 * U.double() @ W.double().T, torch.arange(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = full_product_softmax(U, W, alpha, plain_targets(rows))
    naive = F.cross_entropy(20 * U @ W.T, torch.arange(rows))  # every step in bfloat16
    assert ours.dtype == torch.float32
    assert abs(ours - truth) < 4e-5 * truth
    assert abs(naive - truth) > 1e-2 * truth  # what it saves us from


def test_a_row_without_negatives_has_no_loss_and_no_nan():
    # Both documents are positives of the one query, so both cells are masked.
    targets = SoftmaxTargets(
        anchor=torch.tensor([0, 0]),
        candidate=torch.tensor([0, 1]),
        weight=torch.tensor([0.5, 0.5]),
        candidate_log_weight=torch.zeros(2),
        false_negatives=torch.tensor([[0, 0], [0, 1]]),
    )
    results = value_and_gradients(
        lambda U, W, a: full_product_softmax(U, W, a, targets), torch.randn(1, 4), torch.randn(2, 4), torch.tensor(3.0)
    )
    for result in results:
        assert torch.equal(result, torch.zeros_like(result))


def test_extreme_logits_give_finite_gradients():
    U, W = torch.eye(8) * 1e3, -torch.eye(8)
    results = value_and_gradients(
        lambda U, W, a: full_product_softmax(U, W, a, plain_targets(8)), U, W, torch.tensor(100.0)
    )
    assert all(torch.isfinite(result).all() for result in results)


def test_no_gradient_work_where_none_is_needed():
    with torch.no_grad():
        loss = full_product_softmax(torch.eye(3), torch.eye(3), torch.tensor(1.0), plain_targets(3))
    assert not loss.requires_grad
