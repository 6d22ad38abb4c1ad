"""A pair is a user's history and the item after it, as the loops here spell it out row by row."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

from st_fpsloss.data import histories, leave_last_out, load_clicks, next_item_pairs, next_item_windows
from tests.click_logs import USERS, random_log, refusal, rows_of_users


@pytest.mark.parametrize("users", USERS)
@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_a_pair_is_the_last_items_before_and_the_item(users: list[Any], max_history: int) -> None:
    log = random_log(users[:20])
    expected = []
    for rows in rows_of_users(log).values():
        items = [str(row["item"]) for row in rows]
        for position in range(1, len(items)):
            history = items[:position][-max_history:]
            expected.append({"query": " ".join(history), "document": items[position]})
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=max_history)
    assert pairs.column_names == ["query", "document"]
    assert list(pairs) == expected
    assert list(load_clicks(pairs)) == expected


@pytest.mark.parametrize("users", USERS)
@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_windows_hold_every_target_once_and_are_full_but_for_a_users_first(users: list[Any], max_history: int) -> None:
    log = random_log(users[:20])
    expected = []
    for user, rows in sorted(rows_of_users(log).items()):
        items = [str(row["item"]) for row in rows]
        windows = []
        while len(items) > 1:
            windows.append({"user": user, "items": items[-max_history - 1 :]})
            items = items[:-max_history]
        expected += windows[::-1]
    found = next_item_windows(log, user="user", item="item", time="time", max_history=max_history)
    assert list(found) == expected
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=max_history)
    assert [item for row in found for item in row["items"][1:]] == pairs["document"][:]


@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_a_history_for_evaluation_ends_with_the_last_row(max_history: int) -> None:
    log = random_log(USERS[1][:20])
    expected = {
        user: " ".join([str(row["item"]) for row in rows][-max_history:]) for user, rows in rows_of_users(log).items()
    }
    found = histories(log, user="user", item="item", time="time", max_history=max_history)
    assert found == expected
    assert list(found) == sorted(found)


def test_histories_of_train_and_validation_are_the_queries_of_the_test_rows() -> None:
    log = random_log(list(range(30)))
    splits = leave_last_out(log, user="user", time="time")
    known = concatenate_datasets([splits["train"], splits["validation"]])
    found = histories(known, user="user", item="item", time="time", max_history=5)
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=5)
    last_pairs = iter(pairs)
    for user, rows in rows_of_users(log).items():
        own = [next(last_pairs) for _ in rows[1:]]
        if len(rows) >= 3:
            assert found[user] == own[-1]["query"]


def test_pairs_span_more_than_one_batch() -> None:
    log = random_log(list(range(5)), rows=25_000)
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=2)
    assert len(pairs) == 24_995
    last = rows_of_users(log)[4]
    assert pairs[-1] == {"query": f"{last[-3]['item']} {last[-2]['item']}", "document": str(last[-1]["item"])}


def test_a_log_without_a_history_is_refused() -> None:
    log = Dataset.from_dict({"user": [1, 2, 2], "item": [1, 2, 3], "time": [1, 2, 3]})
    with pytest.raises(ValueError, match="no row has a history"):
        next_item_pairs(log.select([0, 1]), user="user", item="item", time="time", max_history=5)
    with pytest.raises(ValueError, match="no user has 2 rows"):
        next_item_windows(log.select([0, 1]), user="user", item="item", time="time", max_history=5)


@pytest.mark.parametrize("max_history", [0, -1, 2.5, True, None])
def test_a_history_has_at_least_one_item(max_history: Any) -> None:
    log = random_log([1, 2])
    for function in (next_item_pairs, next_item_windows, histories):
        with pytest.raises(ValueError, match=refusal(f"max_history={max_history!r}", "at least 1")):
            function(log, user="user", item="item", time="time", max_history=max_history)
