"""Settings that cannot work, looked at before training begins: refused where a run would look healthy, or warned of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import nn
from transformers import TrainingArguments

from st_fpsloss.data.inputs import LABEL_COLUMNS
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.losses.fps import FPSLoss
from st_fpsloss.losses.sampled_softmax import SampledSoftmaxLoss

_LOW_COSINE_SCALE = 2.0  # a fixed α below it is warned of


def check_setting(loss: ClickLoss, model: nn.Module | None, args: TrainingArguments) -> None:
    """Refuse what would train nothing, or mask nothing, and look healthy.

    Args:
        loss: the loss.
        model: the trainer's model, None where it is not known.
        args: the training arguments.

    Raises:
        ValueError: If the loss was made for another model, or has known positives while the arguments have prompts.
    """
    if model is not None and _unwrapped(loss.model) is not _unwrapped(model):
        raise ValueError(
            f"The `loss` ({type(loss).__name__}) was made for another model object than the trainer's: the optimizer "
            "would move the parameters of the one, and the gradients reach the other. Make the loss anew from the "
            f"trainer's model, loss = {type(loss).__name__}(model, ...); in a notebook, run the cell of the loss, and "
            "those after it, whenever that of the model was run."
        )
    prompts = getattr(args, "prompts", None)
    if loss.known_positives is not None and _has_text(prompts):
        raise ValueError(
            f"`known_positives` are known by their inputs without prompts, and the training arguments have prompts="
            f"{prompts!r}: none would be recognised, and none masked. Leave out one of the two, or put the prompts "
            "into the texts themselves, those of the data set and those of `known_positives`."
        )


def check_inputs(dataset: Any) -> None:
    """Refuse a training data set with a column of floats or dates that is no label: it would be taken for documents.

    Raises:
        ValueError: If there is one, such as the ``time`` of :func:`st_fpsloss.data.load_clicks`.
    """
    for part in getattr(dataset, "datasets", [dataset]):  # of a dictionary of data sets the trainer makes one
        for name, feature in (getattr(part, "features", None) or {}).items():
            kind = getattr(feature, "dtype", "")
            if name not in LABEL_COLUMNS and kind.startswith(("float", "timestamp", "date")):
                raise ValueError(
                    f"The training data set's column {name!r} holds {kind}, and every column that is no label is taken "
                    f"for queries or documents: remove it before training, dataset.remove_columns({name!r})."
                )


def prompt_warnings(args: TrainingArguments) -> list[str]:
    """A sentence for each tower whose columns are trained with different prompts."""
    found = []
    for routes, prompts in _routes_and_prompts(getattr(args, "router_mapping", None), getattr(args, "prompts", None)):
        for tower in dict.fromkeys(routes.values()):
            given = {column: prompts.get(column) or "" for column, route in routes.items() if route == tower}
            if len(set(given.values())) > 1:
                found.append(
                    f"The columns of the tower {tower!r} have different prompts, {given}: `prompts` in the training "
                    "arguments go by the name of the column. Give all columns of the tower, negatives among them, the "
                    "prompt that the model puts there by itself when it encodes."
                )
    return found


def setting_warnings(loss: ClickLoss, model: SentenceTransformer) -> list[str]:
    """What is wrong with the settings of a loss, known before training; a sentence each, with its cure."""
    found = []
    if isinstance(loss, FPSLoss) and loss.beta != 0:
        found.append(
            f"bias={loss.beta:g} has no effect: β cancels in a softmax, its gradient is 0. Leave `bias` off, or train "
            "with SigmoidLoss, where β counts."
        )
    is_softmax = isinstance(loss, (FPSLoss, SampledSoftmaxLoss))
    is_low = loss.alpha < _LOW_COSINE_SCALE and not loss.logit_scale.requires_grad
    if is_softmax and loss.similarity == "cosine" and is_low:
        found.append(
            f"α = {loss.alpha:g} is fixed and the similarity is a cosine: in a softmax over 64 documents no click can "
            f"get a probability above {1 / (1 + 63 * math.exp(-2 * loss.alpha)):.2f}. Leave `scale` off (it "
            "starts at 1/0.07), pass 5 or more, or let it learn."
        )
    searched = str(model.similarity_fn_name)
    if searched != loss.similarity and not _ends_normalised(model):
        found.append(
            f"The loss trains with the similarity {loss.similarity!r}, and model.similarity_fn_name is {searched!r}, "
            "which RetrievalEvaluator, DocumentIndex and model.similarity use: they will rank by another one. Set "
            f"model.similarity_fn_name = {loss.similarity!r} before training, or leave `similarity` off."
        )
    return found


def _ends_normalised(model: SentenceTransformer) -> bool:
    """Whether all embeddings have length 1, so that dot product and cosine are the same."""
    last = list(model)[-1]
    tails = [list(modules)[-1] for modules in last.sub_modules.values()] if isinstance(last, Router) else [last]
    return all(isinstance(tail, Normalize) for tail in tails)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel, and then torch.compile, was given."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _has_text(prompts: Any) -> bool:
    """Whether prompts, in whatever form, put anything before any input."""
    return any(map(_has_text, prompts.values())) if isinstance(prompts, Mapping) else bool(prompts)


def _routes_and_prompts(router_mapping: Any, prompts: Any) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Tower and prompt of the columns of each data set, where the prompts go by column."""
    if not isinstance(router_mapping, Mapping) or not isinstance(prompts, Mapping):
        return
    # Either may be one for all data sets, or one for each by its name.
    by_data_set = [setting for setting in (router_mapping, prompts) if _is_nested(setting)]
    for name in by_data_set[0] if by_data_set else [None]:
        routes = router_mapping[name] if _is_nested(router_mapping) else router_mapping
        own = prompts.get(name, {} if _is_nested(prompts) else prompts)
        if isinstance(routes, Mapping) and isinstance(own, Mapping):
            yield dict(routes), dict(own)


def _is_nested(setting: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in setting.values())
