"""Documents as they are given (dicts, data sets, Parquet files, streams) as tables of one form, batch by batch."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from datasets import Dataset

from st_fpsloss.data.inputs import canonical_string

logger = logging.getLogger(__name__)

ID, INPUT, FINGERPRINT = "id", "input", "fingerprint"
RESERVED = (ID, INPUT, FINGERPRINT, "vector", "live")
Row = tuple[Any, Any, Mapping[str, Any]]


@dataclass(frozen=True)
class DocumentBatch:
    """Some documents.

    Args:
        inputs: What the model takes: strings or dicts.
        table: The same documents as the index stores them: ``id`` (strings or int64), ``input`` (JSON; null where JSON
            cannot express it), ``fingerprint`` (16 bytes; null where there is none), and the stored columns.
    """

    inputs: list[Any]
    table: pa.Table


@dataclass(frozen=True)
class Documents:
    """Documents of any kind, which can be counted where their kind allows it, and read batch by batch.

    Args:
        source: A dict of id to input, a ``datasets.Dataset``, a Parquet file or a folder of them, or an iterable of
            (id, input) or (id, input, dict of stored values).
        columns: Names of the values that are stored: columns of a data set or file, keys of dict inputs.
        id_column: Name of the column of ids.
        document_column: Name of the column of inputs.
    """

    source: Any
    columns: Sequence[str] = ()
    id_column: str = "id"
    document_column: str = "document"

    def __post_init__(self) -> None:
        if isinstance(self.columns, str) or any(name in RESERVED for name in self.columns):
            raise ValueError(f"columns={self.columns!r}: give a list of names other than {', '.join(RESERVED)}.")
        if isinstance(self.source, Mapping) or self._table is not None:
            if not self.count:
                raise ValueError(f"documents={repr(self.source)[:200]} has no documents: give a dict of id to input.")
            self._check_table()
        elif isinstance(self.source, (str, bytes)) or not isinstance(self.source, Iterable):
            raise ValueError(
                f"documents={repr(self.source)[:200]} is no dict, data set, Parquet path or stream of pairs."
            )
        if isinstance(self.source, Mapping):
            _id_array(list(self.source))

    @property
    def _table(self) -> pa.dataset.Dataset | None:
        if isinstance(self.source, Dataset):
            data = self.source.data.table
            if self.source._indices is not None:
                data = data.take(self.source._indices.column(0))
            return pa.dataset.dataset(data)
        if isinstance(self.source, (str, os.PathLike)):
            if not Path(self.source).exists():
                raise ValueError(
                    f"documents={str(self.source)!r} does not exist: give a Parquet file or a folder of them."
                )
            try:
                return pa.dataset.dataset(self.source, format="parquet")
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"documents={str(self.source)!r} cannot be read as Parquet: {error}") from error
        return None

    @property
    def count(self) -> int | None:
        """The number of documents; None for a stream."""
        if isinstance(self.source, (Mapping, Dataset)):
            return len(self.source)
        table = self._table
        return None if table is None else table.count_rows()

    def _check_table(self) -> None:
        """Find missing columns and repeated ids of a table before anything is embedded."""
        table = self._table
        if table is None:
            return
        missing = [
            name for name in (self.id_column, self.document_column, *self.columns) if name not in table.schema.names
        ]
        if missing:
            raise ValueError(
                f"documents has no column {missing[0]!r}; its columns are {table.schema.names}: name them with "
                "id_column, document_column and columns."
            )
        ids = table.to_table(columns=[self.id_column])[self.id_column]
        if pc.count_distinct(ids).as_py() < len(ids):
            counts = pc.value_counts(ids)
            repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
            raise ValueError(f"documents has the id {repeated!r} more than once: every document needs its own.")

    def batches(self, size: int) -> Iterator[DocumentBatch]:
        """Read the documents in order.

        Args:
            size: Documents in a batch; the last one may have fewer.

        Raises:
            ValueError: For ids that are neither all strings nor all integers, or that repeat.
        """
        rows = self._rows()
        seen: set[Any] = set()
        lost = 0
        kind: pa.DataType | None = None
        while chunk := list(itertools.islice(rows, size)):
            ids, inputs, values = zip(*chunk, strict=True)
            id_array = _id_array(ids)
            if kind is not None and id_array.type != kind:
                raise ValueError("documents has ids of type int, str: make all of them strings or all integers.")
            kind = id_array.type
            self._check_repeated(ids, seen)
            table = _table_of(id_array, inputs, values, self.columns)
            lost += table[INPUT].null_count
            yield DocumentBatch(list(inputs), table)
        if lost:
            logger.warning("%d documents hold values that JSON cannot express: they are kept without inputs.", lost)

    def _check_repeated(self, ids: Sequence[Any], seen: set[Any]) -> None:
        if isinstance(self.source, (Mapping, Dataset, str, os.PathLike)):
            return
        for document_id in ids:
            if document_id in seen:
                raise ValueError(f"documents has the id {document_id!r} more than once: every document needs its own.")
            seen.add(document_id)

    def _rows(self) -> Iterator[Row]:
        if isinstance(self.source, Mapping):
            for document_id, value in self.source.items():
                yield document_id, value, value if isinstance(value, Mapping) else {}
        elif (table := self._table) is not None:
            names = list(dict.fromkeys([self.id_column, self.document_column, *self.columns]))
            for fragment in table.get_fragments():  # one after the other: always the same order of rows
                for batch in fragment.to_batches(schema=table.schema, columns=names):
                    for row in batch.to_pylist():
                        yield row[self.id_column], row[self.document_column], row
        else:
            for item in self.source:
                if not isinstance(item, Sequence) or isinstance(item, str) or len(item) not in (2, 3):
                    raise ValueError(
                        f"documents has {repr(item)[:200]}, which is no pair: give (id, input) pairs, or a dict."
                    )
                value = item[1]
                yield item[0], value, item[2] if len(item) == 3 else value if isinstance(value, Mapping) else {}


def _table_of(
    ids: pa.Array, inputs: Sequence[Any], values: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> pa.Table:
    arrays = {
        ID: ids,
        INPUT: pa.array([_json_or_none(value) for value in inputs], pa.large_string()),
        FINGERPRINT: pa.array([content_fingerprint(value) for value in inputs], pa.binary(16)),
    }
    for name in columns:
        try:
            arrays[name] = pa.array([row.get(name) for row in values])
        except pa.ArrowException as error:
            raise ValueError(f"columns={list(columns)}: {name!r} has values of more than one type: {error}") from error
    return pa.table(arrays)


def _id_array(ids: Sequence[Any]) -> pa.Array:
    """Check ids, and lay them out as strings or int64."""
    if all(isinstance(document_id, str) for document_id in ids):
        return pa.array(ids, pa.large_string())
    if all(isinstance(document_id, numbers.Integral) and not isinstance(document_id, bool) for document_id in ids):
        try:
            return pa.array([int(document_id) for document_id in ids], pa.int64())
        except OverflowError as error:
            raise ValueError("documents has an integer id beyond 64 bits: use strings as ids.") from error
    types = sorted({type(document_id).__name__ for document_id in ids})
    raise ValueError(f"documents has ids of type {', '.join(types)}: make all of them strings or all integers.")


def content_fingerprint(value: Any) -> bytes | None:
    """16 bytes that are equal for inputs of equal content; None for what JSON cannot express."""
    try:
        return hashlib.blake2b(canonical_string(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    except (AttributeError, TypeError, ValueError):
        return None


def _json_or_none(value: Any) -> str | None:
    """An input as JSON; numpy numbers and arrays as plain ones."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
        text.encode()
    except (AttributeError, TypeError, ValueError):
        return None
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(type(value).__name__)
