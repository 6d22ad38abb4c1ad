"""log_q against the exact softmax over a whole small catalogue: how the error falls as the batch grows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from st_fpsloss import FPSLoss
from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.objectives.softmax import full_product_softmax
from tests.losses.conftest import small_model

MODEL = small_model()
NUM_ASKING, NUM_ANSWERING, DIM = 400, 200, 8


@dataclass
class Log:
    """A joint p(asking, answer) over a whole catalogue, and float64 embeddings that know it well, not perfectly."""

    joint: Tensor  # (asking, answering)
    asking: Tensor  # (asking, dim)
    answering: Tensor

    @staticmethod
    def make(several_answers: bool) -> Log:
        """Zipf popularity on both sides; each asking row has one answer, or mixes it with all others."""
        generator = torch.Generator().manual_seed(0)
        p_asking = torch.arange(1, NUM_ASKING + 1, dtype=torch.float64) ** -0.7
        p_asking /= p_asking.sum()
        answer = torch.randperm(NUM_ASKING, generator=generator) % NUM_ANSWERING  # every answer is asked for
        joint = torch.zeros(NUM_ASKING, NUM_ANSWERING, dtype=torch.float64)
        joint[torch.arange(NUM_ASKING), answer] = p_asking
        if several_answers:
            joint = 0.8 * joint + 0.2 * p_asking[:, None] * joint.sum(0)
        answering = torch.randn(NUM_ANSWERING, DIM, generator=generator, dtype=torch.float64)
        asking = answering[answer] + 0.3 * torch.randn(NUM_ASKING, DIM, generator=generator, dtype=torch.float64)
        return Log(joint, asking, answering)


def exact_gradient(log: Log, pairs: Tensor, without_positives: bool) -> Tensor:
    """Gradient of the mean of -log softmax over the catalogue at these pairs, (asking, answering) weights.

    ``without_positives``: the other answers that a row has among the pairs are left out of its softmax.
    """
    asking, answering = log.asking.clone().requires_grad_(), log.answering.clone().requires_grad_()
    logits = asking @ answering.T
    own = (pairs > 0) & without_positives
    others = (logits.exp() * ~own).sum(1, keepdim=True)
    loss = (pairs * (torch.log(torch.where(own, logits.exp(), 0) + others) - logits)).sum()
    return torch.cat(torch.autograd.grad(loss, [asking, answering]))


def batch_gradient(loss: FPSLoss, log: Log, asked: Tensor, answered: Tensor) -> Tensor:
    asking, answering = log.asking.clone().requires_grad_(), log.answering.clone().requires_grad_()
    log_q = log.joint.sum(0).log()[answered]
    sides = [asking[asked], answering[answered]], [asked, answered]
    if loss.directions == ("query_to_doc",):
        embeddings, (query, document) = sides
        given = {"document_log_q": log_q[None]}
    else:
        embeddings, (query, document) = sides[0][::-1], sides[1][::-1]
        given = {"query_log_q": log_q}
    value = loss.compute_loss_from_embeddings(
        embeddings, query_ids=query, document_ids=document[None], **(given if loss.log_q else {})
    )
    return torch.cat(torch.autograd.grad(value, [asking, answering]))


def error_of_the_mean_gradient(loss: FPSLoss, log: Log, num_rows: int, num_batches: int) -> float:
    """Norm of the bias, relative to the exact gradient.

    A batch is compared with the exact softmax at its own rows, so only the negatives are noise. Two independent means
    give an estimate of the squared norm that noise does not add to.
    """
    generator = torch.Generator().manual_seed(num_rows)
    halves = torch.zeros(2, NUM_ASKING + NUM_ANSWERING, DIM, dtype=torch.float64)
    for number in range(num_batches):
        rows = torch.multinomial(log.joint.flatten(), num_rows, replacement=True, generator=generator)
        pairs = torch.bincount(rows, minlength=log.joint.numel()).view_as(log.joint) / num_rows
        gradient = batch_gradient(loss, log, rows // NUM_ANSWERING, rows % NUM_ANSWERING)
        halves[number % 2] += gradient - exact_gradient(log, pairs, without_positives=loss.duplicates == "mask")
    first, second = halves / (num_batches / 2)
    scale = exact_gradient(log, log.joint, without_positives=False).norm().item()
    return math.sqrt(max(0.0, (first * second).sum())) / scale


def loss_of(direction: str, duplicates: str, log_q: str | None) -> FPSLoss:
    return FPSLoss(MODEL, 1.0, similarity="dot", directions=(direction,), duplicates=duplicates, log_q=log_q)


CORRECTED = [("keep", "standard"), ("mask", "corrected")]


@pytest.mark.parametrize("direction", ["query_to_doc", "doc_to_query"])
@pytest.mark.parametrize(("duplicates", "log_q"), CORRECTED)
def test_with_log_q_the_error_falls_with_the_batch(direction, duplicates, log_q):
    loss, log = loss_of(direction, duplicates, log_q), Log.make(several_answers=False)
    small, medium, large = (error_of_the_mean_gradient(loss, log, *of) for of in ((64, 40), (512, 60), (4096, 150)))
    assert 0.2 < small < 0.6  # there is an error to begin with
    assert medium < small / 3  # 1/n sets in where n passes the spread of exp(s)/Q, about 80 here
    assert large < medium / 6 and large < 0.02


@pytest.mark.parametrize("direction", ["query_to_doc", "doc_to_query"])
@pytest.mark.parametrize(
    ("duplicates", "log_q"),
    [("keep", None), ("mask", None), ("mask", "standard")],  # the last overweights a row by 1/(1-P)
)
def test_without_it_or_with_the_wrong_form_the_error_stays(direction, duplicates, log_q):
    loss, log = loss_of(direction, duplicates, log_q), Log.make(several_answers=False)
    medium, large = (error_of_the_mean_gradient(loss, log, num_rows, 10) for num_rows in (512, 4096))
    assert large > 0.2 and large > 0.9 * medium


@pytest.mark.parametrize(("duplicates", "log_q"), CORRECTED)
def test_with_several_answers_mask_estimates_the_softmax_without_the_other_positives(duplicates, log_q):
    """And ``keep`` the whole softmax: each the softmax that its name says, over the catalogue instead of the batch."""
    loss, log = loss_of("query_to_doc", duplicates, log_q), Log.make(several_answers=True)
    medium, large = (error_of_the_mean_gradient(loss, log, *of) for of in ((512, 60), (4096, 150)))
    assert 0.02 < medium < 0.2
    assert large < 0.02


@pytest.mark.parametrize("num_rows", [128, 8192])
def test_few_queries_of_many_positives_are_warned_of_with_a_form_that_converges(num_rows):
    generator = torch.Generator().manual_seed(0)
    asking, answering = (0.6 * torch.randn(size, DIM, generator=generator, dtype=torch.float64) for size in (12, 30))
    joint = torch.softmax(2 * asking @ answering.T, dim=1) / 12
    rows = torch.multinomial(joint.flatten(), num_rows, replacement=True, generator=generator)
    pairs = torch.bincount(rows, minlength=360).view(12, 30) / num_rows
    log = Log(joint, asking, answering)
    exact, errors = exact_gradient(log, pairs, without_positives=False), {}
    for duplicates, form in CORRECTED:
        loss = loss_of("query_to_doc", duplicates, form)
        errors[form] = (batch_gradient(loss, log, rows // 30, rows % 30) - exact).norm() / exact.norm()
        warned = any("of all draws" in warning for warning in loss.training_warnings(loss.batch_statistics()))
        assert warned == (form == "corrected")
    if num_rows == 8192:  # in a small batch, noise is most of both errors
        assert errors["standard"] < 0.1 and errors["corrected"] > 0.7


def test_known_positives_that_a_batch_lacks_are_no_negatives_of_the_corrected_sum() -> None:
    num_documents, num_known, size = 2000, 600, 64
    generator = torch.Generator().manual_seed(0)
    sums = []
    for _ in range(300):
        document = torch.randint(num_documents, (1, size), generator=generator)
        document[0, 0] = 0  # the positive of query 0, which wants documents 0 to 599
        present, column = torch.unique(document, return_inverse=True)
        known = (present < num_known).nonzero().flatten()
        batch = ClickBatch(
            query=torch.arange(size),
            document=column,
            relevance=torch.tensor([1.0] + [0.0] * (size - 1)),
            query_fingerprints=torch.arange(size),
            document_fingerprints=present,
            document_log_q=torch.full((1, size), -math.log(num_documents)),
            known_positives=torch.stack([torch.zeros_like(known), known]),
        )
        _, targets = batch.softmax_targets("query_to_doc", "mask", "mask", "corrected")
        loss = full_product_softmax(torch.zeros(1, 2), torch.zeros(len(present), 2), torch.tensor(1.0), targets)
        sums.append(loss.exp() - 1)  # all scores are 0: of the positive 1, so this is the sum over the negatives
    assert torch.stack(sums).mean().item() == pytest.approx(num_documents - num_known, rel=0.02)
