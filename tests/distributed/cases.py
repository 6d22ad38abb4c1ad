"""What the gradients of several processes are compared over: settings of a loss, and the batches of every rank."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, tensor

from st_fpsloss import FPSLoss
from tests.losses.conftest import sentences, small_model, static_query_model

MODELS = {
    "two towers": small_model,
    "shared tower": lambda: small_model(shared=True),
    "static queries": static_query_model,
}
MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "cached": {"cache_gradients": True},
    "cached, several mini-batches": {"cache_gradients": True, "mini_batch_num_tokens": 40},
    "kept, several mini-batches": {"mini_batch_num_tokens": 40},
}
DIRECTIONS = [("query_to_doc",), ("doc_to_query",), ("query_to_doc", "doc_to_query")]
LABELS = ["none", "graded", "a rank without positives"]
MASKING = [("mask", None), ("keep", None), ("mask", "corrected"), ("mask", "standard"), ("keep", "standard")]

Columns = list[list[str]]


@dataclass(frozen=True)
class Case:
    """One setting; ``seed`` chooses its batches."""

    mode: str
    directions: tuple[str, ...]
    num_negatives: int
    labels: str
    uneven: bool
    gather: bool
    model: str
    find_unused_parameters: bool
    masking: tuple[str, str | None]
    relevance: str
    similarity: str
    micro_batches: int
    seed: int

    def loss(self, model: SentenceTransformer, **options: Any) -> FPSLoss:
        """The loss of this setting, with α far from 1."""
        duplicates, log_q = self.masking
        return FPSLoss(
            model,
            scale=3.0,
            directions=self.directions,
            relevance=self.relevance,
            duplicates=duplicates,
            log_q=log_q,
            similarity=self.similarity,
            gather_across_devices=self.gather,
            **MODES[self.mode],
            **options,
        )

    def batch(self, rank: int, micro_batch: int) -> tuple[Columns, list[float] | None]:
        """Columns of texts and labels of one rank; every rank draws from the same few texts, so that they repeat."""
        rng = random.Random(f"{self.seed} {rank} {micro_batch}")
        rows = (3, 7, 4)[(rank + micro_batch) % 3] if self.uneven else 5
        queries, documents = sentences(6, 8, seed=0), sentences(8, 30, seed=1)
        columns = [rng.choices(queries, k=rows)]
        columns += [rng.choices(documents, k=rows) for _ in range(1 + self.num_negatives)]
        if self.labels == "none":
            return columns, None
        if self.labels == "a rank without positives" and rank == 1:
            return columns, [0.0, -1.0] + [0.0] * (rows - 2)
        return columns, [1.0, *rng.choices([2.0, 1.0, 0.5, 0.0, -1.0], k=rows - 1)]

    def global_batch(self, ranks: int, micro_batch: int) -> tuple[Columns, list[float] | None]:
        """The batches of all ranks as one."""
        parts = [self.batch(rank, micro_batch) for rank in range(ranks)]
        columns = [[text for part in column for text in part] for column in zip(*(c for c, _ in parts), strict=True)]
        labels = None if self.labels == "none" else [label for _, part in parts for label in part or ()]
        return columns, labels


def cases() -> list[Case]:
    """Every combination of what decides about collectives, and one at random of the rest for each."""
    rng = random.Random(0)
    combinations = itertools.product(MODES, DIRECTIONS, (0, 2), LABELS, (False, True), (False, True))
    return [
        Case(
            *combination,
            model=rng.choice(list(MODELS)),
            find_unused_parameters=rng.choice([False, True]),
            masking=rng.choice(MASKING),
            relevance=rng.choice(["mask", "weight"]),
            similarity=rng.choice(["dot", "cosine"]),
            micro_batches=rng.choice([1, 2]),
            seed=seed,
        )
        for seed, combination in enumerate(combinations)
    ]


def arguments(
    model: SentenceTransformer, batch: tuple[Columns, list[float] | None]
) -> tuple[list[dict[str, Any]], Tensor | None]:
    """What the trainer passes to a loss."""
    columns, labels = batch
    features = [
        model.preprocess(column, task="document" if number else "query") for number, column in enumerate(columns)
    ]
    return features, None if labels is None else tensor(labels)
