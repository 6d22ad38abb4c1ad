"""Times of a log, and the inputs of a corpus."""

from __future__ import annotations

import re
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value

from st_fpsloss.data import load_clicks, load_inputs
from tests.click_logs import FILES, STREAMS, load, refusal, write

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
    with pytest.raises(ValueError, match=refusal("time='when'", "row 1", "'yesterday evening'", "a number, a date")):
        list(load(kind, rows, tmp_path, time="when"))


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
