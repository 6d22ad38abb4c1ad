"""MovieLens as a task for two towers, and the experiments on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_fpsloss.data.movielens import load_movielens_100k
from training_scripts.movielens_task import Model, build_model, title_words
from training_scripts.studies import movielens_experiments


def test_words_of_few_titles_are_left_out() -> None:
    films = [{"title": ["the", "rock"]}, {"title": ["the", "the", "net"]}, {"film": "3"}]
    assert title_words(films, 2) == ["the"]
    assert set(title_words(films, 1)) == {"the", "rock", "net"}


def test_held_out_films_are_in_no_history_and_stay_documents(tmp_path: Path) -> None:
    data = load_movielens_100k()
    held_out = {50, 181, 258}
    task = Model().task(data, held_out)
    histories = [*task.rows["query"], *task.queries.values()]
    assert not held_out & {int(film) for query in histories for film in query["seen"]}
    assert not held_out & {int(film["film"]) for film in task.trained}
    assert held_out <= task.documents.keys() and len(task.queries) == 943
    assert task.clicks == sum(len(query["seen"]) - 1 for query in task.rows["query"])
    # Their ids are unknown to the towers, so that title, genres and year alone tell them apart.
    ids_alone = Model(film=(), user=())
    model = build_model(ids_alone.task(data, held_out), ids_alone)
    first, second = model.encode_document([{"film": "50"}, {"film": "181"}])
    assert (first == second).all()
    model = build_model(task, Model())
    first, second = model.encode_document([task.documents[50], task.documents[181]])
    assert not (first == second).all()
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    queries = list(task.queries.values())[:20]
    torch.testing.assert_close(again.encode_query(queries), model.encode_query(queries), rtol=0, atol=1e-6)


def test_runs_that_are_there_are_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, peers = tmp_path / "gains.jsonl", tmp_path / "peers.jsonl"
    users = {"test_ndcg@10_by_user": [0.0, 0.5, 1.0, 0.5]}
    rows = [
        {"step": step, "seed": seed, "ndcg@10": 0.1 + seed, **users}
        for step in movielens_experiments.GAINS
        for seed in (0, 1)
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    peers.write_text(json.dumps({"test_ndcg@10_by_user": [0.0, 0.25, 0.75, 0.25]}) + "\n")
    words = ["--experiment", "gains", "--results", str(results), "--seeds", "0", "1", "--against", str(peers)]
    movielens_experiments.main(words)
    printed = capsys.readouterr().out
    assert len(results.read_text().splitlines()) == len(rows)
    assert "text (2 seeds): ndcg@10 0.6000 ±0.5000" in printed
    assert "text: +0.1875 (" in printed
