"""One batch over several processes: clicks and embeddings of all ranks, with exact gradients.

Every rank learns its own positives against the documents of all ranks. Its loss is its share of the global mean times
the number of ranks, so that the mean over ranks that DistributedDataParallel takes of the encoders' gradients (and
:class:`st_fpsloss.LossStateCallback` of α's) is the gradient of one process with the whole batch, up to no factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.encoding.rows import first_of_each


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Exchange:
    """How to come from one rank's unique embeddings to those of all ranks.

    Args:
        sizes: number of rows that each rank sends, its queries before its documents.
        query_rows: (A,) position of each unique query of the global batch among all that was sent.
        document_rows: (B,) position of each unique document.
    """

    sizes: list[int]
    query_rows: Tensor
    document_rows: Tensor

    def gather(self, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Unique queries and documents of the global batch: one gather forward, one reduction backward."""
        rows = _GatherRows.apply(torch.cat([queries, documents]), self.sizes)
        return rows[self.query_rows], rows[self.document_rows]


def gather_clicks(batch: ClickBatch) -> tuple[ClickBatch, Exchange]:
    """The batch of all ranks, rows in the order of ranks, and the way to its embeddings.

    Queries and documents that repeat on another rank are one row of the global batch, known by their fingerprints.
    """
    ranks = [_unpack(packed, batch.relevance.dtype) for packed in _gather_varying(_pack(batch))]
    num_queries = [len(rank.query_fingerprints) for rank in ranks]
    num_documents = [len(rank.document_fingerprints) for rank in ranks]
    sizes = [sum(pair) for pair in zip(num_queries, num_documents, strict=True)]
    starts = [sum(sizes[:rank]) for rank in range(len(ranks))]

    query_fingerprints, query_rows, queries = _merge(
        [rank.query_fingerprints for rank in ranks], [rank.query for rank in ranks], starts
    )
    document_fingerprints, document_rows, documents = _merge(
        [rank.document_fingerprints for rank in ranks],
        [rank.document for rank in ranks],
        [start + offset for start, offset in zip(starts, num_queries, strict=True)],
    )
    num_rows = [len(rank.relevance) for rank in ranks]
    first = sum(num_rows[: dist.get_rank()])
    merged = ClickBatch(
        query=torch.cat(queries),
        document=torch.cat(documents, dim=1),
        relevance=torch.cat([rank.relevance for rank in ranks]),
        query_fingerprints=query_fingerprints,
        document_fingerprints=document_fingerprints,
        query_log_q=_concatenated([rank.query_log_q for rank in ranks]),
        document_log_q=_concatenated([rank.document_log_q for rank in ranks]),
        local_rows=slice(first, first + num_rows[dist.get_rank()]),
    )
    return merged, Exchange(sizes, query_rows, document_rows)


def over_ranks(value: Tensor, operation: Literal["sum", "max"]) -> Tensor:
    """The sum or the maximum over ranks of a tensor that all of them have, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    return value


def distinct_ids(count: int, device: torch.device) -> Tensor:
    """Fingerprints (count,) int64 of rows that are all different, from those of other ranks too."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return torch.arange(count, device=device) + (rank << 40)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, ...) of all ranks, in the order of ranks; their number may differ."""
    return torch.cat(_gather_varying(rows)) if world_size() > 1 else rows


def _merge(fingerprints: list[Tensor], numbers: list[Tensor], starts: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Unique fingerprints over ranks, where the first row of each was sent from, and each rank's numbers."""
    unique_fingerprints, inverse = torch.unique(torch.cat(fingerprints), return_inverse=True)
    sent = torch.cat(
        [
            torch.arange(start, start + len(part), device=part.device)
            for start, part in zip(starts, fingerprints, strict=True)
        ]
    )
    of_rank = inverse.split([len(part) for part in fingerprints])
    missing = inverse.new_tensor([-1])  # found at the index -1
    renumbered = [torch.cat([new, missing])[old] for new, old in zip(of_rank, numbers, strict=True)]
    return unique_fingerprints, sent[first_of_each(inverse)], renumbered


def _pack(batch: ClickBatch) -> Tensor:
    """Everything about the clicks as one int64 vector, so that one collective carries it."""
    parts = [
        batch.query,
        batch.document.flatten(),
        batch.query_fingerprints,
        batch.document_fingerprints,
        _bits(batch.relevance),
    ]
    for log_q in (batch.query_log_q, batch.document_log_q):
        parts.append(batch.query[:0] if log_q is None else _bits(log_q.to(batch.relevance.dtype)))
    sizes = [len(part) for part in parts]
    return torch.cat([batch.query.new_tensor(sizes), *parts])


def _unpack(packed: Tensor, dtype: torch.dtype) -> ClickBatch:
    sizes = packed[:7].tolist()
    query, document, query_fingerprints, document_fingerprints, relevance, query_log_q, document_log_q = packed[
        7:
    ].split(sizes)
    num_rows = len(query)
    return ClickBatch(
        query=query,
        document=document.view(-1, num_rows),
        relevance=_floats(relevance, dtype),
        query_fingerprints=query_fingerprints,
        document_fingerprints=document_fingerprints,
        query_log_q=_floats(query_log_q, dtype) if len(query_log_q) else None,
        document_log_q=_floats(document_log_q, dtype).view(-1, num_rows) if len(document_log_q) else None,
    )


def _bits(values: Tensor) -> Tensor:
    """Numbers (N,) as int64 by their bits; float32 unless they are float64, which some accelerators lack."""
    values = values.flatten()
    return values.view(torch.int64) if values.dtype == torch.float64 else values.float().view(torch.int32).long()


def _floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.view(dtype) if dtype == torch.float64 else bits.int().view(torch.float32)


def _concatenated(parts: list[Tensor | None]) -> Tensor | None:
    """Rows of all ranks, along the last dimension; None if no rank has any."""
    given = [part for part in parts if part is not None]
    return torch.cat(given, dim=-1) if given else None


def _gather_varying(rows: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
    """Tensors of all ranks that differ in their first dimension: sizes first, then padded to the largest."""
    if sizes is None:
        counts = [rows.new_zeros(1, dtype=torch.int64) for _ in range(world_size())]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.sizes = sizes
        return torch.cat(_gather_varying(rows, sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()], None
