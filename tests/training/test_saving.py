"""A folder holds the old model or the new one, and what stood beside it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_fpsloss.training import save_model
from st_fpsloss.utils import folders
from tests.losses.conftest import small_model
from tests.training.killed_runs import PROCESSES


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def two_models() -> tuple[SentenceTransformer, SentenceTransformer]:
    first, second = small_model(), small_model(shared=True)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    return first, second


def saved_before(models, folder: Path) -> list[dict[str, bytes]]:
    """What models leave in a folder from their second save on: the first, making a card, changes the tokenizer."""
    found = []
    for number, model in enumerate(models):
        for _ in range(2):
            model.save_pretrained(str(folder / str(number)))
        found.append(without_card(contents(folder / str(number))))
    return found


def save_for_ever(path: str, ready: multiprocessing.synchronize.Event) -> None:
    torch.set_num_threads(1)
    models = two_models()
    with tempfile.TemporaryDirectory() as folder:
        saved_before(models, Path(folder))
    for number, model in enumerate(itertools.cycle(models)):
        save_model(model, path)
        if number == 1:
            ready.set()


def without_card(files):
    """The files but the card, which prints scores of a sample as this process rounds them."""
    assert files["README.md"].startswith(b"---")
    return {name: content for name, content in files.items() if name != "README.md"}


def test_a_process_that_is_killed_leaves_the_old_model_or_the_new_one(tmp_path):
    expected = saved_before(two_models(), tmp_path)
    path = tmp_path / "saved" / "model"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    rng, found = random.Random(0), set()
    for _ in range(5):
        ready = PROCESSES.Event()
        process = PROCESSES.Process(target=save_for_ever, args=(str(path), ready))
        process.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        held = contents(path)
        assert held.pop("notes.txt") == b"mine"
        found.add(expected.index(without_card(held)))
    save_model(two_models()[0], path)
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]  # nothing is left of the killed processes


@pytest.mark.parametrize("system", ["exchanges folders", "renames folders", "has a mount point there"])
def test_what_stands_beside_a_model_stays_and_nothing_of_the_old_model(tmp_path, system, monkeypatch):
    if system == "renames folders":
        monkeypatch.setattr(folders, "_exchange_at_once", lambda *_: False)
    if system == "has a mount point there":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "model")
    first, second = two_models()
    first.save_pretrained(str(tmp_path / "model"))
    for _ in range(2):  # making its card, the first save changes what the tokenizer keeps of itself
        second.save_pretrained(str(tmp_path / "expected"))
    before = contents(tmp_path / "model")
    others = {"checkpoint-2/model.safetensors": b"weights", "thesis.tex": b"text", "eval_results.json": b"{}"}
    for name, content in others.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    save_model(second, tmp_path / "model")
    expected = contents(tmp_path / "expected")
    assert set(before) - set(expected)  # the second has fewer modules
    assert contents(tmp_path / "model") == expected | others
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "expected"}


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    first, second = two_models()
    save_model(first, tmp_path / "model")
    before = contents(tmp_path / "model")

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(second[0], "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(second, tmp_path / "model")
    assert contents(tmp_path / "model") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
