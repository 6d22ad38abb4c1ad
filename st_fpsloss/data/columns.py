"""The columns of a click log: which of the source's becomes which of the result's, and what a value in it has to be."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Value

# Rows that are read and cleaned together.
BATCH_ROWS = 10_000


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
    return pa.types.is_struct(kind) or isinstance(kind, pa.BaseExtensionType)


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


# The rules for one value.


def _text(value: Any) -> str | None:
    """The text of a scalar; None for what is no text: missing, blank, or a container."""
    if value is None or isinstance(value, bytes | dict | list | tuple) or value != value:
        return None
    text = str(value)
    return text if text.strip() else None


def _finite_number(value: Any) -> float | None:
    """The value as a float; None for what is no finite number."""
    words = {"true": 1.0, "false": 0.0}
    try:
        number = words.get(str(value).strip().lower())
        number = float(value) if number is None else number
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _seconds(value: Any) -> float | None:
    """A number as it is, a date or its ISO text as seconds since 1970 (UTC where it has no zone); None for others."""
    number = _finite_number(value)
    if number is not None:
        return number
    try:
        moment = pd.Timestamp(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if moment is pd.NaT else moment.timestamp()


NUMBERS: Mapping[str, Callable[[Any], float | None]] = {"label": _finite_number, "time": _seconds}
"""The result's columns that hold numbers, and the rule of each."""


def _bad_value(name: str, source: str, value: Any, place: str) -> ValueError:
    wanted = {"label": "a finite number", "time": "a number, a date or its ISO text"}.get(
        name, "a text that is not blank, a number or a dict"
    )
    return ValueError(
        f"{argument_of(name)}={source!r}: {place} holds {reprlib.repr(value)}, where {wanted} has to stand. "
        "Correct the row, or leave it out of the log."
    )


# Cleaning: whole tables at once, rows of a stream one by one, by the same rules.


def clean_table(table: pa.Table, columns: Mapping[str, str], first_row: int, file: str = "") -> pa.Table:
    """The result's columns of a table, checked; ``first_row`` is the number of its first row in the log."""
    return pa.table(
        {name: _clean_column(table.column(source), name, source, first_row, file) for name, source in columns.items()}
    )


def _clean_column(
    column: pa.ChunkedArray, name: str, source: str, first_row: int, file: str
) -> pa.ChunkedArray | pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if name in NUMBERS:
        rule: Callable[[Any], Any] = NUMBERS[name]
        fast, kind = _numbers_at_once(column), pa.float64()
    elif left_alone(column.type):
        if column.null_count == 0:
            return column
        rule, fast, kind = (lambda value: value), None, column.type
    else:
        rule = _text
        fast, kind = _texts_at_once(column), pa.string()
    if fast is not None:
        return fast
    cleaned = []
    for row, value in enumerate(column.to_pylist(), start=first_row):
        cleaned.append(rule(value))
        if cleaned[-1] is None:
            raise _bad_value(name, source, value, f"row {row}{file}")
    return pa.array(cleaned, kind)


def _numbers_at_once(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The column as floats if that needs no look at single values, else None."""
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowException:
        return None
    is_finite = pc.all(pc.is_finite(numbers), skip_nulls=False)
    return numbers if is_finite.as_py() else None


def _texts_at_once(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The column as strings if that needs no look at single values, else None."""
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind)) or column.null_count:
        return None
    texts = column.cast(pa.string())
    shortest = pc.min(pc.binary_length(pc.utf8_trim_whitespace(texts))).as_py()
    return None if shortest == 0 else texts


def clean_row(
    row: Mapping[str, Any], number: int, columns: Mapping[str, str], dicts: Mapping[str, Any], file: str = ""
) -> dict[str, Any]:
    """One row of a stream, checked; ``dicts``: source column -> Arrow type of its dicts, None for one not to check."""
    place = f"row {number}{file}"
    cleaned: dict[str, Any] = {}
    for name, source in columns.items():
        value: Any = row.get(source)
        if name in NUMBERS:
            cleaned[name] = NUMBERS[name](value)
        elif source in dicts:
            cleaned[name] = value
            if isinstance(value, dict) and dicts[source] is not None:
                _check_dict(value, dicts[source], name, source, place)
        else:
            cleaned[name] = _text(value)
        if cleaned[name] is None:
            raise _bad_value(name, source, value, place)
    return cleaned


def _check_dict(value: dict[str, Any], kind: pa.StructType, name: str, source: str, place: str) -> None:
    """Refuses a dict that would lose something in a stream whose types are fixed already."""
    unknown = sorted(set(value) - {field.name for field in kind})
    problem = f"has keys that the stream's first rows lack: {unknown}" if unknown else ""
    try:
        pa.array([value], kind)
    except (pa.ArrowException, OverflowError) as error:
        problem = f"does not fit the types of the stream's first rows: {error}"
    if problem:
        raise ValueError(
            f"{argument_of(name)}={source!r}: the dict {reprlib.repr(value)} of {place} {problem}. Give every dict the "
            "same keys and types, read the log without streaming, or set the stream's features."
        )
