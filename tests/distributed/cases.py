"""What the gradients of several processes are compared over: settings of a loss, and the batches of every rank."""

from __future__ import annotations

import inspect
import itertools
import random
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, tensor

from st_fpsloss import FPSLoss, FullSoftmaxLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
from st_fpsloss.losses.base import ClickLoss
from tests.losses.conftest import sentences, small_model, static_query_model

MODELS = {
    "two towers": small_model,
    "shared tower": lambda: small_model(shared=True),
    "static queries": static_query_model,
}
QUERIES, DOCUMENTS = sentences(6, 8, seed=0), sentences(8, 30, seed=1)
LOSSES: dict[str, tuple[type[ClickLoss], dict[str, Any]]] = {
    "full product softmax": (FPSLoss, {}),
    "sampled softmax": (SampledSoftmaxLoss, {}),
    "sampled softmax, in-batch": (SampledSoftmaxLoss, {"negatives": "in_batch"}),
    "sampled softmax, hardest": (SampledSoftmaxLoss, {"negatives": "in_batch", "hardest": 2, "log_q": None}),
    "full softmax": (FullSoftmaxLoss, {"corpus": DOCUMENTS}),
    "pairs": (PairCELoss, {}),
    "pairs, hardest": (PairCELoss, {"negatives": "in_batch", "hardest": 2}),
    "triplets": (TripletLoss, {"learn_scale": True}),
    "triplets, semi-hard": (TripletLoss, {"negatives": "in_batch", "semi_hard": True}),
    "sigmoid": (SigmoidLoss, {"bias": -1.0}),
}
MODES: dict[str, dict[str, Any]] = {
    "kept": {"cache_gradients": False},
    "as memory allows": {},
    "cached": {"cache_gradients": True},
    "cached, several mini-batches": {"cache_gradients": True, "mini_batch_num_tokens": 40},
    "cached within a budget": {"cache_gradients": 120, "mini_batch_num_tokens": 40},
    "kept, several mini-batches": {"cache_gradients": False, "mini_batch_num_tokens": 40},
}
DIRECTIONS = [("query_to_doc",), ("doc_to_query",), ("query_to_doc", "doc_to_query")]
LABELS = ["none", "graded", "a rank without positives"]
MASKING = [("mask", None), ("keep", None), ("mask", "corrected"), ("mask", "standard"), ("keep", "standard")]

Columns = list[list[str]]


@dataclass(frozen=True)
class Case:
    """One setting; ``seed`` chooses its batches."""

    kind: str
    directions: tuple[str, ...]
    mode: str
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
    matryoshka: bool
    seed: int

    def loss(self, model: SentenceTransformer) -> ClickLoss:
        """The loss of this setting, with α far from 1."""
        duplicates, log_q = self.masking
        kind, own_options = LOSSES[self.kind]
        options = {
            "scale": 3.0,
            "directions": self.directions,
            "relevance": self.relevance,
            "duplicates": duplicates,
            "log_q": log_q,
            "similarity": self.similarity,
            "gather_across_devices": self.gather,
            **MODES[self.mode],
            **own_options,
        }
        known = inspect.signature(kind).parameters
        return kind(model, **{name: value for name, value in options.items() if name in known})

    def at_every_dimension(self, loss: ClickLoss) -> ClickLoss | MatryoshkaLoss:
        """The loss, or the sum of it over truncated embeddings."""
        return MatryoshkaLoss(loss.model, loss, [8, 4], [1.0, 0.5]) if self.matryoshka else loss

    def batch(self, rank: int, micro_batch: int) -> tuple[Columns, list[float] | None]:
        """Columns of texts and labels of one rank; every rank draws from the same few texts, so that they repeat."""
        rng = random.Random(f"{self.seed} {rank} {micro_batch}")
        rows = (3, 7, 4)[(rank + micro_batch) % 3] if self.uneven else 5
        columns = [rng.choices(QUERIES, k=rows)]
        columns += [rng.choices(DOCUMENTS, k=rows) for _ in range(1 + self.num_negatives)]
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
    """Every combination of what decides about collectives, for other losses some, with the rest at random."""
    rng = random.Random(0)
    shared = (MODES, (0, 2), LABELS, (False, True), (False, True))
    combinations = list(itertools.product(["full product softmax"], DIRECTIONS, *shared))
    others = [kind for kind in LOSSES if kind != "full product softmax"]
    combinations += list(itertools.product(others, DIRECTIONS[:1], *shared))[::11]
    return [_case(rng, seed, combination) for seed, combination in enumerate(combinations)]


def _case(rng: random.Random, seed: int, combination: tuple[Any, ...]) -> Case:
    masking = rng.choice(MASKING)
    return Case(
        *combination,
        model=rng.choice(list(MODELS)),
        find_unused_parameters=rng.choice([False, True]),
        masking=masking,
        relevance=rng.choice(["mask", "weight"]),
        similarity=rng.choice(["dot", "cosine"]),
        micro_batches=rng.choice([1, 2]),
        # Without log_q: it would be counted once for every dimension.
        matryoshka=masking[1] is None and rng.choice([False, True]),
        seed=seed,
    )


def arguments(
    model: SentenceTransformer, batch: tuple[Columns, list[float] | None]
) -> tuple[list[dict[str, Any]], Tensor | None]:
    """What the trainer passes to a loss."""
    columns, labels = batch
    features = [
        model.preprocess(column, task="document" if number else "query") for number, column in enumerate(columns)
    ]
    return features, None if labels is None else tensor(labels)
