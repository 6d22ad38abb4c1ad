"""What a tower is made of, and the input module that it starts with."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling, StaticEmbedding, Transformer
from torch import nn

from st_fpsloss.towers.checks import positive_int, probability
from st_fpsloss.towers.features.kinds import Feature, checked_features

# Where transformers keeps the list of layers: BERT, RoBERTa, MPNet | ModernBERT, Qwen | DistilBERT | BART-like
# encoders | T5 | GPT-2.
_LAYER_LISTS = ("encoder.layer", "layers", "transformer.layer", "encoder.layers", "encoder.block", "h")
# Configuration entries that hold one value a layer.
_PER_LAYER_CONFIG = ("layer_types", "mlp_layer_types", "attention_window")


@dataclass(frozen=True, eq=False)
class Tower:
    """Describes one tower of a two-tower model: what reads the input, and the MLP on top of it.

    A tower is an encoder (a transformer and its pooling, or a light :class:`StaticEmbedding`), then one
    ``Dense`` layer with ReLU for every entry of ``hidden_dims``, then a linear layer to the embedding size that
    :func:`~st_fpsloss.two_tower` is given. Nothing is loaded before :func:`~st_fpsloss.two_tower` builds the model.
    Two towers that are described alike are still two; the same ``Tower`` object on both sides is one shared encoder.

    Args:
        transformer: A hub id, a folder (of a transformer, or of a saved sentence-transformers model, whose first module
            is taken), or a ready ``Transformer`` or ``StaticEmbedding``. A ready module is used as it is, so that two
            towers may share it under different MLPs; where ``num_hidden_layers`` or ``max_seq_length`` changes it, the
            tower works on a copy. None is for a tower of ``features`` alone.
        num_hidden_layers: Keep the first so many layers of the transformer. None keeps all of them.
        max_seq_length: Cut inputs at so many tokens. None keeps what the transformer comes with.
        pooling: How token embeddings become one embedding: ``"mean"``, ``"cls"``, ``"max"``,
            ``"mean_sqrt_len_tokens"``, ``"weightedmean"`` or ``"lasttoken"``. Take the one that the transformer was
            trained with. StaticEmbedding pools by itself.
        features: Side features of the input, fitted: :class:`Categorical`, :class:`Numerical`, :class:`Tags`,
            :class:`History`. What they say is added to the text's embedding, at first nothing, before the hidden
            layers; with ``transformer=None`` they are the input of the hidden layers. Their tables of embeddings start
            from scratch: beside a pretrained transformer let them learn faster, by the training argument
            ``learning_rate_mapping={"encoders": 1e-3}``.
        hidden_dims: Width of each hidden layer of the MLP; ``()`` is a linear tower.
        dropout: Probability with which training zeroes a unit of a hidden layer, or, without hidden layers, of the
            encoder's embedding.

    Raises:
        ValueError: An argument is of the wrong kind or out of range.

    Example:
        >>> from st_fpsloss.towers import Tower
        >>> Tower("sentence-transformers/all-MiniLM-L6-v2", num_hidden_layers=2, hidden_dims=(512, 512)).hidden_dims
        (512, 512)
    """

    transformer: str | os.PathLike[str] | InputModule | None = None
    num_hidden_layers: int | None = None
    max_seq_length: int | None = None
    pooling: str = "mean"
    features: Sequence[Feature] = ()
    hidden_dims: Sequence[int] = (512,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_transformer(self.transformer)
        object.__setattr__(self, "features", checked_features(self.features))
        if self.transformer is None:
            _check_featured(self)
        for name in ("num_hidden_layers", "max_seq_length"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if self.pooling not in Pooling.POOLING_MODES:
            raise ValueError(f"pooling={self.pooling!r} is unknown: choose one of {', '.join(Pooling.POOLING_MODES)}.")
        object.__setattr__(self, "hidden_dims", _checked_hidden_dims(self.hidden_dims))
        object.__setattr__(self, "dropout", probability("dropout", self.dropout))


def load_input_module(tower: Tower) -> InputModule:
    """Loads the module that reads the tower's input, cut to the tower's number of layers and sequence length.

    Args:
        tower: A tower with a ``transformer``.

    Returns:
        The ``Transformer`` or ``StaticEmbedding``, in float32.

    Raises:
        ValueError: There is nothing to load under that name, or what is there does not fit the tower.
    """
    source = tower.transformer
    changed = [name for name in ("num_hidden_layers", "max_seq_length") if getattr(tower, name) is not None]
    if isinstance(source, (str, os.PathLike)):
        module = _load_first_module(os.fspath(source))
    else:
        module = copy.deepcopy(source) if changed else source
    if changed and not isinstance(module, Transformer):
        raise ValueError(
            f"{changed[0]}={getattr(tower, changed[0])} needs a Transformer, but transformer={source!r} is a "
            f"{type(module).__name__}, which has no layers and no limit; leave {changed[0]}=None."
        )
    if tower.num_hidden_layers is not None:
        _keep_first_layers(module, tower.num_hidden_layers)
    if tower.max_seq_length is not None:
        _set_max_seq_length(module, tower.max_seq_length)
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


def _check_transformer(transformer: object) -> None:
    """Refuses what cannot be the start of a tower, with the way to what was probably meant."""
    cure = "give a hub id, a folder, a Transformer or a StaticEmbedding."
    if transformer is None:
        return
    if isinstance(transformer, SentenceTransformer):
        raise ValueError("transformer is a whole SentenceTransformer: give its first module, model[0].")
    if isinstance(transformer, InputModule):
        _check_input_module(transformer, "transformer")
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in transformer.parameters()):
            raise ValueError("transformer is not in float32, as the layers on top of it are: call its .float() first.")
    elif not isinstance(transformer, (str, os.PathLike)) or not os.fspath(transformer):
        raise ValueError(f"transformer={transformer!r} is no input of a tower: {cure}")


def _check_featured(tower: Tower) -> None:
    """Refuses a tower without a transformer that has no features either, or settings for a transformer."""
    if not tower.features:
        raise ValueError(
            "transformer=None leaves the tower without input: give a hub id, a folder, a Transformer, a "
            "StaticEmbedding, or features."
        )
    for name in ("num_hidden_layers", "max_seq_length"):
        if getattr(tower, name) is not None:
            raise ValueError(f"{name}={getattr(tower, name)} needs a transformer, but transformer is None.")


def _check_input_module(module: nn.Module, name: str) -> None:
    """Refuses modules whose output is not one embedding a token or a text."""
    if not isinstance(module, (Transformer, StaticEmbedding)):
        hint = ' such as router.sub_modules["document"][0]' if type(module).__name__ == "Router" else ""
        raise ValueError(
            f"{name} starts with a {type(module).__name__}: give a Transformer or a StaticEmbedding{hint}."
        )
    if isinstance(module, Transformer) and module.transformer_task != "feature-extraction":
        raise ValueError(
            f"{name} has transformer_task={module.transformer_task!r}, which yields no embeddings: load it with "
            'transformer_task="feature-extraction".'
        )


def _checked_hidden_dims(hidden_dims: object) -> tuple[int, ...]:
    """Returns the widths as a tuple of ints."""
    if isinstance(hidden_dims, str) or not isinstance(hidden_dims, Sequence):
        raise ValueError(f"hidden_dims={hidden_dims!r} must be a sequence of widths, such as (512,).")
    return tuple(positive_int(f"hidden_dims[{index}]", width) for index, width in enumerate(hidden_dims))


def _load_first_module(name_or_path: str) -> InputModule:
    """Loads a plain transformer, or the first module of a saved sentence-transformers model."""
    try:
        module = SentenceTransformer(name_or_path, device="cpu")[0]
    except OSError as error:
        raise ValueError(
            f"transformer={name_or_path!r} could not be loaded: give a hub id that can be reached, or a folder that "
            f"holds a transformer or a sentence-transformers model. ({error})"
        ) from error
    _check_input_module(module, f"transformer={name_or_path!r}")
    # Weights kept in half precision would not meet the float32 layers on top, nor train well.
    return module.float()


def _keep_first_layers(transformer: Transformer, count: int) -> None:
    """Drops all but the first layers, from the model and from its configuration, so that saving keeps it so."""
    model, config = transformer.model, transformer.model.config
    parent, name = _find_layers(model)
    layers = getattr(parent, name)
    if count > len(layers):
        raise ValueError(f"num_hidden_layers={count}, but the transformer has {len(layers)} layers; give at most that.")
    setattr(parent, name, layers[:count])
    for key in _PER_LAYER_CONFIG:
        if isinstance(getattr(config, key, None), list):
            setattr(config, key, getattr(config, key)[:count])
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
