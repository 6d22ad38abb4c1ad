"""The splits follow their protocols, which are written out here row by row."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pytest
from datasets import Dataset, Value

from st_fpsloss.data import hold_out, leave_last_out, split_by_time
from tests.click_logs import USERS, random_log, refusal, rows_of_users


@pytest.mark.parametrize("users", USERS)
def test_leave_last_out_takes_the_last_two_rows_of_users_with_three(users: list[Any]) -> None:
    log = random_log(users)
    reference = rows_of_users(log)
    assert {1, 2, 3} <= {len(rows) for rows in reference.values()}
    splits = leave_last_out(log, user="user", time="time")
    kept = [rows for rows in reference.values() if len(rows) >= 3]
    train = [row for rows in reference.values() for row in (rows[:-2] if len(rows) >= 3 else rows)]
    assert list(splits["test"]) == [rows[-1] for rows in kept]
    assert list(splits["validation"]) == [rows[-2] for rows in kept]
    assert list(splits["train"]) == train


def test_leave_last_out_of_a_shuffled_log_goes_by_the_shuffled_order() -> None:
    shuffled = random_log(list(range(30))).shuffle(seed=3)
    expected = [rows[-1] for rows in rows_of_users(shuffled).values() if len(rows) >= 3]
    assert list(leave_last_out(shuffled, user="user", time="time")["test"]) == expected


def test_leave_last_out_sorts_dates_and_times_of_day() -> None:
    days = [datetime(2024, 3, day) for day in (9, 10, 2)]
    for times in (days, [day.date() for day in days], [day.timestamp() for day in days]):
        log = Dataset.from_dict({"user": [1, 1, 1], "item": [9, 10, 2], "time": times})
        assert leave_last_out(log, user="user", time="time")["test"]["item"][:] == [10]


def test_a_log_without_a_user_of_three_rows_is_refused() -> None:
    log = Dataset.from_dict({"user": [1, 2, 2], "item": [1, 2, 3], "time": [1, 2, 3]})
    with pytest.raises(ValueError, match="no user has 3 rows"):
        leave_last_out(log, user="user", time="time")


def test_split_by_time_cuts_at_the_first_time_that_is_no_longer_of_a_split() -> None:
    log = random_log([1, 2])
    splits = split_by_time(log, time="time", validation_from=10, test_from=15.5)
    assert list(splits["train"]) == [row for row in log if row["time"] < 10]
    assert list(splits["validation"]) == [row for row in log if 10 <= row["time"] < 15.5]
    assert list(splits["test"]) == [row for row in log if row["time"] >= 15.5]


@pytest.mark.parametrize("unit", ["timestamp[s]", "timestamp[us]", "date32"])
@pytest.mark.parametrize("as_point", [str, lambda day: day, lambda day: datetime(day.year, day.month, day.day)])
def test_split_by_time_takes_dates(unit: str, as_point: Any) -> None:
    days = [datetime(2024, 3, day) for day in (9, 10, 2)]
    log = Dataset.from_dict({"time": days}).cast_column("time", Value(unit))
    splits = split_by_time(
        log, "time", validation_from=as_point(date(2024, 3, 9)), test_from=as_point(date(2024, 3, 10))
    )
    assert [split["time"][0].day for split in splits.values()] == [2, 9, 10]


@pytest.mark.parametrize(
    ("points", "empty"), [((-1, 5), "train"), ((5, 5.5), None), ((5.2, 5.8), "validation"), ((5, 99), "test")]
)
def test_an_empty_split_is_refused_by_name(points: tuple[float, float], empty: str | None) -> None:
    log = random_log([1, 2])
    if empty is None:
        assert len(split_by_time(log, "time", *points)["validation"])
        return
    with pytest.raises(ValueError, match=refusal(f"The {empty} split is empty", "from 0 to 19", "Choose other points")):
        split_by_time(log, "time", *points)


@pytest.mark.parametrize(
    ("points", "parts"),
    [
        ((10, 10), ["validation_from=10", "before test_from=10"]),
        (("10", 15), ["validation_from='10'", "pass a number"]),
        ((10, float("nan")), ["test_from=nan", "pass a number"]),
    ],
)
def test_points_that_do_not_fit_are_refused(points: tuple[Any, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=refusal(*parts)):
        split_by_time(random_log([1, 2]), "time", *points)


@pytest.mark.parametrize("point", [5, "soon", datetime.fromisoformat("2024-01-01T00:00:00+01:00")])
def test_points_that_do_not_fit_dates_are_refused(point: Any) -> None:
    log = Dataset.from_dict({"time": [datetime(2024, 3, day) for day in (9, 10, 2)]})
    with pytest.raises(ValueError, match=refusal("validation_from", "ISO string")):
        split_by_time(log, "time", validation_from=point, test_from="2024-03-10")


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_hold_out_takes_the_newest_rows_and_those_of_the_same_time(fraction: float) -> None:
    log = random_log([1, 2]).shuffle(seed=2)
    parts = hold_out(log, fraction, time="time")
    first = sorted(log["time"])[-round(fraction * len(log))]
    assert list(parts["test"]) == [row for row in log if row["time"] >= first]
    assert list(parts["train"]) == [row for row in log if row["time"] < first]


def test_hold_out_at_random_is_a_partition_that_the_seed_decides() -> None:
    log = random_log([1, 2])
    parts = hold_out(log, 0.25, seed=4)
    assert len(parts["test"]) == 100
    assert sorted(parts["train"]["row"][:] + parts["test"]["row"][:]) == log["row"][:]
    assert parts["test"]["row"][:] == sorted(parts["test"]["row"]) == hold_out(log, 0.25, seed=4)["test"]["row"][:]
    assert parts["test"]["row"][:] != hold_out(log, 0.25, seed=5)["test"]["row"][:]


@pytest.mark.parametrize(
    ("fraction", "time", "message"),
    [
        (0.0, None, "fraction=0.0 has to lie between 0 and 1"),
        (1.0, None, "fraction=1.0 has to lie between 0 and 1"),
        (0.1, None, "fraction=0.1 of 3 rows: no row is held out"),
        (0.9, None, "fraction=0.9 of 3 rows: every row is held out"),
        (0.1, "same", "every row is held out. Choose another fraction or another column of times"),
        (0.1, "when", "time='when' is no column of the log"),
    ],
)
def test_hold_out_refuses_what_leaves_a_part_empty(fraction: float, time: str | None, message: str) -> None:
    log = Dataset.from_dict({"item": [1, 2, 3], "same": [7, 7, 7]})
    with pytest.raises(ValueError, match=message):
        hold_out(log, fraction, time)
