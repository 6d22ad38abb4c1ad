"""The example of the commands on ratings: users and films with features, pretrained, then fine-tuned on the stars."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from st_fpsloss.data import load_movielens_100k
from st_fpsloss.negatives.graded import graded_pairs
from tests.cli.conftest import QUIET, run, weights_of

FEATURES = [
    "--query_features", "user=Categorical", "age=Numerical", "gender=Categorical", "occupation=Categorical",
    "--document_features", '{"type": "Categorical", "name": "film", "buckets": 2000}', "genres=Tags", "year=Numerical",
]  # fmt: skip


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens as files, cut to the rows of ten users."""
    folder = tmp_path_factory.mktemp("movielens")
    run("movielens", "--output_dir", folder)
    for name, count in (("train", 90_570), ("validation", 4_715), ("test", 4_715)):
        lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) == count
        mine = [line for line in lines if int(json.loads(line)["query"]["user"]) <= 10]
        (folder / f"{name}.jsonl").write_text("".join(mine))
    assert len((folder / "documents.jsonl").read_text().splitlines()) == 1_682
    return folder


def test_a_model_with_features_is_pretrained_fine_tuned_on_ratings_evaluated_and_searched(
    movielens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads((movielens / "train.jsonl").read_text().splitlines()[0])
    assert set(row["query"]) == {"user", "age", "gender", "occupation"} and 1 <= row["rating"] <= 5
    held_out = ["--eval_dataset", movielens / "validation.jsonl", "--documents", movielens / "documents.jsonl"]
    common = ["--dataset", movielens / "train.jsonl", *held_out, "--exclude_seen", "--at", 10, *QUIET]
    short = ["--max_steps", 3, "--save_strategy", "no", "--learning_rate", 1e-2, "--per_device_train_batch_size", 64]
    sizes = ["--hidden_dims", 0, "--embedding_dim", 8, "--document_bias"]
    before = run("pretrain", *common, *short, *FEATURES, *sizes, "--output_dir", tmp_path / "clicks")
    rated = ["--model", tmp_path / "clicks", "--trust_remote_code", "--grade_column", "rating", "--max_pairs", 20]
    with pytest.raises(ValueError, match="trust_remote_code"):
        run("finetune", *common, *short, *rated[:2], "--output_dir", tmp_path / "refused")
    after = run("finetune", *common, *short, *rated, "--loss", "pair_ce", "--output_dir", tmp_path / "rated")
    assert set(before) == set(after)
    old, new = (weights_of(tmp_path / name, trust_remote_code=True) for name in ("clicks", "rated"))
    assert not torch.equal(old, new)

    seen = ["--seen", movielens / "train.jsonl", movielens / "validation.jsonl", "--trust_remote_code"]
    models = ["--models", tmp_path / "clicks", tmp_path / "rated"]
    test = ["--dataset", movielens / "test.jsonl", "--documents", movielens / "documents.jsonl", "--at", 10]
    figures = run("evaluate", *models, *test, *seen)
    assert (figures["queries"], figures["documents"]) == (10, 1_682)

    place = ["--model", tmp_path / "rated", "--trust_remote_code", "--index", tmp_path / "index"]
    run("index", *place, "--documents", movielens / "documents.jsonl")
    capsys.readouterr()
    run("search", *place, "--query", json.dumps(row["query"]), "-k", 2)
    best = capsys.readouterr().out.splitlines()[1].split("\t")
    film = json.loads(best[4])
    assert json.loads(best[0]) == row["query"] and film["film"].endswith(f"({best[2]})")  # the id of its file


def test_the_stars_of_a_user_become_pairs(movielens: Path) -> None:
    rows = [json.loads(line) for line in (movielens / "train.jsonl").read_text().splitlines()]
    judged = Dataset.from_list([{**row, "grade": row["rating"]} for row in rows])
    stars = {(row["query"]["user"], row["document"]["film"]): row["rating"] for row in rows}
    pairs = graded_pairs(judged, max_pairs=20)
    assert len(pairs) == 20 * 10
    for pair in pairs:
        user, better, worse = pair["query"]["user"], pair["document"]["film"], pair["negative_1"]["film"]
        assert stars[user, better] > stars[user, worse]


def test_one_film_of_each_user_is_left_out_as_the_protocol_has_it(tmp_path: Path) -> None:
    run("movielens", "--output_dir", tmp_path, "--last", 1)
    for name, ratings in load_movielens_100k().splits().items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        users = [int(row["query"]["user"]) for row in rows]
        assert users == ratings["user_id"][:] and [row["timestamp"] for row in rows] == ratings["timestamp"][:]
    with pytest.raises(ValueError, match="--last 10: the least active user"):
        run("movielens", "--output_dir", tmp_path, "--last", 10)


def test_the_commands_of_the_readme_run(movielens: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## From the command line\n\n.*?```bash\n(.*?)```", readme, flags=re.DOTALL)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.startswith("st-fpsloss")]
    names = [name for _, name, *_ in commands]
    assert names == ["movielens", "pretrain", "finetune", "evaluate", "evaluate", "index", "search", "serve"]
    # The files are there, cut to ten users; the server, which never ends, has tests of its own.
    for name, (_, _, *words) in zip(names[1:-1], commands[1:-1], strict=True):
        words = [word.replace("data/movielens", str(movielens)).replace("runs/", f"{tmp_path}/") for word in words]
        if name in ("pretrain", "finetune"):
            words += ["--max_steps", "2", "--save_strategy", "no", *QUIET]
        run(name, *words)
    assert (tmp_path / "films-index").is_dir()
