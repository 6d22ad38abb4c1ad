"""Embedding many inputs with a trained model, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.autonotebook import trange

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

CHUNK_SIZE = 32_768
"""Inputs that are embedded in one go: what is kept besides the embeddings themselves stays below this many rows."""


def checked_similarity(model: SentenceTransformer) -> str:
    """Return the model's similarity, ``"dot"`` or ``"cosine"``.

    Args:
        model: The model whose ``similarity_fn_name`` is read.

    Returns:
        ``"dot"`` or ``"cosine"``.

    Raises:
        ValueError: For another similarity: nearest neighbours are found by inner products here.
    """
    similarity = str(model.similarity_fn_name)
    if similarity not in ("dot", "cosine"):
        raise ValueError(
            f"model.similarity_fn_name is {similarity!r}: only 'dot' and 'cosine' are supported; "
            "set model.similarity_fn_name to the one that the model was trained with."
        )
    return similarity


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors by their lengths, so that an inner product is the cosine.

    Args:
        vectors: (N, dim).

    Returns:
        (N, dim); a vector of length 0 stays as it is.
    """
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def embed(
    encode: Callable[..., Any],
    inputs: Sequence[Any],
    batch_size: int = 32,
    show_progress_bar: bool = False,
    **settings: Any,
) -> np.ndarray:
    """Embed inputs in one go.

    Args:
        encode: ``model.encode_query`` or ``model.encode_document``.
        inputs: Strings, or dicts with ``"text"`` and features.
        batch_size: Inputs in one forward pass.
        show_progress_bar: Whether to show a progress bar.
        settings: Further arguments of ``encode``, such as ``pool``.

    Returns:
        (N, dim) float32 embeddings.

    Raises:
        ValueError: If the model gives an embedding that is NaN or infinite.
    """
    encoded = encode(
        list(inputs), batch_size=batch_size, show_progress_bar=show_progress_bar, convert_to_tensor=True, **settings
    )
    embeddings = encoded.float().cpu().numpy()
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the model gave NaN or infinite embeddings for {int((~finite).sum())} inputs, the first "
            f"{repr(inputs[int(np.argmin(finite))])[:200]}: its weights are broken or the training diverged; load an "
            "earlier checkpoint or lower the learning rate."
        )
    return embeddings


def embed_in_chunks(
    encode: Callable[..., Any],
    inputs: Sequence[Any],
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> Iterator[np.ndarray]:
    """Embed inputs chunk by chunk, so that memory is bounded by what the caller keeps.

    Args:
        encode: ``model.encode_query`` or ``model.encode_document``.
        inputs: Strings, or dicts with ``"text"`` and features.
        batch_size: Inputs in one forward pass.
        show_progress_bar: Whether to show progress bars; None: if the logger is at INFO or below.

    Yields:
        (at most ``CHUNK_SIZE``, dim) float32 embeddings, in the order of ``inputs``.

    Raises:
        ValueError: If the model gives an embedding that is NaN or infinite.
    """
    if show_progress_bar is None:
        show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    one_chunk = len(inputs) <= CHUNK_SIZE
    for start in trange(0, len(inputs), CHUNK_SIZE, desc="Chunks", disable=one_chunk or not show_progress_bar):
        yield embed(encode, inputs[start : start + CHUNK_SIZE], batch_size, show_progress_bar)
