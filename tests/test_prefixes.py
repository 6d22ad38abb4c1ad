"""Whole histories give the loss and the gradients of their prefixes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor

from st_fpsloss import FPSLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.prefix_collator import PrefixCollator
from st_fpsloss.towers import Categorical, History, Numerical, Tower, id_transformer, two_tower

ITEMS = [f"i{n}" for n in range(12)]
DOCUMENTS = {item: {"item": item, "year": 1990 + number} for number, item in enumerate(ITEMS)}
# Two users begin alike, so that a query has two documents; one history is there twice; items repeat.
HISTORIES = [
    {"seen": ["i0", "i1", "i2", "i3", "i0", "i4"], "age": 20},
    {"seen": ["i0", "i1", "i5"], "age": 20},
    {"seen": ["i6", "i0"], "age": None},
    {"seen": ["i0", "i1", "i5"], "age": 20},
    {"seen": ["i7", "i7", "i8", "i2", "i1"], "age": 50},
]


def make_model(text: bool = False, similarity: str = "dot", dropout: float = 0.0, shared: bool = False) -> Any:
    torch.manual_seed(0)
    age = Numerical("age").fit([20, 30, 50])
    history: dict[str, Any] = {"shared_with": "item"} if shared else {"vocabulary": tuple(ITEMS)}
    seen = History("seen", max_length=5, dim=16, dropout=dropout, id_dropout=dropout, **history)
    words = id_transformer(["young", "old"], hidden_size=16, num_hidden_layers=1, dropout=0.0) if text else None
    item = Categorical("item", vocabulary=tuple(ITEMS), dim=16)
    year = Numerical("year").fit([1990, 2001])
    model = two_tower(
        Tower(words, features=[age, seen], hidden_dims=(16,)),
        Tower(features=[item, year], hidden_dims=(16,)),
        embedding_dim=8,
        similarity=similarity,
    )
    for module in model.modules():
        if hasattr(module, "gate"):
            torch.nn.init.normal_(module.gate.weight)
    return model.double()


def features_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns of a batch, as the trainer finds them."""
    return SentenceTransformerTrainer.collect_features(None, batch)[0]  # type: ignore[arg-type]


def whole(model: SentenceTransformer, histories: list[dict] = HISTORIES) -> list[dict[str, Any]]:
    """Features of whole histories."""
    return features_of(PrefixCollator(model, "seen", DOCUMENTS)([{"query": row} for row in histories]))


def one_by_one(model: SentenceTransformer, histories: list[dict] = HISTORIES) -> list[dict[str, Any]]:
    """Features of all prefixes of the histories."""
    queries, documents = [], []
    for row in histories:
        for place in range(1, len(row["seen"])):
            queries.append({**row, "seen": row["seen"][:place]})
            documents.append(DOCUMENTS[row["seen"][place]])
    return [model.preprocess(queries, task="query"), model.preprocess(documents, task="document")]


def loss_and_gradients(loss: Any, features: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss.zero_grad()
    value = loss(features)
    (3 * value).backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    return value.detach(), gradients


def assert_equal(loss: Any, ours: list[dict[str, Any]], reference: list[dict[str, Any]], tolerance: float) -> None:
    value, gradients = loss_and_gradients(loss, ours)
    expected, expected_gradients = loss_and_gradients(loss, reference)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        assert error <= tolerance * max(1.0, float(expected_gradients[name].norm())), name


def losses(model: SentenceTransformer) -> Iterator[tuple[str, ClickLoss]]:
    both = ("query_to_doc", "doc_to_query")
    known = [({"seen": ["i0", "i1"], "age": 20}, DOCUMENTS["i8"]), ({"seen": ["i7"], "age": 50}, DOCUMENTS["i2"])]
    yield "fps", FPSLoss(model)
    yield "keep", FPSLoss(model, duplicates="keep", directions=both)
    yield "log_q", FPSLoss(model, log_q="corrected", directions=both)
    yield "known", FPSLoss(model, known_positives=known)
    yield "cached", FPSLoss(model, cache_gradients=True, mini_batch_num_tokens=5)
    yield "catalogue", SampledSoftmaxLoss(model, catalogue=list(DOCUMENTS.values()))
    yield "cached catalogue", SampledSoftmaxLoss(model, catalogue=list(DOCUMENTS.values()), cache_gradients=True)
    yield "in batch", SampledSoftmaxLoss(model, hardest=3, negatives="in_batch")
    yield "sigmoid", SigmoidLoss(model)
    yield "pairs", PairCELoss(model)
    yield "triplet", TripletLoss(model)


@pytest.mark.parametrize("name", [name for name, _ in losses(make_model())])
def test_loss_and_gradients_are_those_of_the_prefixes_one_by_one(name: str) -> None:
    model = make_model(shared=name == "fps", similarity="cosine" if name == "keep" else "dot")
    loss = dict(losses(model))[name].double()
    loss.eval()  # frequency tables stay as they are
    assert_equal(loss, whole(model), one_by_one(model), 1e-6)  # relevance is float32
