"""The columns of a click log: which of the source's becomes which of the result's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Features, Value

BATCH_ROWS = 10_000
"""Rows that are read and cleaned together."""

NUMBERS = ("label", "time")
"""The result's columns that hold numbers."""


def chosen_columns(
    query: str, document: str, label: str | None, negatives: Sequence[str], time: str | None
) -> dict[str, str]:
    """The result's column -> the source's column, in the result's order."""
    if isinstance(negatives, str):
        raise ValueError(f"negatives={negatives!r} has to be a list of columns. Pass negatives=[{negatives!r}].")
    columns = {"query": query, "document": document}
    columns |= {f"negative_{number}": name for number, name in enumerate(negatives, start=1)}
    columns |= {name: source for name, source in (("label", label), ("time", time)) if source is not None}
    used: dict[str, str] = {}
    for name, source in columns.items():
        if source in used:
            raise ValueError(
                f"The column {source!r} is used twice, for {argument_of(used[source])} and for {argument_of(name)}. "
                "Give each its own column."
            )
        used[source] = name
    return columns


def argument_of(name: str) -> str:
    """The argument of ``load_clicks`` behind a column of its result."""
    return "negatives" if name.startswith("negative_") else name


def check_columns(present: Sequence[str], columns: Mapping[str, str], place: str) -> None:
    """Refuses a log that lacks one of the chosen columns or has two of one name."""
    for name, source in columns.items():
        check_column(present, source, argument_of(name), place)


def check_column(present: Sequence[str], column: str, argument: str, place: str) -> None:
    """Refuses a column that is not there exactly once; ``argument`` is the one that names it."""
    count = list(present).count(column)
    if count > 1:
        raise ValueError(f"{argument}={column!r}: {place} has {count} columns of this name. Rename all but one.")
    if count == 0:
        names = {name.lower(): name for name in present}
        closest = difflib.get_close_matches(str(column).lower(), names, n=1, cutoff=0.0)
        hint = f"the closest is {names[closest[0]]!r}" if closest else "there are none"
        raise ValueError(
            f"{argument}={column!r} is no column of {place}. Its columns are {list(present)}; {hint}. "
            f"Pass {argument} with one of them, or rename the column."
        )


def empty_log(place: str) -> ValueError:
    """The error for a log without rows."""
    return ValueError(f"source: {place} is empty, there is nothing to train on. Pass a log with at least one row.")


def left_alone(kind: pa.DataType) -> bool:
    """Whether values of this type pass as they are: dicts, and dicts that ``datasets`` stores as JSON."""
    is_json = isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"
    return pa.types.is_struct(kind) or is_json


def result_features(columns: Mapping[str, str], dicts: Mapping[str, Any]) -> Features:
    """Features of the result; ``dicts``: source column -> feature, for columns that hold dicts."""
    plain = {name: Value("float64" if name in NUMBERS else "string") for name in columns}
    kept = {name: dicts[source] for name, source in columns.items() if source in dicts and name not in NUMBERS}
    return Features(plain | kept)


def dict_array(values: Sequence[Any], place: str) -> pa.Array:
    """The values of a column as an array; the keys of its dicts are united."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(
            f"The dicts of {place} do not fit each other: {error}. Give a column dicts in every row, and a key values "
            "of one type."
        ) from error
