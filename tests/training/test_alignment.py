"""A light query tower learns the document tower's embeddings, on texts alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cosine_similarity, normalize

from st_fpsloss import Tower, align_towers, two_tower
from st_fpsloss.towers import id_embedding, id_transformer
from st_fpsloss.training.alignment import AlignmentLoss

WORDS = [f"w{n}" for n in range(30)]
TEXTS = [f"w{a} w{(7 * a + b) % 30}" for a in range(30) for b in range(20)]


def light_model(**arguments) -> SentenceTransformer:
    torch.manual_seed(0)
    document = id_transformer(WORDS, hidden_size=16, num_hidden_layers=1, dropout=0.1)
    return two_tower(
        Tower(id_embedding(WORDS, 16), hidden_dims=()), Tower(document, hidden_dims=(16,)), embedding_dim=8, **arguments
    )


def test_the_query_tower_comes_to_agree_and_nothing_else_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = light_model(similarity="cosine", prompts={"query": "w3 "})
    before = {name: value.clone() for name, value in model.state_dict().items() if ".document." in name}
    with caplog.at_level(logging.INFO):
        figures = align_towers(model, TEXTS, epochs=8, batch_size=32)
    assert figures["cosine"] > 0.95 and figures["neighbours@10"] > 0.5
    assert caplog.text.count("Agreement of the query tower after step") >= 6
    for name, value in before.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    query = torch.tensor(model.encode_query(TEXTS[:50]))
    same = torch.tensor(model.encode_document([f"w3 {text}" for text in TEXTS[:50]]))
    plain = torch.tensor(model.encode_document(TEXTS[:50]))
    assert cosine_similarity(query, same).mean() > cosine_similarity(query, plain).mean()
    assert all(module.training for module in model.train().modules())  # dropout is back


def test_a_teacher_takes_the_place_of_the_document_tower_and_a_bias_is_no_target() -> None:
    model = light_model(document_bias=True)
    teacher = light_model(similarity="dot")
    torch.nn.init.normal_(model[0].sub_modules["document"][-2].linear.weight)
    align_towers(model, TEXTS, epochs=1)
    assert set(model.encode_query(TEXTS[:9])[:, -1]) == {1.0}
    target = torch.tensor(teacher.encode_query(TEXTS))
    align_towers(model, TEXTS, teacher=teacher, epochs=8, batch_size=32)
    assert cosine_similarity(torch.tensor(model.encode_query(TEXTS))[:, :-1], target).mean() > 0.95


def test_the_loss_is_its_formula() -> None:
    model = light_model().eval()
    texts, target = TEXTS[:7], torch.randn(7, 8, dtype=torch.float64)
    features = model.preprocess(texts, task="query")
    found = AlignmentLoss(model)([{**features, "task": "query"}], target.float())
    s = torch.tensor(model.encode_query(texts), dtype=torch.float64)
    distance = ((s - target) ** 2).sum() / (target**2).sum()
    p = (20 * normalize(target) @ normalize(target).T).softmax(dim=1)
    q = (20 * normalize(s) @ normalize(target).T).softmax(dim=1)
    torch.testing.assert_close(found.double(), distance + (p * (p / q).log()).sum() / 7, rtol=1e-5, atol=1e-6)


def test_a_cut_minilm_learns_the_whole_one_and_is_saved_as_a_stock_model(minilm: str, tmp_path: Path) -> None:
    model = two_tower(Tower(minilm, num_hidden_layers=1), Tower(minilm), similarity="cosine")
    texts = [
        f"{a} {b}" for a in ("red", "blue", "old", "new", "small") for b in ("shoe", "coat", "car", "house", "dog")
    ]
    figures = align_towers(model, texts, epochs=3, batch_size=8)
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(
        again.encode_query(texts, convert_to_tensor=True), model.encode_query(texts, convert_to_tensor=True)
    )
    assert figures["cosine"] > 0.5


def test_what_cannot_be_aligned_is_refused(minilm: str) -> None:
    tower = Tower(id_embedding(WORDS, 8))
    with pytest.raises(ValueError, match="share weights"):
        align_towers(two_tower(tower, tower), TEXTS)
    with pytest.raises(ValueError, match="teacher has embeddings of 16 dimensions, model of 8"):
        align_towers(light_model(), TEXTS, teacher=SentenceTransformer(modules=[id_embedding(WORDS, 16)]))
    with pytest.raises(ValueError, match="no towers"):
        align_towers(SentenceTransformer(modules=[id_embedding(WORDS, 16)]), TEXTS)
    with pytest.raises(ValueError, match="1 different texts"):
        align_towers(light_model(), ["w1"] * 100)
    with pytest.raises(ValueError, match="epochs=0"):
        align_towers(light_model(), TEXTS, epochs=0)


@pytest.mark.parametrize("hidden_dims", [(), (16,)])
def test_a_static_embedding_starts_from_the_documents_embeddings_of_its_words(hidden_dims: tuple[int, ...]) -> None:
    document = id_transformer(WORDS, hidden_size=16, num_hidden_layers=1)
    query = Tower(id_embedding(WORDS, 8), hidden_dims=hidden_dims)
    model = two_tower(query, Tower(document, hidden_dims=(16,)), embedding_dim=8, document_bias=True)
    align_towers(model, TEXTS, epochs=1, learning_rate=1e-9)
    found, expected = model.encode_query(WORDS), model.encode_document(WORDS)
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], rtol=1e-4, atol=1e-5)
