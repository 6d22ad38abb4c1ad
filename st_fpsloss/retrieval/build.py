"""Building an index: embedding in shards, which a later build takes over, and publishing them as a generation."""

from __future__ import annotations

import numbers
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_fpsloss.retrieval import storage
from st_fpsloss.retrieval.encode import checked_similarity, embed, normalized
from st_fpsloss.retrieval.faiss_backend import check_factory, import_faiss
from st_fpsloss.retrieval.generation import Kind, write_shards_as_generation
from st_fpsloss.retrieval.model_fingerprint import document_fingerprint
from st_fpsloss.retrieval.shards import (
    VECTOR,
    read_shard,
    remove_if_nothing_is_finished,
    shard_vectors,
    write_shards,
)
from st_fpsloss.retrieval.sources import Documents
from st_fpsloss.towers.modules.document_bias import BiasDimension

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Plan:
    """What is built; the arguments are those of :meth:`st_fpsloss.DocumentIndex.build`."""

    documents: Documents
    factory: str | None
    recall: float
    queries: Sequence[Any] | None
    shard_size: int
    batch_size: int = 32
    device: str | list[str] | None = None
    show_progress_bar: bool | None = None

    def check(self, model: SentenceTransformer) -> None:
        """Refuse what cannot be built, before anything is embedded.

        Raises:
            ImportError: If FAISS is not installed.
            ValueError: Naming the argument.
        """
        import_faiss()
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall={self.recall!r} has to be above 0 and at most 1.")
        if not isinstance(self.shard_size, numbers.Integral) or self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size!r} has to be an integer of 1 or more.")
        checked_similarity(model)
        if self.factory is not None:
            check_factory(self.factory, model.get_embedding_dimension(), self.documents.count)


def build_generation(model: SentenceTransformer, plan: Plan, folder: Path) -> None:
    """Embed the documents and publish them as the generation of a folder.

    Args:
        model: The model.
        plan: What is built.
        folder: The folder, which may hold an index or finished shards.
    """
    plan.check(model)
    building = folder / storage.BUILDING
    try:
        with storage.writing(folder):
            try:
                files = write_shards(
                    model,
                    plan.documents,
                    building,
                    plan.shard_size,
                    plan.batch_size,
                    plan.device,
                    plan.show_progress_bar,
                )
                publish_shards(model, plan, files, folder)
            finally:
                remove_if_nothing_is_finished(building)
    finally:
        storage.remove_if_empty(folder)


def publish_shards(model: SentenceTransformer, plan: Plan, files: Sequence[Path], folder: Path) -> None:
    """Join finished shards into a generation, and remove them.

    Args:
        model: The model that embedded them.
        plan: What is built.
        files: The shards, in order.
        folder: The folder, which this process is writing.
    """
    similarity = checked_similarity(model)
    queries = None
    if plan.queries is not None:
        queries = embed(model.encode_query, plan.queries, plan.batch_size)
        queries = normalized(queries) if similarity == "cosine" else queries
    bias_dimension = any(isinstance(module, BiasDimension) for module in model.modules())
    tables = [read_shard(path) for path in files]
    info = {
        "similarity": similarity,
        "metric": "inner_product",
        "model": document_fingerprint(model),
        "wanted_factory": plan.factory,
        "wanted_recall": plan.recall,
        "bias_dimension": bias_dimension,
    }
    with storage.new_generation(folder, info) as generation:
        described = write_shards_as_generation(
            generation,
            [table.drop_columns([VECTOR]) for table in tables],
            (shard_vectors(table) for table in tables),
            shard_vectors(tables[0]).shape[1],
            Kind(plan.factory, plan.recall, queries, bias_dimension),
        )
        info.update(described)
    shutil.rmtree(folder / storage.BUILDING)
