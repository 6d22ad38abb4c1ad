"""Search by nearest neighbours: a corpus embedded once, kept in a folder, searched with FAISS, changed in use."""

from __future__ import annotations

import json
import logging
import numbers
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from st_fpsloss.retrieval import storage
from st_fpsloss.retrieval.encode import embed_in_chunks, normalized
from st_fpsloss.retrieval.faiss_backend import import_faiss
from st_fpsloss.retrieval.filters import Filter, allowed_rows, check_ids, excluded_rows
from st_fpsloss.retrieval.generation import (
    Kind,
    read_generation,
    write_snapshot_as_generation,
)
from st_fpsloss.retrieval.snapshot import ID

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from st_fpsloss.retrieval.updates import EmbeddedChanges

logger = logging.getLogger(__name__)

SHARD_SIZE = 8192
_INPUT, _FINGERPRINT = "input", "fingerprint"
_ATTEMPTS = 20

Results = list[list[tuple[Any, float]]]


class Changes(NamedTuple):
    """What :meth:`DocumentIndex.update` did: numbers of documents."""

    embedded: int
    added: int
    changed: int
    removed: int
    unchanged: int


class DocumentIndex:
    """The documents of a corpus as vectors: embed offline once, save, load anywhere, search, add, update and remove.

    The scores are the model's own similarity: inner products of the embeddings for ``"dot"``, of the normalized
    embeddings for ``"cosine"``; those of an approximate index too, which finds its candidates with FAISS and scores
    them by their full vectors. Vectors and documents are mapped into memory, not read.

    Threads may search while others change the index. Changes are in memory until :meth:`save`, which writes a new
    generation: other processes search the old one until they :meth:`load` again. ``st_fpsloss.retrieval.storage``
    describes the folder.

    Create one with :meth:`build` or :meth:`load`, not with the constructor.

    Attributes:
        path: The folder.
        info: The content of its ``index.json``: similarity, dimension, count, factory, measured recall, generation.

    Example:
        ::

            index = DocumentIndex.build(model, {"d1": "a heist in a dream", "d2": "toys come alive"}, "my-index")
            index = DocumentIndex.load("my-index")
            [[(document_id, score)]] = index.search(model, ["films with toys"], k=1)
            index.document(document_id)  # "toys come alive"
            index.update(model, {"d2": "toys come alive at night", "d3": "robots"})  # embeds two documents
            index.remove(["d1"])
            index.save()
    """

    def __init__(self, path: Path, manifest: dict[str, Any], generation: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._open(manifest, generation)

    def _open(self, manifest: dict[str, Any], generation: Path) -> None:
        self.info = manifest
        self._snapshot = read_generation(generation, manifest)
        self._id_type: pa.DataType = self._snapshot.stored.schema.field(ID).type
        self._rows: dict[Any, int] | None = None
        self._changed = False

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        documents: Any,
        path: str | os.PathLike[str],
        factory: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        overwrite: bool = False,
        recall: float = 0.98,
        columns: Sequence[str] = (),
        id_column: str = "id",
        document_column: str = "document",
        queries: Sequence[Any] | None = None,
        shard_size: int = SHARD_SIZE,
        device: str | list[str] | None = None,
    ) -> DocumentIndex:
        """Embed a corpus with ``model.encode_document``, and write the index to a folder.

        The corpus is embedded in shards. Where a build is stopped, even killed, the next one with the same model and
        documents takes the finished shards over. Memory holds one shard, and a graph index where one is built.

        Args:
            model: The model whose document tower embeds the corpus; its similarity has to be dot or cosine.
            documents: A dict of document id to input (a string, or a dict with ``"text"`` and features), a
                ``datasets.Dataset``, the path of a Parquet file or of a folder of them, or an iterable of (id, input)
                or (id, input, dict of values to store). Ids are all strings or all integers.
            path: The folder to write; it must not exist, unless ``overwrite`` or a build was stopped there.
            factory: A FAISS factory string, such as ``"Flat"`` (exact), ``"HNSW32"``, ``"IVF1024,Flat"`` or
                ``"IVF4096,PQ32x8"``; None: by size, exact up to 100,000 documents, a graph up to 5 million, then
                inverted lists of compressed vectors.
            batch_size: Documents in one forward pass.
            show_progress_bar: Whether to show progress bars; None: if the logger is at INFO or below.
            overwrite: Whether to replace the index that is in ``path``. Processes that have it loaded go on with it.
            recall: The recall@10 against the exact search that an approximate index has to reach: it searches as hard
                as that takes, and the measured recall is stored. 1 is exact.
            columns: Names of values to store for filters: columns of a data set or a file, keys of dict inputs.
            id_column: Name of the column of ids, of a data set or a file.
            document_column: Name of the column of inputs, of a data set or a file.
            queries: Some real queries to measure the recall with; None: means of three documents, about as hard.
            shard_size: Documents in a shard.
            device: A device; or several, for sentence-transformers' encoding in one process each; None: the model's.

        Returns:
            The index, ready to search.

        Raises:
            ImportError: If FAISS is not installed.
            RuntimeError: If another process is writing to ``path``.
            ValueError: For an unusable argument (before anything is embedded), a factory string that FAISS refuses, or
                embeddings that are NaN (before anything is published).
        """
        # Here, not above: a process that only searches needs neither torch nor datasets.
        from st_fpsloss.retrieval.build import Plan, build_generation
        from st_fpsloss.retrieval.sources import Documents

        folder = storage.check_target(path, overwrite)
        source = Documents(documents, columns, id_column, document_column)
        plan = Plan(source, factory, recall, queries, shard_size, batch_size, device, show_progress_bar)
        build_generation(model, plan, folder)
        index = cls.load(folder)
        logger.info("Wrote an index of %d documents to %s.", len(index), folder)
        return index

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DocumentIndex:
        """Load an index that :meth:`build` wrote, and check every file against its checksum.

        Args:
            path: The folder.

        Returns:
            The index, ready to search.

        Raises:
            ImportError: If FAISS is not installed.
            ValueError: If there is no index, or a file of it is missing or not as it was written.
        """
        import_faiss()
        folder = Path(path).resolve()
        for _ in range(_ATTEMPTS):
            manifest = storage.read_manifest(folder)
            try:
                return cls(folder, manifest, storage.verified_generation(folder, manifest))
            except FileNotFoundError as error:
                if storage.read_manifest(folder)["generation"] == manifest["generation"]:
                    raise storage.broken(folder, f"it has no {Path(error.filename).name}") from error
        raise RuntimeError(f"path={str(path)!r} was replaced {_ATTEMPTS} times while it was read: load it again.")

    @staticmethod
    def current_generation(path: str | os.PathLike[str]) -> str:
        """Return the name of the generation in a folder: where it is not ``info["generation"]``, load again.

        Args:
            path: The folder.

        Raises:
            ValueError: If there is no index.
        """
        return str(storage.read_manifest(Path(path).resolve())["generation"])

    def __len__(self) -> int:
        return len(self._snapshot)

    @property
    def ids(self) -> list[Any]:
        """The document ids, of the type they had when the index was built, in the order of the vectors."""
        return self._snapshot.ids

    @property
    def columns(self) -> list[str]:
        """The names of the stored columns."""
        return [name for name in self._snapshot.added.column_names if name not in (ID, _INPUT, _FINGERPRINT)]

    def document(self, document_id: Any) -> Any:
        """Return the input that a document was embedded from, to show results in words.

        Args:
            document_id: The id of a document in the index.

        Returns:
            The string or dict; None if it held something that JSON cannot express, such as an image.

        Raises:
            ValueError: If the index does not have the document.
        """
        text = self._row(document_id, [_INPUT])[_INPUT]
        return None if text is None else json.loads(text)

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Read all documents: (id, input), in the order of :attr:`ids`; inputs as :meth:`document` returns them."""
        snapshot = self._snapshot
        texts = pa.chunked_array([*snapshot.stored[_INPUT].chunks, *snapshot.added[_INPUT].chunks])
        texts = texts.filter(pa.array(snapshot.live))
        for document_id, text in zip(snapshot.ids, texts, strict=True):
            yield document_id, None if not text.is_valid else json.loads(text.as_py())

    def fields(self, document_id: Any) -> dict[str, Any]:
        """Return the stored columns of a document.

        Args:
            document_id: The id of a document in the index.

        Raises:
            ValueError: If the index does not have the document.
        """
        return self._row(document_id, self.columns)

    def vectors(self, ids: Sequence[Any]) -> np.ndarray:
        """Return the vectors of some documents, normalized for a cosine.

        Args:
            ids: Ids of documents in the index.

        Returns:
            (N, dim) float32, in the order of the ids.

        Raises:
            ValueError: If the index lacks one of the documents.
        """
        with self._lock:
            row_of, snapshot = self._row_of(), self._snapshot
            rows = [row_of.get(document_id) if isinstance(document_id, (str, int)) else None for document_id in ids]
        if None in rows:
            raise ValueError(f"ids has {ids[rows.index(None)]!r:.100}, none of the {len(self)} documents of the index.")
        return snapshot.vectors_of(np.array(rows, dtype=np.int64))

    def _row(self, document_id: Any, columns: Sequence[str]) -> dict[str, Any]:
        with self._lock:
            row, snapshot = self._row_of().get(document_id), self._snapshot
        if row is None:
            raise ValueError(f"document_id={document_id!r} is not among the {len(self)} documents of the index.")
        return snapshot.row(row, columns)

    def _row_of(self) -> dict[Any, int]:
        """Id to row; made when it is first needed, which a search without ids never does."""
        with self._lock:
            if self._rows is None:
                rows = np.flatnonzero(self._snapshot.live).tolist()
                self._rows = dict(zip(self._snapshot.ids, rows, strict=True))
            return self._rows

    def check_model(self, model: SentenceTransformer) -> None:
        """Refuse a model whose document tower is not the one that embedded the documents.

        Args:
            model: The model. One in another precision is compared by an embedding.

        Raises:
            ValueError: Saying what differs.
        """
        # Here, not above: a process that searches with vectors needs no torch.
        from st_fpsloss.retrieval.model_fingerprint import check_model

        with self._lock:
            check_model(model, self.info, self._snapshot)

    def search(
        self,
        model: SentenceTransformer,
        queries: Sequence[Any],
        k: int,
        exclude: Sequence[Iterable[Any] | None] | None = None,
        filter: Filter | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> Results:
        """Find the k most similar documents of each query.

        Args:
            model: The model whose query tower embeds the queries. Its document tower has to be the one that embedded
                the documents; it may have been loaded in another precision.
            queries: Strings, or dicts with ``"text"`` and features.
            k: Documents a query. Where fewer are left, all of them are returned.
            exclude: For each query the ids of documents to leave out, such as those the user has seen, or None. The
                search goes as deep as it takes to return k others. Ids that the index does not have are ignored.
            filter: The documents that may be returned, for all queries alike: ids; an expression over the stored
                columns and ``id`` such as ``pyarrow.compute.field("year") > 1990``; or a function from the table of
                these columns to one bool a row. Where it leaves 20,000 documents or fewer, all of them are scored.
            batch_size: Queries in one forward pass.
            show_progress_bar: Whether to show progress bars.

        Returns:
            For each query a list of (document id, score), best first; equal scores in the order of the corpus. Which
            of the documents that tie for the last place are returned is not defined.

        Raises:
            ValueError: If the model is not the one that the index was built with, ``queries`` is a lone input, ``k``
                is below 1, or ``exclude`` or ``filter`` is unusable.
        """
        _check_k(k)
        if isinstance(queries, (str, Mapping)):
            raise ValueError(f"queries={repr(queries)[:200]} is one input: give a list of them, queries=[...].")
        self.check_model(model)
        excluded, allowed, snapshot = self._restrictions(exclude, filter, len(queries))
        results: Results = []
        for vectors in embed_in_chunks(model.encode_query, queries, batch_size, show_progress_bar):
            results += snapshot.search(
                self._prepared(vectors), int(k), excluded[len(results) : len(results) + len(vectors)], allowed
            )
        return results

    def search_vectors(
        self,
        vectors: np.ndarray,
        k: int,
        exclude: Sequence[Iterable[Any] | None] | None = None,
        filter: Filter | None = None,
    ) -> Results:
        """Find the k most similar documents of queries that are embedded already.

        Args:
            vectors: (Q, dim) the queries' embeddings, as ``model.encode_query`` gives them; a cosine needs no
                normalizing.
            k: As for :meth:`search`.
            exclude: As for :meth:`search`.
            filter: As for :meth:`search`.

        Returns:
            As :meth:`search`.

        Raises:
            ValueError: If ``vectors`` has another shape or holds NaN, and as :meth:`search`.
        """
        _check_k(k)
        prepared = self._prepared(np.asarray(vectors))
        excluded, allowed, snapshot = self._restrictions(exclude, filter, len(prepared))
        return snapshot.search(prepared, int(k), excluded, allowed)

    def _restrictions(
        self, exclude: Sequence[Iterable[Any] | None] | None, filter: Filter | None, num_queries: int
    ) -> tuple[list[np.ndarray], np.ndarray | None, Any]:
        """Turn ids and filters into rows of one snapshot."""
        with self._lock:
            snapshot = self._snapshot
            excluded = excluded_rows(exclude, num_queries, self._row_of, self._id_type)
            if filter is None:
                return excluded, None, snapshot
            names = [ID, *self.columns]
            table = pa.concat_tables([snapshot.stored.select(names), snapshot.added.select(names)])
            return excluded, allowed_rows(filter, table, self._row_of, self._id_type), snapshot

    def _prepared(self, vectors: np.ndarray) -> np.ndarray:
        """Check the queries' vectors, and normalize them for a cosine."""
        if vectors.ndim != 2 or vectors.shape[1] != self.info["dimension"]:
            raise ValueError(
                f"the index has vectors of dimension {self.info['dimension']}, and the queries' are of shape "
                f"{vectors.shape}: search with the model that built it, or build the index again with this one."
            )
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError("vectors has NaN or infinite numbers: its query tower is broken, or it overflowed.")
        return normalized(vectors) if self.info["similarity"] == "cosine" else vectors

    def add(
        self,
        model: SentenceTransformer,
        documents: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        id_column: str = "id",
        document_column: str = "document",
    ) -> None:
        """Embed documents with new ids and add them, in memory; :meth:`save` writes them.

        Args:
            model: The model that the index was built with.
            documents: As for :meth:`build`. The stored columns are those of the index.
            batch_size: Documents in one forward pass.
            show_progress_bar: Whether to show a progress bar; None: if the logger is at INFO or below.
            id_column: As for :meth:`build`.
            document_column: As for :meth:`build`.

        Raises:
            ValueError: If an id is in the index already (:meth:`update` replaces documents), the model is another one,
                or the documents are unusable. The index is as it was, then.
        """
        changes = self._changes(model, documents, batch_size, show_progress_bar, id_column, document_column)
        if changes.replaced:
            raise ValueError(
                f"documents has {len(changes.replaced)} ids that are in the index, the first {changes.replaced[0]!r}: "
                "use update() to replace them."
            )
        self._apply(changes.table, changes.vectors, ())

    def update(
        self,
        model: SentenceTransformer,
        documents: Any,
        remove_missing: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        id_column: str = "id",
        document_column: str = "document",
    ) -> Changes:
        """Add new documents and replace those that changed, in memory; :meth:`save` writes them.

        Only new inputs and those whose content differs from the stored one are embedded. Where the stored columns
        alone changed, the vector stays.

        Args:
            model: The model that the index was built with.
            documents: As for :meth:`build`.
            remove_missing: Whether to remove the documents of the index that are not among these.
            batch_size: Documents in one forward pass.
            show_progress_bar: Whether to show a progress bar; None: if the logger is at INFO or below.
            id_column: As for :meth:`build`.
            document_column: As for :meth:`build`.

        Returns:
            How many documents were embedded, added, changed, removed and left as they were.

        Raises:
            ValueError: If the model is another one or the documents are unusable. The index is as it was, then.
        """
        changes = self._changes(model, documents, batch_size, show_progress_bar, id_column, document_column)
        missing = [document_id for document_id in self.ids if document_id not in changes.seen] if remove_missing else []
        self._apply(changes.table, changes.vectors, missing)
        return Changes(
            embedded=changes.embedded,
            added=len(changes.table) - len(changes.replaced),
            changed=len(changes.replaced),
            removed=len(missing),
            unchanged=len(changes.seen) - len(changes.table),
        )

    def _changes(self, model: SentenceTransformer, documents: Any, *how: Any) -> EmbeddedChanges:
        """What differs from the stored documents, embedded."""
        from st_fpsloss.retrieval.updates import embed_changes  # needs torch, searching does not

        self.check_model(model)
        with self._lock:
            snapshot, row_of = self._snapshot, dict(self._row_of())
        return embed_changes(snapshot, row_of, model, documents, self.columns, *how)

    def remove(self, ids: Iterable[Any]) -> None:
        """Remove documents, in memory; :meth:`save` writes it.

        Args:
            ids: Their ids.

        Raises:
            ValueError: If the index does not have one of them; it is as it was, then.
        """
        ids = [ids] if isinstance(ids, str) else list(ids)
        check_ids(ids, self._id_type, "ids")
        with self._lock:
            unknown = [document_id for document_id in ids if document_id not in self._row_of()]
            if unknown:
                raise ValueError(f"ids has {unknown[0]!r}, which is not among the {len(self)} documents of the index.")
            self._apply(self._snapshot.added.slice(0, 0), self._snapshot.added_vectors[:0], ids)

    def _apply(self, table: pa.Table, vectors: np.ndarray, removed: Iterable[Any]) -> None:
        """Put the next snapshot in the place of this one."""
        with self._lock:
            snapshot, rows = self._snapshot, self._row_of()
            first = len(snapshot.live)
            live = np.concatenate([snapshot.live, np.ones(len(table), dtype=bool)])
            for document_id in removed:
                live[rows.pop(document_id)] = False
            for number, document_id in enumerate(table[ID].to_pylist()):
                if document_id in rows:
                    live[rows[document_id]] = False
                rows[document_id] = first + number
            self._snapshot = replace(
                snapshot,
                added=pa.concat_tables([snapshot.added, table]).combine_chunks(),
                added_vectors=np.concatenate([snapshot.added_vectors, vectors]),
                live=live,
            )
            self._changed = True

    def save(self) -> None:
        """Write the changes as a new generation of the folder; without changes nothing is written.

        Processes that have the folder loaded go on with their generation. A graph or lists grow by the added
        documents, and are built again where the index has outgrown them or a fifth of it was removed.

        Raises:
            RuntimeError: If another process is writing, or has published another generation since this one was loaded.
        """
        with self._lock:
            if not self._changed:
                return
            with storage.writing(self.path):
                if storage.read_manifest(self.path)["generation"] != self.info["generation"]:
                    raise RuntimeError(
                        f"path={str(self.path)!r} was replaced since this index was loaded: load it again, repeat the "
                        "changes, and save."
                    )
                info = {name: value for name, value in self.info.items() if name not in storage.OWN_KEYS}
                kind = Kind(info["wanted_factory"], info["wanted_recall"], bias_dimension=info["bias_dimension"])
                with storage.new_generation(self.path, info) as generation:
                    old = self.path / self.info["generation"]
                    info.update(write_snapshot_as_generation(generation, self._snapshot, kind, info, old))
                manifest = storage.read_manifest(self.path)
                self._open(manifest, self.path / manifest["generation"])


def _check_k(k: Any) -> None:
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k={k!r} has to be an integer of 1 or more.")
