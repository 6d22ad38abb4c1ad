from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from st_fpsloss.cli.data import DataArguments, EvaluationArguments
from st_fpsloss.cli.models import TowerArguments
from st_fpsloss.cli.training import OutputArguments, set_columns
from tests.cli.conftest import QUIET, data_of, run, towers_of, weights_of, write
from tests.click_logs import refusal


def test_a_pretrained_model_has_a_card_metrics_and_no_need_of_this_package(pretrained: Path) -> None:
    metrics = json.loads((pretrained / "eval_results.json").read_text())
    assert metrics["eval_hr@10"] > 0.5  # by chance about a tenth: 10 of some 130 documents
    card = (pretrained / "README.md").read_text()
    assert "FPSLoss</code> with these parameters" in card and '"log_q": "corrected"' in card
    shown = [float(n) for line in card.splitlines() if "ndcg@10" in line for n in re.findall(r"\b[01]\.\d+", line)]
    assert any(value == pytest.approx(metrics["eval_ndcg@10"], abs=5e-5) for value in shown)  # 0.75 is not 0.7500
    model = SentenceTransformer(str(pretrained), device="cpu")
    assert model.encode_query(["fox"]).shape == (1, 8)
    assert (
        "st_fpsloss" not in (pretrained / "modules.json").read_text() + (pretrained / "router_config.json").read_text()
    )


@pytest.mark.parametrize(
    ("words", "rate", "max_scale"),
    [
        ((), 0.05, 30.0),
        (("--learning_rate_mapping", '{"logit_scale": 0.002}', "--max_scale", 60), 0.002, 60.0),
        (("--scale", 50), 0.05, 50.0),
    ],
)
def test_alpha_has_a_rate_and_a_bound_of_its_own(
    folder: Path, tmp_path: Path, words: tuple[str | float, ...], rate: float, max_scale: float
) -> None:
    run(
        "pretrain", *data_of(folder), *towers_of(folder), "--similarity", "cosine", *words, "--learning_rate", 0.005,
        "--lr_scheduler_type", "constant", "--max_steps", 2, "--save_steps", 2, "--output_dir", tmp_path, *QUIET,
    )  # fmt: skip
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    alpha = next(entry["loss/alpha"] for entry in state["log_history"] if "loss/alpha" in entry)
    start = 50.0 if "--scale" in words else 1 / 0.07
    # Adam's first step is the rate; at the bound none is left upwards.
    assert abs(math.log(alpha / start)) == pytest.approx(rate, rel=0.01) or alpha == start == max_scale
    assert f'"max_scale": {max_scale}' in (tmp_path / "README.md").read_text()


def test_a_query_tower_is_aligned_and_a_frozen_encoder_stays(folder: Path, tmp_path: Path) -> None:
    encoder = SentenceTransformer(str(folder / "encoder"), device="cpu")
    words = [*data_of(folder), "--query_model", folder / "encoder", "--document_model", folder / "encoder"]
    words += ["--query_layers", 1, "--document_frozen", "--align", "--similarity", "cosine", "--max_steps", 1, *QUIET]
    run("pretrain", *words, "--output_dir", tmp_path, "--learning_rate", 1e-2, "--save_strategy", "no")
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert model.get_embedding_dimension() == 16  # the encoder's, where no other is given
    frozen = dict(model[0].sub_modules["document"][0].named_parameters())
    learned = dict(model[0].sub_modules["query"][0].named_parameters())
    start = dict(encoder[0].named_parameters())
    assert all(torch.equal(frozen[name], start[name]) for name in start)
    assert not all(torch.equal(learned[name], start[name]) for name in learned)


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(folder: Path, tmp_path: Path) -> None:
    words = [
        *data_of(folder),
        *towers_of(folder),
        "--max_steps",
        4,
        "--save_steps",
        2,
        "--output_dir",
        tmp_path,
        *QUIET,
    ]
    run("pretrain", *words, "--resume_from_checkpoint", "last")  # there is none yet
    end = weights_of(tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run\. Pass --resume_from_checkpoint last"):
        run("pretrain", *words)
    for path in tmp_path.iterdir():
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "checkpoint-4").mkdir()  # killed while it saved
    run("pretrain", *words, "--resume_from_checkpoint", "last")
    torch.testing.assert_close(weights_of(tmp_path), end, rtol=0, atol=0)


@pytest.mark.parametrize("held", ["checkpoint-4/trainer_state.json", "modules.json"])
def test_an_earlier_run_is_overwritten_only_where_that_is_said(held: str, tmp_path: Path) -> None:
    (tmp_path / held).parent.mkdir(exist_ok=True)
    for name in (held, "notes.txt"):
        (tmp_path / name).write_text("{}")
    training = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="--overwrite_output_dir to replace it, or another output_dir"):
        OutputArguments().check(training)
    chosen = OutputArguments(overwrite_output_dir=True)
    chosen.check(training)
    chosen.clear(training)
    assert (tmp_path / "notes.txt").exists() and not list(tmp_path.glob("checkpoint-*"))
    OutputArguments().check(SentenceTransformerTrainingArguments(str(tmp_path / "new"), use_cpu=True))
    training.resume_from_checkpoint = "last"
    OutputArguments().check(training)
    with pytest.raises(ValueError, match="contradict each other"):
        chosen.check(training)


def test_a_data_set_that_is_no_file_goes_through_load_dataset(folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_json(str(folder / "log.jsonl"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()
    rows.to_parquet(tmp_path / "repository" / "train.parquet")
    rows.select(range(20)).to_parquet(tmp_path / "repository" / "test.parquet")
    data = DataArguments([str(tmp_path / "repository")], query_column="q", document_column="d")
    train, held_out = EvaluationArguments(eval_split="test").read(data, label=None)
    assert train["query"][:] == rows["q"][:] and train.column_names == ["query", "document"]
    assert held_out is not None and held_out["document"][:] == rows["d"][:20]


def test_the_newest_rows_are_held_out_and_their_time_is_no_column_of_the_training(folder: Path) -> None:
    data = DataArguments([str(folder / "log.jsonl")], query_column="q", document_column="d")
    train, held_out = EvaluationArguments(eval_fraction=0.1, time_column="day").read(data, label="stars")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert held_out is not None
    assert held_out["document"][:] == [row["d"] for row in rows if row["day"] >= "2024-01-19"]  # 16 rows
    assert train["document"][:] == [row["d"] for row in rows if row["day"] < "2024-01-19"]
    assert train.column_names == held_out.column_names == ["query", "document", "label"]


def test_columns_go_to_their_towers_with_the_prompts_of_the_model() -> None:
    from tests.losses.conftest import small_model

    model = small_model()
    model.prompts = {"query": "quick ", "document": ""}
    training = SentenceTransformerTrainingArguments(use_cpu=True)
    set_columns(training, model, ["query", "document", "label", "negative_1"])
    assert training.router_mapping == {"query": "query", "document": "document", "negative_1": "document"}
    assert training.prompts == {"query": "quick "}
    chosen = SentenceTransformerTrainingArguments(use_cpu=True, router_mapping={"query": "document"}, prompts="a ")
    set_columns(chosen, model, ["query", "document"])
    assert (chosen.router_mapping, chosen.prompts) == ({"query": "document"}, "a ")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--query_column", "search"], ["query='search' is no column of log.jsonl", "'q', 'd'"]),
        (["--dataset", "no/such-data"], ["'no/such-data' is no file of a known kind", "from the Hub failed"]),
        (["--dataset", "absent.csv"], ["source='absent.csv' is no file"]),
        (["--dataset", "a", "b"], ["['a', 'b'] are no files of a known kind", "not one Hub id"]),
        (["--time_column", "day"], ["pass --eval_fraction too"]),
        (
            ["--eval_fraction", "0.1", "--time_column", "worse"],
            ["time='worse'", "line 1 of log.jsonl"],
        ),
        (["--eval_fraction", "0.1", "--eval_dataset", "x.csv"], ["--eval_fraction holds out", "pass one"]),
        (["--eval_fraction", "1.5"], ["fraction=1.5 has to lie between 0 and 1"]),
        (["--margin", "1"], ["--margin is no argument of the loss 'fps'"]),
        (["--query_features", "age=Numerical"], ["holds texts, so there is no 'age'"]),
        (["--query_features", "age=Number"], ["'age=Number' is no feature", "Categorical, Numerical, Tags, History"]),
        (["--shared_tower"], ["--document_model and --shared_tower contradict each other"]),
        (["--resume_from_checkpoint", "nowhere"], ["--resume_from_checkpoint='nowhere' is no folder"]),
        (["--mask_known_positives", "--query_prompt", "q: "], ["--mask_known_positives does not know", "prompts"]),
        (["--label_column", "never"], ["--label_column: all 160 training rows have r <= 0", "no click to learn from"]),
        (["--document_column", "same"], ["--document_column: all 160 training rows", "one and the same document, 'x'"]),
        (["--colour", "red"], ["--colour is no argument", "['--colour', 'red']", "--help"]),
        (["--logq", "none"], ["--logq is no argument", "Did you mean --log_q?"]),
        (["--logq=none"], ["--logq is no argument", "Did you mean --log_q?"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size 0", "at least 1"]),
        (["--embedding_dim", "-8"], ["--embedding_dim -8", "at least 1"]),
        (["--at", "10", "0"], ["--at 0", "at least 1"]),
        (["--learning_rate", "0"], ["--learning_rate 0.0", "above 0"]),
    ],
)
def test_wrong_arguments_are_refused_before_training(
    words: list[str], parts: list[str], folder: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) | {"never": 0, "same": "x"} for line in (folder / "log.jsonl").read_text().splitlines()]
    log = ["--dataset", write(tmp_path / "log.jsonl", rows), *data_of(folder)[2:]]
    with pytest.raises(ValueError, match=refusal(*parts)):
        run("pretrain", *log, *towers_of(folder), *QUIET, "--output_dir", tmp_path, *words)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_tower_needs_an_encoder_or_features(folder: Path) -> None:
    with pytest.raises(ValueError, match="Pass --document_model, a Hub id or a folder, or --document_features"):
        run("pretrain", *data_of(folder), "--query_model", folder / "encoder")


USERS = [{"q": {"user": f"u{n % 3}", "age": n, "text": "fox"}, "d": f"fox {n}"} for n in range(8)]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["user=Categorical"], ["['age', 'text'] too", "add age=Categorical (or another kind) to --query_features"]),
        (["user=Categorical", "age=Numerical"], ["['text'] too", "pass --query_model, which reads the text; or leave"]),
    ],
)
def test_keys_that_a_tower_would_not_know_are_refused_before_it_is_trained(
    words: list[str], parts: list[str], folder: Path, tmp_path: Path
) -> None:
    data = ["--dataset", write(tmp_path / "users.jsonl", USERS), *data_of(folder)[2:], "--output_dir", tmp_path]
    with pytest.raises(ValueError, match=refusal("--query_features: the dicts in the column of the query", *parts)):
        run("pretrain", *data, "--document_model", folder / "encoder", "--query_features", *words, *QUIET)


def test_a_shared_tower_has_to_know_the_keys_of_the_documents_too(folder: Path) -> None:
    rows = Dataset.from_dict({"query": [{"user": "a"}], "document": [{"film": "b"}]})
    towers = TowerArguments(shared_tower=True, query_features=["user=Categorical"])
    with pytest.raises(ValueError, match=r"column of the document have the keys \['film'\].*to --query_features"):
        towers.build(rows)


def test_a_column_that_looks_like_a_label_and_is_not_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"query": "a", "document": "d", "label": 0, "score": "good"}]
    data = DataArguments([str(write(tmp_path / "log.jsonl", rows))], label_column="label")
    data.read(label="label")
    data.read(negatives=["label"])
    assert not caplog.records
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = tmp_path / f"log{suffix}"
        if suffix != ".jsonl":
            getattr(Dataset.from_list(rows), f"to_{suffix[1:]}")(path)
        caplog.clear()
        DataArguments([str(path)]).read()
        assert f"{path} has the column 'label', which is not read" in caplog.text
        assert "pass --label_column label" in caplog.text and "score" not in caplog.text


def test_documents_that_a_catalogue_lacks_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"query": ["a", "b", "c"], "document": ["d", "e", "e"]})
    data = DataArguments(["log.jsonl"])
    whole = EvaluationArguments(documents=[str(write(tmp_path / "all.jsonl", [{"document": d} for d in "def"]))])
    whole.evaluator(data, rows, rows, 8)
    EvaluationArguments().evaluator(data, rows.select([0]), rows, 8)
    assert not caplog.records
    part = EvaluationArguments(documents=[str(write(tmp_path / "part.jsonl", [{"document": d} for d in "Dd"]))])
    part.evaluator(data, rows, rows, 8)
    assert (
        "--documents lacks 1 of the 2 distinct documents of the rows, such as 'e'; it holds, for one, 'D'"
        in caplog.text
    )


@pytest.mark.parametrize("name", ["arr.json", "clicks.csv.gz"])
def test_a_file_of_an_unknown_kind_is_not_looked_up_on_the_hub(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(
        ValueError, match=refusal(name, "a file of a kind that is not read", ".csv, .tsv", "convert it")
    ):
        DataArguments([str(tmp_path / name)]).read()


def test_files_of_another_encoding_and_bad_rows_are_read_where_one_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("query,document,clicked\nthé,café,1\nthé,,1\nthé,crème,never\nthé,sucre,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="no utf-8"):
        DataArguments([str(path)]).read(label="clicked")
    with pytest.raises(ValueError, match="on_bad_row"):
        DataArguments([str(path)], encoding="latin-1").read(label="clicked")
    rows = DataArguments([str(path)], encoding="latin-1", on_bad_row="skip").read(label="clicked")
    assert rows["document"][:] == ["café", "sucre"] and "2" in caplog.text


@pytest.mark.slow
def test_two_processes_train_together_and_one_writes(folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    plain = ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [*data_of(folder), *towers_of(folder), "--max_steps", 3, "--eval_fraction", 0.1, "--output_dir", tmp_path]
    command = [*launch, *plain, "-m", "st_fpsloss.cli", "pretrain", *words, *QUIET, "--gather_across_devices"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=600)
    assert {path.name for path in (tmp_path / "checkpoint-3").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    table = (tmp_path / "eval" / "retrieval_evaluation_results.csv").read_text().splitlines()
    assert len(table) == 2
    assert SentenceTransformer(str(tmp_path), device="cpu").encode_query(["fox"]).shape == (1, 8)
