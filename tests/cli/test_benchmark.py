"""``st-fpsloss benchmark`` on tiny logs: whom it compares, what it writes, its verdict, and that it goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_fpsloss.cli.benchmark.contenders import contenders_of
from st_fpsloss.cli.benchmark.measure import Result
from st_fpsloss.cli.benchmark.models import Settings
from st_fpsloss.cli.benchmark.report import write_report
from st_fpsloss.cli.benchmark.task import make_task
from st_fpsloss.cli.benchmark.verdict import give_verdict
from st_fpsloss.data import load_clicks
from st_fpsloss.evaluation import paired_difference
from st_fpsloss.towers import id_embedding
from tests.cli.conftest import run, write

TOPICS = [f"topic{number}" for number in range(12)]
IDS = [
    "popularity",
    "ItemKNN",
    "ItemKNN (recency)",
    "EASE",
    "EASE (recency)",
    "MultipleNegativesRankingLoss",
    "FPSLoss",
]
TEXTS = ["popularity", "BM25", "untouched encoder", "MultipleNegativesRankingLoss", "FPSLoss"]


def next_items(users: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Users walk around a ring of 24 items: each comes after the one before it."""
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        start = rng.randrange(24)
        rows += [{"query": f"u{user}", "document": f"item {(start + step) % 24}", "t": step} for step in range(length)]
    return rows


def searches(count: int) -> list[dict[str, Any]]:
    """The words of a query name its topic in another language than those of the document."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        topic = rng.randrange(len(TOPICS))
        rows.append(
            {"q": f"x{topic} y{rng.randrange(9)}{number}", "d": f"{TOPICS[topic]} v{rng.randrange(3)}", "day": number}
        )
    return rows


def shuffled(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    documents = [row[column] for row in rows]
    random.Random(1).shuffle(documents)
    return [{**row, column: document} for row, document in zip(rows, documents, strict=True)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [*TOPICS, *(f"x{number}" for number in range(12)), "v0", "v1", "v2"]
    path = tmp_path_factory.mktemp("benchmark") / "encoder"
    SentenceTransformer(modules=[id_embedding(words, 16)], similarity_fn_name="cosine").save_pretrained(str(path))
    return path


def text_words(encoder: Path, folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    dataset = write(folder / "log.jsonl", rows)
    columns = ["--query_column", "q", "--document_column", "d", "--time_column", "day"]
    training = ["--encoder", encoder, "--learning_rate", 0.03, "--num_train_epochs", 3, "--batch_size", 32]
    return ["--dataset", dataset, *columns, *training, "--output_dir", folder / "out"]


def id_words(folder: Path, rows: list[dict[str, Any]], epochs: int = 5, minutes: float = 3) -> list[Any]:
    dataset = write(folder / "log.jsonl", rows)
    training = ["--num_train_epochs", epochs, "--batch_size", 64, "--minutes", minutes]
    return ["--dataset", dataset, "--user_items", *training, "--output_dir", folder / "out"]


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()][1:]


def test_users_and_items_without_times_are_split_by_the_last_click_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    words = id_words(tmp_path, next_items(40, 9))
    assert run("benchmark", *words) is not None
    results = results_of(tmp_path)
    assert [one["contender"] for one in results] == IDS
    by_name = {one["contender"]: np.mean(one["metrics"]["ndcg@10"]) for one in results}
    assert by_name["FPSLoss"] > by_name["ItemKNN"] > by_name["popularity"]  # the newest item says which one is next
    assert all(one["curve"] for one in results[-2:]) and results[-1]["settings"]["alpha"] > 0

    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the last contender
    run("benchmark", *words)
    again = path.read_bytes().splitlines(keepends=True)
    assert again[:-1] == lines[:-1] and len(again) == len(lines)  # the measured seconds too
    assert [one["contender"] for one in results_of(tmp_path)] == IDS
    whole = path.read_bytes()
    run("benchmark", *words)
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="holds results of another batch_size: pass another --output_dir"):
        run("benchmark", *words, "--batch_size", 32)
    write(tmp_path / "log.jsonl", next_items(39, 9))
    with pytest.raises(ValueError, match="holds results of another log or split"):
        run("benchmark", *words)


def test_searches_that_an_encoder_has_to_learn_are_worth_it_against_what_does_not_learn(
    tmp_path: Path, encoder: Path
) -> None:
    run("benchmark", *text_words(encoder, tmp_path, searches(400)))
    results = results_of(tmp_path)
    assert [one["contender"] for one in results] == TEXTS
    means = {one["contender"]: float(np.mean(one["metrics"]["ndcg@10"])) for one in results}
    assert means["FPSLoss"] > 2 * max(means["popularity"], means["BM25"], means["untouched encoder"])
    untrained = [one for one in results if one["contender"] != "MultipleNegativesRankingLoss"]
    verdict = give_verdict(untrained)
    assert verdict.worth and verdict.headline.startswith("Yes: FPSLoss ranks better than ")
    page = (tmp_path / "out" / "report.html").read_text()
    charts = [
        ElementTree.fromstring(part.split("</svg>")[0] + "</svg>")
        for part in ("<svg" + rest for rest in page.split("<svg")[1:])
    ]
    assert len(charts) == 4 and "src=" not in page and "http-equiv" not in page
    report = (tmp_path / "out" / "report.md").read_text()
    for name in TEXTS:
        assert f"| {name} | {means[name]:.4f} (" in report


def test_where_texts_are_shuffled_the_verdict_is_no(tmp_path: Path, encoder: Path) -> None:
    assert run("benchmark", *text_words(encoder, tmp_path, shuffled(searches(400), "d"))) is False
    assert "**No: this log teaches nothing beyond popularity.**" in (tmp_path / "out" / "report.md").read_text()


def test_where_items_are_shuffled_the_verdict_is_no_and_training_ends_with_its_time(tmp_path: Path) -> None:
    words = id_words(tmp_path, shuffled(next_items(40, 8), "document"), epochs=100_000, minutes=0.02)
    assert run("benchmark", *words) is False
    assert "**No: this log teaches nothing beyond popularity.**" in (tmp_path / "out" / "report.md").read_text()
    for trained in results_of(tmp_path)[-2:]:
        times, values = zip(*trained["curve"], strict=True)
        assert times[-1] >= 1.2 and list(times) == sorted(times) and max(values) > 0
        assert 1 <= trained["settings"]["steps"] < 100_000


def result(contender: str, values: Any, curve: bool = False) -> Result:
    metrics = {metric: list(values) for metric in ("ndcg@10", "hr@10", "recall@100")}
    return {
        "contender": contender, "about": "", "metrics": metrics, "deciles": {"1": 0.1}, "coverage@10": 0.5,
        "cold": None, "seconds": {"learning": 1.0, "ranking": 1.0}, "settings": {},
        "curve": [(1.0, 0.1)] if curve else [],
    }  # fmt: skip


def test_the_verdict_names_a_baseline_that_is_better_or_as_good() -> None:
    rng = np.random.default_rng(0)
    ease, noise = rng.uniform(0, 1, 400), rng.normal(0, 0.05, 400)
    popularity = result("popularity", ease - 0.3)

    def verdict(shift: float, *others: Result) -> Any:
        return give_verdict([popularity, result("EASE", ease), *others, result("FPSLoss", ease + noise + shift, True)])

    assert verdict(0.1).headline == "Yes: FPSLoss ranks better than EASE, the best of the others."
    assert verdict(0.0).headline == "No: EASE is as good as FPSLoss: the difference is within the interval."
    assert verdict(-0.1).headline == "No: EASE ranks better than FPSLoss."
    assert [verdict(shift).worth for shift in (0.1, 0.0, -0.1)] == [True, False, False]
    both = verdict(0.1, result("MultipleNegativesRankingLoss", ease + 0.1, True))
    assert both.worth is False and "Training a model pays, both leave EASE behind," in both.sentences[-1]
    assert give_verdict([popularity]).worth is None


def test_a_report_of_part_of_the_contenders_says_that_it_is_not_finished(tmp_path: Path) -> None:
    write_report(tmp_path, {"documents": 1234}, [result("popularity", [0.0, 0.5])])
    report = (tmp_path / "report.md").read_text()
    assert "Not finished: start the same command again" in report and "| documents | 1,234 |" in report


def test_repeated_searches_are_compared_with_the_clicks_of_the_same_query(tmp_path: Path) -> None:
    rows = [{"query": f"q{n % 10}", "document": f"d{n % 20 if n < 200 else 5}", "t": n} for n in range(220)]
    task = make_task(load_clicks(write(tmp_path / "log.jsonl", rows), time="t"), False, None, 1000)
    contender = next(one for one in contenders_of(task) if one.name == "same query")
    query = next(number for number, text in task.queries.items() if text == "q3")
    best = task.test_evaluator.top_k(contender.fit(task, Settings(1.0, 1, "", 8, 1e-3)).score, 3)[query]
    assert {task.documents[number] for number, score in best if score >= 1} == {"d3", "d13"}  # seen ones stay in


def test_cold_documents_and_repeated_clicks(tmp_path: Path) -> None:
    rows = [*next_items(30, 8), *({"query": f"u{user}", "document": "new", "t": 8} for user in range(5))]
    rows.append({"query": "u9", "document": rows[9 * 8]["document"], "t": 9})  # what the user had before
    log = load_clicks(write(tmp_path / "log.jsonl", rows), time="t")
    task = make_task(log, user_items=True, split="last", max_queries=1000)
    assert task.cold_evaluator is not None and len(task.cold_evaluator.query_ids) == 5
    assert len(task.test.relevant) == 29  # nothing new for u9
    assert len(make_task(log, True, "last", max_queries=10).test.relevant) == 10
    by_time = make_task(log, True, None, 1000)
    newest = max(by_time.train["time"])
    assert "newest tenth" in by_time.split and newest < 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "time"], "--split time needs --time_column"),
        (["--split", "last"], "--split last: no query has 3 clicks"),
        (["--encoder", "no/such/folder"], "'no/such/folder' is neither the folder of a model nor the id of one"),
        (["--minutes", 0], "--minutes 0.0: pass a number that is above 0"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, encoder: Path, more: list[Any], message: str) -> None:
    dataset = write(tmp_path / "log.jsonl", [{"query": f"q{n}", "document": f"d{n % 7}"} for n in range(50)])
    with pytest.raises(ValueError, match=message):
        run("benchmark", "--dataset", dataset, "--encoder", encoder, "--output_dir", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_dicts_without_text_are_refused_unless_they_are_users_and_items(tmp_path: Path, encoder: Path) -> None:
    rows = [{"query": {"user": str(n % 9)}, "document": {"film": str(n % 7)}} for n in range(60)]
    with pytest.raises(ValueError, match=r'some inputs have no "text"\. Pass --user_items'):
        dataset = write(tmp_path / "log.jsonl", rows)
        run("benchmark", "--dataset", dataset, "--encoder", encoder, "--output_dir", tmp_path / "out")


def test_a_difference_that_few_rankings_show_by_chance_is_no_yes() -> None:
    """On 29 rankings, of which 4 differ: the interval of 95% leaves out 0, that of 99% does not."""
    base, gain = np.linspace(0.3, 0.7, 29), np.r_[np.full(4, 0.2), np.zeros(25)]

    def result(name: str, values: np.ndarray) -> Result:
        metrics = {"ndcg@10": values.tolist()}
        return {"contender": name, "metrics": metrics, "curve": [], "cold": {}, "seconds": {"learning": 1.0}}

    assert paired_difference(base + gain, base)[1] > 0
    results = [result("popularity", 0 * base), result("EASE", base), result("FPSLoss", base + gain)]
    assert give_verdict(results).headline == "No: EASE is as good as FPSLoss: the difference is within the interval."
