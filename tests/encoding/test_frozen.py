"""What a frozen encoder gives for a row is computed once, kept by its weights, and never another encoder's."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Transformer

from st_fpsloss import Categorical, FPSLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, Tower, TripletLoss, two_tower
from st_fpsloss.encoding.embedding_store import EmbeddingStore
from st_fpsloss.towers import id_transformer
from tests.encoding.test_packed import pack
from tests.encoding.tiny_models import tiny_transformer
from tests.losses.conftest import WORDS, clicks, gradients

MODES = [{}, {"cache_gradients": False}, {"cache_gradients": True, "mini_batch_num_tokens": 20}]
LOSSES = [FPSLoss, SampledSoftmaxLoss, PairCELoss, TripletLoss, SigmoidLoss]


def model_of(frozen: tuple[bool, bool] = (True, True), dropout: float = 0.3, seed: int = 0) -> SentenceTransformer:
    """Two towers of MLPs over transformers from scratch, in training mode."""
    torch.manual_seed(seed)
    towers = [
        Tower(id_transformer(WORDS, 16, 1, 2, max_seq_length=50, dropout=dropout), hidden_dims=(16,), frozen=is_frozen)
        for is_frozen in frozen
    ]
    return two_tower(*towers, embedding_dim=8).train()


def encoded_rows(model: SentenceTransformer) -> list[tuple[Any, ...]]:
    """Rows that go through an encoder from now on, by tower and tokens."""
    rows: list[tuple[Any, ...]] = []

    def record(_, inputs):
        if "sentence_embedding" not in inputs[0]:  # else the encoder passes on what it is given
            ids, mask = inputs[0]["input_ids"], inputs[0]["attention_mask"].bool()
            rows.extend((inputs[0]["task"], *row[held].tolist()) for row, held in zip(ids, mask, strict=True))

    for module in model.modules():
        if isinstance(module, Transformer):
            module.register_forward_pre_hook(record)
    return rows


def step(model: SentenceTransformer, features, kind=FPSLoss, **options) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    value = kind(model, similarity="dot", **options)(features())
    value.backward()
    return value.detach(), gradients(model, None)


def assert_equal_steps(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert expected[1].norm() > 0
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_losses_and_gradients_are_those_without_the_cache(kind, mode):
    model = model_of()
    features, _ = clicks(model, 12, num_negatives=1, prompts=True)
    expected = step(model, features, kind, **mode)
    assert_equal_steps(step(model, features, kind, cache_frozen=True, **mode), expected)


def test_each_row_is_encoded_once_whatever_the_batch():
    model = model_of()
    loss = FPSLoss(model, cache_frozen=True)
    batches = [clicks(model, 10, seed=seed)[0] for seed in (0, 0, 5)]
    rows = encoded_rows(model)
    for features in (*batches, *batches):
        loss(features()).backward()
    with torch.no_grad():
        loss.eval()(batches[0]())
    assert len(rows) == len(set(rows)) > 10


@pytest.mark.parametrize("frozen", [(True, False), (False, True)])
def test_a_tower_that_learns_is_encoded_as_ever(frozen):
    model = model_of(frozen, dropout=0.0)
    features, _ = clicks(model, 12)
    assert_equal_steps(step(model, features, cache_frozen=True), step(model, features))
    learning = model[0].sub_modules["query" if frozen[1] else "document"][0]
    assert any(parameter.grad is not None for parameter in learning.parameters())


def test_a_missing_frozen_encoder_is_warned_of_once(caplog):
    model = model_of((False, False))
    for module in model.modules():
        if isinstance(module, Transformer):
            module.requires_grad_(False)  # but dropout goes on
    loss = FPSLoss(model, cache_frozen=True, learn_scale=False)
    features, _ = clicks(model, 6)
    rows = encoded_rows(model)
    for _ in range(2):
        loss(features()).backward()
    assert len(rows) == 2 * len(set(rows)) > 0
    assert sum("no tower has a frozen encoder" in record.message for record in caplog.records) == 1
    model.eval()  # now they cannot change any more
    loss(features())
    assert len(rows) == 3 * len(set(rows))
    loss(features())
    assert len(rows) == 3 * len(set(rows))


def test_weights_that_are_replaced_have_embeddings_of_their_own():
    model, other = model_of(), model_of(seed=1)
    features, _ = clicks(model, 8)
    loss = FPSLoss(model, cache_frozen=True)
    before = loss(features())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(loss(features()), FPSLoss(other)(features()), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(before, loss(features()))


def test_side_features_learn_above_a_frozen_encoder():
    torch.manual_seed(0)
    genre = Categorical("genre", vocabulary=["a", "b"], dim=4)
    encoders = [id_transformer(WORDS, 16, 1, 2, max_seq_length=50, dropout=0.3) for _ in "qd"]
    model = two_tower(
        Tower(encoders[0], hidden_dims=(16,), frozen=True),
        Tower(encoders[1], hidden_dims=(16,), frozen=True, features=[genre]),
        embedding_dim=8,
    ).train()
    with torch.no_grad():  # they start without a say
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    rows = [{"text": text, "genre": genre} for text in ("quick fox", "lazy dog", "brew") for genre in "ab"]

    def features():
        queries = model.preprocess([f"{word} towers" for word in WORDS[:6]], task="query")
        return [queries, model.preprocess(rows, task="document")]

    expected = step(model, features)
    encoded = encoded_rows(model)
    assert_equal_steps(step(model, features, cache_frozen=True), expected)
    assert len(encoded) == len(set(encoded)) == 6 + 3  # six documents of three texts
    table = model[0].sub_modules["document"][0].encoders[0].table
    assert table.weight.grad.norm() > 0


@pytest.mark.parametrize("cache_gradients", [False, "auto"])
def test_under_matryoshka_and_autocast(cache_gradients):
    model = model_of()
    features, _ = clicks(model, 8)

    def value(cache_frozen):
        model.zero_grad()
        inner = FPSLoss(model, scale=2.0, cache_gradients=cache_gradients, cache_frozen=cache_frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = MatryoshkaLoss(model, inner, [8, 4], [1.0, 0.5])(features(), None)
        loss.backward()
        return loss.detach(), gradients(model, inner)

    (with_cache, ours), (without, plain) = value(True), value(False)
    torch.testing.assert_close(with_cache, without, rtol=1e-2, atol=1e-2)
    assert (ours - plain).norm() < 2e-2 * plain.norm()


def test_packed_rows_too():
    towers = [Tower(tiny_transformer("qwen"), pooling="lasttoken", hidden_dims=(8,), frozen=True) for _ in "qd"]
    model = pack(two_tower(*towers, embedding_dim=8))
    features, _ = clicks(model, 8)
    assert "cu_seq_lens_q" in features()[0]
    assert_equal_steps(step(model, features, cache_frozen=True), step(model, features))


def test_what_does_not_fit_into_memory_is_computed_every_time():
    store = EmbeddingStore(4, max_bytes=3 * 16)
    vectors = torch.arange(20.0).view(5, 4)
    store.add(torch.arange(2), vectors[:2])
    store.add(torch.arange(2, 5), vectors[2:])
    found, kept = store.get(torch.tensor([4, 2, 9, 0]))
    assert len(store) == 3
    assert found.tolist() == [False, True, False, True]
    assert torch.equal(kept, vectors[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_folder_holds_embeddings_exactly_and_forgets_a_row_cut_off_by_a_kill(tmp_path, dtype):
    vectors = torch.randn(5000, 4, dtype=torch.float64).to(dtype)
    numbers = torch.randperm(5000) - 2500
    store = EmbeddingStore(4, dtype, tmp_path)
    for chunk in torch.arange(5000).split(1300):
        store.add(numbers[chunk], vectors[chunk])
    again = EmbeddingStore(4, dtype, tmp_path)
    for one in (store, again):
        found, kept = one.get(numbers)
        assert found.all() and torch.equal(kept, vectors)
    (path,) = tmp_path.glob("*.fingerprints")
    os.truncate(path, 8 * 4999 - 3)
    vectors_path = path.with_suffix(".vectors")
    os.truncate(vectors_path, vectors_path.stat().st_size // 5000 * 4990 + 5)
    found, kept = EmbeddingStore(4, dtype, tmp_path).get(numbers)
    assert found.tolist() == [True] * 4990 + [False] * 10
    assert torch.equal(kept, vectors[:4990])


def run(folder: Path, report: Callable[[tuple[Any, ...]], object]) -> None:
    """Thirty batches; every row that is encoded is reported."""
    model = model_of()
    loss = FPSLoss(model, cache_frozen=folder, learn_scale=False, mini_batch_num_tokens=40)
    rows = encoded_rows(model)
    for seed in range(30):
        with torch.no_grad():  # autograd has threads, which a forked process lacks
            loss(clicks(model, 12, seed=seed)[0]())
        for row in rows:
            report(row)
        rows.clear()


def test_a_killed_run_is_resumed_and_encodes_nothing_twice(tmp_path):
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run(tmp_path, lambda row: os.write(writable, f"{row}\n".encode()))
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as lines:
        first = list(itertools.islice(lines, 60))
        os.kill(child, signal.SIGKILL)
        first += [line for line in lines if line.endswith("\n")]
    assert os.waitpid(child, 0)[1] == signal.SIGKILL  # not the end of the run
    second: list[str] = []
    run(tmp_path, lambda row: second.append(f"{row}\n"))
    assert len(first) >= 60 and len(second) > 60
    assert len(first) + len(second) == len({*first, *second})


@pytest.mark.parametrize("value", [None, 3, ""])
def test_what_is_no_folder_is_refused(value):
    with pytest.raises(ValueError, match="`cache_frozen` must be True, False or a folder"):
        FPSLoss(model_of(), cache_frozen=value)
