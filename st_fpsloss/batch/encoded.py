"""From encoded or ready rows to the unique queries and documents of a batch of clicks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.batch.distributed import Exchange, distinct_ids, gather_clicks
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.rows import first_of_each


@dataclass(frozen=True)
class EncodedClicks:
    """The clicks of a batch, and the rows of this process's embeddings where its unique queries and documents are."""

    batch: ClickBatch
    query_rows: Tensor
    document_rows: Tensor
    exchange: Exchange | None = None

    @classmethod
    def from_plan(cls, plan: BatchPlan, relevance: Tensor, num_columns: int) -> EncodedClicks:
        """Number the queries and the documents of a batch, each from 0; columns after the first ones are candidates."""
        query_rows, query = _renumber(plan.index[0, : len(relevance)])
        document_rows, document = _renumber(plan.index[1:])
        document = document[: num_columns - 1, : len(relevance)]
        batch = ClickBatch(query, document, relevance, plan.fingerprints[query_rows], plan.fingerprints[document_rows])
        return cls(batch, query_rows, document_rows)

    def gathered(self) -> EncodedClicks:
        """The clicks of all processes, over this one's rows."""
        batch, exchange = gather_clicks(self.batch)
        return replace(self, batch=batch, exchange=exchange)


def unique_by_id(columns: Sequence[Tensor], ids: Tensor | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows (U, dim) of some columns, the number (columns, M) of each row among them, and their ids (U,)."""
    rows = torch.cat(list(columns))
    shape = (len(columns), len(columns[0]))
    if ids is None:
        number = torch.arange(len(rows), device=rows.device)
        return rows, number.view(shape), distinct_ids(len(rows), rows.device)
    check_shape(name, ids, shape if name == "document_ids" else shape[1:])
    fingerprints, number = torch.unique(ids.to(rows.device).flatten(), return_inverse=True)
    return rows[first_of_each(number)], number.view(shape), fingerprints


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if a tensor is given and does not have the shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(tensor.shape)}.")


def _renumber(index: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct entries of ``index`` that are not -1, and ``index`` in numbers of them."""
    encoded = index >= 0
    rows, number = torch.unique(index[encoded], return_inverse=True)
    numbers = torch.full_like(index, -1)
    numbers[encoded] = number
    return rows, numbers
