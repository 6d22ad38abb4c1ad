"""Naive float64 references: the formulas written out row by row over the M×M product, with nothing shared or tiled."""

from __future__ import annotations

import torch
from torch import Tensor


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
