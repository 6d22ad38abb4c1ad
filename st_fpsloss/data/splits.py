"""Splits of a log: by each user's last rows, at points in time, or with a part held out."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from st_fpsloss.data.group_by_user import group_by_user, time_column


def leave_last_out(log: Dataset, user: str, time: str) -> DatasetDict:
    """Splits a log by the protocol leave-last-one-out.

    The rows of each user are sorted by time, ties by their order in the log. The last row is the user's test row,
    the one before the validation row, the rest is for training. A user with fewer than 3 rows is in train alone.

    Args:
        log: The log, one row for each click or rating.
        user: The column of user ids (integers or strings).
        time: The column of times (numbers, timestamps or dates).

    Returns:
        The splits ``train``, ``validation`` and ``test`` with all columns of the log. In each the users ascend
        (integers by value, strings by code point), the rows of one user by time.

    Raises:
        ValueError: If a column is missing or unfit, the log is empty, or no user has 3 rows.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import leave_last_out
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 1], "item": [5, 6, 7, 8], "time": [40, 10, 30, 20]})
        >>> {name: split["item"][:] for name, split in leave_last_out(log, user="user", time="time").items()}
        {'train': [6, 8], 'validation': [7], 'test': [5]}
    """
    rows = group_by_user(log, user, time)
    last = rows.stops[rows.stops - rows.starts >= 3] - 1
    if not len(last):
        raise ValueError(f"user={user!r}: no user has 3 rows, so nothing can be left out. Use split_by_time.")
    is_train = np.ones(len(rows.order), dtype=bool)
    is_train[last] = is_train[last - 1] = False
    parts = {"train": rows.order[is_train], "validation": rows.order[last - 1], "test": rows.order[last]}
    return DatasetDict({name: log.select(part) for name, part in parts.items()})


def split_by_time(
    log: Dataset, time: str, validation_from: float | str | date, test_from: float | str | date
) -> DatasetDict:
    """Splits a log at two points in time, as a system in use would meet it.

    Args:
        log: The log, one row for each click or rating.
        time: The column of times (numbers, timestamps or dates).
        validation_from: The first time that is no longer for training: a number where the column holds numbers,
            otherwise a ``datetime``, a ``date`` or an ISO string.
        test_from: The first time that is for testing.

    Returns:
        ``train`` (time < ``validation_from``), ``validation`` (time < ``test_from``) and ``test`` (the rest), each
        in the order of the log.

    Raises:
        ValueError: If the column is missing or unfit, the two points do not fit it or are not in order, or a split
            would be empty.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import split_by_time
        >>> log = Dataset.from_dict({"item": [5, 6, 7, 8], "time": [40, 10, 30, 20]})
        >>> splits = split_by_time(log, time="time", validation_from=30, test_from=40)
        >>> {name: split["item"][:] for name, split in splits.items()}
        {'train': [6, 8], 'validation': [7], 'test': [5]}
    """
    times = time_column(log, time)
    validation_start = _point_in_time(validation_from, times, "validation_from")
    test_start = _point_in_time(test_from, times, "test_from")
    if not validation_start < test_start:
        raise ValueError(f"validation_from={validation_from!r} has to be before test_from={test_from!r}.")
    is_test = (times >= test_start).to_numpy()
    is_train = (times < validation_start).to_numpy()
    parts = {"train": is_train, "validation": ~is_train & ~is_test, "test": is_test}
    for name, part in parts.items():
        if not part.any():
            raise ValueError(
                f"The {name} split is empty with validation_from={validation_from!r} and test_from={test_from!r}: "
                f"the times of column {time!r} go from {times.min()} to {times.max()}. Choose other points."
            )
    return DatasetDict({name: log.select(np.flatnonzero(part)) for name, part in parts.items()})


def hold_out(log: Dataset, fraction: float, time: str | None = None, seed: int = 0) -> DatasetDict:
    """Holds out a part of a log: its newest rows, or rows at random.

    Args:
        log: The log, one row for each click or rating.
        fraction: About this part of the rows is held out, above 0 and below 1.
        time: The column of times (numbers, timestamps or dates): the newest rows are held out. Rows of one time stay
            together, so it may be a few more. None holds out rows at random.
        seed: Of the random rows.

    Returns:
        ``train`` and ``test``, each in the order of the log.

    Raises:
        ValueError: If the column is missing or unfit, ``fraction`` is out of range, or a part would be empty.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import hold_out
        >>> log = Dataset.from_dict({"item": [5, 6, 7, 8], "time": [40, 10, 30, 20]})
        >>> {name: split["item"][:] for name, split in hold_out(log, fraction=0.5, time="time").items()}
        {'train': [6, 8], 'test': [5, 7]}
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction!r} has to lie between 0 and 1, such as 0.05.")
    count = round(fraction * len(log))
    if time is not None:
        times = time_column(log, time).to_numpy()
        count = max(count, 1)
        is_test = times >= np.partition(times, -count)[-count]
    else:
        is_test = np.zeros(len(log), dtype=bool)
        is_test[np.random.default_rng(seed).permutation(len(log))[:count]] = True
    if not is_test.any() or is_test.all():
        part = "no row is" if not is_test.any() else "every row is"
        raise ValueError(
            f"fraction={fraction!r} of {len(log)} rows: {part} held out. Choose another fraction"
            f"{' or another column of times' if time is not None else ''}."
        )
    return DatasetDict(
        {name: log.select(np.flatnonzero(part)) for name, part in (("train", ~is_test), ("test", is_test))}
    )


def _point_in_time(point: Any, times: pd.Series, argument: str) -> Any:
    """The point as something that compares with the times."""
    is_datetime = pd.api.types.is_datetime64_any_dtype(times.dtype)
    is_number = isinstance(point, int | float | np.number) and not isinstance(point, bool) and not math.isnan(point)
    try:
        if is_number == is_datetime:
            raise TypeError("a number where a datetime has to be, or the other way round")
        comparable = pd.Timestamp(point) if is_datetime else point
        _ = comparable < times.iloc[0]
    except (TypeError, ValueError) as error:
        wanted = f"a datetime, date or ISO string as in {times.dtype}" if is_datetime else "a number"
        raise ValueError(f"{argument}={point!r} does not fit the column of times: pass {wanted}.") from error
    return comparable
