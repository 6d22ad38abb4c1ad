"""The rows of a log by user and time, and the checked columns of users, items and times that they are sorted by."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from st_fpsloss.data.columns import check_column


@dataclass(frozen=True)
class GroupedByUser:
    """Rows of a log sorted by user and time.

    Attributes:
        order: Row numbers of the log (rows,).
        starts: Where each user's rows start in ``order`` (users,).
        stops: Where they end, exclusive (users,).
        users: The users' ids, ascending.
    """

    order: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    users: list[Any]


def group_by_user(log: Dataset, user: str, time: str) -> GroupedByUser:
    """Sorts the rows of a log by user, then time; ties keep their order in the log."""
    times = time_column(log, time)
    if pd.api.types.is_datetime64_any_dtype(times.dtype):
        times = times.astype("int64")
    user_of_row, users = pd.factorize(id_column(log, user, "user").to_pandas(), sort=True)
    # lexsort is stable.
    order = np.lexsort((times.to_numpy(), user_of_row))
    stops = np.cumsum(np.bincount(user_of_row))
    return GroupedByUser(order, np.concatenate([[0], stops[:-1]]), stops, users.tolist())


def id_column(log: Dataset, column: str, argument: str) -> pa.Array:
    """The ids, integers or strings, of a column of the log; ``argument`` is ``"user"`` or ``"item"``."""
    values = _log_column(log, column, argument)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        if argument == "item":
            pattern = r"\s|^$"
            rule = "an item's id is not empty and has no white space, which separates a history's items"
        else:
            pattern = r"^\s*$"
            rule = "an id is not blank"
        _refuse_rows(pc.match_substring_regex(values, pattern), values, f"{argument}={column!r}", rule)
    elif not pa.types.is_integer(values.type):
        raise ValueError(
            f"{argument}={column!r} holds {values.type}; ids are integers or strings. "
            f"Cast it: log.cast_column({column!r}, Value('int64'))."
        )
    return values.combine_chunks()


def time_column(log: Dataset, column: str) -> pd.Series:
    """The times as numbers or as datetimes."""
    values = _log_column(log, column, "time")
    kind = values.type
    is_datetime = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
    if not (is_datetime or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(
            f"time={column!r} holds {kind}, whose order need not be that of time. Cast it to a number or a timestamp: "
            f"log.cast_column({column!r}, Value('int64')) or Value('timestamp[s]')."
        )
    return values.to_pandas(date_as_object=False)


def _log_column(log: Dataset, column: str, argument: str) -> pa.ChunkedArray:
    """A column without None of a log that can be sorted."""
    if not isinstance(log, Dataset):
        raise ValueError(f"log is a {type(log).__name__}; it has to be a datasets.Dataset, so that it can be sorted.")
    check_column(log.column_names, column, argument, "the log")
    if len(log) == 0:
        raise ValueError("log is empty. Pass a log with at least one row.")
    values = log.data.column(column)
    if log._indices is not None:
        # There is no public way that is fast: for two million shuffled rows this takes under 0.2 s a column,
        # select_columns([column]).with_format("arrow")[:], which goes row by row, 4 s, flatten_indices() 15 s or more.
        values = values.take(log._indices.column(0))
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    _refuse_rows(pc.is_null(values, nan_is_null=True), values, f"{argument}={column!r}", "no value may be missing")
    return values


def _refuse_rows(is_bad: pa.ChunkedArray, values: pa.ChunkedArray, argument: str, rule: str) -> None:
    row = pc.index(is_bad, True).as_py()
    if row >= 0:
        raise ValueError(
            f"{argument}: row {row} holds {reprlib.repr(values[row].as_py())}, but {rule}. "
            "Correct the row, or leave it out of the log."
        )
