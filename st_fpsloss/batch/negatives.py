"""Which documents are the negatives of which click: columns named for it, or the columns of the whole batch.

Turns a :class:`st_fpsloss.batch.clicks.ClickBatch` into what the losses on pairs, on sampled negatives and on all index
pairs work on. Everything is O(rows + columns + positives): the M×M index pairs are never listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch, Duplicates, Relevance, renumbered
from st_fpsloss.objectives.pairwise import InBatchPairs
from st_fpsloss.objectives.sampled_softmax import indexed_dot
from st_fpsloss.objectives.sigmoid import SigmoidTargets

# Explicit negatives that are listed at a time: some 20 numbers each, 40 MB.
_TILE_PAIRS = 2**18


@dataclass(frozen=True)
class Positives:
    """The P rows of a batch with r > 0.

    Args:
        row: (P,) number of the row in the batch.
        query: (P,) number of its query.
        document: (P,) number of its document.
        weight: (P,) weight of its loss; they sum to 1 over the whole batch.
    """

    row: Tensor
    query: Tensor
    document: Tensor
    weight: Tensor

    @classmethod
    def of(cls, batch: ClickBatch, relevance: Relevance) -> Positives:
        """All positives of a batch, sorted by query."""
        row = (batch.relevance > 0).nonzero().flatten()
        row = row[torch.argsort(batch.query[row], stable=True)]
        return cls(row, batch.query[row], batch.document[0, row], batch.pair_weights(relevance)[row])

    def select(self, index: Tensor | slice) -> Positives:
        """The positives at ``index``: numbers, bool or a slice."""
        return Positives(self.row[index], self.query[index], self.document[index], self.weight[index])

    def is_local(self, batch: ClickBatch) -> Tensor:
        """The positives (P,), as bool, that this process is to learn."""
        is_local = torch.zeros(len(batch.relevance), dtype=torch.bool, device=self.row.device)
        is_local[batch.local_rows] = True
        return is_local[self.row]


@dataclass(frozen=True)
class NegativePairs:
    """Negatives listed one by one.

    Args:
        positive: (K,) number of the positive (an index of :class:`Positives`) that each negative belongs to.
        document: (K,) number of the negative document.
        count: (K,) how many columns the negative stands for.
        column: (2, K) document column and row that the negative stands in, or None for documents without a place.
    """

    positive: Tensor
    document: Tensor
    count: Tensor
    column: Tensor | None = None

    def of(self, chosen: Tensor) -> NegativePairs:
        """The negatives of some positives, (P,) bool, in numbers of these alone."""
        number = torch.cumsum(chosen, dim=0) - 1
        kept = chosen[self.positive]
        column = None if self.column is None else self.column[:, kept]
        return NegativePairs(number[self.positive[kept]], self.document[kept], self.count[kept], column)


def pair_products(
    queries: Tensor, documents: Tensor, positives: Positives, negatives: NegativePairs
) -> tuple[Tensor, Tensor]:
    """Dot products of the positives (P,) and of their negatives (K,), from unique embeddings."""
    rows = torch.cat([positives.query, positives.query[negatives.positive]])
    columns = torch.cat([positives.document, negatives.document])
    sizes = [len(positives.row), len(negatives.positive)]
    positive, negative = indexed_dot(queries, documents, rows, columns).split(sizes)
    return positive, negative


def explicit_tiles(batch: ClickBatch, positives: Positives) -> list[slice]:
    """Positives in tiles whose explicit negatives can be listed at a time; of one positive they are all in one tile."""
    shown = _shown_rows(batch)
    matches = torch.bincount(batch.query[shown], minlength=len(batch.query_fingerprints))[positives.query]
    end = (matches + len(batch.document) - 1).cumsum(0)
    tile = (end - 1).clamp_min(0) // _TILE_PAIRS
    cuts = [0, *(tile.diff().nonzero().flatten() + 1).tolist(), len(tile)]
    return [slice(first, last) for first, last in pairwise(cuts) if last > first]


def explicit_negatives(batch: ClickBatch, positives: Positives, duplicates: Duplicates) -> NegativePairs:
    """The negatives in the columns of each positive's row, and what was shown to its query and not clicked.

    Args:
        batch: the clicks; a row's negatives are its document columns after the first.
        positives: positives of the batch, all of them or a tile of :func:`explicit_tiles`.
        duplicates: ``"mask"`` leaves out a document that is a positive of the query anywhere in the batch.
    """
    number = torch.arange(len(positives.row), device=positives.row.device)
    num_negatives = len(batch.document) - 1
    columns = torch.arange(1, num_negatives + 1, device=number.device)
    named = torch.stack([columns.repeat_interleave(len(number)), positives.row.repeat(num_negatives)])
    shown_number, shown_row = _shown_to_the_same_query(batch, positives)
    shown = torch.stack([torch.zeros_like(shown_row), shown_row])

    positive = torch.cat([number.repeat(num_negatives), shown_number])
    column = torch.cat([named, shown], dim=1)
    document = batch.document[column[0], column[1]]
    if duplicates == "mask":
        kept = ~_is_pair_of(
            batch.false_negatives(), positives.query[positive], document, len(batch.document_fingerprints)
        )
        positive, document, column = positive[kept], document[kept], column[:, kept]
    return NegativePairs(positive, document, torch.ones_like(document).to(batch.relevance.dtype), column)


def in_batch_negatives(batch: ClickBatch, positives: Positives, duplicates: Duplicates) -> InBatchPairs:
    """Every positive with every document column of the batch.

    ``"mask"`` leaves out documents that are positives of the query; ``"keep"`` only the positive's column.
    """
    count = _column_counts(batch)
    if duplicates == "keep":
        group = torch.arange(len(positives.row), device=count.device)
        false_negatives = torch.stack([group, positives.document])
        removed = torch.ones_like(positives.weight)
    else:
        queries, group = torch.unique(positives.query, return_inverse=True)
        false_negatives = renumbered(batch.false_negatives(), queries, len(batch.query_fingerprints))
        removed = count[false_negatives[1]]
    return InBatchPairs(positives.document, positives.weight, group, count, false_negatives, removed)


def sigmoid_targets(batch: ClickBatch, relevance: Relevance, duplicates: Duplicates) -> SigmoidTargets:
    """Every row's query against every document column; positive at the row's first document if r > 0.

    Weights are divided by the sum of those of rows with r > 0. With ``relevance="weight"`` a row's pairs weigh r;
    those of a row with r ≤ 0, all of them negatives, weigh 1.
    """
    positives = Positives.of(batch, relevance)
    positives = positives.select(positives.is_local(batch))
    weight = _row_weights(batch, relevance)[batch.local_rows]
    count = _column_counts(batch)
    query_weight = torch.zeros(len(batch.query_fingerprints), dtype=weight.dtype, device=weight.device)
    query_weight.index_add_(0, batch.query[batch.local_rows], weight)

    pairs = torch.stack([positives.query, positives.document])
    if duplicates == "keep":
        false_negatives, removed = pairs, positives.weight
    else:
        false_negatives = batch.false_negatives()
        removed = query_weight[false_negatives[0]] * count[false_negatives[1]]
    return SigmoidTargets(query_weight, count, false_negatives, removed, pairs, positives.weight)


def _row_weights(batch: ClickBatch, relevance: Relevance) -> Tensor:
    """Weights (M,) of all rows of the sigmoid loss; 0 in a batch without positives."""
    positive = batch.relevance > 0
    weights = torch.where(positive & (relevance == "weight"), batch.relevance, 1.0).to(batch.relevance.dtype)
    total = weights[positive].sum()
    return weights / total if total > 0 else torch.zeros_like(weights)


def _column_counts(batch: ClickBatch) -> Tensor:
    """How many document columns (B,) hold each document."""
    encoded = batch.document[batch.document >= 0]
    return torch.bincount(encoded, minlength=len(batch.document_fingerprints)).to(batch.relevance.dtype)


def _shown_to_the_same_query(batch: ClickBatch, positives: Positives) -> tuple[Tensor, Tensor]:
    """Each positive with each row of r ≤ 0 of its query: (number of the positive, row)."""
    shown = _shown_rows(batch)
    shown = shown[torch.argsort(batch.query[shown], stable=True)]
    number, entry = _join(positives.query, batch.query[shown])
    return number, shown[entry]


def _shown_rows(batch: ClickBatch) -> Tensor:
    """Rows (N,) of r ≤ 0, as far as they are encoded."""
    return ((batch.relevance <= 0) & (batch.query >= 0) & (batch.document[0] >= 0)).nonzero().flatten()


def _join(values: Tensor, sorted_values: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, j) with ``values[i] == sorted_values[j]``, sorted."""
    begin = torch.searchsorted(sorted_values, values)
    matches = torch.searchsorted(sorted_values, values, right=True) - begin
    number = torch.repeat_interleave(matches)
    return number, torch.arange(len(number), device=number.device) + (begin - matches.cumsum(0) + matches)[number]


def _is_pair_of(pairs: Tensor, query: Tensor, document: Tensor, num_documents: int) -> Tensor:
    """Whether each (query, document) is among the sorted index ``pairs`` (2, C)."""
    if pairs.shape[1] == 0:
        return torch.zeros_like(query, dtype=torch.bool)
    flat, wanted = (pair[0] * num_documents + pair[1] for pair in (pairs, (query, document)))
    return flat[torch.searchsorted(flat, wanted).clamp_max(len(flat) - 1)] == wanted
