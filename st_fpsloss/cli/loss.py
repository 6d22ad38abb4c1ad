"""The loss of a script, by its name and the arguments of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss.data.inputs import is_positive
from st_fpsloss.losses import FPSLoss, FullSoftmaxLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
from st_fpsloss.losses.arguments import CacheGradients
from st_fpsloss.losses.base import ClickLoss

LossName = Literal["fps", "pair_ce", "triplet", "sampled_softmax", "full_softmax", "sigmoid"]
_LOSSES: Mapping[str, type[ClickLoss]] = {
    "fps": FPSLoss,
    "pair_ce": PairCELoss,
    "triplet": TripletLoss,
    "sampled_softmax": SampledSoftmaxLoss,
    "full_softmax": FullSoftmaxLoss,
    "sigmoid": SigmoidLoss,
}


@dataclass
class LossArguments:
    """The arguments of the losses; what is left out is what the loss has by itself."""

    _argument_group_name = "loss"

    scale: float | None = field(default=None, metadata={"help": "start of α (default: 1/0.07 for cosine, 1 for dot)"})
    learn_scale: bool | None = field(default=None, metadata={"help": "learn α"})
    max_scale: float | None = field(default=None, metadata={"help": "bound of α"})
    margin: float | None = field(default=None, metadata={"help": "of the triplet loss"})
    directions: list[str] | None = field(default=None, metadata={"help": "query_to_doc, doc_to_query, or both"})
    relevance: Literal["mask", "weight"] | None = field(
        default=None, metadata={"help": "mask: rows with r > 0 count alike; weight: they count by r"}
    )
    duplicates: Literal["mask", "keep"] | None = field(
        default=None, metadata={"help": "mask: a positive of the query in the batch is no negative of it"}
    )
    log_q: Literal["none", "standard", "corrected"] | None = field(
        default=None, metadata={"help": "correct for popularity"}
    )
    mask_known_positives: bool = field(
        default=False, metadata={"help": "positives of all training rows are no negatives, whatever the batch holds"}
    )
    hardest: int | None = field(default=None, metadata={"help": "so many in-batch negatives, the most similar ones"})
    semi_hard: bool = field(default=False, metadata={"help": "in-batch negatives within the margin alone"})
    mini_batch_num_tokens: int | None = field(default=None, metadata={"help": "padded tokens encoded at a time"})
    cache_gradients: str | None = field(
        default=None,
        metadata={"nargs": "?", "const": "true", "help": "fewer graphs are kept: auto, true, false, or so many tokens"},
    )
    cache_frozen: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "true",
            "help": "keep what frozen encoders gave for a row; a folder keeps it for later runs",
        },
    )
    gather_across_devices: bool = field(default=False, metadata={"help": "negatives from all processes"})


def loss_defaults(*names: LossName) -> dict[str, Any]:
    """What losses take where the command line gives nothing: the arguments that all of them take alike."""
    of_losses = [
        {name: one.default for name, one in inspect.signature(_LOSSES[loss]).parameters.items()}
        for loss in names or _LOSSES
    ]
    known = {name for defaults in of_losses for name in defaults}
    values = {name: [defaults[name] for defaults in of_losses if name in defaults] for name in known}
    return {name: found[0] for name, found in values.items() if len(set(map(str, found))) == 1 and found[0] is not None}


def make_loss(
    name: LossName,
    model: SentenceTransformer,
    arguments: LossArguments,
    clicks: Dataset,
    prompts: Any = None,
    **chosen: Any,
) -> ClickLoss:
    """Makes a loss.

    Args:
        name: Which one.
        model: The model to train.
        arguments: What the command line says.
        clicks: The training rows, for the known positives.
        prompts: Those of the training arguments.
        chosen: What the script chooses; the command line comes first, and what the loss does not know is left out.

    Raises:
        ValueError: If the command line has an argument that this loss does not know, or known positives are to be
            masked under prompts, or ``--cache_gradients`` has a value that is no number, and as the loss itself.
    """
    kind = _LOSSES[name]
    known = set(inspect.signature(kind).parameters)
    given = {
        entry.name: getattr(arguments, entry.name)
        for entry in fields(arguments)
        if getattr(arguments, entry.name) != entry.default and entry.name != "mask_known_positives"
    }
    unknown = [argument for argument in given if argument not in known]
    if unknown:
        raise ValueError(f"--{unknown[0]} is no argument of the loss {name!r} ({kind.__name__}): leave it out.")
    if arguments.cache_gradients is not None:
        given["cache_gradients"] = _flag_or_number(arguments.cache_gradients)
    if arguments.cache_frozen is not None:
        given["cache_frozen"] = {"true": True, "false": False}.get(arguments.cache_frozen, arguments.cache_frozen)
    settings = {argument: value for argument, value in chosen.items() if argument in known} | given
    if settings.get("log_q") == "none":
        settings["log_q"] = None
    if arguments.mask_known_positives:
        if prompts:
            raise ValueError("--mask_known_positives does not know the rows behind prompts: leave out one of the two.")
        rows = clicks.select_columns(["query", "document"]).with_format(None)[is_positive(clicks).nonzero()[0]]
        settings["known_positives"] = list(zip(rows["query"], rows["document"], strict=True))
    return kind(model, **settings)


def _flag_or_number(word: str) -> CacheGradients:
    if word.lower() == "auto":
        return "auto"
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.isdecimal():
        return int(word)
    raise ValueError(
        f"--cache_gradients {word}: leave out the value, or give auto, true, false or a whole number of tokens."
    )
