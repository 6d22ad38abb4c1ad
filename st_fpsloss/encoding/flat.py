"""Rows whose tokens lie one after the other in one tensor, without padding: cut out of it, and put together again.

Two input modules give such features: StaticEmbedding (``offsets``), and a Transformer with flash attention
(``cu_seq_lens_q``), where attention ends at the borders of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]

# What sentence-transformers' preprocessing adds to a packed column; all of it follows from the rows' lengths.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def cut_bags(features: Features) -> Features:
    """Padded ``input_ids`` and ``attention_mask`` in the place of a StaticEmbedding's ids and offsets."""
    features = dict(features)
    ids, offsets = features["input_ids"], features.pop("offsets")
    mask = _mask(torch.diff(offsets, append=offsets.new_tensor([len(ids)])))
    return {**features, "input_ids": _padded(ids, mask), "attention_mask": mask.to(ids.dtype)}


def join_bags(features: Features) -> Features:
    """The inverse of :func:`cut_bags`."""
    features = dict(features)
    active = features.pop("attention_mask").bool()
    counts = active.sum(dim=1)
    return {**features, "input_ids": features["input_ids"][active], "offsets": counts.cumsum(0) - counts}


def cut_packed(features: Features) -> Features:
    """Padded token tensors and an ``attention_mask`` in the place of packed ones of shape (1, tokens)."""
    borders = features["cu_seq_lens_q"]
    mask = _mask(torch.diff(borders).long())
    cut = {
        name: _padded(value[0], mask) if name in ("input_ids", "position_ids", "token_type_ids") else value
        for name, value in features.items()
        if name not in _BORDERS
    }
    return {**cut, "attention_mask": mask.long()}


def join_packed(features: Features) -> Features:
    """The inverse of :func:`cut_packed`."""
    features = dict(features)
    active = features.pop("attention_mask").bool()
    lengths = active.sum(dim=1)
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    longest = int(lengths.max())
    for name in ("input_ids", "position_ids", "token_type_ids"):
        if name in features:
            features[name] = features[name][active][None]
    values = (borders, borders, longest, longest, row.int()[None])
    return {**features, **dict(zip(_BORDERS, values, strict=True))}


def _mask(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    padded = flat.new_zeros(mask.shape)
    padded[mask] = flat
    return padded
