"""Keys of raw inputs: what a row will be known by in training, before there is any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from st_fpsloss.input_codes import codes, spelling
from st_fpsloss.rows import row_keys


def input_keys(
    model: SentenceTransformer, inputs: Sequence[Any], task: str | None, prompt: str | None = None
) -> np.ndarray:
    """Keys (N,) int64 of inputs, each distinct one preprocessed once; see :func:`st_fpsloss.rows.row_keys`."""
    if not len(inputs):  # which no tower can preprocess
        return np.empty(0, dtype=np.int64)
    numbers, _ = codes(map(spelling, inputs))
    first = np.unique(numbers, return_index=True)[1]
    return row_keys(model, [inputs[number] for number in first], task, prompt).cpu().numpy()[numbers]
