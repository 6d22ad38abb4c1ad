"""DocumentIndex: what it finds, what it writes, what it refuses."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

from st_fpsloss.retrieval import generation, snapshot
from st_fpsloss.retrieval.index import DocumentIndex
from st_fpsloss.retrieval.sources import Documents
from tests.evaluation.test_evaluator import static_model, static_module, vectors

NUM_QUERIES, NUM_DOCUMENTS = 30, 200
QUERIES = [f"query{i}" for i in range(NUM_QUERIES)]
DOCUMENTS = {i: f"document{i}" for i in range(NUM_DOCUMENTS)}


def random_model(similarity="dot", dim=12, num=NUM_DOCUMENTS):
    words = [*QUERIES, *(f"document{i}" for i in range(num))]
    return static_model(words, vectors(len(words), dim=dim), similarity)


def similarities(model, documents=DOCUMENTS):
    return model.similarity(model.encode_query(QUERIES), model.encode_document(list(documents.values()))).numpy()


@pytest.fixture(scope="module", params=["dot", "cosine"])
def built(request, tmp_path_factory):
    model = random_model(request.param)
    path = tmp_path_factory.mktemp("index") / "films"
    DocumentIndex.build(model, DOCUMENTS, path)
    return model, path


def test_search_gives_the_models_own_similarity_best_first(built):
    model, path = built
    scores = similarities(model)
    for number, result in enumerate(DocumentIndex.load(path).search(model, QUERIES, k=10)):
        documents, found = zip(*result, strict=True)
        assert list(documents) == np.argsort(-scores[number])[:10].tolist()
        np.testing.assert_allclose(found, scores[number][list(documents)], rtol=1e-5)


def test_search_goes_deeper_for_what_is_excluded(built, monkeypatch):
    model, path = built
    monkeypatch.setattr(snapshot, "QUERY_CHUNK_SIZE", 8)
    scores = similarities(model)
    rng = np.random.default_rng(0)
    exclude = [rng.permutation(NUM_DOCUMENTS)[: 9 * number].tolist() for number in range(NUM_QUERIES - 1)]
    exclude[3] = [int(d) for d in np.argsort(-scores[3])[:50]]
    exclude.append(None)
    results = DocumentIndex.load(path).search(model, QUERIES, k=10, exclude=exclude)
    for number, result in enumerate(results):
        left_out = set(exclude[number] or ())
        expected = [d for d in np.argsort(-scores[number]).tolist() if d not in left_out]
        assert [document_id for document_id, _ in result] == expected[:10]


def test_an_index_survives_saving(built):
    model, path = built
    loaded, again = DocumentIndex.load(path), DocumentIndex.load(str(path))
    assert loaded.search(model, QUERIES, k=5) == again.search(model, QUERIES, k=5)
    assert len(loaded) == NUM_DOCUMENTS and loaded.ids == list(DOCUMENTS)
    info = json.loads((path / "index.json").read_text(encoding="utf-8"))
    assert loaded.info == info
    assert (info["similarity"], info["metric"], info["factory"]) == (model.similarity_fn_name, "inner_product", "Flat")
    assert (info["dimension"], info["count"]) == (12, NUM_DOCUMENTS) and "st_fpsloss_version" in info
    assert [file.name for file in path.parent.iterdir()] == ["films"]


@pytest.mark.parametrize("ids", [["1", "b", "ü"], [3, 1, -(2**62)], [np.int64(7), 8, np.int32(9)]])
def test_ids_keep_their_type_and_inputs_their_content(tmp_path, ids):
    model = random_model()
    inputs = ["document0", "document1 ü", "document2"]
    built = DocumentIndex.build(model, dict(zip(ids, inputs, strict=True)), tmp_path / "index")
    for index in (built, DocumentIndex.load(tmp_path / "index")):
        (result,) = index.search(model, ["query0"], k=3)
        assert {document_id for document_id, _ in result} == set(ids)
        assert {type(document_id) for document_id, _ in result} == {str if isinstance(ids[0], str) else int}
        assert [index.document(document_id) for document_id in ids] == inputs
        with pytest.raises(ValueError, match="document_id='z'"):
            index.document("z")


def test_queries_and_documents_go_through_their_own_towers(tmp_path):
    words = ["a", "b", "c"]
    towers = [static_module(words, np.eye(3)), static_module(words, np.eye(3)[[1, 2, 0]])]
    router = Router.for_query_document(query_modules=towers[:1], document_modules=towers[1:])
    model = SentenceTransformer(modules=[router], similarity_fn_name="dot", device="cpu")
    index = DocumentIndex.build(model, {w: w for w in words}, tmp_path / "index")
    assert index.search(model, ["a"], k=1) == [[("c", 1.0)]]


def test_a_real_model_finds_by_meaning_and_shows_what_it_found(tmp_path, minilm):
    model = SentenceTransformer(minilm, device="cpu")
    documents = {
        "d1": "The toys of a boy come alive when he is away.",
        "d2": {"text": "A crew robs a bank in Los Angeles."},
        "d3": "A pregnant sheriff solves murders in the snow.",
    }
    DocumentIndex.build(model, documents, tmp_path / "index")
    index = DocumentIndex.load(tmp_path / "index")
    queries = ["living toys", {"text": "bank robbery"}]
    results = index.search(model, queries, k=2)
    assert [result[0][0] for result in results] == ["d1", "d2"]
    assert [index.document(result[0][0]) for result in results] == [documents["d1"], documents["d2"]]
    expected = model.similarity(model.encode_query(["living toys"]), model.encode_document(["toys", documents["d1"]]))
    assert results[0][0][1] == pytest.approx(float(expected[0, 1]), abs=1e-5)


def test_embedding_in_chunks_changes_nothing(tmp_path, monkeypatch):
    model = random_model()
    whole = DocumentIndex.build(model, DOCUMENTS, tmp_path / "whole").search(model, QUERIES, k=7)
    monkeypatch.setattr("st_fpsloss.retrieval.encode.CHUNK_SIZE", 13)
    assert DocumentIndex.build(model, DOCUMENTS, tmp_path / "chunks").search(model, QUERIES, k=7) == whole


def test_equal_scores_stand_in_the_order_of_the_corpus(tmp_path):
    model = static_model(["query0", "x", "y"], np.array([[1.0], [1.0], [2.0]]))
    index = DocumentIndex.build(model, {9: "x", 1: "x", 5: "y", 0: "x"}, tmp_path / "index")
    assert index.search(model, ["query0"], k=4) == [[(5, 2.0), (9, 1.0), (1, 1.0), (0, 1.0)]]


def test_search_returns_what_there_is(built):
    model, path = built
    index = DocumentIndex.load(path)
    assert index.search(model, [], k=3) == []
    assert [len(result) for result in index.search(model, QUERIES[:2], k=10_000)] == [NUM_DOCUMENTS] * 2
    everything, most = list(DOCUMENTS), list(DOCUMENTS)[1:]
    first, second = index.search(model, QUERIES[:2], k=3, exclude=[everything, most])
    assert first == [] and [document_id for document_id, _ in second] == [0]


def test_excluded_ids_that_the_index_does_not_have_are_ignored(built):
    model, path = built
    index = DocumentIndex.load(path)
    assert index.search(model, QUERIES[:1], k=3, exclude=[[10**9]]) == index.search(model, QUERIES[:1], k=3)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW16", "PCA8,IVF8,Flat"])
def test_an_approximate_index_finds_most_and_fills_up_after_exclusion(tmp_path, factory):
    num = 1500
    model = random_model("cosine", num=num)
    documents = {i: f"document{i}" for i in range(num)}
    DocumentIndex.build(model, documents, tmp_path / "index", factory=factory)
    index = DocumentIndex.load(tmp_path / "index")
    scores = similarities(model, documents)
    best = [set(np.argsort(-row)[:10].tolist()) for row in scores]
    found = [{document_id for document_id, _ in result} for result in index.search(model, QUERIES, k=10)]
    recall = np.mean([len(a & b) / 10 for a, b in zip(found, best, strict=True)])
    assert recall > (0.3 if factory.startswith("PCA") else 0.6)
    if not factory.startswith("HNSW"):
        # Everything but the 20 worst is excluded, far more than the probed lists hold.
        exclude = [np.argsort(-row)[:-20].tolist() for row in scores]
        results = index.search(model, QUERIES, k=15, exclude=exclude)
        assert [len(result) for result in results] == [15] * NUM_QUERIES
        for result, left_out in zip(results, exclude, strict=True):
            assert not {document_id for document_id, _ in result} & set(left_out)


def test_an_existing_path_is_kept_unless_overwrite(tmp_path):
    model, path = random_model(), tmp_path / "index"
    DocumentIndex.build(model, {1: "document1"}, path)
    with pytest.raises(ValueError, match=r"exists.*overwrite=True"):
        DocumentIndex.build(model, {2: "document2"}, path)
    assert DocumentIndex.load(path).ids == [1]
    DocumentIndex.build(model, {2: "document2"}, path, overwrite=True)
    assert DocumentIndex.load(path).ids == [2] and [file.name for file in tmp_path.iterdir()] == ["index"]


def test_overwrite_does_not_remove_what_is_no_index(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="is no document index"):
            DocumentIndex.build(random_model(), DOCUMENTS, path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_build_leaves_nothing_and_keeps_the_old_index(tmp_path, monkeypatch):
    model, path = random_model(), tmp_path / "index"
    DocumentIndex.build(model, {1: "document1"}, path)

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(generation, "write_vectors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        DocumentIndex.build(model, DOCUMENTS, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["index"] and DocumentIndex.load(path).ids == [1]


def test_an_overwrite_that_stops_at_the_last_step_leaves_the_old_index(tmp_path, monkeypatch):
    model, path = random_model(), tmp_path / "index"
    DocumentIndex.build(model, {1: "document1"}, path)
    replace = os.replace

    def interrupted(source, target):
        if str(target).endswith("index.json"):
            raise OSError("interrupted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        DocumentIndex.build(model, DOCUMENTS, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["index"] and DocumentIndex.load(path).ids == [1]
    assert len([file for file in path.iterdir() if file.name.startswith("generation-")]) == 1


def test_inputs_that_json_cannot_spell_are_indexed_without_them(tmp_path, caplog):
    (batch,) = Documents({1: {"text": "a", "year": np.float32(1995)}, 2: {"image": object()}}).batches(10)
    assert batch.table["input"].to_pylist() == ['{"text": "a", "year": 1995.0}', None]
    assert "1 documents hold values that JSON cannot express" in caplog.text


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({}, "documents={} has no documents"),
        (["document1"], "documents has 'document1'.*pairs"),
        ({1: "document1", "2": "document2"}, "ids of type int, str"),
        ({1.5: "document1"}, "ids of type float"),
        ({True: "document1"}, "ids of type bool"),
        ({2**70: "document1"}, "beyond 64 bits"),
    ],
)
def test_documents_that_are_none_are_refused(tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        DocumentIndex.build(random_model(), documents, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("factory", "message"), [("Flatt", "factory='Flatt' is no FAISS"), ("IVF4096,Flat", "cannot be trained on 200")]
)
def test_factories_that_do_not_work_are_refused(tmp_path, factory, message):
    with pytest.raises(ValueError, match=message):
        DocumentIndex.build(random_model(), DOCUMENTS, tmp_path / "index", factory=factory)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_gives_nan_builds_nothing(tmp_path):
    model = static_model(["x", "y"], np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="NaN or infinite embeddings for 1 inputs, the first 'y'"):
        DocumentIndex.build(model, {1: "x", 2: "y"}, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 2.5}, "k=2.5"),
        ({"queries": "query0"}, "queries='query0' is one input"),
        ({"queries": {"text": "query0"}}, "is one input"),
        ({"exclude": [[1]]}, "exclude has 1 entries for 2 queries"),
        ({"exclude": {"query0": [1], "query1": [2]}}, "is a dict: give a list with the ids to leave out"),
        ({"exclude": [["1"], None]}, r"exclude\[0\] has '1', and the ids of this index are of type int"),
    ],
)
def test_searches_that_make_no_sense_are_refused(built, arguments, message):
    model, path = built
    with pytest.raises(ValueError, match=message):
        DocumentIndex.load(path).search(model, **{"queries": QUERIES[:2], "k": 3, **arguments})


def test_another_model_than_the_indexs_is_refused(tmp_path):
    index = DocumentIndex.build(random_model("dot"), DOCUMENTS, tmp_path / "index")
    with pytest.raises(ValueError, match=r"built for the similarity 'dot'.*is 'cosine'"):
        index.search(random_model("cosine"), QUERIES, k=3)
    with pytest.raises(ValueError, match=r"vectors of dimension 12.* in 6"):
        index.search(random_model("dot", dim=6), QUERIES, k=3)
    with pytest.raises(ValueError, match="'manhattan'"):
        DocumentIndex.build(random_model("manhattan"), DOCUMENTS, tmp_path / "other")


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_another_model_of_the_same_size_is_refused_and_half_precision_is_not(tmp_path, similarity):
    model, trained = random_model(similarity), random_model(similarity)
    with torch.no_grad():
        trained[0].embedding.weight.mul_(-0.5).add_(0.3)
    DocumentIndex.build(model, DOCUMENTS, tmp_path / "index")
    index = DocumentIndex.load(tmp_path / "index")
    index.search(model, QUERIES, k=3)
    index.search(copy.deepcopy(model).bfloat16(), QUERIES, k=3)
    for other in (trained, copy.deepcopy(trained).bfloat16()):
        with pytest.raises(ValueError, match=r"another model.* the weights of the document tower differ"):
            index.search(other, QUERIES, k=3)
    with torch.no_grad():  # the one that searched before, trained on
        model[0].embedding.weight.add_(1e-4)
    with pytest.raises(ValueError, match="before it was trained on"):
        index.search(model, QUERIES, k=3)


def test_missing_files_are_named(built, tmp_path):
    path = tmp_path / "index"
    shutil.copytree(built[1], path)
    files = [*path.glob("generation-*/*"), path / "index.json"]
    assert len(files) == 3
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=f"it has no {file.name}"):
            DocumentIndex.load(path)
        file.write_bytes(content)
    with pytest.raises(ValueError, match="is no document index"):
        DocumentIndex.load(tmp_path / "nowhere")


def test_files_of_two_indexes_are_refused(built, tmp_path):
    DocumentIndex.build(built[0], {**DOCUMENTS, 0: "document1"}, tmp_path / "other")
    shutil.copytree(built[1], tmp_path / "mixed")
    (target,) = (tmp_path / "mixed").glob("generation-*/vectors.npy")
    (source,) = (tmp_path / "other").glob("generation-*/vectors.npy")
    shutil.copy(source, target)
    with pytest.raises(ValueError, match="broken document index, build it again"):
        DocumentIndex.load(tmp_path / "mixed")


def test_without_faiss_the_error_says_what_to_install(built, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for attempt in (
        lambda: DocumentIndex.load(built[1]),
        lambda: DocumentIndex.build(built[0], DOCUMENTS, tmp_path / "index"),
    ):
        with pytest.raises(ImportError, match=r'pip install "st-fpsloss\[faiss\]"'):
            attempt()
