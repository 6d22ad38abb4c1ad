"""A two-tower model that ranks below its own pretrained encoder: a start or a training that lost what was known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, Module, Transformer
from sentence_transformers.util import batch_to_device
from torch import Tensor
from torch.nn.functional import normalize

from st_fpsloss.towers.encoder import remembers_a_name
from st_fpsloss.towers.modules.document_bias import DocumentBias

_ROWS = 64
_MIN_ROWS = 16
_STANDARD_ERRORS = 2.0


class EncoderCheck:
    """Compares a model with the encoder of its document tower on a few clicks of the log, before and after training.

    The encoder reads queries and documents alike, without MLP, and is compared by the cosine: what a user has who takes
    it as it is. Both rank the documents of the sample for each of its queries, by the reciprocal rank of the clicked
    one. A model is called worse where the mean difference is below 0 by two standard errors. Models without a
    pretrained transformer in the document tower, and logs of anything but texts, are not looked at.
    """

    def __init__(self) -> None:
        self._sample: tuple[list[str], list[str]] | None = None
        self._of_encoder: Tensor | None = None

    def before(self, model: SentenceTransformer, log: Any) -> list[str]:
        """Warnings about the untrained model; remembers how its encoder ranks.

        Args:
            model: The model.
            log: The training data.
        """
        self._sample = _sample(log) if _has_pretrained_documents(model) else None
        if self._sample is None:
            return []
        of_model, self._of_encoder = _reciprocal_ranks(model, *self._sample)
        if not _is_worse(of_model, self._of_encoder):
            return []
        return [
            f"The model ranks below its own document encoder before training: a clicked document stands at a mean "
            f"reciprocal rank of {of_model.mean():.2f} among {len(of_model)} of the log, by the encoder alone at "
            f"{self._of_encoder.mean():.2f}. What the encoder knows has to be learned again from clicks. Teach a query "
            "tower with another or a shorter encoder first: align_towers(model, texts); build heads with two_tower, "
            "which starts them as the encoder, and give it `texts` where the embeddings are smaller than the encoder's."
        ]

    def after(self, model: SentenceTransformer | None) -> list[str]:
        """Warnings about the trained model, on the same clicks, against its encoder as it was before training."""
        if model is None or self._sample is None or self._of_encoder is None:
            return []
        of_model, _ = _reciprocal_ranks(model, *self._sample)
        if not _is_worse(of_model, self._of_encoder):
            return []
        return [
            "The trained model still ranks below its own document encoder as it was before training, on clicks that "
            f"it has trained on: mean reciprocal rank {of_model.mean():.2f} against {self._of_encoder.mean():.2f}. "
            "Train longer or with a lower learning rate, or take the encoder as it is."
        ]


def _sample(log: Any) -> tuple[list[str], list[str]] | None:
    """Queries and clicked documents of some rows, None where they are no texts."""
    if not isinstance(log, Dataset) or len(log) < _MIN_ROWS:
        return None
    rows = log.with_format(None)[np.linspace(0, len(log) - 1, min(_ROWS, len(log))).astype(int).tolist()]
    labels = next((rows[name] for name in ("label", "labels", "score", "scores") if name in rows), None)
    columns = [values for name, values in rows.items() if name not in ("label", "labels", "score", "scores")][:2]
    if len(columns) < 2 or not all(isinstance(value, str) for values in columns for value in values):
        return None
    clicked = [number for number in range(len(columns[0])) if labels is None or labels[number] > 0]
    queries, documents = ([values[number] for number in clicked] for values in columns)
    return (queries, documents) if len(clicked) >= _MIN_ROWS else None


def _has_pretrained_documents(model: SentenceTransformer) -> bool:
    router = model[0]
    if not isinstance(router, Router) or not {"query", "document"} <= router.sub_modules.keys():
        return False
    tower = router.sub_modules["document"]
    return isinstance(tower[0], Transformer) and remembers_a_name(tower[0]) and isinstance(tower[-1], Dense)


@torch.no_grad()
def _reciprocal_ranks(model: SentenceTransformer, queries: list[str], documents: list[str]) -> tuple[Tensor, Tensor]:
    """Reciprocal rank (M,) of each query's document by the model, and by the encoder of the documents."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    encoded_queries, _ = _encode(model, queries, "query")
    encoded_documents, document_directions = _encode(model, documents, "document")
    _, query_directions = _encode(model, queries, "document", prompt="query")
    for module, mode in modes.items():
        module.training = mode
    clicks = set(zip(queries, documents, strict=True))
    positives = torch.tensor([[(query, document) in clicks for document in documents] for query in queries])
    return (
        _ranks_of_diagonal(encoded_queries @ encoded_documents.T, positives).reciprocal(),
        _ranks_of_diagonal(query_directions @ document_directions.T, positives).reciprocal(),
    )


def _encode(
    model: SentenceTransformer, texts: list[str], task: str, prompt: str | None = None
) -> tuple[Tensor, Tensor]:
    """The model's embeddings (M, dim) of texts, and the directions of those of the tower's encoder, on the CPU."""
    features = model.preprocess(texts, task=task, prompt=model.prompts.get(prompt or task) or None)
    features = batch_to_device(features, model.device)
    tower = list(model[0].sub_modules[task])
    head = _length_of_head(tower)
    for module in tower[: len(tower) - head]:
        features = module(features)
    of_encoder = features["sentence_embedding"]
    for module in [*tower[len(tower) - head :], *list(model)[1:]]:
        features = module(features)
    return features["sentence_embedding"].float().cpu(), normalize(of_encoder.float(), dim=1).cpu()


def _length_of_head(tower: Sequence[Module]) -> int:
    """How many modules at the end of a tower are its MLP."""
    number = 0
    while number < len(tower) and isinstance(tower[len(tower) - 1 - number], (Dense, Dropout, DocumentBias)):
        number += 1
    return number


def _ranks_of_diagonal(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank (M,) of each row's own column among the columns that are no positives of it; ties count against it."""
    others = scores.masked_fill(positives, -torch.inf)
    return 1 + (others >= scores.diagonal()[:, None]).sum(dim=1).double()


def _is_worse(of_model: Tensor, of_encoder: Tensor) -> bool:
    difference = of_model - of_encoder
    return bool(difference.mean() < -_STANDARD_ERRORS * difference.std() / len(difference) ** 0.5)
