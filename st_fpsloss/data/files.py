"""Click logs in files: CSV, TSV, Parquet and JSONL, read piece by piece as texts and dicts."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from st_fpsloss.data.columns import BATCH_ROWS, dict_array, empty_log
from st_fpsloss.data.csv_quotes import quotes_are_syntax

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*_DELIMITERS, ".parquet", ".jsonl")
# Bytes of a CSV file that are looked at before it is parsed.
_START_BYTES = 1 << 16


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
    delimiter = _DELIMITERS[path.suffix.lower()]
    is_quoted = quotes_are_syntax(path, delimiter)
    return pa.csv.open_csv(
        path,
        # A row has to fit into one block.
        read_options=pa.csv.ReadOptions(block_size=1 << 24),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if is_quoted else False,
            newlines_in_values=is_quoted,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(columns), strings_can_be_null=False
        ),
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
