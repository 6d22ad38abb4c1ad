"""Two levels of a batch: documents first, then queries that read the vectors of documents in their histories.

A column whose rows are histories of documents carries the documents' features under ``DOCUMENTS`` and the names of the
tensors that point at them under ``HISTORIES``. The documents join those of the other columns, so that each distinct one
is encoded once, and a mini-batch of queries is given the vectors that its histories read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from st_fpsloss.encoding.rows import HISTORIES, TokenizedRows


@dataclass(frozen=True)
class Reader:
    """A mini-batch of queries, and the documents that it reads.

    Args:
        rows: the mini-batch; its histories hold numbers among ``documents``, counted from 1.
        positions: (D,) position of each document among all document embeddings of the batch.
        documents: (D, dim) their embeddings.
    """

    rows: TokenizedRows
    positions: Tensor
    documents: Tensor


def documents_read(rows: TokenizedRows, needed: Tensor | None) -> TokenizedRows | None:
    """The documents in the histories of a column, of the (M,) rows that are needed; None where there are none."""
    if rows.documents is None or needed is None:
        return rows.documents
    read = torch.cat([tensor[needed].flatten() for tensor in _histories(rows).values()])
    chosen = torch.isin(rows.documents.fingerprints(), read).nonzero().flatten()
    return rows.documents.select(chosen) if len(chosen) else None


def with_positions(rows: TokenizedRows, fingerprints: Tensor) -> TokenizedRows:
    """Rows whose histories hold positions among (N,) fingerprints, counted from 1, in the place of fingerprints."""
    order = fingerprints.argsort()
    known = fingerprints[order]
    positions = {
        name: torch.where(tensor != 0, order[torch.searchsorted(known, tensor).clamp_max(len(known) - 1)] + 1, 0)
        for name, tensor in _histories(rows).items()
    }
    return replace(rows, tensors={**rows.tensors, **positions})


def readers(mini_batches: Sequence[TokenizedRows], documents: Tensor) -> list[Reader]:
    """Give mini-batches of queries the vectors that they read.

    Args:
        mini_batches: as :func:`with_positions` made them.
        documents: (N, dim) all document embeddings.
    """
    local = [_with_local_positions(rows) for rows in mini_batches]
    # One gather for all of them: its backward pass makes one gradient of the size of `documents`, not one for each.
    gathered = documents[torch.cat([positions for _, positions in local])].split([len(read) for _, read in local])
    return [Reader(rows, positions, vectors) for (rows, positions), vectors in zip(local, gathered, strict=True)]


def _with_local_positions(rows: TokenizedRows) -> tuple[TokenizedRows, Tensor]:
    histories = _histories(rows)
    read = torch.cat([tensor.flatten() for tensor in histories.values()]).unique()
    read = read[read > 0]
    local = {
        name: torch.where(tensor > 0, torch.searchsorted(read, tensor) + 1, 0) for name, tensor in histories.items()
    }
    return replace(rows, tensors={**rows.tensors, **local}), read - 1


def _histories(rows: TokenizedRows) -> dict[str, Tensor]:
    names = rows.metadata[HISTORIES]
    assert isinstance(names, tuple)
    return {name: rows.tensors[name] for name in names}
