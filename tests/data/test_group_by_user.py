"""A log whose users, items or times cannot be sorted is refused by every function that sorts one."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from st_fpsloss.data import histories, leave_last_out, next_item_pairs
from tests.click_logs import refusal


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"user": [1, None, 1]}, ["user='user'", "row 1", "missing"]),
        ({"user": [1.0, 1.0, 1.0]}, ["user='user'", "double", "int64"]),
        ({"user": ["a", " ", "b"]}, ["user='user'", "row 1", "blank"]),
        ({"item": ["a", "b", "c d"]}, ["item='item'", "row 2", "'c d'", "white space"]),
        ({"item": ["", "b", "c"]}, ["item='item'", "row 0", "white space"]),
        ({"item": [[1], [2], [3]]}, ["item='item'", "ids are integers or strings"]),
        ({"time": ["9", "10", "11"]}, ["time='time'", "string", "cast_column"]),
        ({"time": [1.0, float("nan"), 2.0]}, ["time='time'", "row 1", "missing"]),
        ({"time": [1, None, 2]}, ["time='time'", "row 1", "missing"]),
        ({"time": [True, False, True]}, ["time='time'", "bool"]),
    ],
)
def test_unfit_columns_are_refused_with_the_row(change: dict[str, Any], parts: list[str]) -> None:
    log = Dataset.from_dict({"user": [1, 1, 1], "item": [1, 2, 3], "time": [1, 2, 3]} | change)
    for function in (next_item_pairs, histories):
        with pytest.raises(ValueError, match=refusal(*parts)):
            function(log, user="user", item="item", time="time", max_history=5)
    if "item" not in change:
        with pytest.raises(ValueError, match=refusal(*parts)):
            leave_last_out(log, user="user", time="time")


def test_logs_that_cannot_be_sorted_are_refused() -> None:
    log = Dataset.from_dict({"user": [1, 2, 2], "item": [1, 2, 3], "time": [1, 2, 3]})
    with pytest.raises(ValueError, match=refusal("user='usr'", "closest is 'user'")):
        leave_last_out(log, user="usr", time="time")
    with pytest.raises(ValueError, match="log is empty"):
        leave_last_out(log.select([]), user="user", time="time")
    with pytest.raises(ValueError, match="IterableDataset"):
        leave_last_out(log.to_iterable_dataset(), user="user", time="time")
