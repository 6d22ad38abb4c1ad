"""What a frozen encoder gives for a row is computed once, and looked up ever after."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from st_fpsloss.encoding.embedding_store import EmbeddingStore
from st_fpsloss.encoding.memory import free_memory
from st_fpsloss.encoding.plan import BatchPlan, sorted_mini_batches
from st_fpsloss.encoding.prefixes import PREFIXES
from st_fpsloss.encoding.rows import TOKEN_TENSORS, Features, TokenizedRows

FrozenEncoder = tuple[Transformer, Pooling]

logger = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = 0.25
# Where an encoder came from and who wrote it is no part of what it computes.
_NOT_OF_THE_ENCODER = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class HalfEncodedRows(TokenizedRows):
    """Rows whose text has gone through the frozen encoder already.

    Args:
        encoder: the modules that have done it.
    """

    encoder: FrozenEncoder

    def embed(self, model: Any, documents: Tensor | None = None) -> Tensor:
        """Embeddings (N, dim), by what comes after the encoder."""
        with ExitStack() as stack:
            for module in self.encoder:
                stack.enter_context(_passing_on(module))
            return super().embed(model, documents)


class FrozenEncoderCache:
    """Replaces rows of a plan by what the frozen encoders of their towers give for them.

    An encoder is a ``Transformer`` and the ``Pooling`` behind it. It is frozen if none of its parameters takes a
    gradient and nothing in it is random: in eval mode, or without dropout. That is looked at in every batch, and
    embeddings are kept by a hash of the encoder's weights and settings, so they are never those of another encoder.

    Args:
        folder: where to keep embeddings; None for memory, up to a quarter of what is free.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._stores: dict[str, EmbeddingStore] = {}
        self._hashes: dict[FrozenEncoder, tuple[Any, str]] = {}
        self._logged = False

    def apply(self, model: nn.Module, plan: BatchPlan, mini_batch_num_tokens: int) -> BatchPlan:
        """A plan of the same rows, those of towers with a frozen encoder half encoded."""
        model = getattr(model, "module", model)  # DistributedDataParallel
        mini_batches: list[TokenizedRows] = []
        route_of: list[int] = []
        for route in dict.fromkeys(plan.route_of):
            batches = [rows for rows, of in zip(plan.mini_batches, plan.route_of, strict=True) if of == route]
            encoder = frozen_encoder(model, batches[0].metadata)
            if encoder is not None:
                batches = self._half_encoded(encoder, batches, mini_batch_num_tokens)
            mini_batches += batches
            route_of += [route] * len(batches)
        if not self._logged:
            self._log([rows for rows in mini_batches if isinstance(rows, HalfEncodedRows)])
        return replace(plan, mini_batches=mini_batches, route_of=route_of)

    def _half_encoded(
        self, encoder: FrozenEncoder, batches: Sequence[TokenizedRows], num_tokens: int
    ) -> list[TokenizedRows]:
        rows = TokenizedRows.stack(batches)
        tokens = replace(rows, tensors={name: rows.tensors[name] for name in TOKEN_TENSORS if name in rows.tensors})
        embeddings = self._embeddings(encoder, tokens, num_tokens)
        others = {name: tensor for name, tensor in rows.tensors.items() if name not in TOKEN_TENSORS}
        tensors = {**others, "sentence_embedding": embeddings}
        return [
            HalfEncodedRows(
                {name: tensor[chunk] for name, tensor in tensors.items()},
                torch.ones_like(chunk), rows.metadata, "padded", encoder,
            )
            for chunk in torch.arange(len(rows), device=embeddings.device).split(num_tokens)
        ]  # fmt: skip

    @torch.no_grad()
    def _embeddings(self, encoder: FrozenEncoder, rows: TokenizedRows, num_tokens: int) -> Tensor:
        device = rows.lengths.device
        fingerprints, inverse = torch.unique(rows.fingerprints(), return_inverse=True)  # side features set rows apart
        first = torch.empty_like(fingerprints).scatter_(0, inverse, torch.arange(len(rows), device=device))
        name = self._hash(encoder, device)
        store = self._stores.get(name)
        if store is None:
            store = self._stores[name] = self._new_store(encoder, name)
        missing = (~store.get(fingerprints)[0]).to(device).nonzero()[:, 0]
        computed: list[tuple[Tensor, Tensor]] = []
        padded = rows.layout == "padded"
        for chunk in sorted_mini_batches(rows.lengths[first[missing]], num_tokens, padded):
            numbers = missing[chunk]
            encoded = _encode(encoder, rows.select(first[numbers]))
            store.add(fingerprints[numbers], encoded)
            computed.append((numbers, encoded))
        found, kept = store.get(fingerprints)
        embeddings = torch.empty(len(fingerprints), store.dim, dtype=store.dtype, device=device)
        embeddings[found.to(device)] = kept.to(device)
        for numbers, encoded in computed:  # all of them, since the store may be full
            embeddings[numbers] = encoded
        return embeddings[inverse]

    def _new_store(self, encoder: FrozenEncoder, name: str) -> EmbeddingStore:
        transformer, pooling = encoder
        dim, dtype = pooling.get_embedding_dimension(), next(transformer.parameters()).dtype
        if self._folder is not None:
            return EmbeddingStore(dim, dtype, self._folder / name)
        return EmbeddingStore(dim, dtype, max_bytes=_SHARE_OF_FREE_MEMORY * free_memory(torch.device("cpu")))

    def _hash(self, encoder: FrozenEncoder, device: torch.device) -> str:
        """Hash of weights, settings and precision, taken again where a weight was written to."""
        tensors = [tensor for module in encoder for tensor in module.state_dict(keep_vars=True).values()]
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors], str(precision)
        known, found = self._hashes.get(encoder, (None, ""))
        if known != state:
            found = _hash_of(encoder, str(precision))
            self._hashes[encoder] = state, found
        return found

    def _log(self, half_encoded: Sequence[TokenizedRows]) -> None:
        self._logged = True
        if half_encoded:
            towers = sorted({str(rows.metadata.get("task")) for rows in half_encoded})
            logger.info("cache_frozen: the encoders of %s are frozen and encode each row once.", ", ".join(towers))
        else:
            logger.warning(
                "`cache_frozen` is on, but no tower has a frozen encoder: build it with `Tower(..., frozen=True)`, or "
                "call `requires_grad_(False)` on it and keep it in eval mode. Every row is encoded in every batch."
            )


def frozen_encoder(model: nn.Module, metadata: Features) -> FrozenEncoder | None:
    """The ``Transformer`` and ``Pooling`` that the rows of a tower go through first, if they cannot change."""
    if PREFIXES in metadata:
        return None
    modules = list(model.children())
    if modules and isinstance(modules[0], Router):
        router = modules[0]
        name = router._resolve_route(task=metadata.get("task"), modality=metadata.get("modality"))
        modules = list(router.sub_modules[name])
    if len(modules) < 2 or not isinstance(modules[1], Pooling):
        return None
    first = getattr(modules[0], "text_encoder", modules[0])  # a FeatureInput holds its text encoder
    if not isinstance(first, Transformer) or _changes(first) or _changes(modules[1]):
        return None
    return first, modules[1]


def _changes(module: nn.Module) -> bool:
    """Whether a module learns, or gives another output for the same input."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        part.training and _is_random(part) for part in module.modules()
    )


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, (_DropoutNd, _BatchNorm)):
        return getattr(module, "p", 1) > 0
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings.items())


def _encode(encoder: FrozenEncoder, rows: TokenizedRows) -> Tensor:
    features = rows.features()
    for module in encoder:
        features = module(features)
    return features["sentence_embedding"]


def _hash_of(encoder: FrozenEncoder, precision: str) -> str:
    transformer, pooling = encoder
    config = {name: value for name, value in transformer.config.to_dict().items() if name not in _NOT_OF_THE_ENCODER}
    settings = [precision, transformer.get_config_dict(), config, pooling.get_config_dict()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in encoder:
        for name, tensor in module.state_dict().items():
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


@contextmanager
def _passing_on(module: nn.Module) -> Iterator[None]:
    """Let a module pass on its features as they are."""
    before = module.__dict__.get("forward")
    module.forward = lambda features, **_: features
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
