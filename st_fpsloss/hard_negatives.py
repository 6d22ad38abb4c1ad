"""Hard negatives: documents that the current model takes for the query's own, found in an index."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss.index import DocumentIndex
from st_fpsloss.input_codes import check_columns, codes, is_positive, spelled_pairs_of, spelling, spellings

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
    query_of_row, number_of = codes(spellings(clicks, query))
    asks = is_positive(clicks)
    ids_of: dict[str, list[Any]] = defaultdict(list)
    for document_id in index.ids:
        ids_of[spelling(index.document(document_id))].append(document_id)
    documents = spellings(clicks, document)
    positives = _positive_ids(query_of_row, asks, documents, ids_of, number_of, known_positives)

    asking = np.unique(query_of_row[asks])
    first_row = dict(zip(*np.unique(query_of_row, return_index=True), strict=True))
    inputs = clicks.with_format(None).select([first_row[number] for number in asking])[query][:]
    found = _search(
        model, index, inputs, [positives[number] for number in asking], last_rank, batch_size, show_progress_bar
    )
    found_of = dict(zip(asking.tolist(), found, strict=True))
    pools = [
        _pool(found_of[number], positives[number], ids_of.get(text, []), first_rank, last_rank, margin) if ask else []
        for number, text, ask in zip(query_of_row.tolist(), documents, asks.tolist(), strict=True)
    ]
    _report(pools, asks)
    if HARD_NEGATIVES in clicks.column_names:  # mined before, from an earlier model
        clicks = clicks.remove_columns(HARD_NEGATIVES)
    return clicks.add_column(HARD_NEGATIVES, pools)


def _positive_ids(
    query_of_row: np.ndarray,
    asks: np.ndarray,
    documents: Sequence[str],
    ids_of: Mapping[str, list[Any]],
    number_of: Mapping[str, int],
    known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None,
) -> dict[int, set[Any]]:
    """The ids of the positives of each query, by its number."""
    positives: dict[int, set[Any]] = defaultdict(set)
    for row in np.flatnonzero(asks).tolist():
        positives[int(query_of_row[row])].update(ids_of.get(documents[row], []))
    for text, document in zip(*spelled_pairs_of(known_positives), strict=True):
        if text in number_of:
            positives[number_of[text]].update(ids_of.get(document, []))
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
