"""Several processes against one, and training runs of several processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from st_fpsloss import FPSLoss, last_complete_checkpoint
from st_fpsloss.frequencies import FrequencyTable
from tests.distributed.cases import cases
from tests.distributed.training_runs import GATHERED, MIXED, SGD, run
from tests.losses.conftest import small_model
from tests.training.runs import click_log

Reports = list[dict[str, Any]]


def start(folder: Path, ranks: int, every: int, *sections: str) -> Reports:
    """What each rank of a torchrun found."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    worker = ["-m", "tests.distributed.worker", str(folder / "report"), str(every), *sections]
    process = subprocess.run(
        torchrun + worker,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return [torch.load(folder / f"report {rank}", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return start(tmp_path_factory.mktemp("two"), 2, 1, "training")


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return start(tmp_path_factory.mktemp("three"), 3, 7)


def assert_like_one_process(reports: Reports, every: int) -> None:
    for report in reports:
        assert report["gradients"] == {"cases": len(cases()[::every]), "mismatches": []}
        assert set(report["ready embeddings"]) == {"with ids", "without ids"}
        assert max(report["ready embeddings"].values()) < 1e-5
        assert max(report["compiled"].values()) < 1e-12
        assert report["whole histories"] == {"kept": {}, "cached": {}}
        assert report["document histories"] == {"kept": {}, "cached": {}, "as memory allows": {}}


def test_two_ranks_have_the_gradients_tables_and_loss_of_one_process(two_ranks):
    assert_like_one_process(two_ranks, every=1)


def test_three_ranks_have_the_gradients_tables_and_loss_of_one_process(three_ranks):
    assert_like_one_process(three_ranks, every=7)


@pytest.mark.slow
def test_three_ranks_in_every_case(tmp_path):
    assert_like_one_process(start(tmp_path, 3, 1), every=1)


@pytest.mark.parametrize("name", ["defaults", "cached_and_accumulated"])
def test_ranks_agree_on_alpha_and_resume_bit_equal(two_ranks, name):
    first, second = (report[name] for report in two_ranks)
    assert first["straight"]["alphas"] == second["straight"]["alphas"]
    assert len(set(first["straight"]["alphas"])) == 8
    assert torch.equal(first["straight"]["weights"], second["straight"]["weights"])
    for rank in (first, second):
        assert rank["resumed"]["alphas"] == rank["straight"]["alphas"][4:]
        assert torch.equal(rank["resumed"]["weights"], rank["straight"]["weights"])
        assert rank["resumed"]["state"] == rank["straight"]["state"] == first["straight"]["state"]


def test_frequencies_count_the_rows_of_all_ranks_and_none_of_the_evaluation(two_ranks):
    loss = FPSLoss(small_model(), log_q="corrected")
    loss.import_state(two_ranks[0]["defaults"]["straight"]["state"])
    assert loss.frequencies["document"].total == 8 * 8 * 2  # steps, rows, ranks


def test_a_checkpoint_is_complete_only_with_the_random_state_of_every_rank(two_ranks, tmp_path):
    shutil.copytree(two_ranks[0]["defaults"]["output_dir"], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-8"
    assert last_complete_checkpoint(newest.parent) == str(newest)
    (newest / "rng_state_1.pth").unlink()  # nobody waits for the other ranks' files before the last file is written
    assert last_complete_checkpoint(newest.parent) == str(newest.with_name("checkpoint-4"))


def test_a_run_of_two_ranks_is_a_run_of_one_process_with_twice_the_batch(two_ranks, tmp_path):
    alone = run(tmp_path, GATHERED, per_device_train_batch_size=8, dropout=0.0, **SGD)
    together = two_ranks[0]["like_one_process"]
    assert together["alphas"] == pytest.approx(alone["alphas"], rel=1e-6)
    assert alone["alphas"][-1] != pytest.approx(1.0, rel=1e-5)
    moved = (alone["weights"] - run(tmp_path, GATHERED, dropout=0.0, **{**SGD, "learning_rate": 0.0})["weights"]).norm()
    assert (together["weights"] - alone["weights"]).norm() < 1e-4 * moved


def test_without_the_callback_each_rank_learns_an_alpha_of_its_own(two_ranks):
    first, second = (report["without_callback"] for report in two_ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert first["alphas"][-1] != pytest.approx(second["alphas"][-1], rel=1e-3)


def test_a_trainable_pooler_of_a_loaded_model_is_frozen_with_a_message(two_ranks):
    for report in two_ranks:
        tuning = report["fine_tuning_with_a_trainable_pooler"]
        assert len(tuning["before"]) == 4 and not tuning["after"]
        assert any("pooler" in message and "frozen" in message for message in tuning["messages"])


def test_ranks_that_draw_from_different_data_sets_count_each_as_one_process_does(two_ranks):
    first, second = (report["several_data_sets"] for report in two_ranks)
    model = small_model()
    for kinds, ours, theirs in zip(MIXED, first["runs"], second["runs"], strict=True):
        assert torch.equal(ours["weights"], theirs["weights"])
        assert (ours["alphas"], ours["betas"]) == (theirs["alphas"], theirs["betas"])
        for number, (name, (_, options)) in enumerate(kinds.items()):
            if "log_q" not in options:
                continue
            for side in ("query", "document"):
                inputs = click_log(rows=16, seed=number)[side][:]
                whole = dict(zip(*FrequencyTable.from_inputs(model, inputs, side).counts(), strict=True))
                expected = whole if side == "document" or "directions" in options else {}
                for rank in (ours, theirs):
                    assert dict(zip(*rank["counts"][name][side], strict=True)) == expected
    assert first["runs"][2]["betas"][0] != 0
    for report in (first, second):
        assert "`gather_across_devices=True` needs one data set" in report["refusal"]
