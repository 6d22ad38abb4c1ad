"""A run that is killed while it saves can be resumed from the last complete checkpoint, α included."""

from __future__ import annotations

import filecmp
import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from st_fpsloss import last_complete_checkpoint
from tests.training.killed_runs import finish, start, train, train_watched


def equal_folders(one: Path, other: Path) -> bool:
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, other)]
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0] if (one / name).is_file()
    )


def assert_never_broken(watched: Path) -> list[int]:
    """At every moment the last complete checkpoint is one that was complete; the steps of them in their course."""
    complete = list((watched / "complete").glob("*/*"))
    course = []
    for moment in sorted((watched / "moment").iterdir()):
        found = last_complete_checkpoint(moment)
        if found is None:
            assert not course, "a complete checkpoint was there before"
            continue
        assert any(equal_folders(Path(found), one) for one in complete if one.name == Path(found).name), moment
        course.append(int(found.rpartition("-")[2]))
    return [step for step, _ in itertools.groupby(course)]


@pytest.mark.parametrize("save_total_limit", [None, 1])
def test_at_every_moment_of_a_run_the_last_complete_checkpoint_is_whole(tmp_path, save_total_limit):
    finish(run_watched, tmp_path, {"save_total_limit": save_total_limit, "max_steps": 6})
    assert assert_never_broken(tmp_path / "watched") == [2, 4, 6]


def test_writing_over_the_checkpoints_of_an_earlier_run_never_mixes_both(tmp_path):
    finish(run_watched, tmp_path, {"max_steps": 4})
    finish(run_watched, tmp_path, {"max_steps": 4, "learning_rate": 0.02})
    assert assert_never_broken(tmp_path / "watched") == [2, 4, 2, 4]


def test_half_a_removed_checkpoint_is_passed_over(tmp_path):
    run = tmp_path / "run"
    finish(train_with, run, {"save_steps": 4})
    shutil.copytree(run, tmp_path / "watched" / "complete" / "before")
    for step in (4, 8):  # older than what comes, so that the trainer removes them
        os.utime(run / f"checkpoint-{step}", (step, step))
    branch = {"save_steps": 6, "max_steps": 6, "save_total_limit": 1, "resume": str(run / "checkpoint-4")}
    finish(run_watched, tmp_path, branch)
    assert assert_never_broken(tmp_path / "watched") == [8, 6]


def run_watched(folder: Path, options: dict) -> None:
    train_watched(folder / "run", folder / "watched", **options)


def test_a_file_that_is_missing_or_cut_off_makes_a_checkpoint_incomplete(tmp_path):
    finish(train, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-8"
    assert last_complete_checkpoint(newest.parent) == str(newest)
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.unlink()
        assert last_complete_checkpoint(newest.parent) == str(newest.with_name("checkpoint-6")), path
        if path.suffix in (".json", ".pt", ".pth", ".safetensors"):
            for size in (0, len(whole) // 2, len(whole) - 2):
                path.write_bytes(whole[:size])
                assert last_complete_checkpoint(newest.parent) == str(newest.with_name("checkpoint-6")), (path, size)
        path.write_bytes(whole)
    assert last_complete_checkpoint(newest.parent) == str(newest)


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Kill runs at random moments of the save of step 6, resume them, and end as if nothing had been."""
    finish(train, folder / "undisturbed", False, folder / "expected")
    expected = torch.load(folder / "expected")
    rng = random.Random(seed)
    exit_codes = []
    for number in range(kills):
        output_dir, result = folder / f"run {number}", folder / f"result {number}"
        limit = {"save_total_limit": rng.choice([None, 1])}
        process = start(train_with, output_dir, limit)
        while process.is_alive() and not (output_dir / "checkpoint-6").exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.12) if number else 0)  # the first one before it can end
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
        finish(train, output_dir, True, result)
        ended = torch.load(result)
        assert ended["alpha"] == expected["alpha"] != 1.0
        assert torch.equal(ended["weights"], expected["weights"])
        shutil.rmtree(output_dir)
    assert -signal.SIGKILL in exit_codes


def train_with(output_dir: Path, options: dict) -> None:
    train(output_dir, **options)


def test_a_killed_run_resumes_and_ends_as_if_nothing_had_been(tmp_path):
    kill_and_resume(tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_runs_killed_at_many_moments_resume(tmp_path):
    kill_and_resume(tmp_path, kills=60, seed=1)
