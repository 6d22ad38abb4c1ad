"""Every loss through the encoding engine and the stock trainer: kept, cached, evaluation, state, card."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from st_fpsloss import LossStateCallback, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
from st_fpsloss.objectives import naive
from tests.losses.conftest import clicks, gradients, small_model, static_query_model
from tests.training.runs import trainer

LABELS = torch.tensor([1.0, 0.0, 2.0, 1.0, -1.0, 1.0, 0.5, 0.0, 1.0])
MODES = [
    dict(cache_gradients=False),
    dict(),
    dict(cache_gradients=True),
    dict(cache_gradients=True, mini_batch_num_tokens=40),
    dict(cache_gradients=120, mini_batch_num_tokens=40),
]


def pairs(explicit, pair_loss, **options):
    def value(U, W, query, document, r):
        return naive.pairwise(U, W, torch.tensor(2.0), query, document, r, pair_loss, explicit, **options)

    return value


def softmax(U, W, query, document, r):
    return naive.sampled_softmax(U, W, torch.tensor(2.0), query, document, r, explicit=True)


def sigmoid(U, W, query, document, r):
    return naive.sigmoid(U, W, torch.tensor(2.0), torch.tensor(-1.0), query, document, r)


LOSSES = {
    "sigmoid": (SigmoidLoss, dict(bias=-1.0), sigmoid),
    "softmax": (SampledSoftmaxLoss, dict(), softmax),
    "pairs": (PairCELoss, dict(), pairs(True, lambda gap: F.softplus(-gap))),
    "pairs, hardest": (PairCELoss, dict(hardest=3), pairs(False, lambda gap: F.softplus(-gap), hardest=3)),
    "triplets": (TripletLoss, dict(), pairs(True, lambda gap: torch.relu(1 - gap))),
    "triplets, in-batch": (TripletLoss, dict(negatives="in_batch"), pairs(False, lambda gap: torch.relu(1 - gap))),
}


@pytest.mark.parametrize("model_of", [small_model, static_query_model])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["clicks", "graded"])
@pytest.mark.parametrize("name", LOSSES)
def test_kept_and_cached_equal_plain_pytorch(name, labels, model_of):
    kind, options, formula = LOSSES[name]
    model = model_of()
    features, ids = clicks(model, 9, num_negatives=2)
    embeddings = [model(column)["sentence_embedding"] for column in features()]
    r = torch.ones(9) if labels is None else labels
    expected = formula(embeddings[0], torch.stack(embeddings[1:]), ids[0], ids[1:], r)
    expected.backward()
    plain = gradients(model, None)
    for mode in MODES:
        model.zero_grad()
        loss = kind(model, scale=2.0, similarity="dot", **options, **mode)
        value = loss(features(), labels)
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert (gradients(model, loss) - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_under_no_grad_the_value_is_the_same(name):
    kind, options, _ = LOSSES[name]
    model = small_model()
    features, _ = clicks(model, 9, num_negatives=2)
    loss = kind(model, cache_gradients=True, **options)
    with torch.no_grad():
        before = loss(features(), LABELS)
    torch.testing.assert_close(before, loss(features(), LABELS).detach())


@pytest.mark.parametrize("name", LOSSES)
def test_sums_stay_in_float32_under_bfloat16(name):
    kind, options, _ = LOSSES[name]
    embeddings = [torch.nn.functional.normalize(torch.randn(64, 32), dim=1).bfloat16() for _ in range(3)]
    loss = kind(small_model(), scale=20.0, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss.compute_loss_from_embeddings(embeddings)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss.compute_loss_from_embeddings([e.float() for e in embeddings]))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_positives_has_loss_zero_connected_to_the_graph(name, mode):
    kind, options, _ = LOSSES[name]
    model = small_model()
    features, _ = clicks(model, 5, num_negatives=1)
    value = kind(model, **options, **mode)(features(), torch.tensor([0.0, -1.0, 0.0, 0.0, -2.0]))
    value.backward()
    assert value == 0
    assert torch.equal(gradients(model, None), torch.zeros_like(gradients(model, None)))


@pytest.mark.parametrize("cache_gradients", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_matryoshka_is_the_weighted_sum_over_dimensions(name, cache_gradients):
    kind, options, formula = LOSSES[name]
    model = small_model(similarity="cosine")
    features, ids = clicks(model, 9, num_negatives=2)
    embeddings = [model(column)["sentence_embedding"] for column in features()]
    expected = sum(
        weight
        * formula(
            *(F.normalize(part[..., :dim], dim=-1) for part in (embeddings[0], torch.stack(embeddings[1:]))),
            ids[0], ids[1:], torch.ones(9),
        )
        for dim, weight in ((8, 1.0), (4, 0.5))
    )  # fmt: skip
    inner = kind(model, scale=2.0, cache_gradients=cache_gradients, **options)
    value = MatryoshkaLoss(model, inner, [8, 4], [1.0, 0.5])(features(), None)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_explicit_negatives_encode_no_row_that_the_loss_does_not_use():
    model = small_model()
    columns = [["quick fox", "quick fox", "lazy dog"], ["brew", "towers", "elixirs"], ["beneath", "moonlit", "potent"]]
    labels = torch.tensor([1.0, 0.0, 0.0])  # the last row's query was clicked nowhere
    encoded = {}
    for task, route in model[0].sub_modules.items():
        route[0].register_forward_pre_hook(
            lambda _, inputs, task=task: encoded.update({task: encoded.get(task, 0) + len(inputs[0]["input_ids"])})
        )
    features = [
        model.preprocess(column, task="document" if number else "query") for number, column in enumerate(columns)
    ]
    PairCELoss(model)(features, labels)
    assert encoded == {"query": 1, "document": 3}  # brew, towers (shown to the same query), beneath


@pytest.mark.parametrize("name", LOSSES)
def test_known_positives_are_no_negatives(name):
    kind, options, _ = LOSSES[name]
    model = small_model()
    columns = [["quick fox"], ["brew"], ["towers"]]
    features = [model.preprocess(column, task="document" if n else "query") for n, column in enumerate(columns)]
    loss = kind(model, known_positives={"quick fox": ["towers"]}, **options)
    value = loss(features)
    if kind is SigmoidLoss:  # the yes alone is left
        R = model.encode_query(columns[0]) @ model.encode_document(columns[1]).T
        torch.testing.assert_close(value, F.softplus(1 - torch.tensor(R[0, 0])), rtol=1e-4, atol=1e-5)
    else:
        assert value == 0
    assert kind(model, **options)(features) > value


@pytest.mark.parametrize("name", LOSSES)
def test_settings_fit_a_model_card_and_the_state_belongs_to_one_loss(name):
    kind, options, _ = LOSSES[name]
    model = small_model()
    loss = kind(model, scale=3.0, **options)
    assert json.loads(json.dumps(loss.get_config_dict()))["scale"] == 3.0
    assert loss.citation.count("@") == loss.citation.count("    title=") > 0
    other = kind(model, **options)
    other.import_state(json.loads(json.dumps(loss.export_state())))
    assert other.alpha == pytest.approx(3.0)
    stranger = SigmoidLoss(model) if kind is not SigmoidLoss else PairCELoss(model)
    with pytest.raises(ValueError, match=f"the state of a {kind.__name__}, not of a {type(stranger).__name__}"):
        stranger.import_state(loss.export_state())


def test_beta_of_the_sigmoid_loss_is_learned_logged_and_resumed(tmp_path):
    def run(folder, resume=None, **options):
        model = small_model()
        loss = SigmoidLoss(model)
        job = trainer(folder, model, loss, **options)
        job.train(resume_from_checkpoint=resume)
        return loss, job

    straight, job = run(tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=2)
    betas = [entry["loss/beta"] for entry in job.state.log_history if "loss/beta" in entry]
    assert len(set(betas)) == 4
    resumed, _ = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), max_steps=4)
    assert resumed.beta == straight.beta
    assert resumed.alpha == straight.alpha


@pytest.mark.parametrize("kind", [PairCELoss, SampledSoftmaxLoss, TripletLoss])
def test_the_stock_trainer_learns(tmp_path, kind):
    model = small_model()
    loss = kind(model)
    job = trainer(tmp_path, model, loss, max_steps=12)
    job.train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any(isinstance(callback, LossStateCallback) for callback in job.callback_handler.callbacks)
