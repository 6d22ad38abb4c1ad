"""Writing the files of a generation, from the shards of a build or from an index that has changed, and reading them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_fpsloss.retrieval import faiss_backend, storage
from st_fpsloss.retrieval.exact import ROWS_PER_BLOCK
from st_fpsloss.retrieval.faiss_backend import FLAT, Approximate
from st_fpsloss.retrieval.snapshot import LIVE, Snapshot

INPUT = "input"
# A graph or lists are kept, and grow, until so much of them is removed documents; then they are built again.
_MOST_REMOVED = 0.2


@dataclass(frozen=True)
class Kind:
    """Which index is wanted.

    Args:
        factory: A FAISS factory string; None: chosen by the number of documents.
        recall: The recall@10 that an approximate search has to reach.
        queries: (Q, dim) vectors to measure it with; None: means of some documents.
        bias_dimension: Whether the last number of a document's vector is its bias, which a query meets with a 1.
    """

    factory: str | None
    recall: float
    queries: np.ndarray | None = None
    bias_dimension: bool = False

    def resolved(self, count: int, dimension: int) -> str:
        """The factory string for so many documents."""
        return self.factory or faiss_backend.choose_factory(count, dimension, self.recall)


def write_tables(generation: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write ``documents.arrow``, a record batch a table, which can be mapped into memory."""
    with pa.ipc.new_file(generation / storage.DOCUMENTS_FILE, schema) as writer:
        for table in tables:
            for batch in _conformed(table, schema).combine_chunks().to_batches():
                writer.write_batch(batch)


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    arrays = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def write_vectors(generation: Path, arrays: Iterable[np.ndarray], count: int, dimension: int) -> np.ndarray:
    """Write ``vectors.npy``, and return it mapped into memory."""
    path = generation / storage.VECTORS_FILE
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (count, dimension))
    filled = 0
    for array in arrays:
        vectors[filled : filled + len(array)] = array
        filled += len(array)
    vectors.flush()
    del vectors
    return np.load(path, mmap_mode="r").view(np.ndarray)


def write_approximate(
    generation: Path, vectors: np.ndarray, live: np.ndarray, kind: Kind, grown_from: Path | None = None
) -> dict[str, Any]:
    """Write ``index.faiss`` where the search is approximate.

    Args:
        generation: The folder.
        vectors: (N, dim) all rows.
        live: (N,) bool.
        kind: Which index is wanted.
        grown_from: An ``index.faiss`` that holds the first of these rows, to be added to; None: a new one.

    Returns:
        ``factory``, ``recall`` (measured) and ``effort`` for the manifest.
    """
    factory = kind.resolved(int(np.count_nonzero(live)), vectors.shape[1])
    if factory == FLAT:
        return {"factory": FLAT, "recall": 1.0, "effort": None}
    index = faiss_backend.read_index_to_add(grown_from) if grown_from else faiss_backend.train(factory, vectors)
    faiss_backend.add(index, vectors[index.ntotal :])
    queries = kind.queries if kind.queries is not None else _sampled(vectors, live, kind.bias_dimension)
    approximate, recall = faiss_backend.tuned(index, vectors, None if live.all() else live, queries, kind.recall)
    faiss_backend.write_index(index, generation / storage.FAISS_FILE)
    return {"factory": factory, "recall": round(recall, 4), "effort": approximate.effort}


def _sampled(vectors: np.ndarray, live: np.ndarray, bias_dimension: bool) -> np.ndarray:
    """Make vectors that are about as hard to search for as queries, for want of real ones: means of three documents.

    A document itself, which is its own nearest neighbour, is easier than a query: on 24,000 texts a graph found .982
    of the best for documents and .958 for queries, and .954 for such means.
    """
    rows = np.flatnonzero(live)
    chosen = np.random.default_rng(0).choice(rows, (min(faiss_backend.RECALL_QUERIES, len(rows)), 3))
    queries = vectors[chosen].mean(axis=1)
    if bias_dimension:
        queries[:, -1] = 1.0
    return queries


def write_shards_as_generation(
    generation: Path, shards: Sequence[pa.Table], vectors: Iterable[np.ndarray], dimension: int, kind: Kind
) -> dict[str, Any]:
    """Join the shards of a build.

    Args:
        generation: The folder.
        shards: Tables with ids, inputs, fingerprints and stored columns.
        vectors: Those of each.
        dimension: Their size.
        kind: Which index is wanted.

    Returns:
        What the manifest tells about them.
    """
    schema = pa.unify_schemas([shard.schema for shard in shards], promote_options="permissive")
    schema = schema.remove_metadata().append(pa.field(LIVE, pa.bool_()))
    count = sum(len(shard) for shard in shards)
    write_tables(generation, (_with_live(shard, np.ones(len(shard), dtype=bool)) for shard in shards), schema)
    stored = write_vectors(generation, vectors, count, dimension)
    described = write_approximate(generation, stored, np.ones(count, dtype=bool), kind)
    return {"count": count, "dimension": dimension, **described}


def write_snapshot_as_generation(
    generation: Path, snapshot: Snapshot, kind: Kind, info: dict[str, Any], old: Path
) -> dict[str, Any]:
    """Write an index that has changed.

    Removed documents are left out, but where a graph or lists can be kept: there their rows stay, without inputs.

    Args:
        generation: The folder.
        snapshot: What is written.
        kind: Which index is wanted.
        info: The manifest of the generation that the snapshot was loaded from.
        old: The folder of that generation.

    Returns:
        What the manifest tells about it.
    """
    count, rows, dimension = len(snapshot), len(snapshot.live), info["dimension"]
    factory = kind.resolved(count, dimension)
    keeps = (
        factory != FLAT
        and factory == info["factory"]
        and rows - count <= _MOST_REMOVED * rows
        and len(snapshot.added) <= len(snapshot.stored)
    )
    split = len(snapshot.stored)
    parts = [
        (_with_live(snapshot.stored, snapshot.live[:split]), snapshot.vectors, snapshot.live[:split]),
        (_with_live(snapshot.added, snapshot.live[split:]), snapshot.added_vectors, snapshot.live[split:]),
    ]
    arrays: Iterable[np.ndarray]
    if keeps:
        tables = [_without_removed_inputs(table) for table, _, _ in parts]
        arrays = (vectors for _, vectors, _ in parts)
        live = snapshot.live
    else:
        tables = [table.filter(pa.array(kept)) for table, _, kept in parts]
        arrays = (block for _, vectors, kept in parts for block in _kept_blocks(vectors, kept))
        live = np.ones(count, dtype=bool)
    write_tables(generation, tables, snapshot.stored.schema)
    stored = write_vectors(generation, arrays, len(live), dimension)
    described = write_approximate(generation, stored, live, kind, old / storage.FAISS_FILE if keeps else None)
    return {**info, "count": count, **described}


def _kept_blocks(vectors: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), ROWS_PER_BLOCK):
        yield vectors[start : start + ROWS_PER_BLOCK][kept[start : start + ROWS_PER_BLOCK]]


def _with_live(table: pa.Table, live: np.ndarray) -> pa.Table:
    if LIVE in table.column_names:
        table = table.drop_columns([LIVE])
    return table.append_column(LIVE, pa.array(live))


def _without_removed_inputs(table: pa.Table) -> pa.Table:
    position = table.column_names.index(INPUT)
    kept = pc.if_else(table[LIVE], table[INPUT], pa.scalar(None, table.schema.field(INPUT).type))
    return table.set_column(position, INPUT, kept)


def read_generation(generation: Path, manifest: dict[str, Any]) -> Snapshot:
    """Map the files of a generation into memory.

    Args:
        generation: The folder, whose files were verified.
        manifest: Its manifest.

    Returns:
        The documents.
    """
    with pa.memory_map(str(generation / storage.DOCUMENTS_FILE)) as file, pa.ipc.open_file(file) as reader:
        stored = reader.read_all()
    vectors = np.load(generation / storage.VECTORS_FILE, mmap_mode="r").view(np.ndarray)
    approximate = None
    if manifest["factory"] != FLAT:
        approximate = Approximate(faiss_backend.read_index(generation / storage.FAISS_FILE), manifest["effort"])
    return Snapshot(
        stored=stored,
        vectors=vectors,
        added=stored.slice(0, 0).drop_columns([LIVE]),
        added_vectors=np.empty((0, vectors.shape[1]), np.float32),
        live=np.asarray(stored[LIVE].to_numpy()),
        approximate=approximate,
    )
