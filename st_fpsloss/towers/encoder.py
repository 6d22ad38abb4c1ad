"""The encoder of a tower: loaded, cut to size, frozen; and what no gradient reaches."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    InputModule,
    Module,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from torch import nn

from st_fpsloss.towers.tower import Tower, check_input_module

# Where transformers keeps the list of layers: BERT, RoBERTa, MPNet | ModernBERT, Qwen | DistilBERT | BART-like
# encoders | T5 | GPT-2.
_LAYER_LISTS = ("encoder.layer", "layers", "transformer.layer", "encoder.layers", "encoder.block", "h")
# Configuration entries that hold one value a layer.
_PER_LAYER_CONFIG = ("layer_types", "mlp_layer_types", "attention_window")


@dataclass(frozen=True)
class Encoder:
    """What turns a text into one embedding: the modules in front of a tower's MLP, side features aside.

    Args:
        modules: An input module, and what follows it, as a rule its pooling.
        pretrained: Whether its embeddings are worth keeping: it was named by a hub id or a folder, or remembers one.
    """

    modules: list[Module]
    pretrained: bool

    @property
    def embedding_dim(self) -> int:
        """Size of the embedding."""
        return embedding_size(self.modules)

    @property
    def is_normalised(self) -> bool:
        """Whether all embeddings have length 1."""
        return isinstance(self.modules[-1], Normalize)


def embedding_size(modules: Sequence[Module]) -> int:
    """Size of the embedding that comes out of some modules; a Dropout, for one, does not know it."""
    return next(
        module.get_embedding_dimension() for module in reversed(modules) if hasattr(module, "get_embedding_dimension")
    )


def load_encoder(tower: Tower) -> Encoder:
    """Loads the encoder of a tower with a ``transformer``, cut and frozen as the tower says, in float32.

    Raises:
        ValueError: There is nothing to load under that name, or what is there does not fit the tower.
    """
    source = tower.transformer
    changed = [name for name in ("num_hidden_layers", "max_seq_length") if getattr(tower, name) is not None]
    following: list[Module] | None = None
    if isinstance(source, (str, os.PathLike)):
        module, *following = _load_modules(os.fspath(source))
    else:
        module = copy.deepcopy(source) if changed else source
    if changed and not isinstance(module, Transformer):
        raise ValueError(
            f"{changed[0]}={getattr(tower, changed[0])} needs a Transformer, but transformer={source!r} is a "
            f"{type(module).__name__}, which has no layers and no limit; leave {changed[0]}=None."
        )
    if tower.num_hidden_layers is not None:
        _keep_layers(module, tower.num_hidden_layers)
    if tower.max_seq_length is not None:
        _set_max_seq_length(module, tower.max_seq_length)
    modules = [module, *_following_modules(module, following, tower.pooling)]
    if tower.frozen:
        for part in modules:
            _freeze(part)
    return Encoder(modules, pretrained=following is not None or remembers_a_name(module))


def _following_modules(module: InputModule, following: list[Module] | None, pooling: str | None) -> list[Module]:
    """What stands between the input module and the MLP."""
    if following and pooling is None:
        return following
    if isinstance(module, StaticEmbedding) or module.module_output_name == "sentence_embedding":
        return []
    return [Pooling(module.get_embedding_dimension(), pooling_mode=pooling or "mean")]


def remembers_a_name(module: InputModule) -> bool:
    """Whether a ready module was loaded from somewhere; the modules of ``towers.from_scratch`` were not."""
    if isinstance(module, StaticEmbedding):
        return module.base_model is not None
    return bool(module.model.config._name_or_path)


def _freeze(module: nn.Module) -> None:
    """Fixes the weights of a module, and keeps it in eval mode when the trainer calls ``model.train()``."""
    module.requires_grad_(False)
    stay_in_eval_mode(module)


def stay_in_eval_mode(module: nn.Module) -> None:
    """Makes ``train()`` of a module, and of a model that holds it, leave it in eval mode until ``del module.train``."""
    module.eval()
    # On the object, so that its class, and with it what is saved, stays the stock one. A partial, unlike a closure,
    # follows the module into a copy or a pickle.
    module.train = functools.partial(_no_change_of_mode, module)  # type: ignore[method-assign]


def _no_change_of_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def freeze_unused_parameters(model: nn.Module) -> list[str]:
    """Freezes parameters that can never receive a gradient: poolers of transformers whose output nobody reads.

    BERT and its relatives end in a pooler that sentence-transformers' own ``Pooling`` replaces. Left trainable it stops
    ``DistributedDataParallel`` with ``ddp_find_unused_parameters=False``, the setting that two separate towers need;
    removed, it would come back at random on loading. :func:`~st_fpsloss.two_tower` freezes it; saving does not keep
    that, so call this once more after loading a saved model for fine-tuning.

    Args:
        model: A SentenceTransformer, or any module that holds ``Transformer`` modules. Changed in place.

    Returns:
        Names of the frozen parameters, as in ``model.named_parameters()``; empty where every parameter is used.

    Example:
        >>> from st_fpsloss.towers import freeze_unused_parameters, id_transformer
        >>> freeze_unused_parameters(id_transformer(range(10), hidden_size=8))
        ['model.pooler.dense.weight', 'model.pooler.dense.bias']
    """
    unused: set[int] = set()
    for module in model.modules():
        if isinstance(module, Transformer) and not _reads_pooler(module):
            for name, child in module.model.named_modules():
                if name.rpartition(".")[2] == "pooler":
                    unused.update(id(parameter) for parameter in child.parameters())
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in unused]
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    return [name for name, _ in frozen]


def _load_modules(name_or_path: str) -> list[Module]:
    """Loads the modules of a saved sentence-transformers model, or a plain transformer and its pooling."""
    try:
        model = SentenceTransformer(name_or_path, device="cpu")
    except OSError as error:
        raise ValueError(
            f"transformer={name_or_path!r} could not be loaded: give a hub id that can be reached, or a folder that "
            f"holds a transformer or a sentence-transformers model. ({error})"
        ) from error
    check_input_module(model[0], f"transformer={name_or_path!r}")
    # Weights kept in half precision would not meet the float32 layers on top, nor train well.
    return list(model.float())


def _keep_layers(transformer: Transformer, count: int) -> None:
    """Drops all but some layers, from the model and from its configuration, so that saving keeps it so.

    Kept are the first, the last, and those at even distances between them: the last layers make what pooling reads.
    """
    model, config = transformer.model, transformer.model.config
    parent, name = _find_layers(model)
    layers = getattr(parent, name)
    if count > len(layers):
        raise ValueError(f"num_hidden_layers={count}, but the transformer has {len(layers)} layers; give at most that.")
    kept = [round(number * (len(layers) - 1) / max(1, count - 1)) for number in range(count)]
    setattr(parent, name, nn.ModuleList(layers[number] for number in kept))
    for position, layer in enumerate(getattr(parent, name)):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):  # where a decoder keeps keys and values
                part.layer_idx = position
    for key in _PER_LAYER_CONFIG:
        if isinstance(getattr(config, key, None), list):
            setattr(config, key, [getattr(config, key)[number] for number in kept])
    config.num_hidden_layers = count


def _find_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """Returns the module that holds the list of layers, and the list's name in it."""
    for path in _LAYER_LISTS:
        *parents, name = path.split(".")
        parent: Any = model
        for part in parents:
            parent = getattr(parent, part, None)
        layers = getattr(parent, name, None)
        # A list that is not what the configuration counts belongs to another part of the model.
        if isinstance(layers, nn.ModuleList) and len(layers) == getattr(model.config, "num_hidden_layers", None):
            return parent, name
    raise ValueError(
        f"num_hidden_layers: no list of layers is known for a {type(model).__name__}; leave num_hidden_layers=None, or "
        "cut the model before you give it as a Transformer."
    )


def _set_max_seq_length(transformer: Transformer, length: int) -> None:
    """Sets the length on the tokenizer, which is where sentence-transformers saves it."""
    if transformer.tokenizer is None:
        raise ValueError(f"max_seq_length={length}: the transformer has no tokenizer to cut texts; leave it None.")
    positions = getattr(transformer.model.config, "max_position_embeddings", None)
    # XLNet writes -1 for "no limit".
    if positions is not None and positions != -1 and length > positions:
        raise ValueError(f"max_seq_length={length}, but the transformer has {positions} positions; give at most that.")
    transformer.max_seq_length = length


def _reads_pooler(transformer: Transformer) -> bool:
    """Tells whether some modality takes its embedding from the pooler, or may (methods other than ``forward``)."""
    for params in transformer.modality_config.values():
        outputs = params["method_output_name"]
        if params["method"] != "forward" or outputs is None:
            return True
        if "pooler_output" in ([outputs] if isinstance(outputs, str) else outputs):
            return True
    return False
