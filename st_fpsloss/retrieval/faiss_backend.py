"""What FAISS does here: choosing a kind of index, training it, finding how hard it has to search, searching."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from st_fpsloss.retrieval.exact import exact_search

logger = logging.getLogger(__name__)

FLAT, HNSW = "Flat", "HNSW32"
FLAT_UP_TO = 100_000
"""Documents up to which the exact search is the default."""
HNSW_UP_TO = 5_000_000
"""Documents up to which a graph, which has to fit into memory, is the default."""
RECALL_AT = 10
RECALL_QUERIES = 256
_TRAINING_ROWS_A_LIST = 64
_ROWS_PER_ADD = 65_536
_MAX_EF = 4096
# Lossy codes order the candidates, their full vectors score them: so many candidates a result.
_CANDIDATES_A_RESULT = 20


def import_faiss() -> Any:
    """Import FAISS, an optional dependency."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('DocumentIndex needs FAISS: pip install "st-fpsloss[faiss]"') from error
    return faiss


def choose_factory(count: int, dimension: int, recall: float) -> str:
    """Choose a kind of index by size.

    Args:
        count: Number of documents.
        dimension: Size of their vectors.
        recall: The recall that is wanted; 1 is exact.

    Returns:
        A FAISS factory string: ``"Flat"``, a graph, or inverted lists of compressed vectors.
    """
    if recall >= 1 or count <= FLAT_UP_TO:
        return FLAT
    if count <= HNSW_UP_TO:
        return HNSW
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    parts = max(part for part in range(1, dimension // 4 + 1) if dimension % part == 0) if dimension >= 4 else 1
    return f"IVF{lists},PQ{parts}x8"


def check_factory(factory: str, dimension: int | None, count: int | None) -> None:
    """Refuse a factory string that FAISS refuses, or that has more lists than there are documents.

    Raises:
        ValueError: Naming it.
    """
    if factory == FLAT:
        return
    inverted = import_faiss().try_extract_index_ivf(new_index(factory, dimension or 64))
    if inverted is not None and count is not None and inverted.nlist > count:
        raise ValueError(f"factory={factory!r} cannot be trained on {count} documents: use fewer lists or 'Flat'.")


def new_index(factory: str, dimension: int) -> Any:
    """Make an empty index for inner products."""
    faiss = import_faiss()
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"factory={factory!r} is no FAISS factory string for vectors of dimension {dimension}: "
            f"'Flat' is exact search. FAISS says: {error}"
        ) from error


@dataclass(frozen=True)
class Approximate:
    """A FAISS index, and how hard it searches.

    Args:
        index: The index; its row numbers are those of the vectors.
        effort: ``efSearch`` of a graph, ``nprobe`` of inverted lists.
    """

    index: Any
    effort: int = 0
    candidates_a_result: int = field(init=False)

    def __post_init__(self) -> None:
        whole = type(self.index).__name__ in ("IndexHNSWFlat", "IndexIVFFlat")
        object.__setattr__(self, "candidates_a_result", 1 if whole else _CANDIDATES_A_RESULT)

    @property
    def least_effort(self) -> int:
        """Where the search for the right effort starts."""
        inverted = import_faiss().try_extract_index_ivf(self.index)
        return 32 if inverted is None else math.ceil(math.sqrt(inverted.nlist))

    @property
    def most_effort(self) -> int:
        """Where it ends."""
        inverted = import_faiss().try_extract_index_ivf(self.index)
        return _MAX_EF if inverted is None else inverted.nlist

    def search(self, queries: np.ndarray, depth: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """Find the rows with about the largest inner products.

        Args:
            queries: (Q, dim) float32.
            depth: Rows a query.
            allowed: (rows of the index,) bool; None: all.

        Returns:
            (Q, at least depth) row numbers, padded with -1.
        """
        faiss = import_faiss()
        depth = min(depth * self.candidates_a_result, self.index.ntotal)
        effort = max(self.effort or self.least_effort, 1)
        selector = None
        if allowed is not None:
            share = max(int(np.count_nonzero(allowed)), 1) / len(allowed)
            effort = min(math.ceil(effort / share), max(self.most_effort, effort))
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        return self.index.search(queries, depth, params=_parameters(self.index, effort, selector))[1]


def _parameters(index: Any, effort: int, selector: Any) -> Any:
    """FAISS's parameters for a search of an index of this kind."""
    faiss = import_faiss()
    selected = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(faiss.downcast_index(index.index), effort, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=effort, **selected)
    if faiss.try_extract_index_ivf(index) is not None:
        kind = faiss.IVFPQSearchParameters if isinstance(index, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        return kind(nprobe=effort, **selected)
    return faiss.SearchParameters(**selected)


def train(factory: str, vectors: np.ndarray, seed: int = 0) -> Any:
    """Make an index and train it on a sample of the vectors, where its kind needs that.

    Args:
        factory: A FAISS factory string.
        vectors: (N, dim) float32, possibly mapped into memory.
        seed: Of the sample.

    Returns:
        The index, empty.

    Raises:
        ValueError: If there are too few vectors.
    """
    faiss = import_faiss()
    index = new_index(factory, vectors.shape[1])
    if index.is_trained:
        return index
    inverted = faiss.try_extract_index_ivf(index)
    wanted = max(_ROWS_PER_ADD, _TRAINING_ROWS_A_LIST * (1 if inverted is None else inverted.nlist))
    sample = vectors
    if len(vectors) > wanted:
        rows = np.random.default_rng(seed).choice(len(vectors), wanted, replace=False)
        sample = vectors[np.sort(rows)]
    try:
        index.train(np.ascontiguousarray(sample))
    except RuntimeError as error:
        raise ValueError(
            f"factory={factory!r} cannot be trained on {len(sample)} documents: use fewer lists or 'Flat'. "
            f"FAISS says: {error}"
        ) from error
    return index


def add(index: Any, vectors: np.ndarray) -> None:
    """Add vectors, in pieces that fit into memory."""
    for start in range(0, len(vectors), _ROWS_PER_ADD):
        index.add(np.ascontiguousarray(vectors[start : start + _ROWS_PER_ADD]))


def tuned(
    index: Any, vectors: np.ndarray, live: np.ndarray | None, queries: np.ndarray, recall: float
) -> tuple[Approximate, float]:
    """Find the least effort that reaches a recall@10, measured against the exact search.

    Args:
        index: A filled FAISS index.
        vectors: (N, dim) what it holds.
        live: (N,) bool, the rows that count; None: all.
        queries: (Q, dim) a sample.
        recall: The recall that is wanted.

    Returns:
        The index with its effort, and the recall that was measured.
    """
    depth = min(RECALL_AT, len(vectors))
    _, exact = exact_search([vectors], queries, depth, live)
    approximate = Approximate(index)
    effort, most = approximate.least_effort, approximate.most_effort
    while True:
        effort = min(effort, most)
        approximate = Approximate(index, effort)
        rows = approximate.search(queries, depth, live)
        found = sum(len(np.intersect1d(a, b[b >= 0])) for a, b in zip(rows, exact, strict=True))
        measured = found / max(int(np.count_nonzero(exact >= 0)), 1)
        if measured >= recall or effort >= most:
            break
        effort *= 2
    if measured < recall:
        logger.warning(
            "The index reaches a recall@%d of %.3f, and recall=%s was wanted: build it with factory='Flat', which is "
            "exact, or with another one.",
            RECALL_AT,
            measured,
            recall,
        )
    return approximate, measured


def read_index(path: Path) -> Any:
    """Read an index, mapped into memory."""
    faiss = import_faiss()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if faiss.try_extract_index_ivf(index) is not None:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    return index


def read_index_to_add(path: Path) -> Any:
    """Read an index into memory, where it can grow."""
    return import_faiss().read_index(str(path))


def write_index(index: Any, path: Path) -> None:
    """Write an index."""
    import_faiss().write_index(index, str(path))
