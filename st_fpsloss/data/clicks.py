"""Click logs: :func:`load_clicks` and :func:`load_inputs` read one and check it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value

from st_fpsloss.data.columns import (
    BATCH_ROWS,
    NUMBERS,
    check_columns,
    chosen_columns,
    dict_array,
    empty_log,
    left_alone,
    result_features,
)
from st_fpsloss.data.files import checked_paths, column_names, read_pieces
from st_fpsloss.data.values import BadRows, Piece, check_time_format, clean

# How the names of the integer and the other number types of datasets begin.
_INTEGERS = ("int", "uint")
_ANY_NUMBERS = (*_INTEGERS, "float")
# Rows of a stream without features that are read ahead to learn which keys its dicts have.
_HEAD_ROWS = 1_000

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Dataset | IterableDataset


def load_clicks(
    source: Source,
    query: str = "query",
    document: str = "document",
    label: str | None = None,
    negatives: Sequence[str] = (),
    streaming: bool = False,
    time: str | None = None,
    time_format: str | None = None,
    encoding: str = "utf-8",
    on_bad_row: Literal["raise", "skip"] = "raise",
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
        streaming: Read the files piece by piece while training, instead of all at once.
        time: The source's column with the time of each row, to split the log by it. The trainer would take it for a
            document: remove it before.
        time_format: Format of times that are neither numbers nor ISO texts, as ``strptime`` takes it:
            ``"%d.%m.%Y"`` for 29.02.2024.
        encoding: Encoding of CSV, TSV and JSONL files, such as ``"latin-1"`` or ``"utf-16"``.
        on_bad_row: ``"raise"``, or ``"skip"`` to leave out rows that cannot be used; the first three and the number of
            all of them are logged.

    Returns:
        The columns ``query``, ``document``, ``negative_1`` to ``negative_n`` and, where they are given, ``label``
        (float) and ``time`` (float; dates become seconds since 1970, UTC where they name no zone), in this order. An
        ``IterableDataset`` for a stream, with its ``features`` set; a ``Dataset`` otherwise.

    Raises:
        ValueError: If a column is missing or used twice, the log is empty, a file is missing, has an unknown suffix or
            holds something else than its name says, a text is None, empty or blank, a label is no finite number, or a
            time neither a number nor a date. A row of a text file is named by its line, others are counted from 0. A
            stream raises when it comes to the piece with the bad row; with several workers on an ``IterableDataset``
            each worker counts its rows by itself.

    Example:
        >>> from datasets import Dataset
        >>> from st_fpsloss.data import load_clicks
        >>> log = Dataset.from_dict({"searched": ["red shoes", "tent"], "item": [17, 4], "clicks": [2, 1]})
        >>> load_clicks(log, query="searched", document="item", label="clicks")[0]
        {'query': 'red shoes', 'document': '17', 'label': 2.0}
    """
    check_time_format(time_format)
    reader = _Reader(chosen_columns(query, document, label, negatives, time), time_format, encoding, on_bad_row)
    if isinstance(source, IterableDataset):
        return reader.read_stream(source)
    if isinstance(source, Dataset) and streaming:
        raise ValueError("streaming=True is for files. For a stream pass source.to_iterable_dataset().")
    return reader.stream_files(checked_paths(source)) if streaming else reader.read(source)


def load_inputs(
    source: Source,
    column: str,
    ids: str | None = None,
    encoding: str = "utf-8",
    on_bad_row: Literal["raise", "skip"] = "raise",
) -> dict[Any, Any]:
    """Reads the documents of a corpus, or queries, by the rules of :func:`load_clicks`.

    Args:
        source: A CSV, TSV, Parquet or JSONL file, a list of files of one such kind, or a ``Dataset``.
        column: The source's column with the inputs, texts or dicts.
        ids: The source's column with their ids, which become strings. None numbers the rows from 0.
        encoding: Encoding of CSV, TSV and JSONL files.
        on_bad_row: ``"raise"``, or ``"skip"`` to leave out rows that cannot be used, as :func:`load_clicks` does.

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
    read = _Reader(columns, None, encoding, on_bad_row).read(source)
    inputs = read["document"][:]
    if ids is None:
        return dict(enumerate(inputs))
    by_id = dict(zip(read["query"][:], inputs, strict=True))
    if len(by_id) < len(inputs):
        repeated = next(one for one, count in Counter(read["query"]).items() if count > 1)
        raise ValueError(f"ids={ids!r}: {repeated!r} occurs more than once. Give every row an id of its own.")
    return by_id


@dataclass(frozen=True)
class _Reader:
    """What is read of a log, and how.

    Attributes:
        columns: The result's column -> the source's column.
        time_format: Format of times, None for numbers and ISO texts.
        encoding: Encoding of text files.
        on_bad_row: What becomes of bad rows.
        types: In a stream, source column -> Arrow type of its dicts; None for dicts that are not looked at.
    """

    columns: Mapping[str, str]
    time_format: str | None
    encoding: str
    on_bad_row: str
    types: Mapping[str, pa.DataType | None] | None = None

    def clean(self, piece: Piece, bad_rows: BadRows) -> dict[str, Any]:
        """The result's columns of a piece."""
        return clean(piece, self.columns, bad_rows, self.time_format, self.types)

    def read(self, source: Any) -> Dataset:
        """Reads all of a data set or of files."""
        bad_rows = BadRows(self.on_bad_row)
        if isinstance(source, Dataset):
            place = "the dataset"
            read = self._read_dataset(source, bad_rows)
        else:
            paths = checked_paths(source)
            place = _names(paths)
            read = self._read_files(paths, bad_rows)
        bad_rows.report(place)
        if not len(read):
            if bad_rows.count:
                raise ValueError(f"source: {place} has no good row: all {bad_rows.count} rows are left out.")
            raise empty_log(place)
        return read

    def _read_dataset(self, source: Dataset, bad_rows: BadRows) -> Dataset:
        check_columns(source.column_names, self.columns, "the dataset")
        if len(source) == 0:
            return source
        chosen = list(self.columns.values())

        def clean_batch(table: pa.Table, indices: Sequence[int]) -> pa.Table:
            piece = Piece({name: table.column(name) for name in chosen}, indices)
            return pa.table(self.clean(piece, bad_rows))

        return (
            source.select_columns(chosen)
            .with_format("arrow")
            .map(
                clean_batch,
                with_indices=True,
                batched=True,
                batch_size=BATCH_ROWS,
                remove_columns=chosen,
                features=result_features(self.columns, self._dict_features(source.features)),
                load_from_cache_file=not bad_rows.skips,  # so that what is left out is always logged
                desc="Checking the click log",
            )
            .with_format(None)
        )

    def _dict_features(self, features: Features) -> dict[str, Any]:
        kinds = features.arrow_schema
        return {name: features[name] for name in self.columns.values() if left_alone(kinds.field(name).type)}

    def _read_files(self, paths: Sequence[Path], bad_rows: BadRows) -> Dataset:
        tables = [pa.table(self.clean(piece, bad_rows)) for piece in self._pieces(paths, bad_rows)]
        if not tables:
            return Dataset.from_dict({})
        try:
            return Dataset(pa.concat_tables(tables, promote_options="permissive"))
        except pa.ArrowException as error:
            raise ValueError(
                f"source: the dicts of {_names(paths)} do not fit each other: {error}. Give a key values of one type."
            ) from error

    def _pieces(self, paths: Sequence[Path], bad_rows: BadRows) -> Iterator[Piece]:
        for path in paths:
            check_columns(column_names(path, self.encoding), self.columns, path.name)
        for path in paths:
            yield from read_pieces(path, list(self.columns.values()), self.encoding, bad_rows)

    def stream_files(self, paths: Sequence[Path]) -> IterableDataset:
        """Reads files piece by piece, whenever the result is gone through."""
        ahead = self._pieces(paths, BadRows(self.on_bad_row))
        first = next((piece for piece in ahead if len(piece.numbers)), None)
        if first is None:
            raise empty_log(_names(paths))
        types = _dict_types(first, self.columns)
        return IterableDataset.from_generator(
            _file_rows,
            features=result_features(self.columns, dict(Features.from_arrow_schema(pa.schema(types.items())))),
            gen_kwargs={"paths": list(paths), "reader": replace(self, types=types)},
        )

    def read_stream(self, source: IterableDataset) -> IterableDataset:
        """Reads a stream, whenever the result is gone through."""
        source = source.with_format(None)
        head = _head(source, 1 if source.features else _HEAD_ROWS)
        if not head:
            raise empty_log("the stream")
        present = source.column_names or list(head[0])
        check_columns(present, self.columns, "the stream")
        types: dict[str, Any]
        if source.features:
            for name, column in self.columns.items():
                # Read as text, a value of another type is checked here; datasets refuses it without naming the row.
                kinds = _ANY_NUMBERS if name in NUMBERS else _INTEGERS
                if getattr(source.features[column], "dtype", "").startswith(kinds):
                    source = source.cast_column(column, Value("string"))
            dicts = self._dict_features(source.features)
            types = dict.fromkeys(dicts)
        else:
            types = _dict_types(_piece_of(head, self.columns), self.columns)
            dicts = dict(Features.from_arrow_schema(pa.schema(types.items())))
        reader, bad_rows = replace(self, types=types), BadRows(self.on_bad_row)

        def clean_batch(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
            missing = [None] * len(indices)
            piece = Piece({column: batch.get(column, missing) for column in self.columns.values()}, indices)
            return {name: _plain(values) for name, values in reader.clean(piece, bad_rows).items()}

        return source.map(
            clean_batch,
            with_indices=True,
            batched=True,
            batch_size=_HEAD_ROWS,
            remove_columns=present,
            features=result_features(self.columns, dicts),
        ).select_columns(list(self.columns))


def _file_rows(paths: list[Path], reader: _Reader) -> Iterator[dict[str, Any]]:
    bad_rows = BadRows(reader.on_bad_row)
    for path in paths:
        for piece in read_pieces(path, list(reader.columns.values()), reader.encoding, bad_rows):
            cleaned = {name: _plain(values) for name, values in reader.clean(piece, bad_rows).items()}
            for row in zip(*cleaned.values(), strict=True):
                yield dict(zip(cleaned, row, strict=True))
    bad_rows.report(_names(paths))


def _plain(values: Any) -> list[Any]:
    return values if isinstance(values, list) else values.to_pylist()


def _head(source: IterableDataset, rows: int) -> list[dict[str, Any]]:
    """The first rows, or those before a row that cannot be read: that one is reported when it is reached."""
    head: list[dict[str, Any]] = []
    try:
        head.extend(islice(source, rows))
    except ValueError:
        if not head:
            raise
    return head


def _piece_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Piece:
    return Piece({source: [row.get(source) for row in rows] for source in columns.values()}, range(len(rows)))


def _dict_types(piece: Piece, columns: Mapping[str, str]) -> dict[str, pa.DataType]:
    """Source column -> Arrow type of its dicts, for the columns that hold dicts in the first rows."""
    types = {}
    for source in columns.values():
        values = piece.columns[source]
        if not isinstance(values, list):
            if left_alone(values.type):
                types[source] = values.type
        elif dicts := [value for value in values if isinstance(value, dict)]:
            types[source] = dict_array(dicts, f"column {source!r} in the first rows of the stream").type
    return types


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)
