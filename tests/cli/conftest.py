"""The commands' mains, and a small log of texts whose documents have a word of their query."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from st_fpsloss.towers import id_transformer
from tests.losses.conftest import WORDS

QUIET = ["--disable_tqdm", "True", "--use_cpu", "--logging_steps", "1"]


def run(name: str, *words: Any) -> Any:
    """What a command's ``main`` returns or raises."""
    return import_module(f"st_fpsloss.cli.{name}").main([str(word) for word in words])


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_rows(count: int = 160, seed: int = 0) -> list[dict[str, Any]]:
    """A query is a word; each of its documents begins with it, and has as many stars as other words."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        word, length = rng.choice(WORDS), rng.randint(1, 3)
        document = " ".join([word, *rng.choices(WORDS, k=length)])
        other = " ".join(rng.choices([one for one in WORDS if one != word], k=3))
        rows.append({"q": word, "d": document, "worse": other, "day": f"2024-01-{1 + number // 8:02}", "stars": length})
    return rows


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log in ``log.jsonl``, its newest day in ``new.jsonl``, and an encoder in ``encoder``."""
    folder = tmp_path_factory.mktemp("cli")
    rows = log_rows()
    write(folder / "log.jsonl", rows)
    write(folder / "new.jsonl", log_rows(24, seed=1))
    torch.manual_seed(0)
    transformer = id_transformer(WORDS, 16, 1, 2, max_seq_length=20, dropout=0.0)
    encoder = SentenceTransformer(modules=[transformer, Pooling(16)], similarity_fn_name="cosine")
    encoder.save_pretrained(str(folder / "encoder"))
    return folder


def data_of(folder: Path) -> list[Any]:
    return ["--dataset", folder / "log.jsonl", "--query_column", "q", "--document_column", "d"]


def towers_of(folder: Path) -> list[Any]:
    towers = ["--query_model", folder / "encoder", "--document_model", folder / "encoder"]
    return [*towers, "--hidden_dims", 16, "--embedding_dim", 8, "--per_device_train_batch_size", 32]


@pytest.fixture(scope="session")
def pretrained(folder: Path) -> Path:
    """What pretrain makes of the log in 60 steps; the last days are held out."""
    output = folder / "pretrained"
    held_out = ["--eval_fraction", 0.1, "--time_column", "day", "--exclude_seen", "--at", 1, 10]
    training = ["--max_steps", 60, "--learning_rate", 1e-2, "--save_strategy", "no", "--output_dir", output]
    run("pretrain", *data_of(folder), *towers_of(folder), *held_out, *training, *QUIET)
    return output


def weights_of(path: Path, **options: Any) -> torch.Tensor:
    model = SentenceTransformer(str(path), device="cpu", **options)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
