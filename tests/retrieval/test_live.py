"""A live index: resumed builds, sources, changes that embed no more than they must, filters, kinds of index."""

from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from st_fpsloss.retrieval import faiss_backend, snapshot
from st_fpsloss.retrieval.index import DocumentIndex
from st_fpsloss.retrieval.sources import Documents
from tests.evaluation.test_evaluator import static_model, vectors
from tests.retrieval import killed_builds
from tests.retrieval.test_index import DOCUMENTS, QUERIES, random_model, similarities

NUM, DIM, K = 30_000, 32, 10


@pytest.fixture(scope="module")
def many():
    """A model of 30,000 clustered documents, and 50 queries near them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, DIM))
    documents = centres[rng.integers(0, 200, NUM)] + 0.7 * rng.standard_normal((NUM, DIM))
    queries = centres[rng.integers(0, 200, 50)] + 0.7 * rng.standard_normal((50, DIM))
    return (
        static_model([f"w{i}" for i in range(NUM)], documents),
        documents.astype(np.float32),
        queries.astype(np.float32),
    )


@pytest.fixture(scope="module", params=["HNSW32", "IVF64,Flat", "IVF64,SQ8"])
def graph(request, many, tmp_path_factory):
    model, _, _ = many
    rows = ((i, f"w{i}", {"share": (i * 7919) % NUM / NUM, "half": i % 2}) for i in range(NUM))
    path = tmp_path_factory.mktemp("graph") / "index"
    DocumentIndex.build(model, rows, path, request.param, columns=["share", "half"], batch_size=4096, shard_size=8192)
    return DocumentIndex.load(path)


def best(queries, embeddings, allowed=None):
    scores = queries.astype(np.float64) @ embeddings.T.astype(np.float64)
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    return np.argsort(-scores, axis=1)[:, :K]


def recall(results, expected):
    assert [len(result) for result in results] == [K] * len(expected)
    hits = [len({d for d, _ in result} & set(row.tolist())) for result, row in zip(results, expected, strict=True)]
    return np.mean(hits) / K


def test_an_approximate_index_reaches_the_recall_that_was_asked_for(graph, many):
    _, embeddings, queries = many
    results = graph.search_vectors(queries, K)
    assert recall(results, best(queries, embeddings)) >= 0.98
    assert 0.98 <= graph.info["recall"] <= 1 and graph.info["effort"] >= 1
    for query, result in zip(queries, results, strict=True):  # the scores are exact
        scores = [score for _, score in result]
        np.testing.assert_allclose(scores, embeddings[[d for d, _ in result]] @ query, rtol=1e-5)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("share", [0.8, 0.1, 0.01, 0.001])
def test_a_filter_returns_all_k_of_the_best(graph, many, share, monkeypatch):
    _, embeddings, queries = many
    monkeypatch.setattr(snapshot, "EXACT_UP_TO", 1000)  # a tenth is left to FAISS
    numbers = (np.arange(NUM) * 7919) % NUM / NUM
    allowed = numbers < share
    expected = best(queries, embeddings, allowed)
    ids = np.flatnonzero(allowed).tolist()
    for filter in (pc.field("share") < share, ids, lambda table: pc.less(table["share"], share)):
        assert recall(graph.search_vectors(queries, K, filter=filter), expected) >= 0.98
    excluded = [row[:3].tolist() for row in expected]
    for result, row in zip(
        graph.search_vectors(queries, 5, excluded, pc.field("share") < share), expected, strict=True
    ):
        assert len(result) == 5 and not {d for d, _ in result} & set(row[:3].tolist())
        assert allowed[[d for d, _ in result]].all()


def test_exclusion_goes_as_deep_as_it_must_in_every_kind_of_index(graph, many):
    _, embeddings, queries = many
    scores = queries @ embeddings.T
    depths = [0, 100, 3000, NUM - 5, NUM - 12, NUM]
    exclude = [np.argsort(-row)[:depth].tolist() for row, depth in zip(scores, depths, strict=False)]
    results = graph.search_vectors(queries[: len(depths)], K, exclude)
    assert [len(result) for result in results] == [10, 10, 10, 5, 10, 0]
    for row, depth, result in zip(scores, depths, results, strict=False):
        missed = set(np.argsort(-row)[depth : depth + 10].tolist()) - {d for d, _ in result}
        assert len(missed) <= 1 and not set(np.argsort(-row)[:depth].tolist()) & {d for d, _ in result}


def test_changes_of_a_graph_are_searched_before_and_after_saving(many, tmp_path):
    model, embeddings, queries = many
    documents = {i: f"w{i}" for i in range(20_000)}
    index = DocumentIndex.build(model, documents, tmp_path / "index", "HNSW32", batch_size=4096)
    index.remove(range(300))
    now = {i: f"w{i + 9000 if i < 600 else i}" for i in range(300, 20_300)}
    done = index.update(model, now)
    assert done == (600, 300, 300, 0, 19_400)
    rows = np.array([int(text[1:]) for text in now.values()])
    found = np.array(list(now))[best(queries, embeddings[rows])]
    for loaded in (index, DocumentIndex.load(tmp_path / "index")):
        if loaded is not index:
            assert len(loaded) == 20_000
    assert recall(index.search_vectors(queries, K), found) >= 0.98
    index.save()
    loaded = DocumentIndex.load(tmp_path / "index")
    for again in (index, loaded):
        assert sorted(again.ids) == list(now) and again.document(300) == "w9300"
        assert recall(again.search_vectors(queries, K), found) >= 0.98
    assert (loaded.info["factory"], loaded.info["count"]) == ("HNSW32", 20_000)
    loaded.remove(list(range(300, 6000)))  # more than a fifth: built again, without them
    loaded.save()
    assert len(loaded._snapshot.live) == len(loaded) == 14_300
    rows = np.array([int(text[1:]) for i, text in now.items() if i >= 6000])
    found = np.array([i for i in now if i >= 6000])[best(queries, embeddings[rows])]
    assert recall(loaded.search_vectors(queries, K), found) >= 0.98


class CountedModel:
    """Counts the documents that a model embeds."""

    def __init__(self, monkeypatch, model):
        self.inputs = []
        encode = model.encode_document

        def counted(inputs, **settings):
            self.inputs += inputs
            return encode(inputs, **settings)

        monkeypatch.setattr(model, "encode_document", counted)


def test_a_killed_build_is_resumed_and_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    count, size = 400, 50
    killed = tmp_path / "killed"
    finished = killed_builds.kill_midway(killed, count, size, finished=3)
    assert len(finished) == 3
    with pytest.raises(ValueError, match=r"a build was stopped here: call DocumentIndex\.build again"):
        DocumentIndex.load(killed)
    model = killed_builds.small_minilm()
    documents = killed_builds.texts(model, count)
    counted = CountedModel(monkeypatch, model)
    resumed = DocumentIndex.build(model, documents, killed, batch_size=64, shard_size=size)
    assert counted.inputs == list(documents.values())[len(finished) * size :]
    whole = DocumentIndex.build(model, documents, tmp_path / "whole", batch_size=64, shard_size=size)
    assert resumed.ids == whole.ids == list(documents)
    np.testing.assert_allclose(resumed._snapshot.vectors, whole._snapshot.vectors, atol=1e-6)
    assert not (killed / "building").exists()

    # 1% changed, added and removed: these alone are embedded, and the search is that of a rebuild.
    now = {**documents, "d5": "changed words", "d6": "others", "x": "one more", "y": "and one"}
    for document_id in ("d7", "d8"):
        del now[document_id]
    counted.inputs.clear()
    assert resumed.update(model, now, remove_missing=True) == (4, 2, 2, 2, 396)
    assert counted.inputs == ["changed words", "others", "one more", "and one"]
    rebuilt = DocumentIndex.build(model, now, tmp_path / "rebuilt", batch_size=64)
    queries = list(killed_builds.texts(model, 20, seed=1).values())
    expected = rebuilt.search(model, queries, k=10)
    resumed.save()
    for index in (resumed, DocumentIndex.load(killed)):
        for found, result in zip(index.search(model, queries, k=10), expected, strict=True):
            assert [d for d, _ in found] == [d for d, _ in result]
            np.testing.assert_allclose([s for _, s in found], [s for _, s in result], atol=1e-6)


def test_a_stopped_build_with_other_documents_or_another_model_computes_what_differs(tmp_path, monkeypatch):
    model = random_model()
    counted = CountedModel(monkeypatch, model)

    def stopped(documents):
        yield from list(documents.items())[:70]
        raise KeyboardInterrupt

    def rebuilt(model, documents):
        with pytest.raises(KeyboardInterrupt):
            DocumentIndex.build(model, stopped(DOCUMENTS), tmp_path / "index", shard_size=20, overwrite=True)
        counted.inputs.clear()
        index = DocumentIndex.build(model, documents, tmp_path / "index", shard_size=20, overwrite=True)
        expected = DocumentIndex.build(model, documents, tmp_path / "whole", overwrite=True)
        assert index.search(model, QUERIES, k=5) == expected.search(model, QUERIES, k=5)
        return counted.inputs[: -len(documents)]

    assert rebuilt(model, DOCUMENTS) == list(DOCUMENTS.values())[60:]
    other = {**DOCUMENTS, 25: "document3"}
    assert rebuilt(model, other) == [*list(other.values())[20:40], *list(other.values())[60:]]
    with pytest.raises(KeyboardInterrupt):
        DocumentIndex.build(model, stopped(DOCUMENTS), tmp_path / "index", shard_size=20, overwrite=True)
    another = random_model("cosine")
    counted = CountedModel(monkeypatch, another)
    DocumentIndex.build(another, DOCUMENTS, tmp_path / "index", shard_size=20, overwrite=True)
    assert counted.inputs == list(DOCUMENTS.values())


def test_every_source_gives_the_same_index(tmp_path):
    model = random_model()
    rows = [
        {"sku": f"s{i}", "text": text, "price": i / 2, "shop": None if i % 3 else "a"} for i, text in DOCUMENTS.items()
    ]
    table = pa.Table.from_pylist(rows)
    (tmp_path / "files").mkdir()
    for number in range(4):
        pq.write_table(table.slice(50 * number, 50), tmp_path / "files" / f"part-{number}.parquet")
    pq.write_table(table, tmp_path / "one.parquet")
    names = {"id_column": "sku", "document_column": "text", "columns": ["price", "shop"], "shard_size": 64}
    shuffled = Dataset(table).select(range(199, -1, -1)).select(range(199, -1, -1))
    stream = ((row["sku"], row["text"], row) for row in rows)
    found = []
    for number, source in enumerate(
        [tmp_path / "files", str(tmp_path / "one.parquet"), Dataset(table), shuffled, stream]
    ):
        index = DocumentIndex.build(model, source, tmp_path / f"index{number}", **names)
        assert index.columns == ["price", "shop"] and index.fields("s3") == {"price": 1.5, "shop": "a"}
        cheap = index.search(model, QUERIES, k=3, filter=(pc.field("price") < 20) & pc.field("shop").is_valid())
        assert all(int(d[1:]) < 40 and int(d[1:]) % 3 == 0 for result in cheap for d, _ in result)
        found.append((index.ids, index.search(model, QUERIES, k=3), cheap))
    assert all(other == found[0] for other in found)
    (batch,) = Documents({7: {"text": "document7", "year": 1990}, 8: "document8"}, columns=["year"]).batches(5)
    assert batch.table["year"].to_pylist() == [1990, None]


def test_stored_columns_change_without_an_embedding(tmp_path, monkeypatch):
    model = random_model()
    rows = [(i, text, {"price": 1.0}) for i, text in DOCUMENTS.items()]
    index = DocumentIndex.build(model, rows, tmp_path / "index", columns=["price"])
    counted = CountedModel(monkeypatch, model)
    assert index.update(model, [(i, text, {"price": 2 if i < 5 else 1}) for i, text, _ in rows]) == (0, 0, 5, 0, 195)
    assert not counted.inputs
    for again in (index, index.save() or DocumentIndex.load(tmp_path / "index")):
        (result,) = again.search(model, QUERIES[:1], k=9, filter=pc.field("price") > 1)
        assert {d for d, _ in result} == set(range(5))
    with pytest.raises(ValueError, match="of another type than those of the index"):
        index.update(model, [(1, "document1", {"price": "cheap"})])
    with pytest.raises(ValueError, match="documents has ids of type"):
        index.add(model, {"one": "document1"})


def test_adding_and_removing_by_id(tmp_path):
    model = random_model()
    index = DocumentIndex.build(model, {1: "document1", 2: "document2"}, tmp_path / "index")
    with pytest.raises(ValueError, match=r"1 ids that are in the index, the first 2.*update\(\)"):
        index.add(model, {3: "document3", 2: "document4"})
    with pytest.raises(ValueError, match="ids has 7, which is not among the 2"):
        index.remove([1, 7])
    with pytest.raises(ValueError, match="'1' are different ids"):
        index.remove(["1"])
    assert index.ids == [1, 2]
    index.add(model, {3: "document3"})
    index.remove([1])
    assert list(index.items()) == [(2, "document2"), (3, "document3")]
    assert index.ids == [2, 3] and index.document(3) == "document3" and DocumentIndex.load(index.path).ids == [1, 2]
    index.add(model, {1: "document9"})
    assert DocumentIndex.current_generation(index.path) == index.info["generation"]
    index.save()
    assert DocumentIndex.load(index.path).ids == [2, 3, 1]
    index.remove([1, 2, 3])
    assert index.search(model, QUERIES[:2], k=3) == [[], []]
    index.save()
    empty = DocumentIndex.load(index.path)
    assert len(empty) == 0 and empty.search(model, QUERIES[:2], k=3) == [[], []]
    empty.add(model, {5: "document5"})
    assert [d for d, _ in empty.search(model, QUERIES[:1], k=3)[0]] == [5]


def test_threads_search_while_others_change_the_index(tmp_path):
    model = random_model()
    index = DocumentIndex.build(model, {i: f"document{i}" for i in range(100)}, tmp_path / "index")
    queries = model.encode_query(QUERIES)
    scores = similarities(model)
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            for row, result in zip(scores, index.search_vectors(queries, 5, filter=list(range(200))), strict=True):
                if len(result) != 5 or any(abs(row[d] - score) > 1e-4 for d, score in result):
                    wrong.append(result)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(100, 200):
        index.add(model, {i: f"document{i}"})
        index.remove([i - 100])
        if i % 20 == 0:
            index.save()
    time.sleep(0.05)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong and sorted(index.ids) == list(range(100, 200))


def test_the_kind_of_index_follows_the_size(tmp_path, monkeypatch):
    assert [faiss_backend.choose_factory(count, 128, 0.98) for count in (1000, 10**5, 10**6, 10**7)] == [
        "Flat",
        "Flat",
        "HNSW32",
        "IVF16384,PQ32x8",
    ]
    assert faiss_backend.choose_factory(10**6, 128, 1) == "Flat"
    monkeypatch.setattr(faiss_backend, "FLAT_UP_TO", 150)
    model = random_model()
    index = DocumentIndex.build(model, {i: f"document{i}" for i in range(100)}, tmp_path / "index")
    assert index.info["factory"] == "Flat"
    index.add(model, {i: f"document{i}" for i in range(100, 200)})
    index.save()
    assert index.info["factory"] == "HNSW32"


def test_a_recall_that_cannot_be_reached_is_warned_of(tmp_path, caplog):
    model = static_model([f"w{i}" for i in range(3000)], vectors(3000, dim=32))
    DocumentIndex.build(model, {i: f"w{i}" for i in range(3000)}, tmp_path / "index", "IVF16,PQ2x4")
    assert "recall@10 of" in caplog.text and "factory='Flat', which is exact" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter": "document1"}, "give a list of ids, an expression such as"),
        ({"filter": 7}, "give a list of ids, an expression such as"),
        ({"filter": ["1"]}, "filter has '1', and the ids of this index are of type int"),
        ({"filter": pc.field("year") > 3}, r"filter=\(year > 3\) cannot be applied.*price \(double\)"),
        ({"filter": pc.field("price") > "a"}, "cannot be applied"),
        ({"filter": lambda table: [True]}, r"of shape \(1,\): return one bool for each of the 200 rows"),
        ({"filter": lambda table: np.ones(len(table))}, "filter returned float64"),
        ({"vectors": np.zeros(12)}, r"of shape \(12,\)"),
        ({"vectors": np.full((1, 12), np.nan)}, "vectors has NaN"),
    ],
)
def test_unusable_filters_and_vectors_are_refused(priced, arguments, message):
    with pytest.raises(ValueError, match=message):
        priced.search_vectors(**{"vectors": np.zeros((1, 12)), "k": 3, **arguments})


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    rows = [(i, text, {"price": float(i)}) for i, text in DOCUMENTS.items()]
    return DocumentIndex.build(random_model(), rows, tmp_path_factory.mktemp("priced") / "index", columns=["price"])


@pytest.mark.parametrize(
    ("documents", "settings", "message"),
    [
        ([(1, "document1"), (1, "document2")], {}, "the id 1 more than once"),
        ([(1, "document1"), ("2", "document2")], {}, "ids of type int, str"),
        (iter([(1, "document1"), ("2", "document2")]), {"shard_size": 1}, "ids of type int, str"),
        (iter([]), {}, "documents has no documents"),
        ("nowhere.parquet", {}, "'nowhere.parquet' does not exist"),
        (7, {}, "documents=7 is no dict"),
        (Dataset.from_dict({"id": [1, 1], "document": ["a", "b"]}), {}, "the id 1 more than once"),
        (Dataset.from_dict({"key": [1], "document": ["a"]}), {}, "no column 'id'"),
        (DOCUMENTS, {"recall": 0}, "recall=0"),
        (DOCUMENTS, {"shard_size": 0}, "shard_size=0"),
        (DOCUMENTS, {"columns": "price"}, "columns='price'"),
        (DOCUMENTS, {"columns": ["id"]}, "other than id"),
    ],
)
def test_unusable_documents_are_refused_and_leave_nothing(tmp_path, documents, settings, message):
    with pytest.raises(ValueError, match=message):
        DocumentIndex.build(random_model(), documents, tmp_path / "index", **{"shard_size": 100, **settings})
    left = [file.name for file in (tmp_path / "index").rglob("*.arrow")] if (tmp_path / "index").exists() else []
    assert left in ([], ["shard-000000.arrow"])
