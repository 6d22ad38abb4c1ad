"""Fingerprints of raw inputs: what a row will be known by in training, before there is any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from st_fpsloss.data.inputs import canonical_string, factorize
from st_fpsloss.encoding.rows import row_fingerprints


def input_fingerprints(
    model: SentenceTransformer, inputs: Sequence[Any], task: str | None, prompt: str | None = None
) -> np.ndarray:
    """Fingerprints (N,) int64 of inputs, each distinct one preprocessed once, as in training."""
    if not len(inputs):  # which no tower can preprocess
        return np.empty(0, dtype=np.int64)
    numbers, _ = factorize(map(canonical_string, inputs))
    first = np.unique(numbers, return_index=True)[1]
    return row_fingerprints(model, [inputs[number] for number in first], task, prompt).cpu().numpy()[numbers]
