"""An index under kills, damage, and readers that go on while it is overwritten: never another's vectors."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from st_fpsloss.retrieval.index import DocumentIndex
from tests.evaluation.test_evaluator import static_model, vectors

NUM, DIM, GENERATIONS = 300, 8, 20
QUERIES = np.random.default_rng(5).standard_normal((4, DIM)).astype(np.float32)


def model():
    return static_model([f"document{i}" for i in range(NUM)], vectors(NUM, dim=DIM))


def documents(generation):
    """The id tells the generation, and with it which word the document is."""
    return {1000 * generation + i: f"document{(i + generation) % NUM}" for i in range(NUM - generation)}


def factory(generation):
    return "HNSW8" if generation % 2 else "Flat"


def right_generation(index, embeddings):
    """The generation whose documents an index returns, each with its own score."""
    generations = set()
    for query, result in zip(QUERIES, index.search_vectors(QUERIES, 5), strict=True):
        assert len(result) == 5
        for document_id, score in result:
            generation, number = divmod(document_id, 1000)
            generations.add(generation)
            assert index.document(document_id) == f"document{(number + generation) % NUM}"
            assert abs(score - query @ embeddings[(number + generation) % NUM]) < 1e-4
    (generation,) = generations
    assert len(index) == NUM - generation
    return generation


def read_until(path, stop, results):
    embeddings, seen, loads = vectors(NUM, dim=DIM).astype(np.float32), set(), 0
    try:
        while not stop.is_set():
            index = DocumentIndex.load(path)
            seen.add(right_generation(index, embeddings))
            loads += 1
        results.put((loads, seen))
    except BaseException as error:
        results.put(repr(error))


def overwrite_forever(path, started):
    for generation in range(1, 10_000):
        DocumentIndex.build(
            model(), documents(generation % 50), path, factory(generation), overwrite=True, shard_size=50
        )
        started.set()


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported what they need, but have started no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def test_readers_of_an_index_that_is_overwritten_see_the_old_or_the_new_one(tmp_path, processes):
    path = tmp_path / "index"
    DocumentIndex.build(model(), documents(0), path)
    stop, results = processes.Event(), processes.Queue()
    readers = [processes.Process(target=read_until, args=(path, stop, results)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for generation in range(1, GENERATIONS + 1):
        DocumentIndex.build(model(), documents(generation), path, factory(generation), overwrite=True)
    time.sleep(0.2)
    stop.set()
    found = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert not [result for result in found if isinstance(result, str)]
    assert set.union(*(seen for _, seen in found)) >= {GENERATIONS}
    assert min(loads for loads, _ in found) >= 1
    assert len(list(path.glob("generation-*"))) == 2


def test_a_writer_that_is_killed_leaves_an_index_and_the_next_one_cleans_up(tmp_path, processes):
    path, embeddings = tmp_path / "index", vectors(NUM, dim=DIM).astype(np.float32)
    DocumentIndex.build(model(), documents(0), path)
    rng = np.random.default_rng(0)
    for _ in range(5):
        started = processes.Event()
        writer = processes.Process(target=overwrite_forever, args=(path, started))
        writer.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        right_generation(DocumentIndex.load(path), embeddings)
    DocumentIndex.build(model(), documents(7), path, overwrite=True)
    assert right_generation(DocumentIndex.load(path), embeddings) == 7
    assert len(list(path.glob("generation-*"))) <= 2
    assert {file.name for file in path.iterdir() if not file.name.startswith("generation-")} == {"index.json", ".lock"}


def test_a_file_with_another_byte_is_refused_or_harmless(tmp_path):
    path, rng = tmp_path / "index", np.random.default_rng(0)
    DocumentIndex.build(model(), documents(0), path, factory="HNSW8")
    expected = DocumentIndex.load(path).search_vectors(QUERIES, 5)
    files = [path / "index.json", *sorted(path.glob("generation-*/*"))]
    assert len(files) == 4
    refused = 0
    for _ in range(500):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        position = int(rng.integers(len(content)))
        changed = bytes([(content[position] + int(rng.integers(1, 256))) % 256])
        cut = content[:position] if rng.random() < 0.1 else content[:position] + changed + content[position + 1 :]
        file.write_bytes(cut)
        try:
            assert DocumentIndex.load(path).search_vectors(QUERIES, 5) == expected
        except ValueError as error:
            assert "document index" in str(error) or "of format" in str(error)
            refused += 1
        file.write_bytes(content)
    assert refused > 450  # the others changed a space of index.json
    assert DocumentIndex.load(path).search_vectors(QUERIES, 5) == expected


@pytest.mark.parametrize("content", ['{"title": "of my thesis"}', '{"format": "other", "version": 2}', "[]", "no JSON"])
def test_overwrite_keeps_a_folder_with_an_index_json_of_something_else(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no document index: it is not overwritten"):
        DocumentIndex.build(model(), documents(0), tmp_path, overwrite=True)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "index.json": content,
        "thesis.txt": "years of work",
    }


def test_overwrite_keeps_what_else_is_in_the_folder_and_replaces_a_damaged_index(tmp_path):
    DocumentIndex.build(model(), documents(0), tmp_path / "index")
    (tmp_path / "index" / "thesis.txt").write_text("years of work")
    manifest = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**manifest, "count": 7}))
    with pytest.raises(ValueError, match="broken document index"):
        DocumentIndex.load(tmp_path / "index")
    DocumentIndex.build(model(), documents(3), tmp_path / "index", overwrite=True)
    assert len(DocumentIndex.load(tmp_path / "index")) == NUM - 3
    assert (tmp_path / "index" / "thesis.txt").read_text() == "years of work"


def test_two_writers_at_once_are_refused(tmp_path, monkeypatch):
    index = DocumentIndex.build(model(), documents(0), tmp_path / "index")
    stale = DocumentIndex.load(tmp_path / "index")
    index.remove([0])
    index.save()
    stale.remove([1])
    with pytest.raises(RuntimeError, match="was replaced since this index was loaded"):
        stale.save()
    assert set(DocumentIndex.load(tmp_path / "index").ids) == set(documents(0)) - {0}
    from filelock import FileLock

    from st_fpsloss.retrieval import storage

    monkeypatch.setattr(storage, "_SECONDS_FOR_THE_LOCK", 0.05)
    with (
        FileLock(tmp_path / "index" / ".lock", is_singleton=False),
        pytest.raises(RuntimeError, match="another process"),
    ):
        DocumentIndex.build(model(), documents(1), tmp_path / "index", overwrite=True)
