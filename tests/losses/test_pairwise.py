from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from st_fpsloss import PairCELoss, TripletLoss
from st_fpsloss.objectives import naive
from tests.losses.agreement import assert_agrees, random_batch
from tests.losses.conftest import small_model

MODEL = small_model()
SHAPES = list(itertools.product([1, 7, 12], [0, 1, 3], [0, 1]))  # rows, negative columns, seed


def pair_loss(loss):
    if isinstance(loss, PairCELoss):
        return lambda gap: F.softplus(-gap)
    return lambda gap: torch.relu(loss.margin - gap)


def formula(loss, explicit: bool):
    def value(U, W, alpha, beta, query, document, r):
        return naive.pairwise(
            U, W, alpha, query, document, r, pair_loss(loss), explicit, loss.duplicates, loss.relevance,
            loss.strategy.hardest, loss.margin if loss.strategy.semi_hard else None,
        )  # fmt: skip

    return value


OPTIONS = [
    dict(),
    dict(negatives="explicit"),
    dict(negatives="in_batch"),
    dict(negatives="in_batch", hardest=2),
    dict(hardest=100),
]
KINDS = [*itertools.product([PairCELoss, TripletLoss], OPTIONS), (TripletLoss, dict(semi_hard=True, margin=1.3))]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("duplicates", ["mask", "keep"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_value_and_gradients_equal_the_float64_formula(kind, options, duplicates, similarity):
    for rows, negatives, seed in SHAPES:
        loss = kind(
            MODEL, scale=2.0, learn_scale=True, similarity=similarity, duplicates=duplicates,
            relevance="weight" if seed else "mask", **options,
        )  # fmt: skip
        explicit = options.get("negatives") == "explicit" or (not options and negatives > 0)
        assert_agrees(loss, formula(loss, explicit), random_batch(rows, negatives, seed)[:5])


@pytest.mark.parametrize("kind", [PairCELoss, TripletLoss])
@pytest.mark.parametrize("options", [dict(), dict(hardest=3), dict(negatives="explicit")], ids=str)
def test_the_tiling_changes_nothing(monkeypatch, kind, options):
    batch = random_batch(40, 1, 0)[:5]
    monkeypatch.setattr("st_fpsloss.batch.negatives._TILE_PAIRS", 7)
    monkeypatch.setattr("st_fpsloss.objectives.softmax._TILE_PAIRS_CPU", 100)
    monkeypatch.setattr("st_fpsloss.objectives.sampled_softmax._CHUNK_NUMBERS", 20)
    loss = kind(MODEL, learn_scale=True, **{"negatives": "in_batch", **options})
    assert_agrees(loss, formula(loss, explicit="negatives" in options), batch)


def test_pair_ce_is_the_cross_entropy_of_the_positive_being_the_better():
    U, W, N = torch.randn(3, 5, 4)
    gap = (U * W).sum(1) - (U * N).sum(1)
    expected = F.binary_cross_entropy_with_logits(gap, torch.ones(5))
    loss = PairCELoss(MODEL, scale=1.0, similarity="dot")
    torch.testing.assert_close(loss.compute_loss_from_embeddings([U, W, N]), expected)


def test_triplet_keeps_alpha_at_one_and_fixed_whatever_the_similarity():
    loss = TripletLoss(small_model(similarity="cosine"))
    assert loss.alpha == 1.0
    assert not any(parameter.requires_grad for parameter in loss.scale_and_bias.parameters())


@pytest.mark.parametrize("kind", [PairCELoss, TripletLoss])
def test_a_shown_and_not_clicked_document_is_a_negative_of_its_query_beside_the_explicit_ones(kind):
    U, W = torch.randn(3, 4), torch.randn(3, 4)
    labels, query = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])  # row 1 was shown to the query of row 0
    loss = kind(MODEL, scale=1.0, similarity="dot", negatives="explicit")
    value = loss.compute_loss_from_embeddings([U[query], W], labels=labels, query_ids=query)
    torch.testing.assert_close(value, pair_loss(loss)(U[0] @ W[0] - U[0] @ W[1]))


@pytest.mark.parametrize("kind", [PairCELoss, TripletLoss])
@pytest.mark.parametrize("negatives", ["explicit", "in_batch"])
def test_a_positive_of_the_query_in_another_row_is_no_negative(kind, negatives):
    U, W = torch.randn(1, 4).expand(2, 4), torch.randn(2, 4)
    query, document = torch.zeros(2, dtype=torch.int64), torch.tensor([[0, 1], [1, 0]])
    loss = kind(MODEL, negatives=negatives)
    inputs = [U, W, W.flip(0)]
    assert loss.compute_loss_from_embeddings(inputs, query_ids=query, document_ids=document) == 0
    other_queries = loss.compute_loss_from_embeddings(inputs, document_ids=document)
    assert other_queries > 0


@pytest.mark.parametrize("options", [dict(negatives="explicit"), dict(), dict(hardest=2)], ids=str)
def test_a_batch_without_positives_or_without_negatives_has_loss_zero_connected_to_the_graph(options):
    for labels in (torch.zeros(3), torch.tensor([1.0, 0.0, -1.0])):
        inputs = [torch.randn(3, 4, requires_grad=True), torch.randn(1, 4).expand(3, 4).requires_grad_()]
        ids = dict(document_ids=torch.zeros(1, 3, dtype=torch.int64))  # one document: a positive, so no negative
        value = PairCELoss(MODEL, **options).compute_loss_from_embeddings(inputs, labels=labels, **ids)
        value.backward()
        assert value == 0
        assert torch.equal(inputs[0].grad, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PairCELoss(MODEL, negatives="random"), "`negatives` must be one of None, 'explicit', 'in_batch'"),
        (lambda: PairCELoss(MODEL, hardest=0), "hardest=0 must be a whole number of at least 1"),
        (lambda: PairCELoss(MODEL, hardest=0.5), "hardest=0.5 must"),
        (lambda: PairCELoss(MODEL, hardest=1, negatives="explicit"), "pass `negatives='in_batch'`"),
        (lambda: TripletLoss(MODEL, hardest=1, semi_hard=True), "pass one"),
        (lambda: TripletLoss(MODEL, margin=0.0), "`margin` must be a finite number above 0, got 0.0"),
        (lambda: TripletLoss(MODEL, margin=float("nan")), "`margin`"),
        (lambda: TripletLoss(MODEL, duplicates="drop"), "`duplicates`"),
        (lambda: PairCELoss(MODEL, known_positives={"a": ["b"]}, duplicates="keep"), "`known_positives` needs"),
        (
            lambda: PairCELoss(MODEL, negatives="explicit").compute_loss_from_embeddings([torch.ones(2, 3)] * 2),
            "needs columns of negative documents",
        ),
    ],
)
def test_wrong_input_is_refused_with_its_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()
