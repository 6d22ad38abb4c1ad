from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from st_fpsloss.retrieval.index import DocumentIndex
from st_fpsloss.towers import Tower, two_tower
from st_fpsloss.towers.modules.document_bias import DocumentBias
from tests.towers.conftest import DOCUMENTS, QUERIES, featured_model, features, kinds, open_gates, words

TEXTS = ["i1 i2", "i3", "", "i4 i5 i6"]


def text_model(**arguments) -> SentenceTransformer:
    torch.manual_seed(0)
    query, document = Tower(words(), hidden_dims=(12,)), Tower(words(), hidden_dims=(12,), dropout=0.1)
    return open_gates(two_tower(query, document, embedding_dim=8, document_bias=True, **arguments))


def test_the_embedding_has_one_more_dimension_that_is_1_for_queries() -> None:
    for model, queries, documents in ((text_model(), TEXTS, TEXTS), (featured_model(), QUERIES, DOCUMENTS)):
        found = model.encode_query(queries), model.encode_document(documents)
        assert model.get_embedding_dimension() == found[0].shape[1] == found[1].shape[1] == 9
        assert (found[0][:, -1] == 1).all()
        assert len(np.unique(found[1][:, -1].round(4))) > 2


def test_the_bias_starts_at_zero() -> None:
    model = two_tower(Tower(words()), Tower(words(), features=features()[1]), document_bias=True)
    assert not model.encode_document(DOCUMENTS)[:, -1].any()


def test_the_bias_is_linear_in_the_last_hidden_layer_and_the_features() -> None:
    model = featured_model()
    modules = model.eval()[0].sub_modules["document"]
    assert kinds(model, "document")[-3:] == ["Dense", "DocumentBias", "Dense"]
    with torch.no_grad():
        hidden = modules[:-2](model.preprocess(DOCUMENTS, task="document"))
        read = torch.cat([hidden["sentence_embedding"], hidden["feature_embedding"]], dim=1)
        expected = read @ modules[-2].linear.weight[0]
    np.testing.assert_allclose(model.encode_document(DOCUMENTS)[:, -1], expected.cpu(), rtol=1e-5, atol=1e-6)


def test_an_id_can_have_a_score_of_its_own() -> None:
    model = featured_model()
    one, other, again = model.encode_document([{"item_id": "i1"}, {"item_id": "i2"}, {"item_id": "i1"}])[:, -1]
    assert one != other and one == again


def test_the_other_dimensions_are_those_of_a_model_without_bias() -> None:
    with_bias, without = featured_model(), featured_model(document_bias=False)
    query, document = with_bias.encode_query(QUERIES), with_bias.encode_document(DOCUMENTS)
    np.testing.assert_allclose(query[:, :-1], without.encode_query(QUERIES), atol=1e-6)
    np.testing.assert_allclose(document[:, :-1], without.encode_document(DOCUMENTS), atol=1e-6)


def test_one_shared_tower_gives_its_documents_alone_a_score() -> None:
    tower = Tower(words(), features=features()[1], hidden_dims=(16,))
    model = open_gates(two_tower(tower, tower, embedding_dim=8, document_bias=True))
    query, document = model.encode_query(DOCUMENTS), model.encode_document(DOCUMENTS)
    np.testing.assert_allclose(query[:, :-1], document[:, :-1], atol=1e-6)
    assert (query[:, -1] == 1).all() and not (document[:, -1] == 1).any()


def test_a_text_model_with_a_bias_survives_saving(tmp_path: Path, installed: dict[str, str]) -> None:
    model = text_model()
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(again.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(again.encode_document(TEXTS), model.encode_document(TEXTS), atol=1e-6)
    assert again.get_embedding_dimension() == 9
    config = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert config["requirements"] == {"st-fpsloss": ">=0.0.7"}
    assert "trust_remote_code=True" in (tmp_path / "README.md").read_text()


def test_the_score_of_an_index_is_the_dot_product_plus_the_bias(tmp_path: Path) -> None:
    model = featured_model()
    documents = {f"d{n}": {"text": f"i{n}", "item_id": f"i{n}", "year": 1950 + n} for n in range(12)}
    index = DocumentIndex.build(model, documents, tmp_path / "index")
    queries = [{"seen": ["i1", "i2"], "age": 30}, {}]
    query, document = model.encode_query(queries), model.encode_document(list(documents.values()))
    scores = query[:, :-1].astype(np.float64) @ document[:, :-1].T.astype(np.float64) + document[:, -1]
    for row, found in enumerate(index.search(model, queries, k=12)):
        assert [name for name, _ in found] == [f"d{n}" for n in np.argsort(-scores[row])]
        np.testing.assert_allclose([score for _, score in found], np.sort(scores[row])[::-1], rtol=1e-5, atol=1e-5)


def test_training_learns_what_is_popular() -> None:
    torch.manual_seed(0)
    model = two_tower(Tower(words()), Tower(words()), embedding_dim=8, document_bias=True)
    bias = next(module for module in model.modules() if isinstance(module, DocumentBias))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is bias.linear.weight)
    optimizer = torch.optim.Adam([bias.linear.weight], lr=0.1)
    queries, documents, clicked = [f"i{n}" for n in range(8)], ["i1", "i2", "i3"], torch.tensor([0] * 6 + [1, 2])
    for _ in range(60):
        optimizer.zero_grad()
        query, document = (
            model(model.preprocess(rows, task=task), task=task)["sentence_embedding"]
            for rows, task in ((queries, "query"), (documents, "document"))
        )
        nn.functional.cross_entropy(query @ document.T, clicked).backward()
        optimizer.step()
    scores = model.encode_document(["i1", "i2", "i3"])[:, -1]
    assert scores[0] > max(scores[1:]) + 0.5


def test_a_cosine_has_no_room_for_a_bias() -> None:
    with pytest.raises(ValueError, match='document_bias=True needs similarity="dot"'):
        text_model(similarity="cosine")
