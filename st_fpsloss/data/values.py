"""The values of a click log: what each column takes, whole pieces of a log at once, and what becomes of bad rows."""

from __future__ import annotations

import logging
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from st_fpsloss.data.columns import NUMBERS, argument_of, dict_array, left_alone

logger = logging.getLogger(__name__)

_SHOWN_BAD_ROWS = 3
# pandas takes words such as "now" for times, and guesses the order of day and month elsewhere.
_ISO_TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?\s?(Z|[+-]\d\d(:?\d\d)?)?)?", re.ASCII)
_EPOCH = pd.Timestamp(0, tz="UTC")


@dataclass(frozen=True)
class Piece:
    """Some rows of a log.

    Attributes:
        columns: Source column -> its values.
        numbers: The number of each row.
        unit: What is counted: "row", from 0, or "line", from 1 as an editor does.
        file: Name of the file, "" where there is none.
    """

    columns: Mapping[str, list[Any] | pa.Array | pa.ChunkedArray]
    numbers: Sequence[int]
    unit: str = "row"
    file: str = ""

    def place(self, index: int) -> str:
        """Where the row with this index stands in the log."""
        return f"{self.unit} {self.numbers[index]}" + (f" of {self.file}" if self.file else "")


class BadRows:
    """What becomes of rows that cannot be used: an error, or left out, counted and logged.

    Args:
        on_bad_row: ``"raise"`` or ``"skip"``.
    """

    def __init__(self, on_bad_row: str) -> None:
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row={on_bad_row!r} has to be 'raise' or 'skip'.")
        self.skips = on_bad_row == "skip"
        self.count = 0

    def __call__(self, problem: str) -> None:
        """Take note of one bad row."""
        if not self.skips:
            raise ValueError(f"{problem} Correct the row, leave it out of the log, or pass on_bad_row='skip'.")
        self.count += 1
        if self.count <= _SHOWN_BAD_ROWS:
            logger.warning("A row is left out: %s", problem)
        elif math.log10(self.count).is_integer():  # a stream has no end at which to report
            logger.warning("%d rows are left out so far.", self.count)

    def report(self, place: str) -> None:
        """Log how many rows were left out."""
        if self.count:
            logger.warning("%d rows of %s were left out.", self.count, place)


def clean(
    piece: Piece,
    columns: Mapping[str, str],
    bad_rows: BadRows,
    time_format: str | None = None,
    types: Mapping[str, pa.DataType | None] | None = None,
) -> dict[str, Any]:
    """Turns a piece of a log into columns of the result.

    Args:
        piece: The rows.
        columns: The result's column -> the source's column.
        bad_rows: What becomes of rows that break a rule.
        time_format: Format of the times, as ``strptime`` takes it; None for numbers and ISO texts.
        types: Source column -> Arrow type that its dicts have to fit; None for dicts that are not looked at.

    Returns:
        The result's column -> the values of the good rows.
    """
    cleaned: dict[str, Any] = {}
    problems: dict[int, str] = {}
    for name, source in columns.items():
        values = piece.columns[source]
        cleaned[name], found = _clean_column(values, name, source, piece, time_format, types or {})
        for index, problem in found.items():
            problems.setdefault(index, f"{argument_of(name)}={source!r}: {piece.place(index)} {problem}.")
    for index in sorted(problems):
        bad_rows(problems[index])
    if problems:
        good = np.ones(len(piece.numbers), dtype=bool)
        good[list(problems)] = False
        cleaned = {
            name: [value for value, is_good in zip(values, good, strict=True) if is_good]
            if isinstance(values, list)
            else values.filter(pa.array(good))
            for name, values in cleaned.items()
        }
    return cleaned


def _clean_column(
    values: Any, name: str, source: str, piece: Piece, time_format: str | None, types: Mapping[str, pa.DataType | None]
) -> tuple[Any, dict[int, str]]:
    """The values as they are in the result, and what is wrong with the bad ones, by index."""
    if not isinstance(values, list) and pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if name not in NUMBERS:
        if isinstance(values, list) and any(isinstance(value, dict) for value in values):
            if source in types:
                return _fit_dicts(values, types[source])
            span = f"{piece.unit}s {piece.numbers[0]} to {piece.numbers[-1]} of {piece.file}"
            values = dict_array(values, f"column {source!r} in {span}")
        if not isinstance(values, list) and left_alone(values.type):
            return values, dict.fromkeys(
                np.flatnonzero(values.is_null()).tolist(), "holds None, where a dict has to be"
            )
    if not isinstance(values, list):
        at_once = _numbers_at_once(values, time_format) if name in NUMBERS else _texts_at_once(values)
        if at_once is not None:
            return at_once, {}
        values = values.to_pylist()
    if name == "time":
        cleaned: Sequence[Any] = _seconds(values, time_format)
        wanted = "a number or an ISO date such as 2024-02-29 has to be; for other dates pass time_format='%d.%m.%Y'"
        if time_format is not None:
            wanted = f"a date as time_format={time_format!r} has it has to be"
    else:
        rule, wanted = (
            (_finite_number, "a finite number has to be")
            if name == "label"
            else (_text, "a text that is not blank, a number or a dict has to be")
        )
        cleaned = [rule(value) for value in values]
    bad = [index for index, value in enumerate(cleaned) if value is None]
    kind = pa.float64() if name in NUMBERS else pa.string()
    return pa.array(cleaned, kind), {index: f"holds {reprlib.repr(values[index])}, where {wanted}" for index in bad}


# One value.


def _text(value: Any) -> str | None:
    """The text of a scalar; None for what is no text: missing, not finite, blank, bytes or a container."""
    if isinstance(value, str):
        return value if value.strip() else None
    if value is None or isinstance(value, bytes | dict | list | tuple):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)


def _finite_number(value: Any) -> float | None:
    """The value as a float; None for what is no finite number."""
    words = {"true": 1.0, "false": 0.0}
    try:
        number = words.get(str(value).strip().lower())
        number = float(value) if number is None else number
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# A column at once.


def _numbers_at_once(column: Any, time_format: str | None) -> Any:
    """The column as floats if that needs no look at single values, else None."""
    if time_format is not None:
        return None
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        microseconds = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return None if column.null_count else pc.divide(microseconds.cast(pa.float64(), safe=False), 1e6)
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowException:
        return None
    return numbers if pc.all(pc.is_finite(numbers), skip_nulls=False).as_py() else None


def _texts_at_once(column: Any) -> Any:
    """The column as strings if that needs no look at single values, else None."""
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind)) or column.null_count:
        return None
    texts = column.cast(pa.string())
    shortest = pc.min(pc.binary_length(pc.utf8_trim_whitespace(texts))).as_py()
    return None if shortest == 0 else texts


def check_time_format(time_format: str | None) -> None:
    """Refuses what is no format."""
    try:
        pd.to_datetime(pd.Series(["0"]), format=time_format, errors="coerce")
    except (TypeError, ValueError) as error:
        raise ValueError(f"time_format={time_format!r}: {error}. Pass one as '%d.%m.%Y' or None.") from error


def _seconds(values: Sequence[Any], time_format: str | None) -> list[float | None]:
    """Seconds since 1970: numbers as they are, texts by the format or ISO, UTC where they have no zone."""
    if time_format is None:
        found = [_finite_number(value) for value in values]
        texts = [text if _ISO_TIME.fullmatch(text) else None for text in map(str, values)]
    else:
        found = [None] * len(values)
        texts = [text if re.search(r"\d", text) else None for text in map(str, values)]
    times = pd.to_datetime(pd.Series(texts, dtype=object), format=time_format or "ISO8601", utc=True, errors="coerce")
    seconds = ((times - _EPOCH) / pd.Timedelta(seconds=1)).tolist()
    return [
        number if number is not None else (None if math.isnan(second) else second)
        for number, second in zip(found, seconds, strict=True)
    ]


def _fit_dicts(values: Sequence[Any], kind: pa.DataType | None) -> tuple[Any, dict[int, str]]:
    """The dicts, and those that would lose something in a stream whose types are fixed already."""
    problems = {}
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            problems[index] = f"holds {reprlib.repr(value)}, where a dict has to be"
        elif kind is not None and (problem := _misfit(value, kind)):
            problems[index] = (
                f"holds the dict {reprlib.repr(value)}, which {problem}. Give every dict the same keys and types, read "
                "the log without streaming, or set the stream's features"
            )
    if kind is None:
        return list(values), problems
    return pa.array([None if index in problems else value for index, value in enumerate(values)], kind), problems


def _misfit(value: dict[str, Any], kind: pa.StructType) -> str:
    if unknown := sorted(set(value) - {field.name for field in kind}):
        return f"has keys that the stream's first rows lack: {unknown}"
    try:
        pa.array([value], kind)
    except (pa.ArrowException, OverflowError) as error:
        return f"does not fit the types of the stream's first rows: {error}"
    return ""
