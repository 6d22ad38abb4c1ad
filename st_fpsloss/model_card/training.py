"""What a training run leaves in the model card: the losses with what they learned, and the softmax of a few clicks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss.data.inputs import is_positive
from st_fpsloss.model_card.card import TwoTowerModelCardData, use_two_tower_card
from st_fpsloss.model_card.statistics import click_statistics

NUM_PAIRS = 12
"""Clicks in the picture of the softmax."""


class LearnedLoss(Protocol):
    """A loss with a learned α."""

    similarity: Any

    @property
    def alpha(self) -> float:
        """α."""

    def get_config_dict(self) -> dict[str, Any]:
        """Settings."""


def record_training(
    model: SentenceTransformer, losses: Mapping[str, LearnedLoss], train_dataset: Any, held_out: Any = None
) -> None:
    """Put what was learned into the model's card, for every later save.

    Args:
        model: the trained model.
        losses: the losses of the run by the name of their data set ("" if there is one).
        train_dataset: the data set of the run, whose statistics the card shows.
        held_out: an evaluation data set of the same columns, or None: its first clicks are drawn as a softmax, those of
            the training data where there is none.
    """
    record_losses(model, losses)
    card = model.model_card_data
    if not isinstance(card, TwoTowerModelCardData):
        return
    card.click_statistics = click_statistics(train_dataset)
    source = held_out if isinstance(held_out, Dataset) else train_dataset
    loss = next(iter(losses.values()))
    card.softmax = _softmax(model, loss, source)
    card.softmax_is_held_out = source is held_out


def record_losses(model: SentenceTransformer, losses: Mapping[str, LearnedLoss]) -> None:
    """Put the losses with what they have learned so far into the model's card."""
    use_two_tower_card(model)
    if isinstance(model.model_card_data, TwoTowerModelCardData):
        model.model_card_data.learned = {name: _learned(loss) for name, loss in losses.items()}


def _learned(loss: LearnedLoss) -> dict[str, Any]:
    return {"name": type(loss).__name__, "alpha": round(loss.alpha, 4), "settings": loss.get_config_dict()}


def _softmax(model: SentenceTransformer, loss: LearnedLoss, clicks: Any) -> np.ndarray | None:
    """softmax(α U Wᵀ) (n, n) of the first clicks with different queries and documents, or None without any."""
    if not isinstance(clicks, Dataset) or len(clicks) == 0 or len(clicks.column_names) < 2:
        return None
    head = clicks.select(range(min(len(clicks), 50 * NUM_PAIRS)))
    head = head.select(np.flatnonzero(is_positive(head))).with_format(None)
    query, document = head.column_names[:2]
    pairs: dict[str, tuple[Any, Any]] = {}
    documents: set[str] = set()
    for row in head:
        if repr(row[query]) not in pairs and repr(row[document]) not in documents:
            pairs[repr(row[query])] = row[query], row[document]
            documents.add(repr(row[document]))
        if len(pairs) == NUM_PAIRS:
            break
    if len(pairs) < 2:
        return None
    was_training = model.training
    queries, answers = map(list, zip(*pairs.values(), strict=True))
    u = model.encode_query(queries, convert_to_tensor=True, show_progress_bar=False)
    w = model.encode_document(answers, convert_to_tensor=True, show_progress_bar=False)
    model.train(was_training)
    if loss.similarity == "cosine":
        u, w = torch.nn.functional.normalize(u, dim=-1), torch.nn.functional.normalize(w, dim=-1)
    return (loss.alpha * u.float() @ w.float().T).softmax(dim=1).cpu().numpy()
