from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from st_fpsloss import SigmoidLoss
from st_fpsloss.objectives import naive
from tests.losses.agreement import assert_agrees, random_batch
from tests.losses.conftest import clicks, small_model

MODEL = small_model()


def formula(loss: SigmoidLoss):
    def value(U, W, alpha, beta, query, document, r):
        return naive.sigmoid(U, W, alpha, beta, query, document, r, loss.duplicates, loss.relevance)

    return value


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("relevance", ["mask", "weight"])
@pytest.mark.parametrize("duplicates", ["mask", "keep"])
def test_value_and_gradients_equal_the_float64_formula(duplicates, relevance, similarity):
    for rows, negatives, seed in itertools.product([1, 6, 13], [0, 1, 3], [0, 1]):
        loss = SigmoidLoss(
            MODEL, scale=2.0, bias=-1.5, similarity=similarity, duplicates=duplicates, relevance=relevance
        )
        assert_agrees(loss, formula(loss), random_batch(rows, negatives, seed)[:5])


def test_the_tiling_changes_nothing(monkeypatch):
    monkeypatch.setattr("st_fpsloss.objectives.softmax._TILE_PAIRS_CPU", 100)
    loss = SigmoidLoss(MODEL, bias=-1.0)
    assert_agrees(loss, formula(loss), random_batch(40, 1, 0)[:5])


def test_without_repetition_it_is_binary_cross_entropy_over_all_cells():
    U, W = torch.randn(2, 6, 4)
    expected = F.binary_cross_entropy_with_logits(U @ W.T - 2, torch.eye(6), reduction="sum") / 6
    loss = SigmoidLoss(MODEL, scale=1.0, bias=-2.0, similarity="dot")
    torch.testing.assert_close(loss.compute_loss_from_embeddings([U, W]), expected)


def test_a_row_without_a_click_says_no_to_its_own_document():
    U, W = torch.randn(2, 2, 4)
    loss = SigmoidLoss(MODEL, scale=1.0, bias=0.0, similarity="dot")
    value = loss.compute_loss_from_embeddings([U, W], labels=torch.tensor([1.0, 0.0]))
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(U @ W.T, targets, reduction="sum"))


def test_weights_of_zero_and_one_are_the_mask():
    batch = random_batch(12, 1, 3)[:5]
    U, W, query, document, r = batch
    labels = (r > 0).double()
    values = [
        SigmoidLoss(MODEL, bias=-1.0, relevance=relevance).compute_loss_from_embeddings(
            [U[query], *W[document]], labels, query, document
        )
        for relevance in ("mask", "weight")
    ]
    torch.testing.assert_close(*values)


def test_a_batch_without_positives_has_loss_zero_connected_to_the_graph():
    inputs = [torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    value = SigmoidLoss(MODEL).compute_loss_from_embeddings(inputs, labels=torch.zeros(3))
    value.backward()
    assert value == 0
    assert torch.equal(inputs[0].grad, torch.zeros(3, 4))


def test_bias_starts_from_the_first_training_batch_and_is_learned_from_there():
    model = small_model()
    loss = SigmoidLoss(model)
    features, _ = clicks(model, 9, num_negatives=2)
    with torch.no_grad():
        before = loss(features())  # as if an evaluation came first: it starts nothing
    assert loss.beta == 0.0
    value = loss(features())
    assert loss.beta == pytest.approx(-math.log(3 * 9 - 1))
    torch.testing.assert_close(before, value.detach())
    value.backward()
    assert loss.logit_bias.grad.abs() > 0
    with torch.no_grad():
        loss.logit_bias.fill_(-1.0)
    loss(clicks(model, 4)[0]())
    assert loss.beta == -1.0
    assert SigmoidLoss(model, bias=-3.0).beta == -3.0


def test_a_bias_that_has_started_is_part_of_the_state():
    model = small_model()
    loss, resumed = SigmoidLoss(model), SigmoidLoss(model)
    features, _ = clicks(model, 9)
    loss(features())
    resumed.import_state(loss.export_state())
    resumed(clicks(model, 5)[0]())
    assert resumed.beta == loss.beta == pytest.approx(-math.log(8))
    fresh = SigmoidLoss(model)
    fresh.import_state(SigmoidLoss(model).export_state())
    fresh(clicks(model, 5)[0]())
    assert fresh.beta == pytest.approx(-math.log(4))


def test_a_batch_of_one_document_starts_the_bias_at_zero():
    loss = SigmoidLoss(MODEL)
    assert torch.isfinite(loss.compute_loss_from_embeddings([torch.ones(1, 4), torch.ones(1, 4)]))
    assert loss.beta == 0.0
