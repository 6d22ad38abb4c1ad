from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer

from st_fpsloss.towers import History, Tower, id_embedding, two_tower
from tests.towers.conftest import DOCUMENTS, IDS, QUERIES, featured_model, features, first, words


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True)


def assert_same_embeddings(one: SentenceTransformer, other: SentenceTransformer) -> None:
    np.testing.assert_allclose(one.encode_query(QUERIES), other.encode_query(QUERIES), atol=1e-6)
    np.testing.assert_allclose(one.encode_document(DOCUMENTS), other.encode_document(DOCUMENTS), atol=1e-6)


# Sharing


def test_a_history_reads_with_the_items_own_table(tmp_path: Path) -> None:
    model = featured_model()
    model.save_pretrained(str(tmp_path))
    for built in (model, load(tmp_path)):
        history, item = first(built, "query").encoders[0], first(built, "document").encoders[0]
        assert history.table is item.table
        assert sum(1 for p in built.parameters() if p is item.table.weight) == 1
    held = json.loads((tmp_path / "query_0_FeatureInput" / "feature_input.json").read_text())
    assert "vocabulary" not in held["features"][0]


def test_a_text_encoder_that_towers_share_is_saved_once_and_shared_after_loading(tmp_path: Path) -> None:
    encoder = words()
    query, document = features()
    both = Tower(encoder, features=[query[1]]), Tower(encoder, features=document)
    for number, (one, other) in enumerate([(Tower(encoder), both[1]), (both[0], Tower(encoder)), both]):
        model = two_tower(one, other, embedding_dim=8)
        model.save_pretrained(str(tmp_path / str(number)))
        again = load(tmp_path / str(number))
        assert len(list((tmp_path / str(number)).rglob("tokenizer.json"))) == 1
        found = [getattr(first(again, route), "text_encoder", first(again, route)) for route in ("query", "document")]
        assert found[0] is found[1]
        texts = ["i1 i2", ""]
        np.testing.assert_allclose(model.encode_document(texts), again.encode_document(texts), atol=1e-6)


def test_one_tower_on_both_sides_is_one_tower_after_loading(tmp_path: Path) -> None:
    tower = Tower(words(), features=features()[1])
    model = two_tower(tower, tower, embedding_dim=8)
    model.save_pretrained(str(tmp_path))
    again = load(tmp_path)
    assert first(again, "query") is first(again, "document")
    np.testing.assert_allclose(again.encode_query(DOCUMENTS), model.encode_document(DOCUMENTS), atol=1e-6)


@pytest.mark.parametrize(
    ("shared_with", "dim", "message"),
    [("item", 16, "shared_with='item' must name one Categorical.*'item_id', 'job'"), ("item_id", 8, "dim=8.*dim=16")],
)
def test_sharing_what_does_not_fit_is_refused(shared_with: str, dim: int, message: str) -> None:
    query, document = features()
    history = History("seen", dim=dim, shared_with=shared_with)
    with pytest.raises(ValueError, match=message):
        two_tower(Tower(features=[history, query[2]]), Tower(features=document), embedding_dim=8)


# Saving and loading


def test_saved_models_encode_the_same_in_a_fresh_process(
    minilm: str, tmp_path: Path, installed: dict[str, str]
) -> None:
    towers = {"minilm": {"text": minilm, "num_hidden_layers": 1}, "static": {"text": id_embedding(IDS, 16)}}
    models = {name: featured_model(**tower) for name, tower in {**towers, "none": {"text": None}}.items()}
    textless = [row for row in DOCUMENTS if isinstance(row, dict) and "text" not in row]
    inputs = {name: (QUERIES, textless if name == "none" else DOCUMENTS) for name in models}
    for name, model in models.items():
        model.save_pretrained(str(tmp_path / name))
    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps(inputs))
    code = """
import pickle
from sentence_transformers import SentenceTransformer

found = {}
for name, (queries, documents) in pickle.load(open("inputs.pkl", "rb")).items():
    model = SentenceTransformer(name, trust_remote_code=True)
    found[name] = model.encode_query(queries), model.encode_document(documents)
pickle.dump(found, open("found.pkl", "wb"))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=installed, check=True)
    found = pickle.loads((tmp_path / "found.pkl").read_bytes())
    for name, model in models.items():
        queries, documents = inputs[name]
        np.testing.assert_allclose(found[name][0], model.encode_query(queries), atol=1e-6)
        np.testing.assert_allclose(found[name][1], model.encode_document(documents), atol=1e-6)


def test_the_folder_asks_for_this_package(tmp_path: Path, installed: dict[str, str]) -> None:
    featured_model().save_pretrained(str(tmp_path))
    config = tmp_path / "config_sentence_transformers.json"
    held = json.loads(config.read_text())
    assert held["requirements"] == {"st-fpsloss": ">=0.0.7"} and held["similarity_fn_name"] == "dot"
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name) == []
    load(tmp_path)
    config.write_text(json.dumps({**held, "requirements": {"st-fpsloss": ">=99"}}))
    with pytest.raises(ImportError, match="st-fpsloss"):
        load(tmp_path)


def test_without_trust_the_model_is_not_loaded(tmp_path: Path) -> None:
    featured_model().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path))


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_loaded_model_can_be_saved_again(safe_serialization: bool, tmp_path: Path) -> None:
    model = featured_model()
    model.save_pretrained(str(tmp_path / "one"), safe_serialization=safe_serialization)
    load(tmp_path / "one").save_pretrained(str(tmp_path / "two"))
    assert_same_embeddings(model, load(tmp_path / "two"))


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    featured_model().save_pretrained(str(tmp_path))
    path = tmp_path / "document_0_FeatureInput" / "feature_input.json"
    held = json.loads(path.read_text())
    del held["features"][1]
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"do not fit its configuration.*encoders"):
        load(tmp_path)


def test_what_is_pushed_to_the_hub_is_the_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = featured_model()

    class Url:
        repo_id, commit_url = "me/films", ""

    def keep(self, *, folder_path: str, **kwargs) -> Url:
        shutil.copytree(folder_path, tmp_path / "hub")
        return Url()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **kwargs: Url())
    monkeypatch.setattr(HfApi, "upload_folder", keep)
    model.push_to_hub("me/films", replace_model_card=True)
    assert 'SentenceTransformer("me/films", trust_remote_code=True)' in (tmp_path / "hub" / "README.md").read_text()
    assert_same_embeddings(model, load(tmp_path / "hub"))


def test_several_processes_encode_as_one_does() -> None:
    model = featured_model()
    alone = model.encode_query(QUERIES), model.encode_document(DOCUMENTS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        np.testing.assert_allclose(model.encode_query(QUERIES, pool=pool), alone[0], atol=1e-6)
        np.testing.assert_allclose(model.encode_document(DOCUMENTS, pool=pool, chunk_size=2), alone[1], atol=1e-6)
    finally:
        model.stop_multi_process_pool(pool)
