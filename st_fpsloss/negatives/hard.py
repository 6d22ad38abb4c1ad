"""Hard negatives: documents that the current model takes for the query's own, found in an index."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss.data.inputs import check_columns, is_positive, pairs_of
from st_fpsloss.encoding.fingerprints import input_fingerprints
from st_fpsloss.retrieval.index import DocumentIndex

logger = logging.getLogger(__name__)

HARD_NEGATIVES = "hard_negatives"
"""The column that :func:`mine_hard_negatives` adds."""

Found = list[tuple[Any, float]]


def mine_hard_negatives(
    model: SentenceTransformer,
    clicks: Dataset,
    index: DocumentIndex,
    first_rank: int = 1,
    last_rank: int = 50,
    margin: float | None = None,
    known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None = None,
    query: str = "query",
    document: str = "document",
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> Dataset:
    """Finds documents that the model ranks high for a row's query and that are no known positives of it.

    The nearest documents are often positives that nobody clicked yet. Two ways to leave these out: start some ranks
    down (``first_rank``), and ask for a distance to the positive (``margin``).

    Inputs are compared by what the towers read of them, however they are spelled: a set of tags is the same in any
    order. What the index holds without its input (it warned of that when it was built) cannot be compared, and
    positives that it does not have are warned of.

    Args:
        model: the model that the index was built with.
        clicks: the data set, with columns of queries and documents (strings or dicts), and ``label`` where it has one.
        index: an index of the documents.
        first_rank: the first of the query's negatives, by similarity, that is taken; the most similar has the rank 1.
        last_rank: the last one.
        margin: take only negatives whose similarity is at most ``R⁺ - margin * |R⁺|``, R⁺ that of the row's own
            document; 0.05 is usual. None does not compare. A row whose own document is not in the index, or ranked
            behind all of these negatives, then has none.
        known_positives: further pairs, query -> documents or (query, document), that are positives.
        query: name of the column of queries.
        document: name of the column of documents.
        batch_size: queries in one forward pass.
        show_progress_bar: whether to show progress bars.

    Returns:
        The data set with the column ``hard_negatives``: the ids of each row's negatives, most similar first; empty for
        rows with r ≤ 0. It is for ``with_negatives(..., documents=..., num_hard=...)``, which chooses from it anew
        every epoch.

    Raises:
        ValueError: If an argument is unfit, or the model is not the index's.

    Example::

        index = DocumentIndex.build(model, documents, "my-index")
        clicks = mine_hard_negatives(model, clicks, index, first_rank=10, margin=0.05)
        train = with_negatives(clicks, num_negatives=5, documents=documents, num_hard=2)
    """
    check_columns(clicks, [query, document])
    _check_ranks(first_rank, last_rank, margin)
    inputs = clicks.with_format(None)
    query_of_row = input_fingerprints(model, inputs[query][:], "query")
    documents = input_fingerprints(model, inputs[document][:], "document").tolist()
    asks = is_positive(clicks)
    ids_of = _ids_by_key(model, index)
    pairs = list(zip(query_of_row[asks].tolist(), (documents[row] for row in np.flatnonzero(asks)), strict=True))
    known_queries, known_documents = pairs_of(known_positives)
    known = (
        input_fingerprints(model, known_queries, "query").tolist(),
        input_fingerprints(model, known_documents, "document").tolist(),
    )
    positives = _positive_ids([*pairs, *zip(*known, strict=True)], ids_of)

    asking = np.unique(query_of_row[asks])
    first_row = dict(zip(*np.unique(query_of_row, return_index=True), strict=True))
    queries = inputs.select([first_row[key] for key in asking])[query][:]
    found = _search(
        model, index, queries, [positives[key] for key in asking.tolist()], last_rank, batch_size, show_progress_bar
    )
    found_of = dict(zip(asking.tolist(), found, strict=True))
    pools = [
        _pool(found_of[asked], positives[asked], ids_of.get(own, []), first_rank, last_rank, margin) if ask else []
        for asked, own, ask in zip(query_of_row.tolist(), documents, asks.tolist(), strict=True)
    ]
    _report(pools, asks)
    if HARD_NEGATIVES in clicks.column_names:  # mined before, from an earlier model
        clicks = clicks.remove_columns(HARD_NEGATIVES)
    return clicks.add_column(HARD_NEGATIVES, pools)


def _ids_by_key(model: SentenceTransformer, index: DocumentIndex) -> dict[int, list[Any]]:
    """The ids of the documents of an index by what the tower reads; several may read alike."""
    known = {document_id: document for document_id, document in index.items() if document is not None}
    ids_of: dict[int, list[Any]] = defaultdict(list)
    for document_id, key in zip(
        known, input_fingerprints(model, list(known.values()), "document").tolist(), strict=True
    ):
        ids_of[key].append(document_id)
    return ids_of


def _positive_ids(pairs: Sequence[tuple[int, int]], ids_of: Mapping[int, list[Any]]) -> dict[int, set[Any]]:
    """The ids of the positives of each query, from pairs (query, document) of keys."""
    positives: dict[int, set[Any]] = defaultdict(set)
    missing = set()
    for query, document in pairs:
        positives[query].update(ids_of.get(document, []))
        if document not in ids_of:
            missing.add(document)
    if missing:
        logger.warning(
            "%d of %d distinct positives are not in the index. If it holds them in other words, or without their "
            "inputs, they may be mined as negatives of their own queries: build the index from the same inputs.",
            len(missing),
            len({document for _, document in pairs}),
        )
    return positives


def _search(
    model: SentenceTransformer,
    index: DocumentIndex,
    queries: Sequence[Any],
    positives: Sequence[set[Any]],
    last_rank: int,
    batch_size: int,
    show_progress_bar: bool,
) -> list[Found]:
    """Each query's documents down to ``last_rank`` negatives, positives among them.

    Queries with about as many positives are searched together: one with a long history makes only its own go deep.
    """
    results: list[Found] = [[] for _ in queries]
    depths = np.array([last_rank + 2 ** len(ids).bit_length() for ids in positives])
    for depth in np.unique(depths).tolist():
        group = np.flatnonzero(depths == depth).tolist()
        inputs = [queries[number] for number in group]
        found = index.search(model, inputs, depth, batch_size=batch_size, show_progress_bar=show_progress_bar)
        for number, documents in zip(group, found, strict=True):
            results[number] = documents
    return results


def _pool(
    found: Found,
    positives: set[Any],
    own: Sequence[Any],
    first_rank: int,
    last_rank: int,
    margin: float | None,
) -> list[Any]:
    """The ids of one row's negatives."""
    negatives = [pair for pair in found if pair[0] not in positives][first_rank - 1 : last_rank]
    if margin is not None:
        # A positive that was not found is behind everything that was: no negative is below it.
        positive = max((score for document_id, score in found if document_id in own), default=-np.inf)
        limit = positive - margin * abs(positive) if np.isfinite(positive) else -np.inf
        negatives = [pair for pair in negatives if pair[1] <= limit]
    return [document_id for document_id, _ in negatives]


def _report(pools: Sequence[Sequence[Any]], asks: np.ndarray) -> None:
    lengths = np.array([len(pool) for pool in pools])[asks]
    if not len(lengths):
        return
    empty = np.count_nonzero(lengths == 0)
    logger.info("Mined %.1f hard negatives a row; %d of %d rows have none.", lengths.mean(), empty, len(lengths))


def _check_ranks(first_rank: int, last_rank: int, margin: float | None) -> None:
    if not 1 <= first_rank <= last_rank:
        raise ValueError(f"1 ≤ `first_rank` ≤ `last_rank` must hold, got {first_rank!r} and {last_rank!r}.")
    if margin is not None and not 0 <= margin < float("inf"):
        raise ValueError(f"`margin` must not be negative, or None, got {margin!r}.")
