"""All documents of a small catalogue, as further columns of every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss.click_batch import ClickBatch
from st_fpsloss.rows import Rows, preprocessed_rows


class Catalogue:
    """Documents that are encoded with every batch.

    Args:
        model: the model whose document tower preprocesses them.
        inputs: strings, or dicts with text and features.
        task: the tower, or None for a model without a router.
        prompt: what stands before each document.
    """

    def __init__(self, model: SentenceTransformer, inputs: Sequence[Any], task: str | None, prompt: str | None) -> None:
        inputs = list(inputs)
        if not inputs:
            raise ValueError("`catalogue` is empty. Pass the inputs of all documents, or None for sampled negatives.")
        self._rows = Rows.stack(list(preprocessed_rows(model, inputs, task, prompt)))

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self, num_rows: int, device: torch.device) -> list[tuple[Rows, Tensor]]:
        """The documents in columns of ``num_rows`` rows, and which of these rows are documents."""
        self._rows = self._rows.to(device)
        index = torch.arange(self._num_columns(num_rows) * num_rows, device=device)
        return [(self._rows.select(part.clamp_max(len(self) - 1)), part < len(self)) for part in index.split(num_rows)]

    def check(self, batch: ClickBatch) -> None:
        """Raise a ValueError if a positive is not among the documents; the batch's last columns are the catalogue."""
        columns = batch.document[-self._num_columns(len(batch.relevance)) :]
        present = torch.zeros(len(batch.document_keys), dtype=torch.bool, device=columns.device)
        present[columns[columns >= 0]] = True
        rows = (batch.relevance > 0).nonzero().flatten()
        missing = rows[~present[batch.document[0, rows]]]
        if len(missing):
            raise ValueError(
                f"`catalogue` lacks the document of row {int(missing[0])} of the batch. Add it, spelled as in the data "
                "set; if the training arguments' `prompts` put something before documents, pass it as "
                "`catalogue_prompt`."
            )

    def _num_columns(self, num_rows: int) -> int:
        return math.ceil(len(self) / num_rows)
