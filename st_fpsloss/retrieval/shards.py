"""Embedding a corpus in shards: a build that was stopped goes on where it was, and computes no finished shard twice.

A shard is one Arrow file with some documents and their vectors. It is named by its number, and carries a hash of its
documents: a shard is taken over from an earlier run if its documents are still the same.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from tqdm.autonotebook import tqdm

from st_fpsloss.retrieval.encode import checked_similarity, embed, normalized
from st_fpsloss.retrieval.model_fingerprint import document_fingerprint
from st_fpsloss.retrieval.sources import INPUT, DocumentBatch, Documents
from st_fpsloss.utils.files import write_whole

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

VECTOR = "vector"
_PLAN = "plan.json"


def write_shards(
    model: SentenceTransformer,
    documents: Documents,
    folder: Path,
    shard_size: int,
    batch_size: int = 32,
    device: str | list[str] | None = None,
    show_progress_bar: bool | None = None,
) -> list[Path]:
    """Embed documents into shards; those that an earlier run with this model finished are taken over.

    Args:
        model: The model whose document tower embeds.
        documents: The documents.
        folder: Where the shards are written; it is emptied first if they are of another model.
        shard_size: Documents in a shard.
        batch_size: Documents in one forward pass.
        device: A device, or several for sentence-transformers' multi-process encoding; None: the model's.
        show_progress_bar: Whether to show a progress bar of documents; None: if the logger is at INFO or below.

    Returns:
        The files, in the order of the documents.
    """
    if show_progress_bar is None:
        show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    prepare_folder(model, folder)
    shards, reused = [], 0
    with (
        document_encoder(model, batch_size, device) as encode,
        tqdm(total=documents.count, unit="docs", desc="Documents", disable=not show_progress_bar) as progress,
    ):
        for number, batch in enumerate(documents.batches(shard_size)):
            path = shard_path(folder, number)
            key = shard_key(batch)
            if is_finished(path, key):
                reused += 1
            else:
                write_shard(path, batch, encode(batch.inputs), key)
            shards.append(path)
            progress.update(len(batch.inputs))
    if not shards:
        raise ValueError("documents has no documents: give a dict of document id to input.")
    if reused:
        logger.info("%d of %d shards were finished before.", reused, len(shards))
    return shards


def prepare_folder(model: SentenceTransformer, folder: Path) -> None:
    """Make the folder of shards; those of another model are removed."""
    plan = {"model": document_fingerprint(model), "similarity": checked_similarity(model)}
    try:
        known = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != plan:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(folder / _PLAN, json.dumps(plan))


def remove_if_nothing_is_finished(folder: Path) -> None:
    """Remove the folder of shards if it has none."""
    if not any(folder.glob("shard-*.arrow")):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def document_encoder(
    model: SentenceTransformer, batch_size: int, device: str | list[str] | None = None
) -> Iterator[Callable[[list[Any]], np.ndarray]]:
    """Give a function from inputs to vectors as the index stores them: normalized for a cosine."""
    cosine = checked_similarity(model) == "cosine"
    pool = model.start_multi_process_pool(device) if isinstance(device, list) else None
    settings = {"device": device} if pool is None else {"pool": pool}

    def encode(inputs: list[Any]) -> np.ndarray:
        vectors = embed(model.encode_document, inputs, batch_size, **settings)
        return normalized(vectors) if cosine else vectors

    try:
        yield encode
    finally:
        if pool is not None:
            model.stop_multi_process_pool(pool)


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:06d}.arrow"


def shard_key(batch: DocumentBatch) -> str:
    """A hash of a shard's documents, other each time where one of them has no JSON to hash."""
    digest = xxhash.xxh3_128()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.table.schema) as writer:
        writer.write_table(batch.table)
    digest.update(sink.getvalue())
    if batch.table[INPUT].null_count:
        digest.update(uuid.uuid4().bytes)
    return digest.hexdigest()


def is_finished(path: Path, key: str) -> bool:
    """Whether a file is the whole shard of these documents."""
    try:
        return read_shard(path).schema.metadata[b"key"].decode() == key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_shard(path: Path, batch: DocumentBatch, vectors: np.ndarray, key: str) -> None:
    """Write a shard under a temporary name, then rename it."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])
    checksum = xxhash.xxh3_128(np.ascontiguousarray(vectors).data).hexdigest()
    table = batch.table.append_column(VECTOR, column).replace_schema_metadata({"key": key, "vectors": checksum})
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with pa.ipc.new_file(temporary, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_shard(path: Path) -> pa.Table:
    """Read a shard, mapped into memory.

    Raises:
        ValueError: If its vectors are not as they were written.
    """
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        table = reader.read_all()
    if xxhash.xxh3_128(shard_vectors(table).data).hexdigest() != table.schema.metadata[b"vectors"].decode():
        raise ValueError(f"{path} is not as it was written: remove it, and call DocumentIndex.build again.")
    return table


def shard_vectors(table: pa.Table) -> np.ndarray:
    """The vectors of a shard, (N, dim) float32."""
    column = table[VECTOR].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    return np.ascontiguousarray(column.flatten().to_numpy()).reshape(len(table), column.type.list_size)
