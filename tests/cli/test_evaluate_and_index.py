from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_fpsloss.cli.index import read_documents
from st_fpsloss.evaluation import paired_difference
from tests.cli.conftest import data_of, log_rows, run, write
from tests.click_logs import refusal


@pytest.fixture(scope="module")
def untrained(folder: Path, pretrained: Path) -> Path:
    """The pretrained model with its queries at random."""
    path = folder / "untrained"
    model = SentenceTransformer(str(pretrained), device="cpu")
    layer = model[0].sub_modules["query"][-1].linear
    layer.weight.data = layer.weight.data.flip(0)
    model.save_pretrained(str(path))
    return path


def reciprocal_ranks(model: Path, rows: list[dict]) -> dict[str, float]:
    """1/rank of the first relevant document of each query, the plain way; ties count against it."""
    loaded = SentenceTransformer(str(model), device="cpu")
    documents = list(dict.fromkeys(row["d"] for row in rows))
    found = {}
    for query in dict.fromkeys(row["q"] for row in rows):
        scores = (loaded.encode_query([query]) @ loaded.encode_document(documents).T)[0]
        relevant = np.array([any(row["q"] == query and row["d"] == text for row in rows) for text in documents])
        found[query] = 1 / (1 + (scores[~relevant] >= scores[relevant].max()).sum())
    return found


def test_two_models_are_compared_on_the_same_queries(
    folder: Path, pretrained: Path, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = log_rows(24, seed=1)
    new = ["--dataset", folder / "new.jsonl", "--query_column", "q", "--document_column", "d"]
    output = tmp_path / "figures" / "new.json"
    figures = run("evaluate", "--models", untrained, pretrained, *new, "--at", 100, "--output", output)
    assert json.loads(output.read_text()) == figures
    expected = {model: reciprocal_ranks(model, rows) for model in (untrained, pretrained)}
    for model, ranks in expected.items():
        interval = figures["models"][str(model)]["mrr@100"]
        assert interval["mean"] == pytest.approx(np.mean(list(ranks.values())), abs=1e-6)
        assert interval["low"] <= interval["mean"] <= interval["high"]
    difference = paired_difference(list(expected[pretrained].values()), list(expected[untrained].values()))
    found = figures["differences"][str(pretrained)]["mrr@100"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(difference, abs=1e-6)
    assert found["low"] > 0
    shown = capsys.readouterr().out
    assert f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})" in shown
    assert f"{figures['queries']} queries, {figures['documents']} documents" in shown


def test_seen_documents_and_the_catalogue_count(folder: Path, pretrained: Path) -> None:
    words = ["--models", pretrained, "--dataset", folder / "new.jsonl", *data_of(folder)[2:], "--at", 1]
    alone = run("evaluate", *words)
    whole = run("evaluate", *words, "--documents", folder / "log.jsonl")
    unseen = run("evaluate", *words, "--documents", folder / "log.jsonl", "--seen", folder / "log.jsonl")
    score = [figures["models"][str(pretrained)]["recall@1"]["mean"] for figures in (alone, whole, unseen)]
    assert alone["documents"] < whole["documents"] == unseen["documents"]
    assert score[1] < score[2] <= score[0]
    with pytest.raises(ValueError, match="names a model twice"):
        run("evaluate", *words, "--models", pretrained, pretrained)


def test_what_was_shown_and_not_clicked_stays_in_the_ranking(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    rows = [row | {"clicked": 1} for row in log_rows(24, seed=1)]
    write(tmp_path / "new.jsonl", rows)
    write(
        tmp_path / "shown.jsonl", [row | {"clicked": 0, "q": query} for row in rows for query in {r["q"] for r in rows}]
    )
    words = ["--models", pretrained, "--dataset", tmp_path / "new.jsonl", *data_of(folder)[2:]]
    labelled = [*words, "--label_column", "clicked", "--at", 10]
    shown = run("evaluate", *labelled, "--seen", tmp_path / "shown.jsonl")
    assert shown == run("evaluate", *labelled)
    # log.jsonl has no such column: all of its rows are clicks
    assert run("evaluate", *labelled, "--seen", folder / "log.jsonl")["queries"] == shown["queries"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--query", "{'user': 'u1'}"], ["--query \"{'user': 'u1'}\"", "is no JSON", '{"user": "u1", "age": 30}']),
        (["--queries", "{tmp}/searches.csv"], ["--query_column='query' is no column of searches.csv"]),
    ],
)
def test_wrong_queries_are_refused_in_the_words_of_the_command_line(
    words: list[str], parts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "searches.csv").write_text("search\nfox\n")
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    with pytest.raises(ValueError, match=refusal(*parts)):
        run("search", "--model", "none", "--index", tmp_path / "index", *words)


def test_an_index_is_built_and_searched(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    documents = list(dict.fromkeys(row["d"] for row in log_rows()))
    write(tmp_path / "documents.jsonl", ({"sku": f"s{n}", "d": text} for n, text in enumerate(documents)))
    place = ["--model", pretrained, "--index", tmp_path / "index"]
    run("index", *place, "--documents", tmp_path / "documents.jsonl", "--document_column", "d", "--id_column", "sku")
    capsys.readouterr()
    run("search", *place, "--query", "fox", "seven wizards", "-k", 3)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "query\trank\tid\tscore\tdocument"
    model = SentenceTransformer(str(pretrained), device="cpu")
    for number, query in enumerate(["fox", "seven wizards"]):
        scores = (model.encode_query([query]) @ model.encode_document(documents).T)[0]
        best = np.argsort(-scores, kind="stable")[:3]
        for rank, (line, position) in enumerate(zip(lines[3 * number :][:3], best, strict=True), start=1):
            cells = line.split("\t")
            assert cells[:3] == [query, str(rank), f"s{position}"] and cells[4] == documents[position]
            assert float(cells[3]) == pytest.approx(scores[position], rel=1e-4)

    monkeypatch.setattr("sys.stdin", io.StringIO("fox\n\nseven wizards\n"))
    run("search", *place, "--queries", "-", "-k", 3, "--output", tmp_path / "found.tsv")
    assert (tmp_path / "found.tsv").read_text().splitlines() == [header, *lines]
    write(tmp_path / "queries.jsonl", [{"query": "fox"}, {"query": "seven wizards"}])
    run("search", *place, "--queries", tmp_path / "queries.jsonl", "-k", 3, "--output", tmp_path / "again.tsv")
    assert (tmp_path / "again.tsv").read_text() == (tmp_path / "found.tsv").read_text()

    with pytest.raises(ValueError, match="exists"):
        run("index", *place, "--documents", folder / "log.jsonl", "--document_column", "d")
    run("index", *place, "--documents", folder / "log.jsonl", "--document_column", "d", "--overwrite")
    capsys.readouterr()
    run("search", *place, "--query", "fox")
    first_row = [row["d"] for row in log_rows()].index(lines[0].split("\t")[4])
    assert capsys.readouterr().out.splitlines()[1].split("\t")[2] == str(first_row)  # a log has no ids of documents
    for wrong in ([], ["--query", "a", "--queries", "-"]):
        with pytest.raises(ValueError, match="pass one"):
            run("search", *place, *wrong)


def test_a_column_of_ids_is_taken_where_there_is_one(tmp_path: Path) -> None:
    rows = [{"id": "s1", "document": "fox"}, {"id": "s2", "document": "fox"}]
    source = [str(write(tmp_path / "documents.jsonl", rows))]
    assert read_documents(source, "document", None) == {"s1": "fox", "s2": "fox"}


def test_judged_documents_alone_are_ranked_by_their_grades(folder: Path, pretrained: Path) -> None:
    words = ["--models", pretrained, "--dataset", folder / "new.jsonl", *data_of(folder)[2:], "--at", 10]
    words += ["--label_column", "stars"]
    figures = run("evaluate", *words, "--rank", "judged")
    rows = log_rows(24, seed=1)
    model = SentenceTransformer(str(pretrained), device="cpu")
    ndcg = []
    for query in dict.fromkeys(row["q"] for row in rows):
        stars: dict[str, float] = {}
        for row in rows:
            if row["q"] == query:
                stars[row["d"]] = max(row["stars"], stars.get(row["d"], 0))
        scores = (model.encode_query([query]) @ model.encode_document(list(stars)).T)[0]
        gains = np.array(list(stars.values()))
        discounts = 1 / np.log2(2 + np.arange(len(gains)))
        ndcg.append((gains[np.argsort(-scores)] * discounts).sum() / (np.sort(gains)[::-1] * discounts).sum())
    assert figures["models"][str(pretrained)]["ndcg@10"]["mean"] == pytest.approx(np.mean(ndcg), abs=1e-6)
    with pytest.raises(ValueError, match="leave out --documents and --seen"):
        run("evaluate", *words, "--rank", "judged", "--seen", folder / "log.jsonl")
