"""A collator for the stock trainer that tokenizes each distinct input of a batch once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from st_fpsloss.encoding.rows import Features, routes_by_task


class DeduplicatingCollator(SentenceTransformerDataCollator):
    """Makes the same batches as the trainer's own collator, in less time where inputs repeat.

    A click log repeats its queries and documents, and the trainer's own collator tokenizes every one of them anew. This
    pays where the encoders are light: with StaticEmbedding or id towers, tokenizing is about half of a training step.
    Beside a transformer it is a percent or two.

    Args:
        model: the model that is trained.
        args: the training arguments, for their ``router_mapping`` and ``prompts``.

    Raises:
        ValueError: The model has towers, but the arguments have no ``router_mapping``.

    Example:
        >>> from sentence_transformers import SentenceTransformerTrainingArguments
        >>> from st_fpsloss import Tower, two_tower
        >>> from st_fpsloss.training.collator import DeduplicatingCollator
        >>> from st_fpsloss.towers import id_embedding
        >>> model = two_tower(Tower(id_embedding(["red", "blue"], 8)), Tower(id_embedding(["rose", "sky"], 8)))
        >>> routes = {"query": "query", "document": "document"}
        >>> args = SentenceTransformerTrainingArguments("runs", router_mapping=routes, use_cpu=True)
        >>> collator = DeduplicatingCollator(model, args)  # SentenceTransformerTrainer(..., data_collator=collator)
        >>> collator([{"query": "red", "document": "rose"}, {"query": "red", "document": "rose"}])["query_offsets"]
        tensor([0, 1])
    """

    def __init__(self, model: SentenceTransformer, args: SentenceTransformerTrainingArguments) -> None:
        if routes_by_task(model) and not args.router_mapping:
            raise ValueError(
                "The training arguments have no `router_mapping`, so no column would reach its tower. Set for example "
                'router_mapping={"query": "query", "document": "document"}, from column to tower.'
            )
        super().__init__(
            preprocess_fn=partial(preprocess_distinct, model.preprocess),
            router_mapping=args.router_mapping,
            prompts=args.prompts,
        )


def preprocess_distinct(preprocess: Callable[..., Features], inputs: Sequence[Any], **options: Any) -> Features:
    """What ``preprocess(inputs, **options)`` gives, each distinct input preprocessed once.

    Args:
        preprocess: from N inputs to features with one entry an input, or to a StaticEmbedding's flat token ids with
            ``offsets``. Features of another form come from all inputs.
        inputs: N strings, dicts or whatever else it takes.
        options: the prompt, the task.
    """
    number_of: dict[Hashable, int] = {}
    first: list[Any] = []
    numbers: list[int] = []
    for value in inputs:
        number = number_of.setdefault(_identity(value), len(first))
        if number == len(first):
            first.append(value)
        numbers.append(number)
    if len(first) == len(numbers):
        return preprocess(inputs, **options)
    features = preprocess(first, **options)
    index = torch.tensor(numbers)
    flat = _repeat_flat(features, index) if "offsets" in features else {}
    per_row = {name: value for name, value in features.items() if _has_rows(value) and name not in flat}
    if any(len(value) != len(first) for value in per_row.values()):
        return preprocess(inputs, **options)
    repeated = {
        name: value[index] if isinstance(value, Tensor) else [value[number] for number in numbers]
        for name, value in per_row.items()
    }
    return {**features, **repeated, **flat}


def _identity(value: Any) -> Hashable:
    # Bytes from which an equal value can be made: no two different ones have the same.
    return value if isinstance(value, str) else pickle.dumps(value)


def _has_rows(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list)


def _repeat_flat(features: Features, index: Tensor) -> Features:
    """Flat token ids and offsets of the rows at ``index``."""
    ids, offsets = features["input_ids"], features["offsets"]
    lengths = torch.diff(offsets, append=offsets.new_tensor([len(ids)]))[index]
    ends = lengths.cumsum(0)
    # Of each token of a repeated row: its place among all, less where its row begins there, plus where it begins here.
    shift = torch.repeat_interleave(offsets[index] - (ends - lengths), lengths)
    return {"input_ids": ids[shift + torch.arange(len(shift))], "offsets": ends - lengths}
