"""A model in words: its towers, and which values of the training data it holds in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, StaticEmbedding, Transformer
from torch import nn


def tower_modules(model: SentenceTransformer, task: str) -> list[nn.Module]:
    """The modules that an input of a task (``"query"`` or ``"document"``) goes through, in order."""
    return [
        inner
        for module in model
        for inner in (
            module.sub_modules[task] if isinstance(module, Router) and task in module.sub_modules else [module]
        )
    ]


def describe_tower(model: SentenceTransformer, task: str) -> str:
    """One line about a tower: encoder, pooling, MLP, trainable or not.

    Example:
        >>> from st_fpsloss.towers import Tower, id_embedding, two_tower
        >>> words = Tower(id_embedding(["a", "b"], 8), hidden_dims=(16,))
        >>> describe_tower(two_tower(words, words, embedding_dim=4), "query")
        'StaticEmbedding of 5 tokens x 8, MLP 8-16-4'
    """
    parts: list[str] = []
    sizes: list[int] = []
    for module in tower_modules(model, task):
        if isinstance(module, Dense):
            sizes = sizes or [module.in_features]
            sizes.append(module.out_features)
        else:
            parts += _describe(module)
    if sizes:
        parts.append(("MLP " if len(sizes) > 2 else "linear layer ") + "-".join(map(str, sizes)))
    return ", ".join(parts)


def _describe(module: nn.Module) -> Iterator[str]:
    encoder = getattr(module, "text_encoder", None)
    if encoder is not None:
        yield from _describe(encoder)
    if isinstance(module, Transformer):
        config = module.auto_model.config
        layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
        size = f" with {layers} layers of {width}" if layers and width else ""
        yield f"{type(module.auto_model).__name__}{size}, at most {module.max_seq_length} tokens"
    elif isinstance(module, StaticEmbedding):
        yield f"StaticEmbedding of {module.embedding.num_embeddings:,} tokens x {module.embedding.embedding_dim}"
    elif isinstance(module, Pooling):
        modes = module.pooling_mode
        yield f"{modes if isinstance(modes, str) else '+'.join(modes)} pooling"
    if features := getattr(module, "features", None):
        yield "side features " + ", ".join(f"`{feature.name}` ({type(feature).__name__})" for feature in features)


def vocabularies(model: SentenceTransformer) -> list[str]:
    """A line for each side feature that keeps values of the training data: in plain text, or hashed."""
    lines: list[str] = []
    for task in ("query", "document"):
        for module in tower_modules(model, task):
            features: Sequence[Any] = getattr(module, "features", ())
            for feature in features:
                if vocabulary := getattr(feature, "vocabulary", None):
                    lines.append(
                        f"`{feature.name}` ({task} tower): {len(vocabulary):,} values in plain text. To keep them "
                        "out of the model, train with `buckets=` instead of a vocabulary."
                    )
                elif buckets := getattr(feature, "buckets", None):
                    lines.append(
                        f"`{feature.name}` ({task} tower): hashed into {buckets:,} buckets, no value is stored."
                    )
    return list(dict.fromkeys(lines))
