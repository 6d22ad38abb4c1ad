"""What the tiled computations equal: each loss as plain PyTorch on all index pairs, nothing shared and nothing tiled.

M rows (query, document, further documents, r) with all their repeats: ``U`` (M, dim) are the queries, ``W``
(columns, M, dim) the documents, ``query`` (M,) and ``document`` (columns, M) say which of them are the same, ``r`` (M,)
is the relevance. Nothing of this runs in training; the tests judge everything by it, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def full_product_softmax(
    U: Tensor,
    W: Tensor,
    alpha: Tensor,
    query: Tensor,
    document: Tensor,
    r: Tensor,
    direction: str = "query_to_doc",
    duplicates: str = "keep",
    relevance: str = "mask",
    log_q: str | None = None,
    document_log_q: Tensor | None = None,
    query_log_q: Tensor | None = None,
) -> Tensor:
    """``-1[r>0]ᵀ log diag softmax(α U Wᵀ)``: each row's anchor against all candidates, its own in column i of row i."""
    if direction == "query_to_doc":
        anchors, candidates, anchor, candidate, q = U, W.flatten(0, 1), query, document.flatten(), document_log_q
    else:
        anchors, candidates, anchor, candidate, q = W[0], U, document[0], query, query_log_q
    positive_of = query if direction == "doc_to_query" else document[0]
    logits = alpha * anchors @ candidates.T
    is_own = torch.eye(*logits.shape, dtype=torch.bool)
    is_positive = _is_positive(anchor, candidate, anchor, positive_of, r)
    masked = is_positive & ~is_own if duplicates == "mask" else torch.zeros_like(is_own)
    if log_q is not None and q is not None:
        q = q.flatten()
        if log_q == "standard":
            logits = logits - q
        else:
            num_negatives = (~masked & ~is_own).sum(dim=1, keepdim=True)
            unmasked_q = 1 - (is_positive * _is_first(candidate) * q.exp()).sum(dim=1, keepdim=True)
            logits = torch.where(is_own, logits, logits - torch.log(num_negatives * q.exp() / unmasked_q))
    losses = logits.masked_fill(masked, -torch.inf).logsumexp(dim=1) - logits.diagonal()
    return _mean(losses, r, relevance)


def sampled_softmax(
    U: Tensor,
    W: Tensor,
    alpha: Tensor,
    query: Tensor,
    document: Tensor,
    r: Tensor,
    explicit: bool,
    duplicates: str = "mask",
    relevance: str = "mask",
    hardest: int | None = None,
    log_q: str | None = None,
    document_log_q: Tensor | None = None,
) -> Tensor:
    """``-log( exp R(q, d⁺) / Σ exp R(q, d_i) )`` over d⁺ and the negatives of each row."""
    logits = _logits(U, W, alpha)
    positive = logits[:, 0].diagonal()
    counted = negatives(query, document, r, explicit, duplicates)
    if hardest is not None:
        counted = _hardest(logits, counted, hardest)
    if log_q is not None and document_log_q is not None:
        # In-batch columns are all drawn; beside explicit ones, those of column 0 were shown: each is one document.
        drawn = counted.clone()
        drawn[:, 0] &= not explicit
        num_drawn = drawn.sum(dim=(1, 2), keepdim=True).clamp_min(1).to(logits.dtype)
        if log_q == "standard":
            positive = positive - document_log_q[0]
            logits = torch.where(drawn, logits - document_log_q, logits + num_drawn.log())
        else:
            flat = document.flatten()
            is_positive = _is_positive(query, flat, query, document[0], r)
            unmasked_q = 1 - (is_positive * _is_first(flat) * document_log_q.flatten().exp()).sum(dim=1)
            corrected = logits - torch.log(num_drawn * document_log_q.exp() / unmasked_q[:, None, None])
            logits = torch.where(drawn, corrected, logits)
    of_row = logits.masked_fill(~counted, -torch.inf).flatten(1)
    return _mean(torch.cat([positive[:, None], of_row], dim=1).logsumexp(dim=1) - positive, r, relevance)


def pairwise(
    U: Tensor,
    W: Tensor,
    alpha: Tensor,
    query: Tensor,
    document: Tensor,
    r: Tensor,
    pair_loss: Callable[[Tensor], Tensor],
    explicit: bool,
    duplicates: str = "mask",
    relevance: str = "mask",
    hardest: int | None = None,
    semi_hard: float | None = None,
) -> Tensor:
    """Mean over the pairs of a row's positive and each of its negatives of ``pair_loss(R⁺ - R⁻)``.

    ``semi_hard`` is the margin within which pairs count, None for all.
    """
    logits = _logits(U, W, alpha)
    gaps = logits[:, 0].diagonal()[:, None, None] - logits
    counted = negatives(query, document, r, explicit, duplicates)
    if hardest is not None:
        counted = _hardest(logits, counted, hardest)
    if semi_hard is not None:
        counted = counted & (gaps > 1e-6) & (gaps < semi_hard)  # the positive again has the gap 0, up to rounding
    weights = _weights(r, relevance)[:, None, None] * counted
    return (weights * pair_loss(gaps)).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def sigmoid(
    U: Tensor,
    W: Tensor,
    alpha: Tensor,
    beta: Tensor,
    query: Tensor,
    document: Tensor,
    r: Tensor,
    duplicates: str = "mask",
    relevance: str = "mask",
) -> Tensor:
    """Sum of ``-log σ(y (α R + β))`` over every row's query and every document, divided by the rows with r > 0."""
    logits = _logits(U, W, alpha) + beta
    is_own = torch.zeros_like(logits, dtype=torch.bool)
    is_own[:, 0] = torch.diag(r > 0)
    losses = -logsigmoid(torch.where(is_own, logits, -logits))
    if duplicates == "mask":
        is_positive = _is_positive(query, document.flatten(), query, document[0], r).view_as(is_own)
        losses = losses.masked_fill(is_positive & ~is_own, 0.0)
    weights = torch.where((r > 0) & (relevance == "weight"), r, 1.0)
    total = weights[r > 0].sum()
    return (weights[:, None, None] * losses).sum() / total if total > 0 else 0 * losses.sum()


def negatives(query: Tensor, document: Tensor, r: Tensor, explicit: bool, duplicates: str) -> Tensor:
    """Which documents (column, row) are negatives of each row, (M, columns, M) bool; none of a row with r ≤ 0.

    Explicit: the row's own after the first, and those shown to its query and not clicked. In-batch: all but its own.
    """
    columns, rows = document.shape
    is_first = torch.arange(columns)[:, None] == 0
    same_row = torch.eye(rows, dtype=torch.bool)[:, None]
    if explicit:
        shown = (query[:, None] == query)[:, None] & (r <= 0)
        found = (same_row & ~is_first) | (shown & is_first)
    else:
        found = ~(same_row & is_first)
    if duplicates == "mask":
        found = found & ~_is_positive(query, document.flatten(), query, document[0], r).view(rows, columns, rows)
    return found & (r > 0)[:, None, None]


def _logits(U: Tensor, W: Tensor, alpha: Tensor) -> Tensor:
    """Every query (M,) with every document (columns, M)."""
    return alpha * torch.einsum("id,cjd->icj", U, W)


def _is_positive(anchor: Tensor, candidate: Tensor, anchors: Tensor, positives: Tensor, r: Tensor) -> Tensor:
    """Whether a click (r > 0) of any row has this anchor and this candidate."""
    clicked = r > 0
    has_anchor = anchor[:, None] == anchors[clicked]
    has_candidate = candidate[:, None] == positives[clicked]
    return (has_anchor[:, None] & has_candidate).any(dim=2)


def _is_first(ids: Tensor) -> Tensor:
    """Whether no earlier entry has the same id."""
    return (ids[:, None] == ids).int().argmax(dim=1) == torch.arange(len(ids))


def _hardest(logits: Tensor, counted: Tensor, k: int) -> Tensor:
    """The k counted entries of each row with the largest logits."""
    order = logits.masked_fill(~counted, -torch.inf).flatten(1).argsort(dim=1, descending=True)
    chosen = torch.zeros_like(counted).flatten(1).scatter(1, order[:, :k], True)
    return chosen.view_as(counted) & counted


def _weights(r: Tensor, relevance: str) -> Tensor:
    return torch.where(r > 0, r if relevance == "weight" else torch.ones_like(r), 0.0)


def _mean(losses: Tensor, r: Tensor, relevance: str) -> Tensor:
    """Weighted mean over the rows with r > 0; 0 without any."""
    weights = _weights(r, relevance)[r > 0]
    return (weights * losses[r > 0]).sum() / weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)
