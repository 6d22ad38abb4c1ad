"""Figures of a batch of clicks: what repeats, what is masked, and whether there is anything to learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch, Direction, Duplicates


def repeated_rows(batch: ClickBatch) -> float:
    """Share of the rows of all columns that repeat another one, and so were not encoded."""
    rows = [index[index >= 0] for index in (batch.query, batch.document)]
    num_rows, num_distinct = (sum(map(len, parts)) for parts in (rows, map(torch.unique, rows)))
    return 1 - num_distinct / max(1, num_rows)


def masked_share(batch: ClickBatch) -> float:
    """Share of a row's document columns, its positive's aside, that are false negatives of it."""
    index = batch.document[batch.document >= 0]
    count = torch.bincount(index, minlength=len(batch.document_fingerprints)).to(torch.float64)
    query, document = batch.false_negatives()
    masked = count.new_zeros(len(batch.query_fingerprints)).index_add_(0, query, count[document])
    rows = batch.query[batch.relevance > 0]
    num_others = len(index) - 1
    return float((masked[rows] - 1).mean()) / num_others if len(rows) and num_others > 0 else 0.0


def masked_q(batch: ClickBatch) -> float:
    """Share of Q that the other positives of a row's query have, the mean over rows with r > 0."""
    rows = batch.relevance > 0
    if batch.document_log_q is None or not rows.any():
        return 0.0
    own = batch.document_log_q[0, rows].exp()
    return float((1 - batch.log_unmasked_q().exp()[batch.query[rows]] - own).clamp_min(0).mean())


def has_in_batch_negatives(batch: ClickBatch, direction: Direction, duplicates: Duplicates) -> bool:
    """Whether any row with r > 0 has a negative among the other rows."""
    anchor, candidate, pairs = batch.query, batch.document, batch.false_negatives()
    if direction == "doc_to_query":
        anchor, candidate, pairs = batch.document[0], batch.query, pairs.flip(0)
    num_candidates = len(torch.unique(candidate[candidate >= 0]))
    if duplicates == "keep":
        return num_candidates > 1
    masked = torch.bincount(pairs[0])[anchor[batch.relevance > 0]]
    return bool((masked < num_candidates).any())


def norm_popularity(documents: Tensor, batch: ClickBatch) -> float | None:
    """Spearman's correlation between the norm of the distinct documents (B, dim) and log Q; None if one is constant."""
    assert batch.document_log_q is not None
    encoded = batch.document >= 0
    popularity = batch.document_log_q.new_zeros(len(documents))
    popularity[batch.document[encoded]] = batch.document_log_q[encoded]  # columns of one document have one Q, or nearly
    ranks = torch.stack([_ranks(documents.float().norm(dim=1)), _ranks(popularity)])
    if len(documents) < 2 or bool((ranks.std(dim=1) == 0).any()):
        return None
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,), equal values with the mean of theirs."""
    _, inverse, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2)[inverse]
