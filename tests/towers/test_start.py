"""Towers over a pretrained encoder start as that encoder."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer

from st_fpsloss.towers import Categorical, Numerical, Tower, id_embedding, id_transformer, two_tower
from st_fpsloss.towers.start import start_linear
from tests.towers.test_two_tower import IDS, LAYOUTS, kinds, route, save_folder, tiny_encoder

TEXTS = ["a film about a train", "robots", "a quiet drama in a small town", "trains and robots in a drama", ""]
HISTORIES = ["i1 i2 i3", "i4", "", "i9 unknown i1", "i5 i6", "i7 i1"]


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)]
    return unit[0] @ unit[1].T


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_folder(LAYOUTS["roberta"], tmp_path / "encoder")


def mlp(widths: list[int]) -> list[Dense]:
    pairs = list(itertools.pairwise(widths))
    activations = [torch.nn.ReLU()] * (len(pairs) - 1) + [torch.nn.Identity()]
    return [Dense(*pair, activation_function=a) for pair, a in zip(pairs, activations, strict=True)]


@pytest.mark.parametrize(
    ("widths", "rank"),
    [([6, 4], 4), ([6, 9], 6), ([6, 12, 6], 6), ([6, 17, 14, 9], 6), ([6, 5, 6], 2), ([6, 40, 8, 40, 6], 4)],
)
def test_a_head_starts_linear_as_its_projection_and_nothing_else(widths: list[int], rank: int) -> None:
    layers = mlp(widths)
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    start_linear(layers, basis)
    x = 100 * torch.randn(50, 6)
    features = {"sentence_embedding": x}
    for layer in layers:
        features = layer(features)
    expected = torch.zeros(50, widths[-1])
    expected[:, :rank] = x @ basis[:rank].T
    torch.testing.assert_close(features["sentence_embedding"], expected, rtol=1e-5, atol=1e-4)


def test_units_that_have_no_effect_yet_learn_at_the_second_step() -> None:
    layers = mlp([4, 20, 4])
    start_linear(layers, torch.eye(4))
    first, output = (layer.linear.weight for layer in layers)
    assert bool((output[:, 8:] == 0).all()) and not bool((first[8:] == 0).any())
    features = {"sentence_embedding": torch.randn(9, 4)}
    for layer in layers:
        features = layer(features)
    features["sentence_embedding"].square().sum().backward()
    assert bool((output.grad[:, 8:].norm(dim=0) > 0).any())


@pytest.mark.parametrize(("similarity", "scale"), [("cosine", 1), ("dot", 1 / 0.07)])
def test_untrained_towers_have_the_cosines_of_their_encoder(minilm: str, similarity: str, scale: float) -> None:
    model = two_tower(Tower(minilm), Tower(minilm), similarity=similarity)
    encoder = SentenceTransformer(minilm, device="cpu")
    assert kinds(route(model, "query")) == ["Transformer", "Pooling", "Normalize", "Dense", "Dense"]
    expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(
        model.encode_query(TEXTS) @ model.encode_document(TEXTS).T, scale * expected @ expected.T, atol=1e-5 * scale
    )
    assert model.get_embedding_dimension() == 384


@pytest.mark.parametrize("with_texts", [True, False])
def test_smaller_embeddings_start_from_one_projection_of_both_towers(
    folder: str, with_texts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"i{a} i{b}" for a in range(20) for b in range(20)]
    model = two_tower(Tower(folder), Tower(folder), embedding_dim=6, texts=texts if with_texts else None)
    full = SentenceTransformer(folder, device="cpu").encode(texts)
    found = model.encode_document(texts)
    np.testing.assert_allclose(model.encode_query(texts), found, rtol=1e-5, atol=1e-5)
    assert ("random projection" in caplog.text) != with_texts
    if not with_texts:
        again = two_tower(Tower(folder), Tower(folder), embedding_dim=6)
        np.testing.assert_allclose(again.encode_query(texts), found, rtol=1e-5, atol=1e-5)
        return
    unit = full / np.linalg.norm(full, axis=1, keepdims=True)
    error = np.linalg.norm(unit @ unit.T - (found @ found.T) / np.outer(*[np.linalg.norm(full, axis=1)] * 2))
    best = np.sqrt((np.linalg.svd(unit, compute_uv=False)[6:] ** 4).sum())  # of all matrices of rank 6
    assert error == pytest.approx(best, rel=1e-3)


def test_narrow_layers_start_from_the_projection_that_they_carry(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"i{a} i{b}" for a in range(20) for b in range(20)]
    narrow = two_tower(Tower(folder, hidden_dims=(40, 12)), Tower(folder, hidden_dims=()), texts=texts)
    query, document = narrow.encode_query(texts), narrow.encode_document(texts)
    np.testing.assert_allclose(query[:, :6], document[:, :6], rtol=1e-5, atol=1e-5)
    assert np.abs(query[:, 6:]).max() == 0 and np.abs(document[:, 6:]).max() > 0
    full = SentenceTransformer(folder, device="cpu").encode(texts)
    np.testing.assert_allclose(cosines(document, document), cosines(full, full), atol=1e-5)


def test_larger_embeddings_keep_the_cosines_too(folder: str) -> None:
    model = two_tower(Tower(folder), Tower(folder, hidden_dims=(40, 50)), embedding_dim=24)
    full = SentenceTransformer(folder, device="cpu").encode(HISTORIES)
    np.testing.assert_allclose(
        cosines(model.encode_query(HISTORIES), model.encode_document(HISTORIES)), cosines(full, full), atol=1e-5
    )


def test_side_features_and_a_bias_leave_the_start_as_it_is(folder: str) -> None:
    document = Tower(folder, features=[Categorical("id", vocabulary=IDS), Numerical("year").fit([1, 2, 3])])
    model = two_tower(Tower(folder), document, document_bias=True)
    full = SentenceTransformer(folder, device="cpu").encode(HISTORIES)
    found = model.encode_document([{"text": text, "id": "i3", "year": 2} for text in HISTORIES])
    np.testing.assert_allclose(found[:, :-1], full, rtol=1e-5, atol=1e-5)


def test_a_tower_takes_all_layers_of_a_saved_model(folder: str, tmp_path: Path) -> None:
    transformer = Transformer(folder)
    modules = [transformer, Pooling(16, pooling_mode="cls"), Dense(16, 12, activation_function=torch.nn.Tanh())]
    encoder = SentenceTransformer(modules=[*modules, Normalize()])
    encoder.save_pretrained(str(tmp_path / "saved"))
    model = two_tower(Tower(str(tmp_path / "saved")), Tower(str(tmp_path / "saved"), num_hidden_layers=1))
    assert kinds(route(model, "document")) == ["Transformer", "Pooling", "Dense", "Normalize", "Dense", "Dense"]
    unit = encoder.encode(HISTORIES)
    found = model.encode_query(HISTORIES)
    np.testing.assert_allclose(cosines(found, found), unit @ unit.T, atol=1e-5)
    mean = two_tower(Tower(str(tmp_path / "saved"), pooling="mean"), Tower(str(tmp_path / "saved"), pooling="mean"))
    assert kinds(route(mean, "document")) == ["Transformer", "Pooling", "Dense", "Dense"]
    assert route(mean, "document")[1].pooling_mode == "mean"


@pytest.mark.parametrize("kind", ["id_transformer", "id_embedding", "static", "features"])
def test_towers_from_scratch_start_random(kind: str) -> None:
    encoders = {
        "id_transformer": id_transformer(IDS, hidden_size=8, dropout=0.0),
        "id_embedding": id_embedding(IDS, 8),
        "static": StaticEmbedding(tiny_encoder().tokenizer, embedding_dim=8),
        "features": None,
    }
    features = [Categorical("id", vocabulary=IDS)] if kind == "features" else []
    tower = Tower(encoders[kind], features=features)
    torch.manual_seed(1)
    model = two_tower(tower, tower, embedding_dim=8)
    last = route(model, "query")[-1].linear
    assert last.in_features == 16 and bool((last.weight != 0).all())


def test_a_pretrained_static_embedding_starts_as_itself(tmp_path: Path) -> None:
    static = id_embedding(IDS, 8)
    SentenceTransformer(modules=[static]).save_pretrained(str(tmp_path))
    model = two_tower(Tower(str(tmp_path)), Tower(str(tmp_path)))
    static = SentenceTransformer(str(tmp_path), device="cpu").encode(HISTORIES)
    np.testing.assert_allclose(model.encode_query(HISTORIES), static, rtol=1e-5, atol=1e-6)


def test_encoders_of_two_sizes_need_a_size(folder: str) -> None:
    with pytest.raises(ValueError, match=r"embedding_dim=None.*16 and 8.*embedding_dim="):
        two_tower(Tower(folder), Tower(id_embedding(IDS, 8)))
    with pytest.raises(ValueError, match=r"embedding_dim=None.*no tower has an encoder"):
        two_tower(*(Tower(features=[Categorical("id", vocabulary=IDS)]) for _ in range(2)))
    with pytest.raises(ValueError, match="texts='one text'"):
        two_tower(Tower(folder), Tower(folder), texts="one text")


# Frozen encoders


def test_a_frozen_encoder_stays_as_it_is_while_the_mlp_learns(minilm: str, tmp_path: Path) -> None:
    frozen = Tower(minilm, num_hidden_layers=1, frozen=True, features=[Categorical("id", vocabulary=IDS)])
    model = two_tower(frozen, Tower(minilm, num_hidden_layers=1))
    for candidate in (model, copy.deepcopy(model)):
        candidate.train()
        first, pooling = route(candidate, "query")[:2]
        assert not any(module.training for module in first.text_encoder.modules()) and not pooling.training
        assert not any(parameter.requires_grad for parameter in first.text_encoder.parameters())
        assert all(parameter.requires_grad for parameter in first.encoders.parameters())
        assert all(module.training for module in [*route(candidate, "query")[3:], *route(candidate, "document")])
        inputs = candidate.preprocess(TEXTS, task="query")
        once, twice = (candidate(dict(inputs), task="query")["sentence_embedding"] for _ in range(2))
        torch.testing.assert_close(once, twice, rtol=0, atol=0)
    plain = two_tower(Tower(minilm, num_hidden_layers=1, frozen=True), Tower(minilm, num_hidden_layers=1))
    plain.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu").train()
    assert all(module.training for module in again.modules())
    assert route(again, "query")[0].model.config.hidden_dropout_prob == 0.1


def test_frozen_needs_an_encoder() -> None:
    with pytest.raises(ValueError, match="frozen=True needs a transformer"):
        Tower(features=[Categorical("id", vocabulary=IDS)], frozen=True)
    with pytest.raises(ValueError, match="frozen='yes'"):
        Tower("x", frozen="yes")
