"""Checks of what a loss is given: each a ValueError that names the argument, the value and the cure."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import Tensor, nn

from st_fpsloss.encoding.rows import routes_by_task
from st_fpsloss.losses.arguments import Similarity


def similarity_of(model: SentenceTransformer, similarity: Similarity | None) -> Similarity:
    """The similarity that a loss is to use: the one given, or the model's own."""
    name = model.similarity_fn_name if similarity is None else similarity
    if name not in ("dot", "cosine"):
        raise ValueError(
            f"`similarity` must be 'dot' or 'cosine', got {name!r}. Pass one of them, or set the model's "
            "`similarity_fn_name`, which is what `similarity=None` takes."
        )
    return name


def check_model(model: object) -> None:
    """Raise a ValueError unless the model is a SentenceTransformer whose towers, if it has two, are known by task."""
    if not isinstance(model, SentenceTransformer):
        raise ValueError(
            f"`model` must be a SentenceTransformer, with dense embeddings, got a {type(model).__name__}. For a "
            "CrossEncoder or a SparseEncoder take those of sentence-transformers; `two_tower` makes "
            "a model for this one."
        )
    router = next((module for module in model.children() if isinstance(module, Router)), None)
    if router is not None and not routes_by_task(model):
        raise ValueError(
            f"`model` has a Router with the routes {list(router.sub_modules)}, which do not tell queries from "
            'documents. Name them "query" and "document", or say which is which, as in Router(..., route_mappings='
            '{("query", None): "user", ("document", None): "item"}), and let `router_mapping` in the training '
            'arguments map columns to "query" and "document".'
        )


def check_layers(model: nn.Module) -> None:
    """Raise a ValueError if AdaptiveLayerLoss or Matryoshka2dLoss has replaced a forward pass of the encoder."""
    if any(type(vars(module).get("forward")).__name__ == "TransformerDecorator" for module in model.children()):
        raise ValueError(
            "AdaptiveLayerLoss and Matryoshka2dLoss call the encoder once a column, and this loss encodes distinct "
            "rows in mini-batches: layers and rows would be mixed. MatryoshkaLoss works around it; for fewer layers "
            "take `Tower(..., num_hidden_layers=...)`."
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_cache_gradients(value: object) -> None:
    """Raise a ValueError unless ``value`` is "auto", True, False, or a number of tokens."""
    if value != "auto" and (not isinstance(value, int) or (value < 1 and value is not False)):
        raise ValueError(
            "`cache_gradients` must be 'auto', True, False, or the number of tokens whose graphs may be kept, a whole "
            f"number from 1, got {value!r}. 'auto' keeps the graphs that fit, False all, True as few as possible."
        )


def check_cache_frozen(value: object) -> None:
    """Raise a ValueError unless ``value`` is True, False or a folder."""
    if isinstance(value, bool):
        return
    if not isinstance(value, (str, os.PathLike)) or value == "" or os.path.isfile(value):
        raise ValueError(f"`cache_frozen` must be True, False or a folder, new or of an earlier run, got {value!r}.")


def check_relevance(labels: Tensor | None, num_rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Relevance (M,) of a batch's rows: the labels, or 1 for every row.

    Raises:
        ValueError: If there is not one finite number a row.
    """
    if labels is None:
        return torch.ones(num_rows, device=device, dtype=dtype)
    if tuple(labels.shape) != (num_rows,):
        raise ValueError(
            f"`label` must hold one number a row, shape ({num_rows},), but has the shape {tuple(labels.shape)}."
        )
    if not bool(torch.isfinite(labels).all()):
        row = int((~torch.isfinite(labels)).nonzero()[0])
        raise ValueError(
            f"`label` must be finite, but row {row} of the batch has {labels[row].item()}. Drop such rows, or give "
            "them a relevance: above 0 for a positive, 0 or below for a document that was shown and not clicked."
        )
    return labels.to(device=device, dtype=dtype)


def check_embeddings(embeddings: Sequence[Tensor]) -> None:
    """Raise a ValueError unless there are two or more tensors of one shape (M, dim)."""
    if len(embeddings) < 2:
        raise ValueError(f"`embeddings` needs at least queries and documents, got {len(embeddings)} tensor(s).")
    shapes = [tuple(tensor.shape) for tensor in embeddings]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"`embeddings` must all have one shape (M, dim), got {shapes}.")
