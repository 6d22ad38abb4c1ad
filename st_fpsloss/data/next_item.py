"""Next-item recommendation: a user's history, the items before, is the query; the item that comes next the document."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from st_fpsloss.data.group_by_user import GroupedByUser, group_by_user, id_column
from st_fpsloss.utils.checks import positive_int

# Pairs whose histories are joined together.
_BATCH_PAIRS = 10_000


def next_item_pairs(log: Dataset, user: str, item: str, time: str, max_history: int) -> Dataset:
    """Turns a log into pairs for next-item recommendation: what the user had before, and what came next.

    Args:
        log: The log, one row for each click or rating.
        user: The column of user ids (integers or strings).
        item: The column of item ids (integers, or strings without white space).
        time: The column of times (numbers, timestamps or dates); ties keep the order of the log.
        max_history: At most this many earlier items, the latest ones.

    Returns:
        One row for each row of the log that has a history, users ascending, then by time: ``query`` (the ids of the
        user's earlier items, oldest first, with single spaces between them) and ``document`` (the item's id).

    Raises:
        ValueError: If a column is missing or unfit, the log is empty, ``max_history`` is below 1, or no row has a
            history.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import next_item_pairs
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 2], "item": [5, 6, 7, 8], "time": [10, 20, 30, 40]})
        >>> next_item_pairs(log, user="user", item="item", time="time", max_history=50)[:]
        {'query': ['5', '5 6'], 'document': ['6', '7']}
    """
    positive_int("max_history", max_history)
    rows = group_by_user(log, user, time)
    items = _items_in_order(log, item, rows)
    stop = np.arange(len(rows.order))
    start = np.maximum(np.repeat(rows.starts, rows.stops - rows.starts), stop - max_history)
    has_history = start < stop
    if not has_history.any():
        raise ValueError(f"user={user!r}: no user has 2 rows, so no row has a history. Check that the column is right.")
    windows = pa.table({"start": start[has_history], "stop": stop[has_history]})
    return (
        Dataset(windows)
        .with_format("arrow")
        .map(
            partial(_window_pairs, items=items),
            batched=True,
            batch_size=_BATCH_PAIRS,
            remove_columns=["start", "stop"],
            features=Features({"query": Value("string"), "document": Value("string")}),
            desc="Joining histories",
        )
        .with_format(None)
    )


def histories(log: Dataset, user: str, item: str, time: str, max_history: int) -> dict[Any, str]:
    """Gives each user's query text at evaluation: the history over all rows of the log.

    Args:
        log: The rows that are known at evaluation; for a test that follows validation, both train and validation.
        user: The column of user ids (integers or strings).
        item: The column of item ids (integers, or strings without white space).
        time: The column of times (numbers, timestamps or dates); ties keep the order of the log.
        max_history: At most this many items, the latest ones.

    Returns:
        User id, ascending -> the item ids, oldest first, in the form that :func:`next_item_pairs` gives a query.

    Raises:
        ValueError: If a column is missing or unfit, the log is empty, or ``max_history`` is below 1.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import histories
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 2], "item": [5, 6, 7, 8], "time": [10, 20, 30, 40]})
        >>> histories(log, user="user", item="item", time="time", max_history=2)
        {1: '6 7', 2: '8'}
    """
    positive_int("max_history", max_history)
    rows = group_by_user(log, user, time)
    items = _items_in_order(log, item, rows)
    texts = _joined(items, np.maximum(rows.starts, rows.stops - max_history), rows.stops)
    return dict(zip(rows.users, texts.to_pylist(), strict=True))


def next_item_windows(log: Dataset, user: str, item: str, time: str, max_history: int) -> Dataset:
    """Cuts each user's items into windows for :class:`st_fpsloss.training.prefix_collator.PrefixCollator`.

    In a window each item but the first is the target of those before it. Windows share one item, the last of one and
    the first of the next, so that every item but a user's first is a target exactly once. They are cut from the newest
    item backwards: the one that may be short is the user's first.

    Args:
        log: The log, one row for each click or rating.
        user: The column of user ids (integers or strings).
        item: The column of item ids (integers, or strings without white space).
        time: The column of times (numbers, timestamps or dates); ties keep the order of the log.
        max_history: At most this many items before a target, the ``max_length`` of the tower's history; a window has
            one more.

    Returns:
        One row for each window, users ascending, then by time: ``user`` (the id) and ``items`` (ids as strings, oldest
        first, 2 to ``max_history`` + 1).

    Raises:
        ValueError: If a column is missing or unfit, the log is empty, ``max_history`` is below 1, or no user has two
            rows.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import next_item_windows
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 1, 2], "item": [5, 6, 7, 8, 9], "time": [10, 20, 30, 40, 50]})
        >>> next_item_windows(log, user="user", item="item", time="time", max_history=2)[:]
        {'user': [1, 1], 'items': [['5', '6'], ['6', '7', '8']]}
    """
    positive_int("max_history", max_history)
    rows = group_by_user(log, user, time)
    items = _items_in_order(log, item, rows)
    num_targets = rows.stops - rows.starts - 1
    num_windows = -(-num_targets // max_history)
    if not num_windows.any():
        raise ValueError(f"user={user!r}: no user has 2 rows, so no row has a history. Check that the column is right.")
    of_user = np.repeat(np.arange(len(num_windows)), num_windows)
    later_windows = np.concatenate([np.arange(count)[::-1] for count in num_windows])
    stop = rows.stops[of_user] - later_windows * max_history
    start = np.maximum(rows.starts[of_user], stop - max_history - 1)
    table = pa.table({"user": pa.array(rows.users).take(pa.array(of_user)), "items": _lists(items, start, stop)})
    return Dataset(table.cast(pa.schema([table.schema.field("user"), pa.field("items", pa.list_(pa.string()))])))


def _items_in_order(log: Dataset, item: str, rows: GroupedByUser) -> pa.Array:
    """The items' ids as strings, by user and time."""
    return id_column(log, item, "item").cast(pa.string()).take(pa.array(rows.order))


def _window_pairs(windows: pa.Table, items: pa.Array) -> pa.Table:
    stop = windows.column("stop").to_numpy()
    return pa.table(
        {"query": _joined(items, windows.column("start").to_numpy(), stop), "document": items.take(pa.array(stop))}
    )


def _joined(items: pa.Array, start: np.ndarray, stop: np.ndarray) -> pa.Array:
    """For each window the items[start:stop] with single spaces between them."""
    return pc.binary_join(_lists(items, start, stop), " ")


def _lists(items: pa.Array, start: np.ndarray, stop: np.ndarray) -> pa.LargeListArray:
    """For each window the items[start:stop]."""
    lengths = stop - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, lengths)
    return pa.LargeListArray.from_arrays(pa.array(offsets), items.take(pa.array(positions)))
