"""Whether a loss agrees with its naive reference: value, and gradients of every distinct row, of log α and of β."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from st_fpsloss.losses.base import ClickLoss


def random_batch(rows: int, negatives: int, seed: int):
    """float64 embeddings per distinct id, ids with repeats, mixed r, and log Q."""
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    num_queries, num_documents = max(1, rows // 2), max(1, rows * (1 + negatives) // 2)
    query = torch.randint(num_queries, (rows,), generator=generator)
    document = torch.randint(num_documents, (1 + negatives, rows), generator=generator)
    r = torch.randint(0, 3, (rows,), generator=generator).double() / 2
    U = torch.randn(num_queries, 6, generator=generator, dtype=torch.float64)
    W = torch.randn(num_documents, 6, generator=generator, dtype=torch.float64)
    query_log_q = torch.log_softmax(torch.randn(num_queries, generator=generator).double(), 0) - 0.5
    document_log_q = torch.log_softmax(torch.randn(num_documents, generator=generator).double(), 0) - 0.5
    return U, W, query, document, r, query_log_q[query], document_log_q[document]


def assert_agrees(loss: ClickLoss, reference: Callable[..., Tensor], batch, **log_q: Tensor) -> None:
    """Compare in float64, where hardly any error is allowed, and in float32, where the naive formula errs as well.

    Args:
        loss: the loss.
        reference: its formula over (U, W, α, β, query, document, r).
        batch: distinct embeddings U and W, ids query and document, r.
        log_q: log Q that the loss is given.
    """
    loss.scale_and_bias.double()
    truth = _naive(loss, reference, torch.float64, *batch)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        loss.scale_and_bias.to(dtype)
        plain = _naive(loss, reference, dtype, *batch)
        for true, simple, mine in zip(truth, plain, _ours(loss, dtype, *batch, **log_q), strict=True):
            allowed = tolerance * true.norm() + (simple - true).norm() + tolerance / 100
            assert (mine - true).norm() <= allowed, (dtype, true, mine)


def _ours(loss, dtype, U, W, query, document, r, **log_q):
    U, W = (tensor.to(dtype).requires_grad_() for tensor in (U, W))
    value = loss.compute_loss_from_embeddings(
        [U[query], *W[document]], labels=r, query_ids=query, document_ids=document, **log_q
    )
    learned = [parameter for parameter in (loss.logit_scale, loss.logit_bias) if parameter.requires_grad]
    return value.detach(), *torch.autograd.grad(value, [U, W, *learned], materialize_grads=True)


def _naive(loss, reference, dtype, U, W, query, document, r):
    U, W = (tensor.to(dtype).requires_grad_() for tensor in (U, W))
    rows_u, rows_w = U[query], W[document]
    if loss.similarity == "cosine":
        rows_u, rows_w = F.normalize(rows_u, dim=-1), F.normalize(rows_w, dim=-1)
    parameters = [loss.logit_scale, loss.logit_bias]
    log_alpha, beta = (parameter.detach().to(dtype).requires_grad_() for parameter in parameters)
    value = reference(rows_u, rows_w, log_alpha.exp(), beta, query, document, r.to(dtype))
    learned = [leaf for leaf, parameter in zip((log_alpha, beta), parameters, strict=True) if parameter.requires_grad]
    return value.detach(), *torch.autograd.grad(value, [U, W, *learned], materialize_grads=True)
