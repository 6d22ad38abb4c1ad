from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from st_fpsloss import FPSLoss, PairCELoss, SampledSoftmaxLoss
from st_fpsloss.frequencies.table import FrequencyTable
from st_fpsloss.objectives import naive
from tests.losses.agreement import assert_agrees, random_batch
from tests.losses.conftest import clicks, small_model

MODEL = small_model()


def formula(loss: SampledSoftmaxLoss, explicit: bool, document_log_q=None):
    def value(U, W, alpha, beta, query, document, r):
        return naive.sampled_softmax(
            U, W, alpha, query, document, r, explicit, loss.duplicates, loss.relevance, loss.strategy.hardest,
            loss.log_q, None if document_log_q is None else document_log_q.to(U.dtype),
        )  # fmt: skip

    return value


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(
    ("duplicates", "log_q"),
    [("keep", None), ("mask", None), ("keep", "standard"), ("mask", "standard"), ("mask", "corrected")],
)
@pytest.mark.parametrize("options", [dict(), dict(negatives="explicit"), dict(negatives="in_batch")], ids=str)
def test_value_and_gradients_equal_the_float64_formula(options, duplicates, log_q, similarity):
    for rows, negatives, seed in itertools.product([1, 6, 13], [0, 1, 3], [0, 1]):
        loss = SampledSoftmaxLoss(
            MODEL, scale=2.0, similarity=similarity, duplicates=duplicates, log_q=log_q,
            relevance="weight" if seed else "mask", **options,
        )  # fmt: skip
        *batch, _, document_log_q = random_batch(rows, negatives, seed)
        explicit = options.get("negatives") == "explicit" or (not options and negatives > 0)
        given = {"document_log_q": document_log_q} if log_q else {}
        assert_agrees(loss, formula(loss, explicit, document_log_q), batch, **given)


@pytest.mark.parametrize(("duplicates", "log_q"), [("keep", None), ("keep", "standard"), ("mask", "corrected")])
def test_the_tiling_of_explicit_negatives_changes_nothing(monkeypatch, duplicates, log_q):
    monkeypatch.setattr("st_fpsloss.batch.negatives._TILE_PAIRS", 7)
    loss = SampledSoftmaxLoss(MODEL, scale=2.0, duplicates=duplicates, log_q=log_q, relevance="weight")
    *batch, _, document_log_q = random_batch(40, 2, 0)
    given = {"document_log_q": document_log_q} if log_q else {}
    assert_agrees(loss, formula(loss, True, document_log_q), batch, **given)


@pytest.mark.parametrize("duplicates", ["keep", "mask"])
@pytest.mark.parametrize("hardest", [1, 4, 100])
def test_the_hardest_negatives_equal_the_float64_formula(hardest, duplicates):
    for rows, negatives in itertools.product([1, 6, 13], [0, 2]):
        loss = SampledSoftmaxLoss(MODEL, scale=2.0, hardest=hardest, duplicates=duplicates)
        assert_agrees(loss, formula(loss, explicit=False), random_batch(rows, negatives, 2)[:5])


def test_it_is_cross_entropy_over_the_positive_and_the_rows_own_negatives():
    U, W, *N = torch.randn(5, 6, 4)
    logits = torch.stack([(U * column).sum(1) for column in (W, *N)], dim=1)
    loss = SampledSoftmaxLoss(MODEL, scale=1.0, similarity="dot")
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(loss.compute_loss_from_embeddings([U, W, *N]), expected)


def test_in_batch_it_is_the_full_product_softmax():
    *batch, _, _ = random_batch(12, 1, 0)
    U, W, query, document, r = batch
    inputs = [U[query], *W[document]], r, query, document
    in_batch = SampledSoftmaxLoss(MODEL, negatives="in_batch").compute_loss_from_embeddings(*inputs)
    torch.testing.assert_close(in_batch, FPSLoss(MODEL).compute_loss_from_embeddings(*inputs))


def test_with_one_negative_it_is_pair_ce():
    inputs = list(torch.randn(3, 6, 4))
    softmax, pairs = (kind(MODEL).compute_loss_from_embeddings(inputs) for kind in (SampledSoftmaxLoss, PairCELoss))
    torch.testing.assert_close(softmax, pairs)


@pytest.mark.parametrize("extreme", [-200.0, 200.0])
def test_certain_rows_have_finite_gradients(extreme):
    U, W, N = (torch.ones(2, 1), torch.full((2, 1), extreme), torch.full((2, 1), -extreme))
    leaves = [tensor.requires_grad_() for tensor in (U, W, N)]
    value = SampledSoftmaxLoss(MODEL, scale=100.0, similarity="dot").compute_loss_from_embeddings(leaves)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("log_q", ["standard", "corrected"])
def test_with_enough_samples_the_corrected_gradient_is_that_of_the_whole_catalogue(log_q):
    torch.manual_seed(0)
    catalogue, q = torch.randn(30, 4).double(), torch.softmax(torch.randn(30).double(), 0)
    positive, rows = torch.tensor(3), 8
    query = torch.randn(4).double()

    def gradient(num_samples, corrected):
        u = query.clone().requires_grad_()
        others = q.clone()
        others[positive] = 0  # a known positive is not drawn again
        generator = torch.Generator().manual_seed(num_samples)
        drawn = torch.multinomial(others, rows * num_samples, replacement=True, generator=generator)
        columns = torch.cat([positive.expand(1, rows), drawn.view(num_samples, rows)])
        loss = SampledSoftmaxLoss(
            MODEL, scale=1.0, similarity="dot", negatives="explicit", duplicates="mask", log_q=corrected
        )
        given = {} if corrected is None else {"document_log_q": q.log()[columns]}
        value = loss.compute_loss_from_embeddings(
            [u.expand(rows, 4), *catalogue[columns]], document_ids=columns, **given
        )
        return torch.autograd.grad(value, u)[0]

    u = query.clone().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy((u @ catalogue.T)[None], positive[None]), u)[0]
    errors = [((gradient(n, log_q) - exact).norm() / exact.norm()).item() for n in (50, 5000)]
    uncorrected = (gradient(5000, None) - exact).norm() / exact.norm()
    if log_q == "corrected":
        assert errors[1] < 0.02 < errors[0] or errors[1] < errors[0] / 3
    assert errors[1] < uncorrected


def test_log_q_is_counted_from_the_negative_columns_where_these_are_explicit():
    model = small_model()
    loss = SampledSoftmaxLoss(model, log_q="corrected", scale=1.0)
    features, ids = clicks(model, 12, num_negatives=2)
    value = loss(features())
    assert loss.frequencies["document"].total == 24
    counts = torch.bincount(ids[2:].flatten(), minlength=int(ids.max()) + 1)
    # The reference takes the table's own prior: one more than counted.
    log_q = torch.log((counts + 1) / (counts.sum() + len(ids[2:].unique())))[ids[1:]]
    embeddings = [model(column)["sentence_embedding"] for column in features()]
    expected = loss.compute_loss_from_embeddings(
        embeddings, query_ids=ids[0], document_ids=ids[1:], document_log_q=log_q
    )
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("log_q", ["standard", "corrected"])
def test_what_was_shown_and_not_clicked_is_not_corrected_for_a_drawing(log_q):
    model = small_model()
    shown = "a text that no sampler draws"
    rows = [("quick fox", "seven wizards", "brew", 1.0), ("quick fox", shown, "brew", 0.0)]
    features = [
        model.preprocess([row[place] for row in rows], task="document" if place else "query") for place in range(3)
    ]
    never = FrequencyTable.from_inputs(model, ["brew", "seven wizards"], task="document", prior=0.0, frozen=True)
    loss = SampledSoftmaxLoss(model, log_q=log_q, scale=1.0, frequencies={"document": never})
    assert loss(features, torch.tensor([row[3] for row in rows])) < 5  # a correction by its Q of 0 gave 87


def test_labels_alone_are_learned_from_under_log_q():
    model = small_model()
    texts = [["quick fox"] * 2, ["seven wizards", "brew"]]
    features = [model.preprocess(column, task=task) for column, task in zip(texts, ("query", "document"), strict=True)]
    plain, corrected = (
        SampledSoftmaxLoss(model, negatives="explicit", log_q=log_q, scale=1.0)(features, torch.tensor([1.0, 0.0]))
        for log_q in (None, "corrected")
    )
    torch.testing.assert_close(corrected, plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampledSoftmaxLoss(MODEL, negatives="sampled"), "`negatives`"),
        (lambda: SampledSoftmaxLoss(MODEL, hardest=3, log_q="standard"), "`hardest` does not draw"),
        (lambda: SampledSoftmaxLoss(MODEL, log_q="corrected", duplicates="keep"), "use `log_q='standard'`"),
        (
            lambda: SampledSoftmaxLoss(MODEL, negatives="explicit")(clicks(MODEL, 4)[0]()),
            "needs columns of negative documents",
        ),
        (
            lambda: SampledSoftmaxLoss(MODEL, log_q="standard").compute_loss_from_embeddings([torch.ones(2, 3)] * 3),
            "`document_log_q` is needed",
        ),
    ],
)
def test_wrong_input_is_refused_with_its_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()
