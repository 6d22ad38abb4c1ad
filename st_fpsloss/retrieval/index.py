"""Search by nearest neighbours: a corpus embedded once, kept in a folder, searched with FAISS."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import numbers
import os
import shutil
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from st_fpsloss.retrieval.encode import checked_similarity, embed_in_chunks

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

INDEX_FILE, DOCUMENTS_FILE, INFO_FILE = "index.faiss", "documents.parquet", "index.json"
QUERY_CHUNK_SIZE = 256

# Of a stored vector's length. Half precision moves an embedding by less, another model by about its whole length.
_SAME_MODEL_TOLERANCE = 0.05


class DocumentIndex:
    """The documents of a corpus as vectors in a FAISS index: embed offline once, save, load anywhere, search.

    The scores are the model's own similarity: inner products of the embeddings for ``"dot"``, of the normalised
    embeddings for ``"cosine"``. The folder holds ``index.faiss`` (the vectors), ``documents.parquet`` (ids and inputs,
    so that results can be shown in words) and ``index.json`` (what the index was made from and with).

    Create one with :meth:`build` or :meth:`load`, not with the constructor.

    Attributes:
        ids: The document ids, of the type they had when the index was built, in the order of the vectors.
        info: The content of ``index.json``.
        faiss_index: The FAISS index itself, for its own search settings.

    Example:
        ::

            index = DocumentIndex.build(model, {"d1": "a heist in a dream", "d2": "toys come alive"}, "my-index")
            index = DocumentIndex.load("my-index")
            [[(document_id, score)]] = index.search(model, ["films with toys"], k=1)
            index.document(document_id)  # "toys come alive"
    """

    def __init__(self, faiss_index: Any, documents: pa.Table, info: dict[str, Any]) -> None:
        self.faiss_index = faiss_index
        self.info = info
        self.ids: list[Any] = documents["id"].to_pylist()
        self._inputs = documents["input"]
        self._row_of = {document_id: row for row, document_id in enumerate(self.ids)}
        self._compared_with: weakref.ref[SentenceTransformer] | None = None

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        documents: Mapping[Any, Any],
        path: str | os.PathLike[str],
        factory: str = "Flat",
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        overwrite: bool = False,
    ) -> DocumentIndex:
        """Embed a corpus with ``model.encode_document``, and write the index to a folder.

        Memory holds the vectors (4 · dim bytes a document), the ids and inputs, and one chunk of embeddings; twice the
        vectors for a ``factory`` that has to be trained. The folder appears whole or not at all.

        Args:
            model: The model whose document tower embeds the corpus; its similarity has to be dot or cosine.
            documents: Document id to input: a string, or a dict with ``"text"`` and features. Ids are all strings or
                all integers.
            path: The folder to write; it must not exist, unless ``overwrite``.
            factory: A FAISS factory string. ``"Flat"`` is exact; ``"IVF64,Flat"`` and others trade exactness for speed.
                An IVF index probes the square root of its number of lists; change ``faiss_index.nprobe`` at will.
            batch_size: Documents in one forward pass.
            show_progress_bar: Whether to show progress bars; None: if the logger is at INFO or below.
            overwrite: Whether to replace the index that is in ``path``.

        Returns:
            The index, ready to search.

        Raises:
            ImportError: If FAISS is not installed.
            ValueError: For an unusable argument (before anything is embedded), a factory string that FAISS refuses, or
                embeddings that are NaN (before anything is written).
        """
        _faiss()
        folder = _checked_target(path, overwrite)
        table = _document_table(documents)
        similarity = checked_similarity(model)
        chunks = embed_in_chunks(model.encode_document, list(documents.values()), batch_size, show_progress_bar)
        faiss_index = _fill(factory, _normalised(chunks) if similarity == "cosine" else chunks)
        info = {
            "similarity": similarity,
            "metric": "inner_product",
            "factory": factory,
            "dimension": faiss_index.d,
            "count": table.num_rows,
            "st_fpsloss_version": _package_version(),
        }
        _write(folder, faiss_index, table, info)
        logger.info("Wrote an index of %d documents to %s.", table.num_rows, folder)
        return cls(faiss_index, table, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DocumentIndex:
        """Load an index that :meth:`build` wrote.

        Args:
            path: The folder.

        Returns:
            The index, ready to search.

        Raises:
            ImportError: If FAISS is not installed.
            ValueError: If the folder or a file in it is missing or broken, or the files belong to different indexes.
        """
        faiss = _faiss()
        folder = Path(path)
        missing = [name for name in (INFO_FILE, DOCUMENTS_FILE, INDEX_FILE) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"path={str(path)!r} is no document index: it has no {', no '.join(missing)}; "
                "give the folder that DocumentIndex.build wrote, or build it anew."
            )
        try:
            info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
            documents = pq.read_table(folder / DOCUMENTS_FILE)
            faiss_index = faiss.read_index(str(folder / INDEX_FILE))
            found = (documents.num_rows, faiss_index.ntotal, faiss_index.d)
            expected = (info["count"], info["count"], info["dimension"])
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise ValueError(f"path={str(path)!r} holds a broken document index, build it anew: {error}") from error
        if found != expected:
            raise ValueError(
                f"path={str(path)!r} holds files of different indexes: documents, vectors and dimension are {found}, "
                f"and {INFO_FILE} says {expected}; build it anew."
            )
        return cls(faiss_index, documents, info)

    def __len__(self) -> int:
        return len(self.ids)

    def document(self, document_id: Any) -> Any:
        """Return the input that a document was embedded from, to show results in words.

        Args:
            document_id: The id of a document in the index.

        Returns:
            The string or dict; None if it held something that JSON cannot spell, such as an image.

        Raises:
            ValueError: If the index does not have the document.
        """
        if document_id not in self._row_of:
            raise ValueError(f"document_id={document_id!r} is not among the {len(self)} documents of the index.")
        spelled = self._inputs[self._row_of[document_id]].as_py()
        return None if spelled is None else json.loads(spelled)

    def search(
        self,
        model: SentenceTransformer,
        queries: Sequence[Any],
        k: int,
        exclude: Sequence[Iterable[Any] | None] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> list[list[tuple[Any, float]]]:
        """Find the k most similar documents of each query.

        Args:
            model: The model whose query tower embeds the queries: the one that the index was built with. An exact
                index (``factory="Flat"``) embeds one of its documents again at the first search with a model, and
                warns if it is another one.
            queries: Strings, or dicts with ``"text"`` and features.
            k: Documents a query. Where fewer are left, all of them are returned.
            exclude: For each query the ids of documents to leave out, such as those the user has seen, or None. The
                search goes as deep as it takes to return k others. Ids that the index does not have are ignored.
            batch_size: Queries in one forward pass.
            show_progress_bar: Whether to show progress bars.

        Returns:
            For each query a list of (document id, score), best first; equal scores in the order of the corpus. Of
            documents that tie for the last place, FAISS chooses those that are returned.

        Raises:
            ValueError: If the model's similarity or dimension is unlike the index's, ``queries`` is a lone input, ``k``
                is below 1, or ``exclude`` is a mapping, has another length than ``queries`` or ids of another type.
        """
        if not isinstance(k, numbers.Integral) or k < 1:
            raise ValueError(f"k={k!r} has to be an integer of 1 or more.")
        if isinstance(queries, (str, Mapping)):
            raise ValueError(f"queries={repr(queries)[:200]} is one input: give a list of them, queries=[...].")
        similarity = checked_similarity(model)
        if similarity != self.info["similarity"]:
            raise ValueError(
                f"the index was built for the similarity {self.info['similarity']!r}, and model.similarity_fn_name is "
                f"{similarity!r}: search with the model that built it, or build the index anew with this one."
            )
        excluded = self._excluded_rows(exclude, len(queries))
        self._warn_of_another_model(model)
        chunks = embed_in_chunks(model.encode_query, queries, batch_size, show_progress_bar)
        results: list[list[tuple[Any, float]]] = []
        for vectors in _normalised(chunks) if similarity == "cosine" else chunks:
            if vectors.shape[1] != self.info["dimension"]:
                raise ValueError(
                    f"the index has vectors of dimension {self.info['dimension']}, and the model embeds queries in "
                    f"{vectors.shape[1]}: search with the model that built it, or build the index anew with this one."
                )
            results += self._search_vectors(vectors, int(k), excluded[len(results) : len(results) + len(vectors)])
        return results

    def _warn_of_another_model(self, model: SentenceTransformer) -> None:
        """Compare a stored vector with the model's own, once a model: nothing else tells models of one size apart."""
        if self._compared_with is not None and self._compared_with() is model:
            return
        self._compared_with = weakref.ref(model)
        row = next((row for row, spelled in enumerate(self._inputs) if spelled.is_valid), None)
        if row is None or self.info["factory"] != "Flat":  # others do not keep the vectors as they were
            return
        chunks = embed_in_chunks(model.encode_document, [self.document(self.ids[row])], show_progress_bar=False)
        ((vector,),) = _normalised(chunks) if self.info["similarity"] == "cosine" else chunks
        stored = self.faiss_index.reconstruct(row)
        if vector.shape != stored.shape:  # the search itself says so
            return
        if np.linalg.norm(vector - stored) > _SAME_MODEL_TOLERANCE * np.linalg.norm(stored):
            logger.warning(
                "The index was built with another model than the one that it is searched with, or with this one before "
                "it was trained on: it embeds document %r otherwise. Rebuild the index, or search with its own model.",
                self.ids[row],
            )

    def _excluded_rows(self, exclude: Sequence[Iterable[Any] | None] | None, num_queries: int) -> list[np.ndarray]:
        """Turn the ids to leave out into sorted row numbers, and check them."""
        if exclude is None:
            exclude = [None] * num_queries
        if isinstance(exclude, (str, Mapping)):
            raise ValueError(
                f"exclude={exclude!r:.200} is a {type(exclude).__name__}: give a list with the ids to leave out, or "
                "None, for each query, in the order of `queries`."
            )
        if len(exclude) != num_queries:
            raise ValueError(
                f"exclude has {len(exclude)} entries for {num_queries} queries: give one for each, or None."
            )
        id_type = str if isinstance(self.ids[0], str) else numbers.Integral
        excluded = []
        for number, ids in enumerate(exclude):
            ids = [] if ids is None else [ids] if isinstance(ids, str) else list(ids)
            wrong = [document_id for document_id in ids if not isinstance(document_id, id_type)]
            if wrong:
                raise ValueError(
                    f"exclude[{number}] has {wrong[0]!r}, and the ids of this index are of type "
                    f"{type(self.ids[0]).__name__}: 1 and '1' are different ids."
                )
            rows = {self._row_of[document_id] for document_id in ids if document_id in self._row_of}
            excluded.append(np.array(sorted(rows), dtype=np.int64))
        return excluded

    def _search_vectors(
        self, vectors: np.ndarray, k: int, excluded: Sequence[np.ndarray]
    ) -> list[list[tuple[Any, float]]]:
        """Search chunks of queries that need about the same depth, so that one long exclusion is paid for once."""
        depths = np.array([min(len(self), k + len(rows)) for rows in excluded])
        results: list[list[tuple[Any, float]]] = [[] for _ in vectors]
        order = np.argsort(depths, kind="stable")
        for start in range(0, len(order), QUERY_CHUNK_SIZE):
            chunk = order[start : start + QUERY_CHUNK_SIZE]
            scores, rows = self.faiss_index.search(vectors[chunk], int(depths[chunk].max()))
            for query, query_scores, query_rows in zip(chunk.tolist(), scores, rows, strict=True):
                kept = _without(query_rows, excluded[query])
                if kept.sum() < min(k, len(self) - len(excluded[query])):
                    query_scores, query_rows = self._search_everywhere(vectors[query], int(depths[query]))
                    kept = _without(query_rows, excluded[query])
                query_scores, query_rows = query_scores[kept], query_rows[kept]
                best = np.lexsort((query_rows, -query_scores))[:k]
                results[query] = [(self.ids[query_rows[i]], float(query_scores[i])) for i in best]
        return results

    def _search_everywhere(self, vector: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Search every list of an inverted index, for a query whose probed lists hold too few documents."""
        inverted = _faiss().try_extract_index_ivf(self.faiss_index)
        probes = inverted.nprobe if inverted is not None else None
        try:
            if inverted is not None:
                inverted.nprobe = inverted.nlist
            scores, rows = self.faiss_index.search(vector[None], depth)
        finally:
            if inverted is not None:
                inverted.nprobe = probes
        return scores[0], rows[0]


def _faiss() -> Any:
    """Import FAISS, an optional dependency."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('DocumentIndex needs FAISS: pip install "st-fpsloss[faiss]"') from error
    return faiss


def _without(rows: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """Mark the rows that are documents (FAISS pads with -1) and not excluded."""
    return (rows >= 0) & ~np.isin(rows, excluded)


def _normalised(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Divide embeddings by their length, so that an inner product is the cosine."""
    for chunk in chunks:
        yield chunk / np.maximum(np.linalg.norm(chunk, axis=1, keepdims=True), 1e-12)


def _checked_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse a path whose content would be lost."""
    folder = Path(path).resolve()
    if folder.exists() and not overwrite:
        raise ValueError(f"path={str(path)!r} exists: choose another one, or replace the index with overwrite=True.")
    if folder.exists() and not (folder / INFO_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(
            f"path={str(path)!r} exists and is no document index: it is not overwritten; choose another one."
        )
    return folder


def _document_table(documents: Mapping[Any, Any]) -> pa.Table:
    """Check the documents, and lay them out as ids (strings or integers) and inputs (JSON)."""
    if not isinstance(documents, Mapping) or not documents:
        raise ValueError(f"documents={repr(documents)[:200]} has no documents: give a dict of document id to input.")
    ids = list(documents)
    if all(isinstance(document_id, str) for document_id in ids):
        column = pa.array(ids, pa.string())
    elif all(isinstance(document_id, numbers.Integral) and not isinstance(document_id, bool) for document_id in ids):
        try:
            column = pa.array([int(document_id) for document_id in ids], pa.int64())
        except OverflowError as error:
            raise ValueError("documents has an integer id beyond 64 bits: use strings as ids.") from error
    else:
        types = sorted({type(document_id).__name__ for document_id in ids})
        raise ValueError(f"documents has ids of type {', '.join(types)}: make all of them strings or all integers.")
    spelled = [_json_or_none(value) for value in documents.values()]
    if lost := sum(value is None for value in spelled):
        logger.warning("%d documents hold values that JSON cannot spell: the index keeps them without inputs.", lost)
    return pa.table({"id": column, "input": pa.array(spelled, pa.string())})


def _json_or_none(value: Any) -> str | None:
    """Spell an input as JSON; numpy numbers and arrays as plain ones."""
    try:
        return json.dumps(value, ensure_ascii=False, default=lambda other: other.tolist())
    except (AttributeError, TypeError, ValueError):
        return None


def _fill(factory: str, chunks: Iterator[np.ndarray]) -> Any:
    """Make a FAISS index for inner products and add the vectors, training it first where its kind needs that."""
    faiss = _faiss()
    first = next(chunks)
    try:
        index = faiss.index_factory(first.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"factory={factory!r} is no FAISS factory string for vectors of dimension {first.shape[1]}: "
            f"'Flat' is exact search. FAISS says: {error}"
        ) from error
    if not index.is_trained:
        first = np.concatenate([first, *chunks])
        try:
            index.train(first)
        except RuntimeError as error:
            raise ValueError(
                f"factory={factory!r} cannot be trained on {len(first)} documents: use fewer lists or 'Flat'. "
                f"FAISS says: {error}"
            ) from error
    index.add(first)
    for chunk in chunks:
        index.add(chunk)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = math.ceil(math.sqrt(inverted.nlist))
    return index


def _package_version() -> str | None:
    try:
        return importlib.metadata.version("st-fpsloss")
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(folder: Path, faiss_index: Any, documents: pa.Table, info: dict[str, Any]) -> None:
    """Write the three files to a temporary folder beside the target, then move it into place."""
    suffix = f"{uuid.uuid4().hex[:8]}.tmp"
    new, old = folder.with_name(f".{folder.name}.new.{suffix}"), folder.with_name(f".{folder.name}.old.{suffix}")
    new.mkdir(parents=True)
    try:
        _faiss().write_index(faiss_index, str(new / INDEX_FILE))
        pq.write_table(documents, new / DOCUMENTS_FILE)
        (new / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
