"""Click logs in files: CSV, TSV, Parquet and JSONL, read piece by piece, each row with its line."""

from __future__ import annotations

import csv
import json
import logging
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet

from st_fpsloss.data.columns import BATCH_ROWS, empty_log
from st_fpsloss.data.values import BadRows, Piece

logger = logging.getLogger(__name__)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*_DELIMITERS, ".parquet", ".jsonl")
_LONGEST_VALUE = 1 << 24  # characters; the csv module's own limit of 131,072 is less than some documents have


def checked_paths(source: Any) -> list[Path]:
    """The files to read; all exist, are not empty and have one known suffix."""
    sources = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(sources, list | tuple) or not all(isinstance(path, str | os.PathLike) for path in sources):
        raise ValueError(
            f"source={reprlib.repr(source)} is a {type(source).__name__}. Pass a path, a list of paths, a Dataset or "
            "an IterableDataset (of a DatasetDict one split, of a pandas DataFrame Dataset.from_pandas(frame))."
        )
    if not sources:
        raise ValueError("source=[] names no file. Pass at least one path.")
    paths = [Path(path) for path in sources]
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"source={str(path)!r} has the unknown suffix {path.suffix!r}. Known are {', '.join(SUFFIXES)}: "
                "write the log as one of these."
            )
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise ValueError(f"source={str(path)!r} cannot be looked at: {error}. Check the path.") from error
        if size is None:
            raise ValueError(f"source={str(path)!r} is no file. Check the path; the working directory is {Path.cwd()}.")
        if size == 0:
            raise empty_log(path.name)
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1:
        raise ValueError(f"source holds files of several kinds, {', '.join(kinds)}. Pass files of one kind.")
    return paths


def column_names(path: Path, encoding: str = "utf-8") -> list[str]:
    """The columns of a file; of JSONL the keys of the first row, since a row without one of the columns is an error."""
    return [name for name, _ in _columns(path, encoding)]


def number_columns(path: Path, encoding: str = "utf-8") -> list[str]:
    """The columns of a file that hold numbers or booleans; of CSV and JSONL as the first row has them."""
    return [name for name, has_numbers in _columns(path, encoding) if has_numbers]


def holds_numbers(kind: pa.DataType) -> bool:
    """Whether values of this type are numbers or booleans."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _columns(path: Path, encoding: str) -> list[tuple[str, bool]]:
    """Name of each column, and whether it holds numbers."""
    try:
        if path.suffix.lower() == ".parquet":
            return [(field.name, holds_numbers(field.type)) for field in pa.parquet.read_schema(path)]
        if path.suffix.lower() == ".jsonl":
            row = next((row for _, row in _json_rows(path, encoding, BadRows("raise"))), None)
            if row is None:
                raise empty_log(path.name)
            return [(name, isinstance(value, int | float)) for name, value in row.items()]
        header, *first = islice((row for _, row in _csv_rows(path, encoding, BadRows("raise"))), 2)
        return [(name, _is_number(value)) for name, value in zip(header, first[0] if first else header, strict=True)]
    except (OSError, UnicodeError, LookupError, pa.ArrowException) as error:
        raise _unreadable(path, encoding, error) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in ("true", "false")
    return True


def read_pieces(path: Path, columns: Sequence[str], encoding: str, bad_rows: BadRows) -> Iterator[Piece]:
    """The chosen columns of a file, which are known to be there, piece by piece."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_pieces(path, columns)
        elif path.suffix.lower() == ".jsonl":
            for lines, rows in _batches(_json_rows(path, encoding, bad_rows)):
                yield Piece({name: [row.get(name) for row in rows] for name in columns}, lines, "line", path.name)
        else:
            numbered = _csv_rows(path, encoding, bad_rows)
            _, header = next(numbered)
            places = [(name, header.index(name)) for name in columns]
            for lines, rows in _batches(numbered):
                texts = {name: pa.array([row[place] for row in rows], pa.string()) for name, place in places}
                yield Piece(texts, lines, "line", path.name)
    except (OSError, UnicodeError, LookupError, pa.ArrowException) as error:
        raise _unreadable(path, encoding, error) from error


def _batches(numbered: Iterator[tuple[int, Any]]) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
    while batch := list(islice(numbered, BATCH_ROWS)):
        lines, rows = zip(*batch, strict=True)
        yield lines, rows


def _parquet_pieces(path: Path, columns: Sequence[str]) -> Iterator[Piece]:
    first = 0
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            arrays = {name: batch.column(name) for name in columns}
            yield Piece(arrays, range(first, first + len(batch)), "row", path.name)
            first += len(batch)


def _open(path: Path, encoding: str) -> TextIO:
    # A byte order mark is no part of the first value.
    return path.open(encoding="utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding, newline="")


# JSONL.


def _json_rows(path: Path, encoding: str, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line that is not blank."""
    with _open(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                bad_rows(f"source: line {number} of {path.name} is no JSON ({reason}).")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                bad_rows(f"source: line {number} of {path.name} is no JSON object but {reprlib.repr(row)}.")


# CSV and TSV.


def _csv_rows(path: Path, encoding: str, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line, from 1, and values of the header and of each row.

    A value that begins with a quote is a quoted one, as in RFC 4180, if it is well-formed. If one is not, quotes are
    plain characters in the whole of a TSV file, as in the logs of searches, and a CSV file is refused: it would join
    rows silently.
    """
    delimiter = _DELIMITERS[path.suffix.lower()]
    is_quoted = delimiter == "," or _has_quoted_values(path, encoding)
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_VALUE))
    with _open(path, encoding) as file:
        lines: list[str] = []  # of the row that is being read
        reader = _reader(_kept(file, lines), delimiter, is_quoted)
        width, last, may_be_joined = 0, 0, True
        try:
            for row in reader:
                first, last = last + 1, reader.line_num
                if not width and row:
                    _check_header(path, lines, delimiter)
                    width = len(row)
                if last > first and may_be_joined and all(line.count(delimiter) == width - 1 for line in lines):
                    may_be_joined = False  # looked at once
                    place = f"{lines[0][:40].rstrip()!r} in line {first}"
                    _check_joined_rows(path, path.stat().st_mtime_ns, encoding, place, width)
                lines.clear()
                if len(row) == width > 0:
                    yield first, row
                elif row:
                    bad_rows(f"source: line {first} of {path.name} has {len(row)} values where the header has {width}.")
        except csv.Error as error:
            raise ValueError(
                f"source={str(path)!r}: {lines[0][:40].rstrip()!r} in line {last + 1} holds a value that begins with a "
                f"quote and does not end with one ({error}). {_QUOTES_CURE}"
            ) from error
    if not width:
        raise empty_log(path.name)


_QUOTES_CURE = (
    "If a quote is a character of the value, put the value into quotes and double it (pandas.DataFrame.to_csv does: "
    '"""tv" is "tv); .jsonl is always clear.'
)


def _reader(lines: Iterable[str], delimiter: str, is_quoted: bool) -> Any:
    return csv.reader(
        lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    )


def _kept(file: TextIO, lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _has_quoted_values(path: Path, encoding: str) -> bool:
    """Whether all values of a TSV file that begin with a quote are well-formed."""
    with _open(path, encoding) as file:
        try:
            for _ in _reader(file, "\t", is_quoted=True):
                pass
        except csv.Error:
            return False
    return True


def _check_header(path: Path, lines: Sequence[str], delimiter: str) -> None:
    """Refuses binary data, and a file whose header has another delimiter than its suffix says."""
    header = lines[0].rstrip("\r\n")
    if "\0" in header:
        raise _unreadable(path, "", "it holds zero bytes: binary data, or UTF-16 (pass encoding='utf-16-le')")
    found = next((other for other in ";\t|" if other in header), None)
    if delimiter not in header and found is not None:
        raise ValueError(
            f"source={str(path)!r}: the delimiter of its header {reprlib.repr(header)} looks like {found!r}, where "
            f"{delimiter!r} is needed. Write the file again, as with pandas.read_csv(path, sep={found!r})"
            f".to_csv(path, sep={delimiter!r}, index=False)."
        )


@lru_cache(maxsize=64)
def _check_joined_rows(path: Path, changed: int, encoding: str, place: str, width: int) -> None:
    """Refuses a value of several lines where every line of the file is a whole row if quotes are plain characters.

    Where other lines need their quotes to be rows, it is one value, with a warning, once for a state of the file.
    """
    delimiter = _DELIMITERS[path.suffix.lower()]
    problem = (
        f"source={str(path)!r}: what begins with {place} is one value with quotes, and several rows if they are plain "
        f"characters. {_QUOTES_CURE}"
    )
    with _open(path, encoding) as file:
        if all(line.count(delimiter) == width - 1 for line in file if not line.isspace()):
            raise ValueError(problem)
    logger.warning("%s It is read as one value.", problem)


def _unreadable(path: Path, encoding: str, reason: object) -> ValueError:
    if isinstance(reason, UnicodeError):
        reason = f"{_undecodable(path, encoding)} Pass the encoding it was written in, such as encoding='latin-1'"
    elif isinstance(reason, LookupError):
        return ValueError(f"encoding={encoding!r} is not known ({reason}). Pass one that Python has, such as 'utf-8'.")
    return ValueError(
        f"source={str(path)!r} cannot be read as {path.suffix.lower()[1:]}: {reason}. The file is damaged or its name "
        "does not say what it holds: write it again (texts in UTF-8), or give it the right suffix."
    )


def _undecodable(path: Path, encoding: str) -> str:
    """What is wrong with the bytes of a file, and in which line."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "it begins with the byte order mark of UTF-16, encoding='utf-16'."
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return f"line {number} holds bytes that are no {encoding}."
    return f"it holds bytes that are no {encoding}."
