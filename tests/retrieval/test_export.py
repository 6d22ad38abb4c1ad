"""What leaves an index: Parquet, LanceDB, a server; each finds what the index finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from st_fpsloss.retrieval import export
from st_fpsloss.retrieval.index import DocumentIndex
from tests.retrieval.test_index import DOCUMENTS, QUERIES, random_model


@pytest.fixture(scope="module", params=["dot", "cosine"])
def changed(request, tmp_path_factory):
    """An index with changes that are not saved."""
    model = random_model(request.param)
    rows = [(i, text, {"price": float(i)}) for i, text in DOCUMENTS.items() if i < 150]
    index = DocumentIndex.build(model, rows, tmp_path_factory.mktemp("export") / "index", columns=["price"])
    index.add(model, [(i, text, {"price": float(i)}) for i, text in DOCUMENTS.items() if i >= 150])
    index.remove(range(0, 200, 7))
    return model, index


def test_parquet_has_ids_inputs_columns_and_vectors(changed, tmp_path, monkeypatch):
    model, index = changed
    monkeypatch.setattr(export, "ROWS_PER_BATCH", 60)
    export.to_parquet(index, tmp_path / "documents.parquet")
    table = pq.read_table(tmp_path / "documents.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["documents.parquet"]
    assert table.column_names == ["id", "input", "price", "vector"] and table["id"].to_pylist() == index.ids
    assert table["input"][3].as_py() == f'"document{index.ids[3]}"' and table["price"][3].as_py() == index.ids[3]
    queries = model.encode_query(QUERIES, normalize_embeddings=model.similarity_fn_name == "cosine")
    scores = queries @ np.array(table["vector"].to_pylist(), dtype=np.float32).T
    for row, result in zip(scores, index.search(model, QUERIES, k=5), strict=True):
        assert [index.ids[i] for i in np.argsort(-row)[:5]] == [d for d, _ in result]
    again = DocumentIndex.build(
        model, {i: DOCUMENTS[i] for i in index.ids}, tmp_path / "again"
    )  # the file holds what a build from the same documents would
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), again._snapshot.vectors, atol=1e-6)


def test_a_lancedb_table_ranks_as_the_index(changed, tmp_path):
    pytest.importorskip("lancedb")
    model, index = changed
    table = export.to_lancedb(index, tmp_path / "lance")
    assert table.count_rows() == len(index)
    queries = model.encode_query(QUERIES[:5], normalize_embeddings=model.similarity_fn_name == "cosine")
    for query, expected in zip(queries, index.search(model, QUERIES[:5], k=5), strict=True):
        rows = table.search(query).distance_type("dot").limit(5).to_list()
        assert [row["id"] for row in rows] == [d for d, _ in expected]
        np.testing.assert_allclose([1 - row["_distance"] for row in rows], [s for _, s in expected], atol=1e-4)
        cheap = table.search(query).distance_type("dot").where("price < 50", prefilter=True).limit(5).to_list()
        allowed = [document_id for document_id in index.ids if document_id < 50]
        (found,) = index.search_vectors(query[None], 5, filter=allowed)
        assert [row["id"] for row in cheap] == [d for d, _ in found]
    with pytest.raises(ValueError, match="overwrite=True"):
        export.to_lancedb(index, tmp_path / "lance")
    assert export.to_lancedb(index, tmp_path / "lance", overwrite=True).count_rows() == len(index)


def test_the_example_of_a_server_finds_what_the_index_finds(changed, capsys):
    qdrant = pytest.importorskip("qdrant_client")
    model, index = changed
    path = Path(__file__).parents[2] / "training_scripts" / "qdrant_server.py"
    spec = importlib.util.spec_from_file_location("qdrant_server", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    client = qdrant.QdrantClient(":memory:")
    example.upload(index, client, "documents")
    cheap = qdrant.models.Filter(must=[qdrant.models.FieldCondition(key="price", range=qdrant.models.Range(lt=50))])
    for where, filter in ((None, None), (cheap, [d for d in index.ids if d < 50])):
        (expected,) = index.search(model, QUERIES[:1], k=5, filter=filter)
        found = example.search(client, "documents", model, QUERIES[0], 5, where)
        assert [d for d, _ in found] == [d for d, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-5)


def test_an_empty_index_is_not_exported(tmp_path):
    model = random_model()
    index = DocumentIndex.build(model, {1: "document1"}, tmp_path / "index")
    index.remove([1])
    with pytest.raises(ValueError, match="nothing to export"):
        export.to_parquet(index, tmp_path / "documents.parquet")
