"""Decoders and encoders of today's kinds with random weights and a tiny vocabulary."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, LlamaConfig, ModernBertConfig, Qwen3Config

from st_fpsloss.towers import Tower, id_transformer, two_tower
from tests.losses.conftest import WORDS

_SHAPE: dict[str, Any] = dict(
    vocab_size=len(WORDS) + 8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "qwen": lambda: Qwen3Config(**_SHAPE, head_dim=8, num_key_value_heads=1),
    "llama": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=1),
    "modernbert": lambda: ModernBertConfig(**_SHAPE, local_attention=8, sep_token_id=2, cls_token_id=1),
}
POOLING = {"qwen": "lasttoken", "llama": "lasttoken", "modernbert": "mean"}


def tiny_transformer(kind: str, padding_side: str = "right", **options: Any) -> Transformer:
    """A Transformer module with random weights, the same at every call, that pads on a side."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[kind]())
    with torch.no_grad():  # at the default 0.02, attention hardly tells tokens apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        id_transformer(WORDS, 16, 1, 2, max_seq_length=50).tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, **options)
    transformer.tokenizer.padding_side = padding_side
    return transformer


def tiny_two_tower(kind: str, padding_side: str = "right", **options: Any) -> SentenceTransformer:
    """Two towers of such encoders, each with an MLP."""
    towers = [
        Tower(tiny_transformer(kind, padding_side, **options), pooling=POOLING[kind], hidden_dims=(16,)) for _ in "qd"
    ]
    torch.manual_seed(1)
    return two_tower(*towers, embedding_dim=8)


def tiny_encoder(kind: str, pooling: str, padding_side: str = "right", **options: Any) -> SentenceTransformer:
    """One such encoder with a pooling."""
    transformer = tiny_transformer(kind, padding_side, **options)
    return SentenceTransformer(modules=[transformer, Pooling(16, pooling)])
