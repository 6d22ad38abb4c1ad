"""An index whose build is killed midway, resumed, compared with an uninterrupted one, and then changed by 1%.

python -m tests.benchmarks.index_build FOLDER --count 200000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from st_fpsloss import DocumentIndex
from tests.retrieval.killed_builds import build, calls, kill_midway, log_calls, small_minilm, texts


def compare(folder: Path, count: int, shard_size: int, factory: str | None) -> None:
    """Kill a build in the middle, resume it, and compare it with one that was not interrupted."""
    halfway = count // shard_size // 2
    killed, whole = folder / "killed", folder / "whole"
    finished = kill_midway(killed, count, shard_size, halfway)
    print(f"killed with {len(finished)} of {-(-count // shard_size)} shards finished", flush=True)
    before = len(calls(killed))
    start = time.perf_counter()
    resumed = build(killed, count, shard_size, factory)
    print(
        f"resumed in {time.perf_counter() - start:.0f} s: {resumed.info['factory']}, {resumed.info['recall']}",
        flush=True,
    )
    model = small_minilm()
    documents = texts(model, count)
    inputs = list(documents.values())
    again = {first for first, _ in calls(killed)[before:]} & {inputs[i * shard_size] for i in range(len(finished))}
    print(f"finished shards computed twice: {len(again)}", flush=True)
    start = time.perf_counter()
    uninterrupted = build(whole, count, shard_size, factory)
    print(f"uninterrupted in {time.perf_counter() - start:.0f} s", flush=True)
    same = [resumed._snapshot.vectors, uninterrupted._snapshot.vectors]
    print(f"vectors equal: {np.array_equal(*same)}, ids equal: {resumed.ids == uninterrupted.ids == list(documents)}")
    queries = model.encode_query(list(texts(model, 500, seed=1).values()))
    exact = np.argsort(-(queries @ same[1].T), axis=1)[:, :10]
    for name, index in (("resumed", resumed), ("uninterrupted", uninterrupted)):
        start = time.perf_counter()
        found = index.search_vectors(queries, 10)
        seconds = time.perf_counter() - start
        hits = [
            len({f"d{row}" for row in rows} & {d for d, _ in result}) for rows, result in zip(exact, found, strict=True)
        ]
        print(f"{name}: recall@10 {np.mean(hits) / 10:.4f}, {1000 * seconds / 500:.2f} ms a query", flush=True)
    change(resumed, model, documents, uninterrupted)


def change(index: DocumentIndex, model: SentenceTransformer, documents: dict[str, str], whole: DocumentIndex) -> None:
    """Change, add and remove 1% of the documents each; ``whole`` has the vectors of those that stay."""
    count = len(documents)
    log = index.path.with_suffix(".jsonl")
    log.unlink()
    log_calls(model, log)
    fresh = list(texts(model, count // 50, seed=2).values())
    ids = list(documents)
    now = {**documents, **dict(zip(ids[: count // 100], fresh, strict=False))}
    now.update({f"new{number}": text for number, text in enumerate(fresh[count // 100 :])})
    for document_id in ids[-(count // 100) :]:
        del now[document_id]
    start = time.perf_counter()
    done = index.update(model, now, remove_missing=True)
    index.save()
    print(f"{done} in {time.perf_counter() - start:.0f} s; embedded {sum(n for _, n in calls(index.path))}")
    kept = list(now)
    other = np.array([documents.get(document_id) != text for document_id, text in now.items()])
    vectors = np.empty((len(kept), whole.info["dimension"]), np.float32)
    vectors[other] = model.encode_document(
        [text for text, is_other in zip(now.values(), other, strict=True) if is_other]
    )
    row_of = {document_id: row for row, document_id in enumerate(whole.ids)}
    vectors[~other] = whole._snapshot.vectors[[row_of[kept[number]] for number in np.flatnonzero(~other)]]
    queries = model.encode_query(list(texts(model, 200, seed=3).values()))
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = DocumentIndex.load(index.path).search_vectors(queries, 10)
    hits = [
        len({kept[row] for row in rows} & {d for d, _ in result}) for rows, result in zip(exact, found, strict=True)
    ]
    print(f"after the update: recall@10 against a rebuild {np.mean(hits) / 10:.4f}, {index.info['factory']}")


def recall_of(found: list, exact: np.ndarray, ids: list) -> float:
    hits = [len({ids[row] for row in rows} & {d for d, _ in result}) for rows, result in zip(exact, found, strict=True)]
    return float(np.mean(hits)) / exact.shape[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--shard_size", type=int, default=8192)
    parser.add_argument("--factory")
    options = parser.parse_args()
    compare(options.folder, options.count, options.shard_size, options.factory)
