"""Click logs: :func:`load_clicks` and :func:`load_inputs` read one and check it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value

from st_fpsloss.data.columns import (
    BATCH_ROWS,
    NUMBERS,
    check_columns,
    chosen_columns,
    clean_row,
    clean_table,
    dict_array,
    empty_log,
    left_alone,
    result_features,
)
from st_fpsloss.data.files import checked_paths, column_names, read_tables

# How the names of the integer and the other number types of datasets begin.
_INTEGERS = ("int", "uint")
_ANY_NUMBERS = (*_INTEGERS, "float")
# Rows of a stream without features that are read ahead to learn which keys its dicts have.
_HEAD_ROWS = 1_000


def load_clicks(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Dataset | IterableDataset,
    query: str = "query",
    document: str = "document",
    label: str | None = None,
    negatives: Sequence[str] = (),
    streaming: bool = False,
    time: str | None = None,
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
        time: The source's column with the time of each row, to split the log by it. The trainer would take it for a
            document: remove it before.

    Returns:
        The columns ``query``, ``document``, ``negative_1`` to ``negative_n`` and, where they are given, ``label``
        (float) and ``time`` (float; dates and their ISO texts become seconds since 1970), in this order. An
        ``IterableDataset`` for a stream, with its ``features`` set; a ``Dataset`` otherwise.

    Raises:
        ValueError: If a column is missing or used twice, the log is empty, a file is missing, has an unknown suffix
            or holds something else than its name says, a text is None, empty or blank, a label is no finite number, or
            a time neither a number nor a date. Rows are counted from 0. In a stream a bad row raises when it is
            reached; with several workers on an ``IterableDataset`` each worker counts its own rows.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import load_clicks
        >>> log = Dataset.from_dict({"searched": ["red shoes", "tent"], "item": [17, 4], "clicks": [2, 1]})
        >>> load_clicks(log, query="searched", document="item", label="clicks")[0]
        {'query': 'red shoes', 'document': '17', 'label': 2.0}
    """
    columns = chosen_columns(query, document, label, negatives, time)
    if isinstance(source, IterableDataset):
        return _load_stream(source, columns)
    if isinstance(source, Dataset):
        if streaming:
            raise ValueError("streaming=True is for files. For a stream pass source.to_iterable_dataset().")
        return _load_dataset(source, columns)
    paths = checked_paths(source)
    return _stream_files(paths, columns) if streaming else _load_files(paths, columns)


def load_inputs(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Dataset, column: str, ids: str | None = None
) -> dict[Any, Any]:
    """Reads the documents of a corpus, or queries, by the rules of :func:`load_clicks`.

    Args:
        source: A CSV, TSV, Parquet or JSONL file, a list of files of one such kind, or a ``Dataset``.
        column: The source's column with the inputs, texts or dicts.
        ids: The source's column with their ids, which become strings. None numbers the rows from 0.

    Returns:
        Id -> input, in the order of the rows: what :class:`st_fpsloss.DocumentIndex` and
        :class:`st_fpsloss.RetrievalEvaluator` take.

    Raises:
        ValueError: As :func:`load_clicks`, and if an id occurs twice.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import load_inputs
        >>> load_inputs(Dataset.from_dict({"sku": [17, 4], "title": ["red shoes", "tent"]}), "title", ids="sku")
        {'17': 'red shoes', '4': 'tent'}
    """
    # Of the columns' roles, "query" and "document" alone are read as inputs.
    columns = {"document": column} if ids is None else {"query": ids, "document": column}
    read = (
        _load_dataset(source, columns) if isinstance(source, Dataset) else _load_files(checked_paths(source), columns)
    )
    inputs = read["document"][:]
    if ids is None:
        return dict(enumerate(inputs))
    by_id = dict(zip(read["query"][:], inputs, strict=True))
    if len(by_id) < len(inputs):
        repeated = next(one for one, count in Counter(read["query"]).items() if count > 1)
        raise ValueError(f"ids={ids!r}: {repeated!r} occurs more than once. Give every row an id of its own.")
    return by_id


def _load_dataset(source: Dataset, columns: Mapping[str, str]) -> Dataset:
    check_columns(source.column_names, columns, "the dataset")
    if len(source) == 0:
        raise empty_log("the dataset")
    kinds = source.features.arrow_schema
    dicts = {name: source.features[name] for name in columns.values() if left_alone(kinds.field(name).type)}
    return (
        source.select_columns(list(columns.values()))
        .with_format("arrow")
        .map(
            _clean_batch,
            with_indices=True,
            batched=True,
            batch_size=BATCH_ROWS,
            remove_columns=list(columns.values()),
            features=result_features(columns, dicts),
            fn_kwargs={"columns": columns},
            desc="Checking the click log",
        )
        .with_format(None)
    )


def _clean_batch(table: pa.Table, indices: Sequence[int], columns: Mapping[str, str]) -> pa.Table:
    return clean_table(table, columns, int(indices[0]))


def _load_stream(source: IterableDataset, columns: Mapping[str, str]) -> IterableDataset:
    source = source.with_format(None)
    head = _head(source, 1 if source.features else _HEAD_ROWS)
    if not head:
        raise empty_log("the stream")
    present = source.column_names or list(head[0])
    check_columns(present, columns, "the stream")
    if source.features:
        for name, column in columns.items():
            # Read as text, a value of another type reaches the check here; datasets refuses it without naming the row.
            if getattr(source.features[column], "dtype", "").startswith(_ANY_NUMBERS if name in NUMBERS else _INTEGERS):
                source = source.cast_column(column, Value("string"))
        kinds = source.features.arrow_schema
        dicts = {name: source.features[name] for name in columns.values() if left_alone(kinds.field(name).type)}
        types: dict[str, Any] = dict.fromkeys(dicts)
    else:
        types = _dict_types(head, columns)
        dicts = dict(Features.from_arrow_schema(pa.schema(types.items())))
    return source.map(
        clean_row,
        with_indices=True,
        remove_columns=present,
        features=result_features(columns, dicts),
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
            types[source] = dict_array(values, f"column {source!r} in the first rows of the stream").type
    return types


def _load_files(paths: Sequence[Path], columns: Mapping[str, str]) -> Dataset:
    for path in paths:
        check_columns(column_names(path), columns, path.name)
    place = _names(paths)
    tables = []
    for path in paths:
        first_row = 0
        for table in read_tables(path, columns):
            tables.append(clean_table(table, columns, first_row, f" of {path.name}"))
            first_row += len(table)
    if not sum(map(len, tables)):
        raise empty_log(place)
    try:
        return Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except pa.ArrowException as error:
        raise ValueError(
            f"source: the dicts of {place} do not fit each other: {error}. Give a key values of one type."
        ) from error


def _stream_files(paths: Sequence[Path], columns: Mapping[str, str]) -> IterableDataset:
    for path in paths:
        check_columns(column_names(path), columns, path.name)
    first = next((table for path in paths for table in read_tables(path, columns) if len(table)), None)
    if first is None:
        raise empty_log(_names(paths))
    types = {field.name: field.type for field in first.schema if left_alone(field.type)}
    dicts = dict(Features.from_arrow_schema(pa.schema(types.items())))
    return IterableDataset.from_generator(
        _clean_file_rows,
        features=result_features(columns, dicts),
        gen_kwargs={"paths": [str(path) for path in paths], "columns": columns, "types": types},
    )


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _clean_file_rows(
    paths: list[str], columns: Mapping[str, str], types: Mapping[str, pa.DataType]
) -> Iterator[dict[str, Any]]:
    for path in map(Path, paths):
        number = 0
        for table in read_tables(path, columns):
            for row in table.to_pylist():
                yield clean_row(row, number, columns, types, f" of {path.name}")
                number += 1
