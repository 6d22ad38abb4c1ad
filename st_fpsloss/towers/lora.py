"""LoRA on the encoders of towers: few weights learn, and the model is saved without a trace of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn

from st_fpsloss.towers.encoder import freeze_unused_parameters


def add_lora(
    model: SentenceTransformer, towers: Sequence[str] = ("query", "document"), rank: int = 16, **settings: Any
) -> list[str]:
    """Adds low-rank adapters to the transformers of towers; of these transformers nothing else learns any more.

    The MLP, side features and other towers learn as before. Adapters start without effect, and bear a higher learning
    rate than an encoder: ``learning_rate_mapping={"lora": 1e-3}``. Needs the package ``peft``.

    Whatever saves the model writes a plain one, the adapters added to the weights that they adapt: it loads anywhere,
    checkpoints too. A run with adapters therefore cannot go on from a checkpoint, nor use ``load_best_model_at_end``.

    Args:
        model: The model, changed in place.
        towers: Which of ``"query"`` and ``"document"``.
        rank: Rank of the adapters.
        settings: Further arguments of ``peft.LoraConfig``; ``lora_alpha`` is twice the rank by default.

    Returns:
        Names of the parameters of the adapters.

    Raises:
        ValueError: A tower is unknown or has no transformer.

    Example:
        >>> from st_fpsloss.towers import Tower, id_transformer, two_tower
        >>> from st_fpsloss.towers.lora import add_lora, merge_lora
        >>> model = two_tower(*(Tower(id_transformer(range(10), hidden_size=8)) for _ in range(2)))
        >>> len(add_lora(model, towers=["query"], rank=2))
        8
        >>> merge_lora(model)  # after training, to train on without adapters
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, **{"lora_alpha": 2 * rank, **settings})
    for transformer in _transformers(model, towers):
        inject_adapter_in_model(config, transformer.model)
        transformer.save = functools.partial(_save_merged, transformer)
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def merge_lora(model: SentenceTransformer) -> None:
    """Adds the adapters to the weights that they adapt, and removes them; all weights of the encoders learn again."""
    for transformer in [module for module in model.modules() if isinstance(module, Transformer)]:
        if _merge(transformer):
            del transformer.save
            transformer.requires_grad_(True)
    freeze_unused_parameters(model)


def _merge(transformer: Transformer) -> bool:
    """Puts the adapted weights in the place of the adapters; whether there were any."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, part) for name, part in transformer.model.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(transformer.model.get_submodule(parent), attribute, layer.get_base_layer())
    vars(transformer.model).pop("peft_config", None)
    return bool(layers)


def _save_merged(transformer: Transformer, *arguments: Any, **settings: Any) -> None:
    """Saves a transformer as it computes, without adapters."""
    plain = copy.deepcopy(transformer)
    _merge(plain)
    del plain.save
    plain.save(*arguments, **settings)


def _transformers(model: SentenceTransformer, towers: Sequence[str]) -> list[Transformer]:
    """The transformers of towers, each once."""
    router = model[0]
    routes = router.sub_modules if isinstance(router, Router) else nn.ModuleDict()
    found: dict[Transformer, None] = {}
    for tower in towers:
        if tower not in routes:
            raise ValueError(f"towers has {tower!r}, model has the towers {sorted(routes)}.")
        of_tower = [module for module in routes[tower].modules() if isinstance(module, Transformer)]
        if not of_tower:
            raise ValueError(f"towers has {tower!r}, whose encoder is no transformer: leave it out.")
        found.update(dict.fromkeys(of_tower))
    return list(found)
