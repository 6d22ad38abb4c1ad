"""What has to be embedded when documents change: those that are new, and those whose content is another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.autonotebook import tqdm

from st_fpsloss.retrieval.shards import document_encoder
from st_fpsloss.retrieval.snapshot import ID, Snapshot
from st_fpsloss.retrieval.sources import FINGERPRINT, DocumentBatch, Documents

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

BATCH = 8192


@dataclass(frozen=True)
class EmbeddedChanges:
    """Documents that are new or differ from the stored ones.

    Args:
        table: Their rows.
        vectors: (rows, dim) float32.
        replaced: The ids among them that the index has.
        embedded: How many of the vectors were computed; the others are the stored ones.
        seen: The ids of all documents that were given.
    """

    table: pa.Table
    vectors: np.ndarray
    replaced: list[Any]
    embedded: int
    seen: set[Any]


def embed_changes(
    snapshot: Snapshot,
    row_of: Mapping[Any, int],
    model: SentenceTransformer,
    documents: Any,
    columns: Sequence[str],
    batch_size: int,
    show_progress_bar: bool | None,
    id_column: str,
    document_column: str,
) -> EmbeddedChanges:
    """Compare documents with those of an index, and embed what differs.

    Args:
        snapshot: The index as it is now.
        row_of: Id -> row of the snapshot.
        model: The model that the index was built with.
        documents: Documents as :meth:`DocumentIndex.build` takes them.
        columns: The stored columns of the index.
        batch_size: Documents in one forward pass.
        show_progress_bar: Whether to show a progress bar; None: if the logger is at INFO or below.
        id_column: Column of the ids, where documents have columns.
        document_column: Column of the documents.

    Raises:
        ValueError: If the documents are unusable, or their ids or columns are of another type than the index's.
    """
    source = Documents(documents, columns, id_column, document_column)
    if show_progress_bar is None:
        show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    schema = snapshot.added.schema
    tables, arrays = [schema.empty_table()], [snapshot.added_vectors[:0]]
    replaced: list[Any] = []
    seen: set[Any] = set()
    embedded = 0
    with (
        document_encoder(model, batch_size) as encode,
        tqdm(total=source.count, unit="docs", desc="Documents", disable=not show_progress_bar) as progress,
    ):
        for batch in source.batches(BATCH):
            table = _cast(batch.table, schema)
            ids = table[ID].to_pylist()
            seen.update(ids)
            rows = np.array([row_of.get(document_id, -1) for document_id in ids])
            other_content, other_columns = _differences(batch, table, snapshot, rows)
            if other_content.any():
                numbers = np.flatnonzero(other_content)
                tables.append(table.take(pa.array(numbers)))
                arrays.append(encode([batch.inputs[number] for number in numbers]))
                embedded += len(numbers)
            if other_columns.any():
                tables.append(table.filter(pa.array(other_columns)))
                arrays.append(snapshot.vectors_of(rows[other_columns]))
            replaced += [ids[number] for number in np.flatnonzero((other_content | other_columns) & (rows >= 0))]
            progress.update(len(ids))
    return EmbeddedChanges(pa.concat_tables(tables), np.concatenate(arrays), replaced, embedded, seen)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    given, known = (one.field(ID).type for one in (table.schema, schema))
    if pa.types.is_integer(given) != pa.types.is_integer(known):  # which the cast would turn into each other
        raise ValueError(f"documents has ids of type {given}, and those of the index are of type {known}.")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"documents has ids or columns of another type than those of the index: {error}") from error


def _differences(
    batch: DocumentBatch, table: pa.Table, snapshot: Snapshot, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents have to be embedded, and which have other stored columns alone."""
    names = [name for name in table.column_names if name not in (ID, "input")]
    given = table.select(names).to_pylist()
    content, columns = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    for number, (row, values) in enumerate(zip(rows.tolist(), given, strict=True)):
        known = snapshot.row(row, names) if row >= 0 else {FINGERPRINT: None}
        content[number] = known[FINGERPRINT] is None or known[FINGERPRINT] != values[FINGERPRINT]
        columns[number] = not content[number] and known != values
    return content, columns
