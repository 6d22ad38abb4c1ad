from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from st_fpsloss.cli.negatives import NegativeArguments
from st_fpsloss.cli.training import check_rows
from tests.cli.conftest import QUIET, data_of, log_rows, run, weights_of, write
from tests.click_logs import refusal

SHORT = ["--max_steps", 2, "--learning_rate", 1e-3, "--save_strategy", "no", "--per_device_train_batch_size", 16]


def finetune(folder: Path, output: Path, *words: Any) -> dict[str, float]:
    held_out = ["--eval_dataset", folder / "new.jsonl", "--at", 10]
    return run("finetune", *data_of(folder), *held_out, "--output_dir", output, *SHORT, *QUIET, *words)


@pytest.mark.parametrize(
    ("loss", "words", "settings"),
    [
        ("PairCELoss", ["--loss", "pair_ce", "--negatives", "sampled"], ['"negatives": "explicit"']),
        ("PairCELoss", ["--loss", "pair_ce", "--negative_columns", "worse"], ['"negatives": "explicit"']),
        ("PairCELoss", ["--loss", "pair_ce", "--hardest", "3"], ['"negatives": "in_batch"', '"hardest": 3']),
        ("TripletLoss", ["--loss", "triplet", "--negatives", "hard", "--margin", "1000"], ['"margin": 1000.0']),
        ("SampledSoftmaxLoss", ["--loss", "sampled_softmax", "--negatives", "mixed"], ['"log_q": "corrected"']),
        ("FullSoftmaxLoss", ["--loss", "full_softmax", "--documents", "{folder}/new.jsonl"], ['"corpus": ']),
        ("SigmoidLoss", ["--loss", "sigmoid", "--mask_known_positives"], ['"duplicates": "mask"']),
        ("FPSLoss", ["--loss", "fps", "--negatives", "mixed", "--duplicates", "keep"], ['"log_q": "standard"']),
        ("FPSLoss", ["--loss", "fps", "--log_q", "none"], ['"log_q": null']),
        ("PairCELoss", ["--grade_column", "stars", "--min_difference", "1"], ['"duplicates": "keep"', '"explicit"']),
    ],
)
def test_every_loss_learns_from_its_negatives(
    loss: str, words: list[str], settings: list[str], folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    words = [word.format(folder=folder) for word in words]
    metrics = finetune(folder, tmp_path, "--model", pretrained, "--num_negatives", 2, *words)
    assert metrics["eval_ndcg@10"] > 0.15  # by chance below 0.05
    assert (weights_of(tmp_path) - weights_of(pretrained)).norm() > 0.01
    card = (tmp_path / "README.md").read_text()
    assert f"{loss}</code> with these parameters" in card
    parameters = card[card.index(f"{loss}</code> with these parameters") :][:2000]
    for setting in settings:
        assert setting in parameters


def test_a_folder_and_a_hub_id_are_the_same_to_the_command(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    repository = tmp_path / "home" / "hub" / "models--me--films"
    revision = "0123456789012345678901234567890123456789"
    shutil.copytree(pretrained, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    words = [*data_of(folder), *SHORT, *QUIET, "--negatives", "sampled", "--output_dir", tmp_path / "from_hub"]
    command = [sys.executable, "-m", "st_fpsloss.cli", "finetune", "--model", "me/films", *words]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, timeout=300)
    finetune(folder, tmp_path / "from_folder", "--model", pretrained, "--negatives", "sampled")
    difference = weights_of(tmp_path / "from_hub") - weights_of(tmp_path / "from_folder")
    assert difference.abs().max() < 1e-6
    assert (weights_of(tmp_path / "from_hub") - weights_of(pretrained)).norm() > 0.01


def test_any_model_is_fine_tuned_one_without_towers_too(folder: Path, tmp_path: Path) -> None:
    before = weights_of(folder / "encoder")
    finetune(folder, tmp_path, "--model", folder / "encoder", "--loss", "fps")
    assert not torch.equal(weights_of(tmp_path), before)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--grade_column", "grade"], ["label='grade' is no column of"]),
        (["--grade_column", "day"], ["label='day'", "where a finite number has to be"]),
        (["--grade_column", "stars", "--duplicates", "mask"], ["stars has 3 grades", "Leave out --duplicates"]),
        (["--grade_column", "stars", "--loss", "fps"], ["--loss fps takes every other document", "pair_ce, triplet"]),
        (["--grade_column", "stars", "--negatives", "hard"], ["leave out --negatives hard"]),
        (["--grade_column", "stars", "--negative_columns", "worse"], ["leave out --negative_columns"]),
        (["--grade_column", "stars", "--label_column", "stars"], ["pass one"]),
        (["--grade_column", "stars", "--min_difference", "9"], ["nothing to compare"]),
        (["--dataset", "{folder}/same.jsonl"], ["all 2 training rows have one and the same document, 'fox'"]),
        (["--loss", "full_softmax", "--negatives", "hard"], ["full_softmax takes all documents", "leave out"]),
        (["--negatives", "explicit"], ["--negatives explicit: the rows have none", "--negative_columns"]),
        (["--negatives", "mixed", "--num_negatives", "1"], ["num_negatives=1 < 2"]),
        (["--hard_first_rank", "0"], ["--hard_first_rank=0 has to be at least 1"]),
        (["--hard_first_rank", "9", "--hard_last_rank", "3"], ["--hard_first_rank=9", "at most --hard_last_rank=3"]),
        (
            ["--negatives", "hard", "--hard_margin", "1e6"],
            ["--negatives hard: no row", "--hard_first_rank=1, --hard_margin=1000000.0 and ", " distinct documents"],
        ),
        (["--margin", "1"], ["--margin is no argument of the loss 'pair_ce'"]),
        (["--log_q", "standard"], ["--log_q is no argument of the loss 'pair_ce'"]),
        (["--model", "me/nothing"], ["'me/nothing' is neither the folder of a model nor the id of one on the Hub"]),
    ],
)
def test_wrong_arguments_are_refused_before_training(
    words: list[str], parts: list[str], folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    write(tmp_path / "same.jsonl", [{"q": "fox", "d": "fox"}, {"q": "seven", "d": "fox"}])
    words = [word.format(folder=tmp_path) for word in words]
    with pytest.raises(ValueError, match=refusal(*parts)):
        finetune(folder, tmp_path, "--model", pretrained, *words)
    assert not (tmp_path / "modules.json").exists()


def test_grades_below_0_are_compared_as_others(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    rows = [row | {"below": row["stars"] - 4} for row in log_rows()]
    data = ["--dataset", write(tmp_path / "log.jsonl", rows), *data_of(folder)[2:], "--grade_column", "below"]
    run("finetune", "--model", pretrained, *data, "--output_dir", tmp_path / "out", *SHORT, *QUIET)
    assert (weights_of(tmp_path / "out") - weights_of(pretrained)).norm() > 0.01


def test_few_mined_negatives_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    negatives = NegativeArguments(negatives="mixed", hard_margin=0.5)
    rows = Dataset.from_dict({"query": list("abc"), "document": list("def"), "hard_negatives": [[1], [], [2]]})
    negatives.check_mined(rows, 3)
    assert not caplog.records
    negatives.check_mined(rows.add_column("label", [0, 1, 1]).select([0, 1, 1, 2]), 3)
    assert "--negatives mixed: 2 of 3 rows with r > 0 have no hard negative" in caplog.text
    assert "--hard_margin=0.5 and 3 distinct documents" in caplog.text


def test_one_document_is_enough_where_negatives_are_drawn_from_a_catalogue() -> None:
    rows = Dataset.from_dict({"query": ["a", "b"], "document": ["d", "d"]})
    check_rows(rows, ["d", "e"])
    check_rows(rows.add_column("negative_1", ["e", "e"]))
    with pytest.raises(ValueError, match="all 2 training rows have one and the same document, 'd'"):
        check_rows(rows, ["d"])


def test_an_unknown_loss_is_answered_with_those_there_are(
    folder: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        finetune(folder, tmp_path, "--model", pretrained, "--loss", "softmax")
    assert "sampled_softmax" in capsys.readouterr().err
