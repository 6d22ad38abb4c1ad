"""The engine against plain PyTorch: every row of every column encoded on its own way, and the formula on top."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

from st_fpsloss import FPSLoss
from st_fpsloss.encoding.gradient_cache import CachedEncoding
from st_fpsloss.encoding.memory import TokenBudget
from st_fpsloss.encoding.plan import BatchPlan, sorted_mini_batches
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.objectives import naive
from tests.losses.conftest import clicks, gradients, plain_model, small_model, static_query_model


def plain_step(model, features, ids, labels=None, directions=("query_to_doc",)) -> torch.Tensor:
    """Gradients of the encoders by uncached PyTorch, one forward a column, nothing deduplicated."""
    model.zero_grad()
    embeddings = [model(column)["sentence_embedding"] for column in features()]
    r = torch.ones(len(embeddings[0])) if labels is None else labels
    loss = sum(
        naive.full_product_softmax(
            embeddings[0], torch.stack(embeddings[1:]), torch.tensor(1.0), ids[0], ids[1:], r, direction, "mask"
        )
        for direction in directions
    ) / len(directions)
    loss.backward()
    return gradients(model, loss)


def engine_step(model, features, labels=None, **options) -> torch.Tensor:
    model.zero_grad()
    loss = FPSLoss(model, similarity="dot", scale=1.0, **options)
    loss(features(), labels).backward()
    return gradients(model, loss)


def assert_close(ours: torch.Tensor, plain: torch.Tensor) -> None:
    assert plain.norm() > 0
    assert (ours - plain).norm() < 1e-5 * plain.norm()


MODES = [
    dict(cache_gradients=False),
    dict(cache_gradients="auto", mini_batch_num_tokens=40),
    dict(cache_gradients=True),
    dict(cache_gradients=True, mini_batch_num_tokens=40),
    dict(cache_gradients=120, mini_batch_num_tokens=40),
]
LABELS = torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
MODELS = {
    "text": small_model,
    "shared tower": lambda: small_model(shared=True),
    "static queries": static_query_model,
}


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_gradients_equal_plain_pytorch(name, options, num_negatives, labels):
    model = MODELS[name]()
    features, ids = clicks(model, 8, num_negatives, prompts=True)
    assert_close(engine_step(model, features, labels, **options), plain_step(model, features, ids, labels))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("directions", [("doc_to_query",), ("query_to_doc", "doc_to_query")])
def test_gradients_equal_plain_pytorch_in_the_other_directions(options, directions):
    model = small_model()
    features, ids = clicks(model, 8, num_negatives=1)
    plain = plain_step(model, features, ids, LABELS, directions)
    assert_close(engine_step(model, features, LABELS, directions=directions, **options), plain)


@pytest.mark.parametrize("options", MODES)
def test_gradients_equal_plain_pytorch_on_a_real_encoder_without_router(minilm, options):
    model = plain_model(minilm)
    features, ids = clicks(model, 10)
    assert_close(engine_step(model, features, **options), plain_step(model, features, ids))


@pytest.mark.parametrize("options", MODES)
def test_gradient_checkpointing_changes_nothing(options):
    model = small_model().train()
    features, ids = clicks(model, 8)
    plain = plain_step(model, features, ids)
    for route in model[0].sub_modules.values():
        route[0].model.gradient_checkpointing_enable()
    assert_close(engine_step(model, features, **options), plain)


@pytest.mark.parametrize("options", MODES)
def test_under_bfloat16_autocast_all_modes_agree(options):
    model = small_model()
    features, _ = clicks(model, 8)

    def step(**chosen):
        model.zero_grad()
        loss = FPSLoss(model, **chosen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(features())
        value.backward()  # outside of autocast, as the trainer does it
        return gradients(model, loss)

    kept, full = step(cache_gradients=False), engine_step(model, features)
    assert (kept - full).norm() > 1e-4 * full.norm()  # it did run in bfloat16
    assert (step(**options) - kept).norm() < 2e-2 * kept.norm()


def test_under_bfloat16_the_gradients_of_mini_batches_are_summed_in_float32():
    model = small_model(similarity="cosine")
    features, _ = clicks(model, 100)

    def step(loss_kind=FPSLoss, autocast=True, **options):
        model.zero_grad()
        loss = loss_kind(model, scale=20.0, mini_batch_num_tokens=64, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(features(), None)
        value.backward()
        return gradients(model, loss)

    options = dict(duplicates="keep", learn_scale=False)
    exact = step(autocast=False, **options)
    kept, cached = (step(cache_gradients=cache, **options) for cache in (False, True))
    assert (kept - cached).norm() < 1e-4 * cached.norm()  # replayed ones are summed one by one, in float32
    peer = step(CachedMultipleNegativesRankingLoss)
    assert 1e-4 * exact.norm() < (kept - exact).norm() <= (peer - exact).norm()


@pytest.mark.parametrize("num_tokens", [30, 100000])
def test_with_dropout_cached_equals_kept_under_one_seed(num_tokens):
    model = small_model(dropout=0.3).train()
    features, _ = clicks(model, 12)

    def step(cache_gradients):
        torch.manual_seed(7)
        return engine_step(model, features, cache_gradients=cache_gradients, mini_batch_num_tokens=num_tokens)

    assert_close(step(True), step(False))
    assert_close(step(120), step(False))
    torch.manual_seed(8)
    other_seed = engine_step(model, features, mini_batch_num_tokens=num_tokens)
    assert (other_seed - step(False)).norm() > 1e-2 * other_seed.norm()


@pytest.mark.parametrize("cache_gradients", [False, True])
def test_two_forwards_before_one_backward(cache_gradients):
    model = small_model()
    loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=40)
    first, second = (clicks(model, 6, seed=seed)[0] for seed in (0, 5))
    model.zero_grad()
    (loss(first()) + 2 * loss(second())).backward()
    together = gradients(model, loss)
    separate = engine_step(model, first) + 2 * engine_step(model, second)
    assert_close(together, separate)


@pytest.mark.parametrize("frozen", ["query", "document"])
@pytest.mark.parametrize("options", MODES)
def test_a_frozen_tower_gets_no_gradient_and_no_second_forward(frozen, options):
    model = small_model()
    features, ids = clicks(model, 8)
    modules = model[0].sub_modules
    for module in modules[frozen]:
        module.requires_grad_(False)
    plain = plain_step(model, features, ids)
    calls = []
    modules[frozen][0].register_forward_hook(lambda *_: calls.append(len(calls)))
    assert_close(engine_step(model, features, **options), plain)
    with torch.no_grad():
        calls_in_training = len(calls)
        engine_loss = FPSLoss(model, **options)
        engine_loss(features())
    assert len(calls) == 2 * calls_in_training  # as many in evaluation, where nothing is replayed


@pytest.mark.parametrize("cache_gradients", [False, True])
def test_evaluation_under_no_grad_gives_the_same_value(cache_gradients):
    model = small_model()
    features, _ = clicks(model, 8)
    loss = FPSLoss(model, cache_gradients=cache_gradients)
    with torch.no_grad():
        value = loss(features())
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(features()).detach())


@pytest.mark.parametrize("options", MODES)
def test_matryoshka_trains_every_dimension(options):
    model = small_model(similarity="cosine")
    features, ids = clicks(model, 8)
    dims, weights = [8, 4], [1.0, 0.5]

    def through_matryoshka(inner: FPSLoss):
        model.zero_grad()
        value = MatryoshkaLoss(model, inner, dims, weights)(features(), None)
        value.backward()
        return value.detach(), gradients(model, inner), inner.logit_scale.grad

    inner = FPSLoss(model, scale=3.0, **options)
    value, ours, d_scale = through_matryoshka(inner)

    model.zero_grad()
    log_alpha = torch.tensor(3.0).log().requires_grad_()
    embeddings = [model(column)["sentence_embedding"] for column in features()]
    plain = sum(
        weight
        * naive.full_product_softmax(
            *(F.normalize(part[..., :dim], dim=-1) for part in (embeddings[0], torch.stack(embeddings[1:]))),
            log_alpha.exp(), ids[0], ids[1:], torch.ones(8), duplicates="mask",
        )
        for dim, weight in zip(dims, weights, strict=True)
    )  # fmt: skip
    plain.backward()
    torch.testing.assert_close(value, plain.detach())
    assert_close(ours, gradients(model, inner))
    torch.testing.assert_close(d_scale, log_alpha.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache_gradients", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_gradient_of_alpha_is_multiplied_by_what_the_loss_is_multiplied_by(cache_gradients, micro_batches):
    model = small_model()
    loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=40)
    batches = [clicks(model, 4, seed=seed)[0] for seed in range(4)]
    per_step = [batches[i :: 4 // micro_batches] for i in range(4 // micro_batches)]
    total = torch.zeros(())
    for (
        group
    ) in per_step:  # the mean over micro-batches, as gradient accumulation takes it; a loss scaler of 1024 on top
        loss.logit_scale.grad = None
        for features in group:
            (1024 * loss(features()) / len(group)).backward()
        total += loss.logit_scale.grad / 1024 / len(per_step)
    model.zero_grad()
    loss.logit_scale.grad = None
    sum(FPSLoss.forward(loss, features()) for features in batches).div(4).backward()
    torch.testing.assert_close(total, loss.logit_scale.grad)


def test_a_cached_loss_can_be_backpropagated_once():
    model = small_model()
    features, _ = clicks(model, 4)
    value = FPSLoss(model, cache_gradients=True)(features())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backpropagated once"):
        value.backward()


def test_each_distinct_row_is_encoded_once_and_unneeded_rows_never():
    model = small_model()
    texts = [["quick fox"] * 3 + ["lazy dog"], ["brown fox", "brown fox", "seven wizards", "brown fox"]]
    columns = [
        TokenizedRows.from_features(model.preprocess(t, task=task))
        for t, task in zip(texts, ("query", "document"), strict=True)
    ]
    plan = BatchPlan.from_columns(columns, [torch.tensor([True, True, True, False]), None], 1000)
    assert sum(len(rows) for rows in plan.mini_batches) == 3
    assert plan.index.tolist()[0][3] == -1
    assert plan.index[1, 0] == plan.index[1, 1] == plan.index[1, 3] != plan.index[1, 2]


def test_mini_batches_hold_the_budget_and_hardly_pad():
    torch.manual_seed(0)
    lengths = torch.randint(1, 128, (2000,))
    batches = sorted_mini_batches(lengths, 2048)
    assert sorted(torch.cat(batches).tolist()) == list(range(2000))
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert all(len(batch) * int(lengths[batch].max()) <= 2048 for batch in batches)
    assert padded < 1.05 * lengths.sum()
    assert len(batches) < 1.2 * lengths.sum() / 2048 + 8


def test_a_row_longer_than_the_budget_is_a_mini_batch_of_its_own():
    assert [len(batch) for batch in sorted_mini_batches(torch.tensor([5, 900, 7]), 100)] == [1, 2]


def test_a_kept_mini_batch_is_forwarded_once():
    model = small_model()
    features, _ = clicks(model, 6)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    FPSLoss(model, cache_gradients=True)(features()).backward()
    assert len(calls) == 2  # one mini-batch a tower


def calls_and_replays(model, features, **options) -> tuple[list[int], list[int]]:
    """Padded tokens of the mini-batches, and of those that are embedded twice."""
    with_graph: list[bool] = []
    sizes: list[int] = []

    def record(_, inputs):
        with_graph.append(torch.is_grad_enabled())
        sizes.append(inputs[0]["attention_mask"].numel())

    hook = model[0].register_forward_pre_hook(record)
    loss = FPSLoss(model, mini_batch_num_tokens=40, **options)
    value = loss(features())
    num_mini_batches = len(sizes)
    value.backward()
    hook.remove()
    replayed = sizes[num_mini_batches:]
    assert replayed == [size for size, kept in zip(sizes, with_graph[:num_mini_batches], strict=False) if not kept]
    return sizes[:num_mini_batches], replayed


def test_graphs_within_the_budget_are_kept_and_only_the_others_embedded_twice():
    model = small_model()
    features, _ = clicks(model, 12)
    sizes, none = calls_and_replays(model, features, cache_gradients=False)
    assert none == [] and len(sizes) > 6
    _, most = calls_and_replays(model, features, cache_gradients=1)
    assert len(most) == len(sizes) - 2  # all but the first of each tower
    for budget in (True, 60, 80, 100):
        _, replayed = calls_and_replays(model, features, cache_gradients=budget)
        budget = 40 if budget is True else budget  # one mini-batch
        kept = sum(sizes) - sum(replayed)
        assert kept <= max(budget, sum(sizes) - sum(most))
        assert all(size > budget - kept for size in replayed)  # no other one would have fitted
        assert len(replayed) > 0
    _, replayed = calls_and_replays(model, features, cache_gradients=sum(sizes))
    assert replayed == []


def test_bags_of_tokens_take_a_token_a_row_of_the_budget():
    model = static_query_model()
    text = "quick brown fox jumps over a lazy dog " * 10
    queries = [text + word for word in ("seven", "wizards", "brew")]  # 81 tokens each
    features = [model.preprocess(queries, task="query"), model.preprocess(["fox", "a dog", "over"], task="document")]
    calls = []
    model[0].sub_modules["document"][0].register_forward_hook(lambda *_: calls.append(1))
    FPSLoss(model, cache_gradients=20, mini_batch_num_tokens=3)(features).backward()
    assert len(calls) == 3  # each document in a mini-batch of its own, none of them twice


@pytest.mark.parametrize("value", [0, -5, 1.5, "always", None])
def test_a_budget_that_is_no_number_of_tokens_is_refused(value):
    with pytest.raises(ValueError, match=f"`cache_gradients` must be 'auto', True, False, or .* got {value!r}"):
        FPSLoss(small_model(), cache_gradients=value)


def test_cached_encoding_of_frozen_towers_is_a_constant():
    model = copy.deepcopy(small_model()).requires_grad_(False)
    features, _ = clicks(model, 4)
    plan = BatchPlan.from_columns([TokenizedRows.from_features(column) for column in features()], [None, None], 1000)
    encoding = CachedEncoding(model, plan, TokenBudget(1000))
    loss = encoding.embeddings.sum()
    assert encoding.attach(loss) is loss
