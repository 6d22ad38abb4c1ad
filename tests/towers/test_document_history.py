"""Histories of documents at run time: encoded once, from stored vectors, saved and loaded, trained, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_fpsloss import DocumentHistory, DocumentIndex, FPSLoss, LossStateCallback, history_documents
from st_fpsloss.cli.models import fitted_features
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.serving import export_query_encoder
from st_fpsloss.towers import Numerical, Tower, id_embedding, id_transformer, two_tower
from st_fpsloss.towers.features.kinds import feature_from_dict

FILMS = [f"f{n}" for n in range(12)]
TEXTS = {film: f"{film} w{number % 3}" for number, film in enumerate(FILMS)}
QUERIES: list[Any] = [
    {"seen": ["f1", "f2", "f3"], "age": 30},
    {"seen": ["f3"], "age": None},
    {"seen": []},
    {"seen": None},
    {},
    {"seen": np.array(["f5", "f1"])},
    {"seen": [*FILMS, None]},
]


def texts(query: dict[str, Any]) -> dict[str, Any]:
    """A query with texts in the place of ids."""
    seen = query.get("seen")
    return query if seen is None else {**query, "seen": [TEXTS[film] for film in seen if film is not None]}


def make_model(text: bool = False, **options: Any) -> SentenceTransformer:
    torch.manual_seed(0)
    words = [*FILMS, "w0", "w1", "w2"]
    query = id_embedding(FILMS, 16) if text else None
    settings = {
        "similarity": "cosine",
        **{name: options.pop(name) for name in ("similarity", "document_bias") if name in options},
    }
    return two_tower(
        Tower(query, features=[DocumentHistory("seen", max_length=5, **options), Numerical("age").fit([20, 40])]),
        Tower(id_transformer(words, 16, 1, 2, max_seq_length=6, dropout=0.0)),
        embedding_dim=16,
        **settings,
    )


def encoded_documents(model: SentenceTransformer) -> list[int]:
    """Fills with the number of rows of each call of the document tower."""
    calls: list[int] = []
    model[0].sub_modules["document"][0].register_forward_pre_hook(
        lambda _, inputs: calls.append(len(inputs[0]["input_ids"]))
    )
    return calls


@pytest.mark.parametrize("pooling", ["last", "mean", "recency"])
def test_a_saved_model_encodes_as_before_and_missing_histories_are_equal(tmp_path: Path, pooling: str) -> None:
    model = make_model(pooling=pooling, num_hidden_layers=1)
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    queries = list(map(texts, QUERIES))
    embeddings = model.encode_query(queries)
    np.testing.assert_allclose(loaded.encode_query(queries), embeddings, atol=1e-6)
    for one in (3, 4):
        np.testing.assert_allclose(embeddings[one], embeddings[2], atol=1e-6)
    assert np.abs(embeddings[0] - embeddings[2]).max() > 1e-3
    # The newest five of a longer history, and nothing of a neighbour's padding.
    np.testing.assert_allclose(model.encode_query(texts({"seen": FILMS[-5:]})), embeddings[6], atol=1e-6)
    order = model.encode_query([texts({"seen": ["f1", "f2"]}), texts({"seen": ["f2", "f1"]})])
    assert (np.abs(order[0] - order[1]).max() > 1e-4) or pooling == "mean"


@pytest.mark.parametrize("settings", [{"similarity": "cosine"}, {"similarity": "dot", "document_bias": True}])
def test_stored_vectors_are_as_good_as_texts_and_no_document_is_encoded(tmp_path: Path, settings: dict) -> None:
    model = make_model(**settings)
    index = DocumentIndex.build(model, TEXTS, tmp_path / "films")
    expected = model.encode_query(list(map(texts, QUERIES)))
    with history_documents(model, TEXTS):
        np.testing.assert_allclose(model.encode_query(QUERIES), expected, atol=1e-6)
    calls = encoded_documents(model)
    with history_documents(model, index):
        np.testing.assert_allclose(model.encode_query(QUERIES), expected, atol=1e-5)
        results = index.search(model, QUERIES[:2], k=3)
        with pytest.raises(ValueError, match="'unknown', none of the 12 documents"):
            model.encode_query({"seen": ["unknown"]})
        index.add(model, {"new": TEXTS["f1"]})
        calls.clear()
        found = model.encode_query([{"seen": ["new"]}, {"seen": ["f1"]}])
        with pytest.raises(ValueError, match="stored vectors"):
            loss: ClickLoss = FPSLoss(model)
            loss([model.preprocess([QUERIES[0]], task="query"), model.preprocess(["f1"], task="document")])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert not calls
    assert results == [
        [(film, pytest.approx(score, abs=1e-4)) for film, score in found]
        for found in index.search(model, list(map(texts, QUERIES[:2])), k=3)
    ]
    with torch.no_grad():
        next(model[0].sub_modules["document"][0].parameters()).add_(1.0)
    with pytest.raises(ValueError, match="another model"), history_documents(model, index):
        pass


def test_documents_are_encoded_once_and_again_when_the_tower_has_changed() -> None:
    model = make_model()
    calls = encoded_documents(model)
    queries = [texts({"seen": FILMS[n % 5 : n % 5 + 2]}) for n in range(40)]
    first = model.encode_query(queries, batch_size=8)
    assert sum(calls) == 6
    np.testing.assert_allclose(model.encode_query(queries[:7], batch_size=2), first[:7], atol=1e-6)
    assert sum(calls) == 6
    with torch.no_grad():
        for parameter in model[0].sub_modules["document"].parameters():
            parameter.mul_(1.1)
    again = model.encode_query(queries)
    assert sum(calls) == 12 and np.abs(again - first).max() > 1e-4


@pytest.mark.parametrize("own_loss", [True, False])
def test_the_stock_trainer_learns_what_follows(tmp_path: Path, own_loss: bool) -> None:
    model = make_model(num_hidden_layers=1, dropout=0.0)
    queries = [{"seen": [FILMS[(n * 5) % 12], FILMS[n]]} for n in range(12)]
    targets = [TEXTS[FILMS[(n + 1) % 12]] for n in range(12)]
    data = Dataset.from_dict({"query": queries * 4, "document": targets * 4})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=30,
        per_device_train_batch_size=12,
        learning_rate=3e-3,
        router_mapping={"query": "query", "document": "document"},
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss: Any = FPSLoss(model, learn_scale=False) if own_loss else MultipleNegativesRankingLoss(model)
    callbacks = [LossStateCallback(loss)] if own_loss else []
    with history_documents(model, TEXTS):  # so that the rows need not repeat texts
        SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss, callbacks=callbacks).train()
        scores = model.similarity(model.encode_query(queries), model.encode_document(targets))
    assert (scores.argmax(dim=1) == torch.arange(12)).float().mean() >= 0.9


def test_a_history_beside_text_changes_nothing_at_the_start_and_may_differ_in_kind() -> None:
    model = make_model(text=True)
    one, other = model.encode_query([{"text": "f1", **texts({"seen": ["f2"]})}, {"text": "f1"}])
    np.testing.assert_allclose(one, other, atol=1e-6)
    example = model[0].sub_modules["query"][0].example_input("f1", 0)
    assert model.encode_query(example).shape == (16,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("f1", "needs a list of documents"),
        ({"text": "f1"}, "needs a list of documents"),
        ([3], "history_documents"),
        ([["f1"]], "strings or dicts"),
        ({"f1"}, "the newest last"),
    ],
)
def test_what_is_no_history_of_documents_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(num_hidden_layers=0).encode_query({"seen": value})


def test_unfit_arguments_are_refused() -> None:
    seen = DocumentHistory("seen")
    for argument in ({"pooling": "max"}, {"max_length": 0}, {"dropout": 1.0}, {"num_hidden_layers": -1}, {"detach": 1}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            DocumentHistory("seen", **argument)
    words = Tower(id_embedding(FILMS, 16))
    with pytest.raises(ValueError, match="num_attention_heads=3 of 'seen' does not divide 16"):
        two_tower(Tower(features=[DocumentHistory("seen", num_attention_heads=3)]), words)
    with pytest.raises(ValueError, match="only a query tower"):
        two_tower(words, Tower(features=[seen]), embedding_dim=16)
    both = Tower(features=[seen])
    with pytest.raises(ValueError, match="only a query tower"):
        two_tower(both, both, embedding_dim=16)
    with pytest.raises(ValueError, match="No tower of the model"), history_documents(two_tower(words, words), {}):
        pass
    with pytest.raises(ValueError, match="neither a DocumentIndex"), history_documents(make_model(), ["f1"]):  # type: ignore[arg-type]
        pass
    model = make_model()
    with history_documents(model, TEXTS), pytest.raises(ValueError, match="'unknown', which is none of the 12 ids"):
        model.encode_query({"seen": ["unknown"]})
    assert model.encode_query({"seen": ["unknown"]}).shape == (16,)  # a text again


def test_an_export_without_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DocumentHistory 'seen'"):
        export_query_encoder(make_model(), tmp_path / "queries")


def test_the_command_line_knows_the_kind() -> None:
    rows = Dataset.from_dict({"query": [{"seen": ["f1"]}], "document": ["f1"]})
    assert fitted_features(["seen=DocumentHistory"], rows, "query") == [DocumentHistory("seen")]
    feature = DocumentHistory("seen", pooling="mean", detach=True, dim=8)
    assert feature_from_dict(feature.to_dict()) == feature
