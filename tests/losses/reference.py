"""Naive float64 references: the formulas written out row by row over the M×M product, with nothing shared or tiled."""

from __future__ import annotations

import math

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
    """FPSLoss of (M, dim) queries U and (C, M, dim) documents W with their ids, as the formulas say it."""
    if direction == "query_to_doc":
        asking, columns, ask_id, column_id = U, W.flatten(0, 1), query, document.flatten()
        column_log_q = None if document_log_q is None else document_log_q.flatten()
    else:
        asking, columns, ask_id, column_id, column_log_q = W[0], U, document[0], query, query_log_q
    S = alpha * asking @ columns.T
    positives: dict[int, set[int]] = {}
    for i in range(len(r)):
        if r[i] > 0:
            positives.setdefault(int(ask_id[i]), set()).add(int(column_id[i]))
    total, weight_sum = U.sum() * 0, 0.0
    for i in range(len(r)):
        if r[i] <= 0:
            continue
        own = positives[int(ask_id[i])]
        masked = [j for j in range(len(columns)) if duplicates == "mask" and int(column_id[j]) in own and j != i]
        kept = [j for j in range(len(columns)) if j not in masked]
        row = S[i]
        if log_q == "standard":
            row = row - column_log_q
            loss = torch.logsumexp(row[kept], 0) - row[i]
        elif log_q == "corrected":
            negatives = [j for j in kept if j != i]
            first_of = {int(column_id[j]): j for j in reversed(range(len(columns)))}
            masked_q = sum(column_log_q[first_of[document]].exp() for document in own)
            corrected = [row[j] - torch.log(len(negatives) * column_log_q[j].exp() / (1 - masked_q)) for j in negatives]
            loss = torch.logsumexp(torch.stack([row[i], *corrected]), 0) - row[i]
        else:
            loss = torch.logsumexp(row[kept], 0) - row[i]
        weight = float(r[i]) if relevance == "weight" else 1.0
        total, weight_sum = total + weight * loss, weight_sum + weight
    return total / weight_sum if weight_sum else total


def _positives_of(query: Tensor, document: Tensor, r: Tensor) -> dict[int, set[int]]:
    """Documents that are a positive of each query anywhere in the batch."""
    positives: dict[int, set[int]] = {}
    for i in range(len(r)):
        if r[i] > 0:
            positives.setdefault(int(query[i]), set()).add(int(document[0, i]))
    return positives


def negatives(
    query: Tensor, document: Tensor, r: Tensor, explicit: bool, duplicates: str
) -> dict[int, list[tuple[int, int]]]:
    """The negatives of each row with r > 0, as places (column, row) in (C, M) documents."""
    columns, rows = document.shape
    positives = _positives_of(query, document, r)
    found = {}
    for i in range(rows):
        if r[i] <= 0:
            continue
        if explicit:
            places = [(c, i) for c in range(1, columns)]
            places += [(0, j) for j in range(rows) if r[j] <= 0 and query[j] == query[i]]
        else:
            places = [(c, j) for c in range(columns) for j in range(rows) if (c, j) != (0, i)]
        masked = positives[int(query[i])] if duplicates == "mask" else set()
        found[i] = [place for place in places if int(document[place]) not in masked]
    return found


def _at(matrix: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Entries of a (C, M) matrix."""
    flat = torch.tensor([c * matrix.shape[1] + j for c, j in places], dtype=torch.int64)
    return matrix.flatten()[flat]


def pairwise(
    U: Tensor,
    W: Tensor,
    alpha: Tensor,
    query: Tensor,
    document: Tensor,
    r: Tensor,
    pair_loss,
    explicit: bool,
    duplicates: str = "mask",
    relevance: str = "mask",
    hardest: int | None = None,
    semi_hard: float | None = None,
) -> Tensor:
    """Mean over pairs of ``pair_loss(R⁺ - R⁻)``; ``semi_hard``: the margin."""
    total, weight_sum = U.sum() * 0, 0.0
    for i, places in negatives(query, document, r, explicit, duplicates).items():
        R = alpha * (W @ U[i])  # (C, M)
        gaps = R[0, i] - _at(R, places)
        if hardest is not None:
            gaps = gaps.sort().values[:hardest]
        if semi_hard is not None:
            gaps = gaps[(gaps > 1e-6) & (gaps < semi_hard)]  # the same document twice has the gap 0, up to rounding
        weight = float(r[i]) if relevance == "weight" else 1.0
        total, weight_sum = total + weight * pair_loss(gaps).sum(), weight_sum + weight * len(gaps)
    return total / weight_sum if weight_sum else total


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
    """Mean over rows with r > 0 of the softmax over the positive and the row's negatives."""
    positives = _positives_of(query, document, r)
    place_of = {int(d): (c, j) for c in range(len(document)) for j, d in enumerate(document[c])}
    total, weight_sum = U.sum() * 0, 0.0
    for i, places in negatives(query, document, r, explicit, duplicates).items():
        R = alpha * (W @ U[i])
        positive, negative = R[0, i], _at(R, places)
        if hardest is not None:
            negative = negative.sort(descending=True).values[:hardest]
        # In-batch columns are all drawn; beside explicit ones, those of column 0 were shown, and count as one document.
        is_drawn = torch.tensor([column > 0 or not explicit for column, _ in places], dtype=torch.bool)
        num_drawn = max(1, int(is_drawn.sum()))
        if log_q == "standard":
            positive = positive - document_log_q[0, i]
            negative = negative + torch.where(is_drawn, -_at(document_log_q, places), math.log(num_drawn))
        elif log_q == "corrected" and places:
            masked_q = sum(document_log_q[place_of[d]].exp() for d in positives[int(query[i])])
            drawn = torch.log((1 - masked_q) / num_drawn) - _at(document_log_q, places)
            negative = negative + torch.where(is_drawn, drawn, torch.zeros_like(drawn))
        loss = torch.logsumexp(torch.cat([positive[None], negative]), 0) - positive
        weight = float(r[i]) if relevance == "weight" else 1.0
        total, weight_sum = total + weight * loss, weight_sum + weight
    return total / weight_sum if weight_sum else total


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
    """Sum over all cells (row's query, document column), divided by the rows with r > 0."""
    positives = _positives_of(query, document, r)
    columns, rows = document.shape
    total, weight_sum = U.sum() * 0, 0.0
    for i in range(rows):
        clicked = bool(r[i] > 0)
        weight = float(r[i]) if relevance == "weight" and clicked else 1.0
        weight_sum += weight if clicked else 0.0
        logits = alpha * (W @ U[i]) + beta
        others = positives.get(int(query[i]), set()) if duplicates == "mask" else set()
        places = [(c, j) for c in range(columns) for j in range(rows) if not (clicked and (c, j) == (0, i))]
        total = total - weight * logsigmoid(-_at(logits, [p for p in places if int(document[p]) not in others])).sum()
        if clicked:
            total = total - weight * logsigmoid(logits[0, i])
    return total / weight_sum if weight_sum else U.sum() * 0
