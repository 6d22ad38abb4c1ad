"""Click logs in files: CSV, TSV, Parquet and JSONL, read piece by piece as texts and dicts.

Quotes in CSV and TSV: a value that begins with ``"`` is a quoted one, as in RFC 4180, if all such values of the file
are well-formed: it ends with ``"`` before a delimiter or a line's end, holds ``""`` for ``"``, and may hold delimiters
and line breaks. If one is not, quotes are plain characters in the whole of a TSV file, as in the logs of searches, and
a CSV file is refused. Refused is too what can be read both ways: a well-formed value holds a line break and a
delimiter, and every line of the file is a whole row if quotes are plain characters. Where other lines need their
quotes to be rows, such a value is read as one, with a warning.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from st_fpsloss.click_columns import BATCH_ROWS, dict_array, empty_log

logger = logging.getLogger(__name__)

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*_DELIMITERS, ".parquet", ".jsonl")
# Bytes of a CSV file that are looked at before it is parsed.
_START_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# From a value's first quote to its last, which a delimiter, a line's end or the file's end follows.
_QUOTED = {
    delimiter: re.compile(rb'"[^"]*(?:""[^"]*)*"(?=[%b\r\n]|\Z)' % delimiter.encode())
    for delimiter in _DELIMITERS.values()
}
# Up to 1,000 quoted values of one line each, to the first quote of the next value: what needs no closer look, at once.
_PLAINLY_QUOTED = {
    delimiter: re.compile(rb'(?:"[^"\r\n]*"(?=[%b\r\n])[^"]*(?<=[%b\r\n])(?=")){0,1000}' % ((delimiter.encode(),) * 2))
    for delimiter in _DELIMITERS.values()
}


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
        if not path.is_file():
            raise ValueError(f"source={str(path)!r} is no file. Check the path; the working directory is {Path.cwd()}.")
        if path.stat().st_size == 0:
            raise empty_log(path.name)
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1:
        raise ValueError(f"source holds files of several kinds, {', '.join(kinds)}. Pass files of one kind.")
    return paths


def column_names(path: Path) -> list[str]:
    """The columns of a file; of JSONL the keys of the first row, since a row without one of the columns is an error."""
    return [name for name, _ in _columns(path)]


def number_columns(path: Path) -> list[str]:
    """The columns of a file that hold numbers or booleans; of CSV and JSONL as its start says."""
    return [name for name, has_numbers in _columns(path) if has_numbers]


def holds_numbers(kind: pa.DataType) -> bool:
    """Whether values of this type are numbers or booleans."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _columns(path: Path) -> list[tuple[str, bool]]:
    """Name of each column, and whether it holds numbers."""
    try:
        if path.suffix.lower() == ".parquet":
            return _of_schema(pa.parquet.read_schema(path))
        if path.suffix.lower() == ".jsonl":
            first = next((row for _, row in _json_rows(path)), None)
            if first is None:
                raise empty_log(path.name)
            return [(name, isinstance(value, int | float)) for name, value in first.items()]
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
        if b"\0" in start:
            raise _not_what_it_says(path, "it holds binary data")
        if len(start) < _START_BYTES and len(start.decode("utf-8").strip().splitlines()) < 2:
            raise empty_log(path.name)
        _check_delimiter(path, start)
        return _of_schema(_open_csv(path).schema)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise _not_what_it_says(path, error) from error


def _of_schema(schema: pa.Schema) -> list[tuple[str, bool]]:
    return [(field.name, holds_numbers(field.type)) for field in schema]


def _check_delimiter(path: Path, start: bytes) -> None:
    """Refuses a file whose header has another delimiter than its suffix says."""
    expected = _DELIMITERS[path.suffix.lower()]
    header = start.decode("utf-8", "replace").lstrip("\ufeff").splitlines()[0]
    found = next((other for other in ";\t|" if other in header), None)
    if expected not in header and found is not None:
        raise ValueError(
            f"source={str(path)!r}: the delimiter of its header {reprlib.repr(header)} looks like {found!r}, where "
            f"{expected!r} is needed. Write the file again, as with pandas.read_csv(path, sep={found!r})"
            f".to_csv(path, sep={expected!r}, index=False)."
        )


def read_tables(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    """The chosen columns of a file, piece by piece."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl}
    try:
        yield from readers.get(path.suffix.lower(), _read_csv)(path, columns)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise _not_what_it_says(path, error) from error


def _read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns.values())):
            yield pa.Table.from_batches([batch])


def _read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    with _open_csv(path, list(columns.values())) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _open_csv(path: Path, columns: Sequence[str] = ()) -> pa.csv.CSVStreamingReader:
    """Opens a CSV or TSV file; the named columns, or all, as texts and without values that stand for nothing."""
    state = path.stat()
    is_quoted = _is_quoted(path, state.st_size, state.st_mtime_ns)
    return pa.csv.open_csv(
        path,
        # A row has to fit into one block.
        read_options=pa.csv.ReadOptions(block_size=1 << 24),
        parse_options=pa.csv.ParseOptions(
            delimiter=_DELIMITERS[path.suffix.lower()],
            quote_char='"' if is_quoted else False,
            newlines_in_values=is_quoted,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(columns), strings_can_be_null=False
        ),
    )


@lru_cache(maxsize=64)
def _is_quoted(path: Path, size: int, changed: int) -> bool:
    """Whether quotes in a CSV or TSV file are syntax, as the module's docstring says; the cache needs size and time.

    Arrow alone would join the lines between two stray quotes to one value, silently.
    """
    delimiter = _DELIMITERS[path.suffix.lower()]
    ends = (*delimiter.encode(), *b"\r\n")
    joined = None  # where the first value begins that joins what may be rows
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        first = len(_BYTE_ORDER_MARK) if text[:3] == _BYTE_ORDER_MARK else 0
        start = text.find(b'"')
        while start >= 0:
            end = start + 1
            if start == first or text[start - 1] in ends:
                if plain := _PLAINLY_QUOTED[delimiter].match(text, start):
                    start = plain.end()
                value = _QUOTED[delimiter].match(text, start)
                if value is None and delimiter == "\t":
                    return False
                if value is None:
                    raise _unclear_quotes(path, text, start, "begins with a quote and does not end with one")
                end = value.end()
                if joined is None and _joins_rows(text, start, end, delimiter):
                    joined = start
            start = text.find(b'"', end)
        if joined is not None:
            problem = "is one value with quotes, and several rows if they are plain characters"
            text.seek(0)
            if _are_rows(iter(text.readline, b""), delimiter):
                raise _unclear_quotes(path, text, joined, problem)
            logger.warning("%s It is read as one value.", _unclear_quotes(path, text, joined, problem))
    return True


def _joins_rows(text: mmap.mmap, start: int, end: int, delimiter: str) -> bool:
    """Whether a quoted value holds a delimiter and a line break, and its lines are whole rows without the quotes."""
    value = text[start:end]
    if delimiter.encode() not in value or b"\n" not in value:
        return False
    after = text.find(b"\n", end)
    lines = text[text.rfind(b"\n", 0, start) + 1 : after if after >= 0 else len(text)].splitlines()
    return _are_rows([text[: text.find(b"\n")], *lines], delimiter)


def _are_rows(lines: Iterable[bytes], delimiter: str) -> bool:
    """Whether all lines have as many values as the first, the header, if quotes are plain characters."""
    counts = (line.count(delimiter.encode()) for line in lines if line.strip(b"\r\n"))
    first = next(counts, 0)
    return all(count == first for count in counts)


def _unclear_quotes(path: Path, text: mmap.mmap, start: int, problem: str) -> ValueError:
    line = text[:start].count(b"\n") + 1
    shown = text[start : start + 40].splitlines()[0].decode("utf-8", "replace")
    return ValueError(
        f"source={str(path)!r}: what begins with {shown!r} in line {line} {problem}. If the quote is a character of "
        'the value, put the value into quotes and double it (pandas.DataFrame.to_csv does: """tv" is "tv); .jsonl is '
        "always clear."
    )


def _read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    rows = _json_rows(path)
    while True:
        batch: list[tuple[int, dict[str, Any]]] = []
        failure = None
        try:
            batch.extend(islice(rows, BATCH_ROWS))
        except ValueError as error:
            failure = error
        if batch:
            place = f"lines {batch[0][0]} to {batch[-1][0]} of {path.name}"
            yield pa.table(
                {
                    source: _json_column([row.get(source) for _, row in batch], f"column {source!r} in {place}")
                    for source in columns.values()
                }
            )
        # The rows before a broken line come first, so that a stream breaks off where the file does.
        if failure is not None:
            raise failure
        if len(batch) < BATCH_ROWS:
            return


def _json_column(values: Sequence[Any], place: str) -> pa.Array:
    """Dicts and lists as they are, everything else as text: numbers of any size, and ids of mixed types, are safe."""
    plain = [value if value is None or isinstance(value, dict | list) else str(value) for value in values]
    return dict_array(plain, place)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _not_what_it_says(path, f"line {number} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise _not_what_it_says(path, f"line {number} is no JSON object but {reprlib.repr(row)}")
            yield number, row


def _not_what_it_says(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"source={str(path)!r} cannot be read as {path.suffix.lower()[1:]}: {reason}. The file is damaged or its name "
        "does not say what it holds: write it again (texts in UTF-8), or give it the right suffix."
    )
