from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_fpsloss.towers import Categorical, Numerical, Tags, Tower, id_embedding, two_tower
from tests.towers.conftest import DOCUMENTS, IDS, QUERIES, featured_model, features, first, kinds

# What the model is made of


def test_a_tower_fuses_features_with_the_text_before_the_hidden_layers() -> None:
    model = featured_model(document_bias=False)
    assert kinds(model, "query") == ["FeatureInput", "Dense", "Dense"]
    assert kinds(model, "document") == ["FeatureInput", "Pooling", "FeatureFusion", "Dense", "Dense"]
    static = featured_model(id_embedding(IDS, 16), document_bias=False)
    assert kinds(static, "document") == ["FeatureInput", "FeatureFusion", "Dense", "Dense"]
    assert model.encode_query(QUERIES).shape == (6, 8) and model.encode_document(DOCUMENTS).shape == (7, 8)
    assert first(model, "query").feature_dim == first(model, "query").get_embedding_dimension() == 16 + 2 + 3


def test_a_pretrained_text_tower_starts_unchanged(minilm: str) -> None:
    _, document = features()
    model = two_tower(Tower(minilm, num_hidden_layers=1), Tower(minilm, features=document, hidden_dims=()))
    texts = ["a film about a train", "robots"]
    rows = [{"text": text, "item_id": "i3", "genres": ["drama"], "year": 1990} for text in texts]
    modules = model[0].sub_modules["document"]
    with torch.no_grad():
        fused = modules[:4](model.eval().preprocess(rows, task="document"))["sentence_embedding"]
    plain = SentenceTransformer(minilm).encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(fused.cpu(), plain.cpu())


def test_every_kind_of_feature_changes_the_embedding() -> None:
    model = featured_model()
    query, document = QUERIES[0], DOCUMENTS[2]
    for encode, row in ((model.encode_query, query), (model.encode_document, document)):
        whole = encode(row)
        for key in row:
            assert not np.allclose(encode({**row, key: None}), whole, atol=1e-4), key


def test_missing_keys_none_and_nothing_at_all_are_the_same() -> None:
    model = featured_model()
    nothing = {"text": None, "item_id": None, "genres": None, "year": None}
    found = model.encode_document([{}, nothing, {**nothing, "genres": [], "text": ""}, ""])
    np.testing.assert_allclose(found, np.repeat(found[:1], 4, axis=0), atol=1e-6)
    found = model.encode_query([{}, {"seen": [], "age": None}])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_unseen_values_share_one_embedding_of_their_own() -> None:
    model = featured_model()
    torch.nn.init.normal_(first(model, "document").encoders[0].table.weight)
    new, newer, none = model.encode_document([{"item_id": "x"}, {"item_id": "y"}, {}])
    np.testing.assert_allclose(new, newer, atol=1e-6)
    assert not np.allclose(new, none, atol=1e-3)


def test_a_prompt_goes_before_the_text_and_no_further() -> None:
    model = featured_model()
    row = {"text": "i1", "item_id": "i3"}
    prompted = model.encode_document(row, prompt="i7 ")
    np.testing.assert_allclose(prompted, model.encode_document({**row, "text": "i7 i1"}), atol=1e-6)
    np.testing.assert_allclose(model.encode_query(QUERIES, prompt="i7 "), model.encode_query(QUERIES), atol=1e-6)


def test_the_limit_of_the_text_is_the_text_encoders() -> None:
    model = featured_model()
    assert model.max_seq_length == first(model, "document").max_seq_length == 12
    model.max_seq_length = 4
    assert model.preprocess([{"text": "i1 " * 9}], task="document")["input_ids"].shape == (1, 4)
    assert first(model, "query").max_seq_length is None and first(model, "document").tokenizer is not None


def test_a_model_in_half_precision_encodes() -> None:
    model = featured_model().bfloat16()
    for found in (
        model.encode_query(QUERIES, convert_to_tensor=True),
        model.encode_document(DOCUMENTS[:3], convert_to_tensor=True),
    ):
        assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()


# Wrong input


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"text": "i1", "genre": ["drama"]}, "Unknown key 'genre'.*did you mean 'genres'"),
        ({"txt": "i1"}, "Unknown key 'txt'.*did you mean 'text'"),
        ({"year": "1994"}, "'year' got '1994' .a str.: a Numerical needs a number"),
        ({"year": float("nan")}, "'year' got nan"),
        ({"year": {"value": 1994}}, "'year' got {'value': 1994} .a dict."),
        ({"item_id": ["i1"]}, r"'item_id' got \['i1'\] .a list.*Tags"),
        ({"text": ["i1"]}, r"'text' got \['i1'\] .a list.: give a string"),
        ({"text": {"text": "i1"}}, "'text' got {'text': 'i1'} .a dict."),
        (3, "The input 3 is a int: give a string or a dict"),
        ([("i1", "i2")], r"The input \('i1', 'i2'\) is a tuple: give a string or a dict"),
    ],
)
def test_wrong_documents_are_refused_by_name(document, message: str) -> None:
    documents = document if isinstance(document, list) else [{}, document]
    with pytest.raises(ValueError, match=message):
        featured_model().encode_document(documents)


def test_a_tower_of_features_alone_refuses_texts() -> None:
    model = featured_model()
    with pytest.raises(ValueError, match=r"The input 'i1' is a str: give a dict with some of .*'seen', 'age', 'job'"):
        model.encode_query("i1")
    with pytest.raises(ValueError, match=r"Unknown key 'text'.*'seen', 'age', 'job'"):
        model.encode_query({"text": "i1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": [Categorical("genre")]}, r"'genre' is not fitted: call Categorical\('genre'\).fit"),
        ({"features": [Numerical("age", 0, 1), Tags("age", buckets=3)]}, "features has 'age' more than once"),
        ({"features": Numerical("age", 0, 1)}, "features=Numerical.*must be a list"),
        ({"features": [Numerical("age", 0, 1)], "num_hidden_layers": 2}, "num_hidden_layers=2 needs a transformer"),
        ({"features": [Numerical("age", 0, 1)], "max_seq_length": 9}, "max_seq_length=9 needs a transformer"),
    ],
)
def test_a_tower_refuses_features_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tower(**arguments)
