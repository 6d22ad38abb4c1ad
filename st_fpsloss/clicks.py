"""Click logs: read and check one, split it by time, turn it into next-item pairs."""

from __future__ import annotations

import difflib
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_DELIMITERS, ".parquet", ".jsonl")
# How the names of the integer and the other number types of datasets begin.
_INTEGERS = ("int", "uint")
_NUMBERS = (*_INTEGERS, "float")
_BATCH_ROWS = 10_000
# Rows of a stream without features that are read ahead to learn which keys its dicts have.
_HEAD_ROWS = 1_000
# Bytes of a CSV file that are looked at before it is parsed.
_START_BYTES = 1 << 16


def load_clicks(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Dataset | IterableDataset,
    query: str = "query",
    document: str = "document",
    label: str | None = None,
    negatives: Sequence[str] = (),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Reads a click log into the columns that ``SentenceTransformerTrainer`` takes, and checks every row.

    A query or a document is a text, or a dict with ``"text"`` and features, which is left as it is. Any other
    scalar, an integer id for one, becomes a string. CSV and TSV values are always read as texts, so that an id
    such as ``007`` and a query such as ``NA`` stay what they are.

    Args:
        source: A CSV, TSV, Parquet or JSONL file, a list of files of one such kind, or a ``Dataset`` or
            ``IterableDataset``. Files are read into memory; a log that does not fit there is read with
            ``streaming=True``.
        query: The source's column with the queries.
        document: The source's column with the documents that were clicked.
        label: The source's column with the relevance of each row (a click is 1), if it has one. ``true`` and
            ``false`` count as 1 and 0.
        negatives: The source's columns with negative documents, in the order wanted.
        streaming: Read the files row by row while training, instead of all at once.

    Returns:
        The columns ``query``, ``document``, ``negative_1`` to ``negative_n`` and, where ``label`` is given,
        ``label`` (float), in this order. An ``IterableDataset`` for a stream, with its ``features`` set; a
        ``Dataset`` otherwise.

    Raises:
        ValueError: If a column is missing or used twice, the log is empty, a file is missing, has an unknown suffix
            or holds something else than its name says, a text is None, empty or blank, or a label is no finite
            number. Rows are counted from 0. In a stream a bad row raises when it is reached; with several workers
            on an ``IterableDataset`` each worker counts its own rows.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.clicks import load_clicks
        >>> log = Dataset.from_dict({"searched": ["red shoes", "tent"], "item": [17, 4], "clicks": [2, 1]})
        >>> load_clicks(log, query="searched", document="item", label="clicks")[0]
        {'query': 'red shoes', 'document': '17', 'label': 2.0}
    """
    columns = _chosen_columns(query, document, label, negatives)
    if isinstance(source, IterableDataset):
        return _load_stream(source, columns)
    if isinstance(source, Dataset):
        if streaming:
            raise ValueError("streaming=True is for files. For a stream pass source.to_iterable_dataset().")
        return _load_dataset(source, columns)
    return _load_files(_checked_paths(source), columns, streaming)


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
        >>> from st_fpsloss.clicks import leave_last_out
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 1], "item": [5, 6, 7, 8], "time": [40, 10, 30, 20]})
        >>> {name: split["item"][:] for name, split in leave_last_out(log, user="user", time="time").items()}
        {'train': [6, 8], 'validation': [7], 'test': [5]}
    """
    rows = _rows_by_user(log, user, time)
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
        >>> from st_fpsloss.clicks import split_by_time
        >>> log = Dataset.from_dict({"item": [5, 6, 7, 8], "time": [40, 10, 30, 20]})
        >>> splits = split_by_time(log, time="time", validation_from=30, test_from=40)
        >>> {name: split["item"][:] for name, split in splits.items()}
        {'train': [6, 8], 'validation': [7], 'test': [5]}
    """
    times = _times(log, time)
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
        >>> from st_fpsloss.clicks import next_item_pairs
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 2], "item": [5, 6, 7, 8], "time": [10, 20, 30, 40]})
        >>> next_item_pairs(log, user="user", item="item", time="time", max_history=50)[:]
        {'query': ['5', '5 6'], 'document': ['6', '7']}
    """
    _check_max_history(max_history)
    rows = _rows_by_user(log, user, time)
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
            batch_size=_BATCH_ROWS,
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
        >>> from st_fpsloss.clicks import histories
        >>> log = Dataset.from_dict({"user": [1, 1, 1, 2], "item": [5, 6, 7, 8], "time": [10, 20, 30, 40]})
        >>> histories(log, user="user", item="item", time="time", max_history=2)
        {1: '6 7', 2: '8'}
    """
    _check_max_history(max_history)
    rows = _rows_by_user(log, user, time)
    items = _items_in_order(log, item, rows)
    texts = _joined(items, np.maximum(rows.starts, rows.stops - max_history), rows.stops)
    return dict(zip(rows.users, texts.to_pylist(), strict=True))


# Columns, and the rules for one value.


def _chosen_columns(query: str, document: str, label: str | None, negatives: Sequence[str]) -> dict[str, str]:
    """The result's column -> the source's column, in the result's order."""
    if isinstance(negatives, str):
        raise ValueError(f"negatives={negatives!r} has to be a list of columns. Pass negatives=[{negatives!r}].")
    columns = {"query": query, "document": document}
    columns |= {f"negative_{number}": name for number, name in enumerate(negatives, start=1)}
    if label is not None:
        columns["label"] = label
    used: dict[str, str] = {}
    for name, source in columns.items():
        if source in used:
            raise ValueError(
                f"The column {source!r} is used twice, for {_argument(used[source])} and for {_argument(name)}. "
                "Give each its own column."
            )
        used[source] = name
    return columns


def _argument(name: str) -> str:
    """The argument of ``load_clicks`` behind a column of its result."""
    return "negatives" if name.startswith("negative_") else name


def _check_columns(present: Sequence[str], columns: Mapping[str, str], place: str) -> None:
    """Refuses a log that lacks one of the chosen columns or has two of one name."""
    for name, source in columns.items():
        _check_column(present, source, _argument(name), place)


def _check_column(present: Sequence[str], column: str, argument: str, place: str) -> None:
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


def _bad_value(name: str, source: str, value: Any, place: str) -> ValueError:
    wanted = "a finite number" if name == "label" else "a text that is not blank, a number or a dict"
    return ValueError(
        f"{_argument(name)}={source!r}: {place} holds {reprlib.repr(value)}, where {wanted} has to stand. "
        "Correct the row, or leave it out of the log."
    )


def _left_alone(kind: pa.DataType) -> bool:
    """Whether values of this type pass as they are: dicts, and dicts that ``datasets`` stores as JSON."""
    return pa.types.is_struct(kind) or isinstance(kind, pa.BaseExtensionType)


def _result_features(columns: Mapping[str, str], dicts: Mapping[str, Any]) -> Features:
    """Features of the result; ``dicts``: source column -> feature, for columns that hold dicts."""
    plain = {name: Value("float64" if name == "label" else "string") for name in columns}
    kept = {name: dicts[source] for name, source in columns.items() if source in dicts and name != "label"}
    return Features(plain | kept)


# Cleaning: whole tables at once, rows of a stream one by one, by the same two rules.


def _clean_table(table: pa.Table, columns: Mapping[str, str], first_row: int, file: str = "") -> pa.Table:
    """The result's columns of a table, checked; ``first_row`` is the number of its first row in the log."""
    return pa.table(
        {name: _clean_column(table.column(source), name, source, first_row, file) for name, source in columns.items()}
    )


def _clean_column(
    column: pa.ChunkedArray, name: str, source: str, first_row: int, file: str
) -> pa.ChunkedArray | pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if name == "label":
        rule: Callable[[Any], Any] = _finite_number
        fast, kind = _numbers_at_once(column), pa.float64()
    elif _left_alone(column.type):
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


def _clean_row(
    row: Mapping[str, Any], number: int, columns: Mapping[str, str], dicts: Mapping[str, Any], file: str = ""
) -> dict[str, Any]:
    """One row of a stream, checked; ``dicts``: source column -> Arrow type of its dicts, None for one not to check."""
    place = f"row {number}{file}"
    cleaned: dict[str, Any] = {}
    for name, source in columns.items():
        value: Any = row.get(source)
        if name == "label":
            cleaned[name] = _finite_number(value)
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
            f"{_argument(name)}={source!r}: the dict {reprlib.repr(value)} of {place} {problem}. Give every dict the "
            "same keys and types, read the log without streaming, or set the stream's features."
        )


# Sources.


def _empty(place: str) -> ValueError:
    return ValueError(f"source: {place} is empty, there is nothing to train on. Pass a log with at least one row.")


def _load_dataset(source: Dataset, columns: Mapping[str, str]) -> Dataset:
    _check_columns(source.column_names, columns, "the dataset")
    if len(source) == 0:
        raise _empty("the dataset")
    kinds = source.features.arrow_schema
    dicts = {name: source.features[name] for name in columns.values() if _left_alone(kinds.field(name).type)}
    return (
        source.select_columns(list(columns.values()))
        .with_format("arrow")
        .map(
            _clean_batch,
            with_indices=True,
            batched=True,
            batch_size=_BATCH_ROWS,
            remove_columns=list(columns.values()),
            features=_result_features(columns, dicts),
            fn_kwargs={"columns": columns},
            desc="Checking the click log",
        )
        .with_format(None)
    )


def _clean_batch(table: pa.Table, indices: Sequence[int], columns: Mapping[str, str]) -> pa.Table:
    return _clean_table(table, columns, int(indices[0]))


def _load_stream(source: IterableDataset, columns: Mapping[str, str]) -> IterableDataset:
    source = source.with_format(None)
    head = _head(source, 1 if source.features else _HEAD_ROWS)
    if not head:
        raise _empty("the stream")
    present = source.column_names or list(head[0])
    _check_columns(present, columns, "the stream")
    if source.features:
        for name, column in columns.items():
            # Read as text, a value of another type reaches the check here; datasets refuses it without naming the row.
            if getattr(source.features[column], "dtype", "").startswith(_NUMBERS if name == "label" else _INTEGERS):
                source = source.cast_column(column, Value("string"))
        kinds = source.features.arrow_schema
        dicts = {name: source.features[name] for name in columns.values() if _left_alone(kinds.field(name).type)}
        types: dict[str, Any] = dict.fromkeys(dicts)
    else:
        types = _dict_types(head, columns)
        dicts = dict(Features.from_arrow_schema(pa.schema(types.items())))
    return source.map(
        _clean_row,
        with_indices=True,
        remove_columns=present,
        features=_result_features(columns, dicts),
        fn_kwargs={"columns": columns, "dicts": types},
    ).select_columns(list(columns))


def _head(source: IterableDataset, rows: int) -> list[dict[str, Any]]:
    """The first rows, or those before a row that cannot be read: that one is reported when it is reached."""
    head: list[dict[str, Any]] = []
    try:
        head.extend(islice(source, rows))
    except ValueError:
        if not head:
            raise
    return head


def _dict_types(head: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, pa.DataType]:
    """Source column -> Arrow type of its dicts, for the columns that hold dicts in the first rows."""
    types = {}
    for source in columns.values():
        values = [row[source] for row in head if isinstance(row.get(source), dict)]
        if values:
            types[source] = _dict_array(values, f"column {source!r} in the first rows of the stream").type
    return types


def _dict_array(values: Sequence[Any], place: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(
            f"The dicts of {place} do not fit each other: {error}. Give a column dicts in every row, and a key values "
            "of one type."
        ) from error


def _load_files(paths: Sequence[Path], columns: Mapping[str, str], streaming: bool) -> Dataset | IterableDataset:
    for path in paths:
        _check_columns(_column_names(path), columns, path.name)
    place = ", ".join(path.name for path in paths)
    if streaming:
        return _stream_files(paths, columns, place)
    tables = []
    for path in paths:
        first_row = 0
        for table in _tables(path, columns):
            tables.append(_clean_table(table, columns, first_row, f" of {path.name}"))
            first_row += len(table)
    if not sum(map(len, tables)):
        raise _empty(place)
    try:
        return Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except pa.ArrowException as error:
        raise ValueError(
            f"source: the dicts of {place} do not fit each other: {error}. Give a key values of one type."
        ) from error


def _stream_files(paths: Sequence[Path], columns: Mapping[str, str], place: str) -> IterableDataset:
    first = next((table for path in paths for table in _tables(path, columns) if len(table)), None)
    if first is None:
        raise _empty(place)
    types = {field.name: field.type for field in first.schema if _left_alone(field.type)}
    dicts = dict(Features.from_arrow_schema(pa.schema(types.items())))
    return IterableDataset.from_generator(
        _clean_file_rows,
        features=_result_features(columns, dicts),
        gen_kwargs={"paths": [str(path) for path in paths], "columns": columns, "types": types},
    )


def _clean_file_rows(
    paths: list[str], columns: Mapping[str, str], types: Mapping[str, pa.DataType]
) -> Iterator[dict[str, Any]]:
    for path in map(Path, paths):
        number = 0
        for table in _tables(path, columns):
            for row in table.to_pylist():
                yield _clean_row(row, number, columns, types, f" of {path.name}")
                number += 1


# Files.


def _checked_paths(source: Any) -> list[Path]:
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
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(
                f"source={str(path)!r} has the unknown suffix {path.suffix!r}. Known are {', '.join(_SUFFIXES)}: "
                "write the log as one of these."
            )
        if not path.is_file():
            raise ValueError(f"source={str(path)!r} is no file. Check the path; the working directory is {Path.cwd()}.")
        if path.stat().st_size == 0:
            raise _empty(path.name)
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1:
        raise ValueError(f"source holds files of several kinds, {', '.join(kinds)}. Pass files of one kind.")
    return paths


def _not_what_it_says(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"source={str(path)!r} cannot be read as {path.suffix.lower()[1:]}: {reason}. The file is damaged or its name "
        "does not say what it holds: write it again (texts in UTF-8), or give it the right suffix."
    )


def _column_names(path: Path) -> list[str]:
    """The columns of a file; of JSONL the keys of the first row, since a row without one of the columns is an error."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(pa.parquet.read_schema(path).names)
        if path.suffix.lower() == ".jsonl":
            first = next((row for _, row in _json_rows(path)), None)
            if first is None:
                raise _empty(path.name)
            return list(first)
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
        if b"\0" in start:
            raise _not_what_it_says(path, "it holds binary data")
        if len(start) < _START_BYTES and len(start.decode("utf-8").strip().splitlines()) < 2:
            raise _empty(path.name)
        return list(_open_csv(path).schema.names)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise _not_what_it_says(path, error) from error


def _tables(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    """The chosen columns of a file, piece by piece."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl}
    try:
        yield from readers.get(path.suffix.lower(), _read_csv)(path, columns)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise _not_what_it_says(path, error) from error


def _read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns.values())):
            yield pa.Table.from_batches([batch])


def _open_csv(path: Path, columns: Sequence[str] = ()) -> pa.csv.CSVStreamingReader:
    """Opens a CSV or TSV file; the named columns, or all, as texts and without values that stand for nothing."""
    return pa.csv.open_csv(
        path,
        # A row has to fit into one block.
        read_options=pa.csv.ReadOptions(block_size=1 << 24),
        parse_options=pa.csv.ParseOptions(delimiter=_DELIMITERS[path.suffix.lower()], newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(columns), strings_can_be_null=False
        ),
    )


def _read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    with _open_csv(path, list(columns.values())) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    rows = _json_rows(path)
    while True:
        batch: list[tuple[int, dict[str, Any]]] = []
        failure = None
        try:
            batch.extend(islice(rows, _BATCH_ROWS))
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
        if len(batch) < _BATCH_ROWS:
            return


def _json_column(values: Sequence[Any], place: str) -> pa.Array:
    """Dicts and lists as they are, everything else as text: numbers of any size, and ids of mixed types, are safe."""
    plain = [value if value is None or isinstance(value, dict | list) else str(value) for value in values]
    return _dict_array(plain, place)


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


# Users, times, histories.


@dataclass(frozen=True)
class _RowsByUser:
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


def _rows_by_user(log: Dataset, user: str, time: str) -> _RowsByUser:
    times = _times(log, time)
    if pd.api.types.is_datetime64_any_dtype(times.dtype):
        times = times.astype("int64")
    codes, users = pd.factorize(_ids(log, user, "user").to_pandas(), sort=True)
    # lexsort is stable: rows of one user at one time keep the order of the log.
    order = np.lexsort((times.to_numpy(), codes))
    stops = np.cumsum(np.bincount(codes))
    return _RowsByUser(order, np.concatenate([[0], stops[:-1]]), stops, users.tolist())


def _items_in_order(log: Dataset, item: str, rows: _RowsByUser) -> pa.Array:
    """The items' ids as strings, by user and time."""
    return _ids(log, item, "item").cast(pa.string()).take(pa.array(rows.order))


def _log_column(log: Dataset, column: str, argument: str) -> pa.ChunkedArray:
    """A column without None of a log that can be sorted."""
    if not isinstance(log, Dataset):
        raise ValueError(f"log is a {type(log).__name__}; it has to be a datasets.Dataset, so that it can be sorted.")
    _check_column(log.column_names, column, argument, "the log")
    if len(log) == 0:
        raise ValueError("log is empty. Pass a log with at least one row.")
    values = log.data.column(column)
    if log._indices is not None:
        # What log.with_format("arrow")[:] does too, but row by row: minutes for ten million rows.
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


def _ids(log: Dataset, column: str, argument: str) -> pa.Array:
    values = _log_column(log, column, argument)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        if argument == "item":
            pattern, rule = (
                r"\s|^$",
                "an item's id is not empty and has no white space, which separates a history's items",
            )
        else:
            pattern, rule = r"^\s*$", "an id is not blank"
        _refuse_rows(pc.match_substring_regex(values, pattern), values, f"{argument}={column!r}", rule)
    elif not pa.types.is_integer(values.type):
        raise ValueError(
            f"{argument}={column!r} holds {values.type}; ids are integers or strings. "
            f"Cast it: log.cast_column({column!r}, Value('int64'))."
        )
    return values.combine_chunks()


def _times(log: Dataset, column: str) -> pd.Series:
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


def _check_max_history(max_history: int) -> None:
    if isinstance(max_history, bool) or not isinstance(max_history, int) or max_history < 1:
        raise ValueError(f"max_history={max_history!r} has to be a whole number of at least 1, such as 50.")


def _window_pairs(windows: pa.Table, items: pa.Array) -> pa.Table:
    stop = windows.column("stop").to_numpy()
    return pa.table(
        {"query": _joined(items, windows.column("start").to_numpy(), stop), "document": items.take(pa.array(stop))}
    )


def _joined(items: pa.Array, start: np.ndarray, stop: np.ndarray) -> pa.Array:
    """For each window the items[start:stop] with single spaces between them."""
    lengths = stop - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, lengths)
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), items.take(pa.array(positions)))
    return pc.binary_join(lists, " ")
