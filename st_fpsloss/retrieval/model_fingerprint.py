"""Which model an index belongs to: a fingerprint of its document tower, and the check of a model against it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from st_fpsloss.retrieval.encode import checked_similarity, embed, normalized
from st_fpsloss.retrieval.snapshot import Snapshot

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

# Of a stored vector's length. Half precision moves an embedding by less, another model by about its whole length.
_SAME_MODEL_TOLERANCE = 0.05
_CACHE: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, str]]] = weakref.WeakKeyDictionary()


def document_fingerprint(model: SentenceTransformer) -> dict[str, str]:
    """Fingerprint the document tower: its weights, and what it does to an input before them.

    The query tower is no part of it: a model whose query tower alone was trained further searches the same index. The
    fingerprint is kept with the model until a weight changes.

    Args:
        model: The model.

    Returns:
        ``weights`` and ``preprocessing`` (hexadecimal hashes), and ``dtype`` of the weights.
    """
    modules = list(_document_modules(model))
    tensors = {f"{number}.{name}": tensor for number, module in enumerate(modules) for name, tensor in _state(module)}
    key = (
        [(name, tensor.data_ptr(), tensor._version, tensor.dtype) for name, tensor in tensors.items()],
        _settings(model, modules),
    )
    known = _CACHE.get(model)
    if known is not None and known[0] == key:
        return known[1]
    fingerprint = {
        "weights": _hash_of_tensors(tensors),
        "preprocessing": _hash([key[1], _configurations(modules)]),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
    }
    _CACHE[model] = (key, fingerprint)
    return fingerprint


def _document_modules(model: SentenceTransformer) -> Iterator[torch.nn.Module]:
    """The modules that a document passes: of a router the document's route alone."""
    for module in model.children():
        routes = getattr(module, "sub_modules", {})
        if "document" in routes:
            yield from routes["document"]
        else:
            yield module


def _state(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return sorted(module.state_dict(keep_vars=True).items())


def _hash_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    import torch

    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(model: SentenceTransformer, modules: list[torch.nn.Module]) -> list[Any]:
    """What can be set on a loaded model: the prompt and the lengths."""
    lengths = [getattr(part, "max_seq_length", None) for module in modules for part in module.modules()]
    return [model.prompts.get("document") or "", model.truncate_dim, lengths]


def _configurations(modules: list[torch.nn.Module]) -> list[Any]:
    """What modules do beside their weights: pooling, activations, vocabularies of features, tokenizers."""
    found: list[Any] = []
    for module in modules:
        for name, part in module.named_modules():
            if hasattr(part, "get_config_dict"):
                config = {key: value for key, value in part.get_config_dict().items() if key != "architecture"}
                found.append([name, type(part).__name__, config, _tokenizer(getattr(part, "tokenizer", None))])
    return found


def _tokenizer(tokenizer: Any) -> Any:
    """A tokenizer without its settings of padding and truncation, which every call changes."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return type(tokenizer).__name__
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}


def _hash(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def check_model(model: SentenceTransformer, info: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Refuse a model whose document tower did not embed the documents of an index.

    Args:
        model: The model.
        info: The manifest of the index.
        snapshot: Its documents.

    Raises:
        ValueError: Saying what differs.
    """
    cure = "search with the model that built it, or build the index again with this one."
    similarity = checked_similarity(model)
    if similarity != info["similarity"]:
        raise ValueError(
            f"the index was built for the similarity {info['similarity']!r}, and model.similarity_fn_name is "
            f"{similarity!r}: {cure}"
        )
    dimension = model.get_embedding_dimension()
    if dimension is not None and dimension != info["dimension"]:
        raise ValueError(
            f"the index has vectors of dimension {info['dimension']}, and the model embeds in {dimension}: {cure}"
        )
    built, found = info["model"], document_fingerprint(model)
    if built == found:
        return
    same_preprocessing = built["preprocessing"] == found["preprocessing"]
    if same_preprocessing and built["dtype"] != found["dtype"] and _embeds_alike(model, similarity, snapshot):
        return
    raise ValueError(
        "the index was built with another model, or with this one before it was trained on: the "
        f"{'weights' if same_preprocessing else 'preprocessing'} of the document tower differ: {cure}"
    )


def _embeds_alike(model: SentenceTransformer, similarity: str, snapshot: Snapshot) -> bool:
    """Compare a stored vector with the model's: a model in another precision cannot be told by its weights."""
    for row in np.flatnonzero(snapshot.live)[:1000].tolist():
        text = snapshot.row(row, ["input"])["input"]
        if text is not None:
            vectors = embed(model.encode_document, [json.loads(text)])
            (vector,) = normalized(vectors) if similarity == "cosine" else vectors
            (stored,) = snapshot.vectors_of(np.array([row]))
            return bool(np.linalg.norm(vector - stored) <= _SAME_MODEL_TOLERANCE * np.linalg.norm(stored))
    return True
