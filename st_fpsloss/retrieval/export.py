"""An index in the form that other engines take: Parquet files, a LanceDB table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from st_fpsloss.retrieval.index import DocumentIndex

if TYPE_CHECKING:
    import lancedb

ROWS_PER_BATCH = 65_536
VECTOR = "vector"


def batches(index: DocumentIndex) -> Iterator[pa.RecordBatch]:
    """Read the documents of an index, in the order of its ids.

    Args:
        index: The index, with its changes that are not saved.

    Yields:
        Record batches of ``id``, ``input`` (JSON), the stored columns, and ``vector`` (a list of float32 of fixed
        size; normalized where the similarity is a cosine, so that an inner product is the score).
    """
    snapshot = index._snapshot
    names = ["id", "input", *index.columns]
    table = pa.concat_tables([snapshot.stored.select(names), snapshot.added.select(names)])
    rows = np.flatnonzero(snapshot.live)
    for start in range(0, len(rows), ROWS_PER_BATCH):
        chunk = rows[start : start + ROWS_PER_BATCH]
        vectors = np.ascontiguousarray(snapshot.vectors_of(chunk), dtype=np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        part = table.take(pa.array(chunk)).append_column(VECTOR, column).combine_chunks()
        yield from part.to_batches()


def to_parquet(index: DocumentIndex, path: str | os.PathLike[str]) -> None:
    """Write ids, inputs, stored columns and vectors to a Parquet file, under a temporary name that is then renamed.

    Args:
        index: The index.
        path: The file; one that is there is replaced.

    Raises:
        ValueError: If the index is empty.
    """
    file = Path(path)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        _check_not_empty(index)
        writer: Any = None
        for batch in batches(index):
            writer = writer or pq.ParquetWriter(temporary, batch.schema)
            writer.write_batch(batch)
        writer.close()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def to_lancedb(
    index: DocumentIndex, uri: str | os.PathLike[str], table: str = "documents", overwrite: bool = False
) -> lancedb.table.Table:
    """Write ids, inputs, stored columns and vectors to a table of an embedded LanceDB.

    Args:
        index: The index.
        uri: The folder of the database, or another address that LanceDB knows.
        table: Name of the table.
        overwrite: Whether to replace a table of this name.

    Returns:
        The table. ``table.search(vector).distance_type("dot")`` ranks as the index does; its distance is 1 - score.

    Raises:
        ImportError: If LanceDB is not installed.
        ValueError: If the index is empty, or the table exists and not ``overwrite``.
    """
    try:
        import lancedb
    except ImportError as error:
        raise ImportError('to_lancedb needs LanceDB: pip install "st-fpsloss[lancedb]"') from error
    _check_not_empty(index)
    database = lancedb.connect(str(uri))
    parts = batches(index)
    first = next(parts)
    mode = "overwrite" if overwrite else "create"
    try:
        created = database.create_table(table, pa.Table.from_batches([first]), mode=mode)
    except ValueError as error:
        raise ValueError(
            f"table={table!r} cannot be written to {str(uri)!r}: {error}; replace it with overwrite=True."
        ) from error
    for part in parts:
        created.add(pa.Table.from_batches([part]))
    return created


def _check_not_empty(index: DocumentIndex) -> None:
    if not len(index):
        raise ValueError("index has no documents: there is nothing to export.")
