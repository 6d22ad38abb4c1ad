"""All documents of a small catalogue, as further columns of every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch
from st_fpsloss.batch.distributed import over_ranks
from st_fpsloss.encoding.rows import TokenizedRows, preprocessed_rows


class Catalogue:
    """Documents that are encoded with every batch.

    Args:
        model: the model whose document tower preprocesses them.
        inputs: strings, or dicts with text and features.
        prompt: what stands before each document.
    """

    def __init__(self, model: SentenceTransformer, inputs: Sequence[Any], prompt: str | None) -> None:
        inputs = list(inputs)
        if not inputs:
            raise ValueError("`catalogue` is empty. Pass the inputs of all documents, or None for sampled negatives.")
        self._rows = TokenizedRows.stack(list(preprocessed_rows(model, inputs, "document", prompt)))
        self._keys = self._rows.fingerprints()

    def __len__(self) -> int:
        return len(self._rows)

    def columns(
        self, num_rows: int, device: torch.device, same_on_all_ranks: bool
    ) -> list[tuple[TokenizedRows, Tensor]]:
        """The documents in columns of ``num_rows`` rows, and which of these rows are documents.

        Ranks whose batches differ in size need different numbers of columns, unless ``same_on_all_ranks``.
        """
        self._rows, self._keys = self._rows.to(device), self._keys.to(device)
        num_columns = torch.tensor(math.ceil(len(self) / num_rows), device=device)
        if same_on_all_ranks:
            num_columns = over_ranks(num_columns, "max")
        index = torch.arange(int(num_columns) * num_rows, device=device)
        return [(self._rows.select(part.clamp_max(len(self) - 1)), part < len(self)) for part in index.split(num_rows)]

    def check(self, batch: ClickBatch) -> None:
        """Raise a ValueError if a positive is not among the documents."""
        rows = (batch.relevance > 0).nonzero().flatten()
        missing = rows[~torch.isin(batch.document_fingerprints[batch.document[0, rows]], self._keys)]
        if len(missing):
            raise ValueError(
                f"`catalogue` lacks the document of row {int(missing[0])} of the batch. Add it, spelled as in the data "
                "set; if the training arguments' `prompts` put something before documents, pass it as "
                "`catalogue_prompt`."
            )
