from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from st_fpsloss import RetrievalEvaluator
from training_scripts.studies import compare_losses
from training_scripts.studies.data import TASKS, Task
from training_scripts.studies.plans import STUDIES
from training_scripts.studies.runs import LOSSES, ResultsFile, Run, execute

NUM_TOKENS = 3_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small log in the place of the docstrings."""
    lines = [f"name {query}\tdoes {query % 7} and {document}\n" for query in range(60) for document in range(12)]
    (tmp_path / "docstrings.tsv").write_text("".join([*lines, *lines[:200]]))
    return tmp_path


def test_a_study_goes_on_where_it_stopped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "docstrings", "--study", "similarity", "--num_tokens", str(NUM_TOKENS), "--output_dir"]
    words += [str(folder), "--seeds", "0"]
    file = folder / "results.jsonl"
    compare_losses.main(words)
    lines = file.read_text().splitlines()
    assert len(lines) == len(STUDIES["similarity"]())

    file.write_text("\n".join([*lines[:-1], lines[-1][:100]]))  # killed while it wrote the last line
    compare_losses.main(words)
    again = file.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    first, second = json.loads(lines[-1]), json.loads(again[-1])
    assert first.pop("seconds") >= 0 and second.pop("seconds") >= 0
    assert first == second  # one seed, one result

    table = (folder / "similarity_docstrings.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n| dot product") == len(lines) - 1
    assert (folder / "similarity_docstrings.png").stat().st_size > 10_000


def test_all_runs_of_a_study_end_at_the_same_number_of_tokens(folder: Path) -> None:
    task, studies = TASKS["docstrings"](folder), STUDIES["losses"]()
    for name in ("FPS", "triplet", "FPS, then catalogue softmax"):
        stages, similarity = studies[name]
        result = execute(Run("docstrings", stages, 0, NUM_TOKENS, similarity), task)
        used = sum(stage["tokens"] for stage in result["losses"])
        assert NUM_TOKENS <= used < 3 * NUM_TOKENS, name  # a stage ends with the batch that reaches its share


def test_deciles_of_a_model_that_finds_the_popular_alone() -> None:
    documents = {number: f"film {number}" for number in range(20)}  # all clicked alike: two of them are a decile
    queries = {f"user {number}": "film 1" for number in documents}
    targets = dict(zip(queries, documents, strict=True))
    evaluator = RetrievalEvaluator(queries, documents, {user: [film] for user, film in targets.items()}, at=(10,))
    task = Task(
        Dataset.from_dict({"query": [], "document": []}),
        documents,
        [],
        dict.fromkeys(documents, 5),
        *2 * [evaluator],
        targets,
    )
    found = [{"test_per_query": [float(film >= 17) for film in targets.values()]}]
    lines = compare_losses.decile_table({"popular": found, "twice": found * 2}, task).splitlines()
    assert lines[2] == "| queries |" + " 2 |" * 10
    for name, line in zip(("popular", "twice"), lines[3:], strict=True):
        assert line == f"| {name} |" + " 0.000 |" * 8 + " 0.500 | 1.000 |"


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_of_a_study_differ_in_what_it_is_about(study: str) -> None:
    configurations = STUDIES[study]()
    keys = {Run("movielens", stages, 0, NUM_TOKENS, similarity).key for stages, similarity in configurations.values()}
    assert len(keys) == len(configurations)
    assert all(stage.loss in LOSSES for stages, _ in configurations.values() for stage in stages)
    assert all(sum(stage.share for stage in stages) == pytest.approx(1) for stages, _ in configurations.values())


def test_docstrings_judge_pairs_that_training_lacks_among_all_documents(folder: Path) -> None:
    task = TASKS["docstrings"](folder)
    log = {tuple(line.split("\t")) for line in (folder / "docstrings.tsv").read_text().splitlines()}
    trained = set(zip(task.pairs["query"], task.pairs["document"], strict=True))
    assert set(task.documents.values()) == {text for _, text in log}
    judged = []
    for evaluator in (task.validation, task.test):
        ranking = evaluator.top_k(lambda ids: [[0.0] * len(task.documents) for _ in ids], len(task.documents))
        assert len(ranking) == len(evaluator.query_ids) > 20
        judged.append({(query, task.documents[number]) for query, found in ranking.items() for number, _ in found})
        offered = {pair for pair in judged[-1] if pair in log}  # a query's ranking holds its relevant documents alone
        assert offered and not offered & trained
    assert not judged[0] & judged[1] & log


def test_ratings_rank_what_a_user_has_rated_and_training_lacks(folder: Path) -> None:
    task = TASKS["ratings"](folder)
    trained = set(zip(task.pairs["query"], task.pairs["document"], strict=True))
    assert len(trained) == len(task.pairs) == pytest.approx(80_000, rel=0.01)
    assert task.graded is not None
    for column in ("document", "negative_1"):
        assert set(zip(task.graded["query"], task.graded[column], strict=True)) <= trained
    for evaluator in (task.validation, task.test):
        ranking = evaluator.top_k(lambda ids: [list(range(len(task.documents))) for _ in ids], len(task.documents))
        offered = {(user, task.documents[film]) for user, found in ranking.items() for film, _ in found}
        assert len(offered) == pytest.approx(10_000, rel=0.03)
        assert not offered & trained


def test_grades_are_asked_of_data_that_has_them(folder: Path) -> None:
    with pytest.raises(ValueError, match="--data docstrings has none: take ratings"):
        compare_losses.main(["--data", "docstrings", "--study", "graded", "--output_dir", str(folder)])
    assert not (folder / "results.jsonl").exists()


def test_results_are_kept_by_all_that_they_depend_on(tmp_path: Path) -> None:
    run = Run("movielens", STUDIES["losses"]()["FPS"][0], 0, NUM_TOKENS)
    results = ResultsFile(tmp_path / "results.jsonl")
    results.append(run, {"test": 0.1})
    read = ResultsFile(tmp_path / "results.jsonl").by_key
    assert read[run.key]["test"] == 0.1
    assert replace(run, seed=1).key not in read
