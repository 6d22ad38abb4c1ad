"""Times of a log, and the inputs of a corpus."""

from __future__ import annotations

import re
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value

from st_fpsloss.data import load_clicks, load_inputs
from tests.click_logs import FILES, STREAMS, load, place, refusal, write

DAY = datetime(2024, 2, 29, tzinfo=timezone.utc).timestamp()


@pytest.mark.parametrize("kind", ["dataset", *FILES, *STREAMS])
@pytest.mark.parametrize(
    ("when", "seconds"),
    [
        ([881250949, -3], [881250949.0, -3.0]),
        ([0.5, 1e9], [0.5, 1e9]),
        (["2024-02-29", "2024-02-29T01:00:00+01:00"], [DAY, DAY]),
    ],
)
def test_times_are_numbers_or_seconds(kind: str, when: list[Any], seconds: list[float], tmp_path: Path) -> None:
    rows = [{"query": "a", "document": "b", "when": one, "r": 1} for one in when]
    clicks = load(kind, rows, tmp_path, time="when", label="r")
    assert clicks.column_names == ["query", "document", "label", "time"]
    assert [row["time"] for row in clicks] == seconds
    assert clicks.features["time"] == Value("float64")


@pytest.mark.parametrize("kind", ["timestamp[ms]", "date32"])
def test_timestamps_of_a_data_set_are_seconds(kind: str) -> None:
    features = Features({"query": Value("string"), "document": Value("string"), "when": Value(kind)})
    log = Dataset.from_dict({"query": ["a"], "document": ["b"], "when": [date(2024, 2, 29)]}, features=features)
    assert load_clicks(log, time="when")[0]["time"] == DAY
    assert next(iter(load_clicks(log.to_iterable_dataset(), time="when")))["time"] == DAY


@pytest.mark.parametrize("kind", ["dataset", *FILES, *STREAMS])
def test_a_time_that_is_none_is_refused_with_its_row(kind: str, tmp_path: Path) -> None:
    rows = [{"query": "a", "document": "b", "when": one} for one in ("2024-02-29", "yesterday evening")]
    with pytest.raises(
        ValueError, match=refusal("time='when'", place(kind, 1), "'yesterday evening'", "a number or an ISO date")
    ):
        list(load(kind, rows, tmp_path, time="when"))


@pytest.mark.parametrize("kind", ["dataset", ".csv", ".jsonl", "stream", "streamed.csv"])
def test_dates_of_another_form_need_their_format(kind: str, tmp_path: Path) -> None:
    rows = [{"query": "a", "document": "b", "when": one} for one in ("29.02.2024", "01.03.2024")]
    clicks = load(kind, rows, tmp_path, time="when", time_format="%d.%m.%Y")
    assert [row["time"] for row in clicks] == [DAY, DAY + 86_400]
    with pytest.raises(ValueError, match=refusal(place(kind, 0), "'29.02.2024'", "pass time_format='%d.%m.%Y'")):
        list(load(kind, rows, tmp_path, time="when"))
    rows[1]["when"] = "13/13/2024"
    with pytest.raises(ValueError, match=refusal(place(kind, 1), "'13/13/2024'", "time_format='%d.%m.%Y'")):
        list(load(kind, rows, tmp_path, time="when", time_format="%d.%m.%Y"))


@pytest.mark.parametrize("word", ["now", "today", "Feb 3", "10:00", "3", "01/02/2024", "2024-02-30", "20240229T10"])
def test_no_time_depends_on_the_clock_or_on_a_guess(word: str) -> None:
    log = Dataset.from_dict({"query": ["a"], "document": ["b"], "when": [word]})
    if word == "3":  # a number
        assert load_clicks(log, time="when")[0]["time"] == 3.0
        return
    for time_format in (None, "%d.%m.%Y"):
        with pytest.raises(ValueError, match=refusal("time='when'", "row 0", repr(word))):
            load_clicks(log, time="when", time_format=time_format)


def test_a_format_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="time_format='%Q'"):
        load_clicks(Dataset.from_dict({"query": ["a"], "document": ["b"]}), time_format="%Q")


@pytest.mark.parametrize("kind", FILES)
def test_the_inputs_of_a_file_by_their_ids_or_by_number(kind: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / f"items{kind}",
        [{"sku": "007", "title": "NA", "price": 1}, {"sku": "7", "title": "tent", "price": 2}],
    )
    assert load_inputs(path, "title", ids="sku") == {"007": "NA", "7": "tent"}
    assert load_inputs([path, path], "title") == {0: "NA", 1: "tent", 2: "NA", 3: "tent"}
    assert load_inputs(Dataset.from_list([{"a": {"text": "x"}}]), "a") == {0: {"text": "x"}}


def test_inputs_that_are_missing_or_share_an_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", [{"sku": "a", "title": "x"}, {"sku": "a", "title": "y"}])
    with pytest.raises(ValueError, match=re.escape("ids='sku': 'a' occurs more than once")):
        load_inputs(path, "title", ids="sku")
    with pytest.raises(ValueError, match=r"document='name' is no column of items\.csv"):
        load_inputs(path, "name")
    with pytest.raises(ValueError, match=r"document='title'.* row 1 holds None"):
        load_inputs(Dataset.from_dict({"title": ["x", None]}), "title")
