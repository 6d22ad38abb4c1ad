"""Large batches: a step at 16384 rows works, and no step holds anything of the size rows × rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from st_fpsloss import (
    FPSLoss,
    FullSoftmaxLoss,
    PairCELoss,
    SampledSoftmaxLoss,
    SigmoidLoss,
    Tower,
    TripletLoss,
    two_tower,
)
from st_fpsloss.objectives import softmax
from st_fpsloss.towers import id_embedding
from tests.benchmarks.zipf import zipf_clicks
from tests.losses.conftest import gradients, static_query_model

M = 2048
LOSSES: dict[str, tuple[type, dict[str, Any]]] = {
    "full product softmax": (FPSLoss, {}),
    "to the letter": (FPSLoss, {"duplicates": "keep", "log_q": "standard"}),
    "both directions": (FPSLoss, {"directions": ("query_to_doc", "doc_to_query"), "log_q": "corrected"}),
    "sampled softmax": (SampledSoftmaxLoss, {}),
    "sampled softmax, in-batch": (SampledSoftmaxLoss, {"negatives": "in_batch", "log_q": "corrected"}),
    "sampled softmax, hardest": (SampledSoftmaxLoss, {"negatives": "in_batch", "hardest": 5}),
    "full softmax": (FullSoftmaxLoss, {"corpus": [str(n) for n in range(M)]}),
    "pairs": (PairCELoss, {}),
    "pairs, in-batch": (PairCELoss, {"negatives": "in_batch"}),
    "pairs, hardest": (PairCELoss, {"negatives": "in_batch", "hardest": 5}),
    "triplets": (TripletLoss, {}),
    "triplets, in-batch": (TripletLoss, {"negatives": "in_batch"}),
    "triplets, semi-hard": (TripletLoss, {"negatives": "in_batch", "semi_hard": True}),
    "sigmoid": (SigmoidLoss, {}),
}


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest storage has that an operation returns, in the backward pass too."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                size = output.untyped_storage().nbytes() // output.element_size()
                self.num_elements = max(self.num_elements, size)
        return outputs


def id_batch(num_negatives: int) -> tuple[Any, list[dict[str, Any]]]:
    """Towers of ids, and M clicks on almost as many different documents, by almost as many queries."""
    torch.manual_seed(0)
    query, document = (Tower(id_embedding(range(M), 8), hidden_dims=()) for _ in range(2))
    model = two_tower(query, document, embedding_dim=8)
    rng = random.Random(0)
    columns = [[str(n) for n in [*range(M - 100), *rng.choices(range(M), k=100)]] for _ in range(2 + num_negatives)]
    for column in columns:
        rng.shuffle(column)
    return model, [model.preprocess(ids, task="document" if n else "query") for n, ids in enumerate(columns)]


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_has_rows_times_rows_elements(name, monkeypatch):
    kind, options = LOSSES[name]
    monkeypatch.setattr(softmax, "_TILE_PAIRS_CPU", M * M // 32)  # by itself all of this batch is one tile
    model, features = id_batch(num_negatives=0 if options.get("negatives") == "in_batch" else 1)
    loss = kind(model, **options)
    with LargestTensor() as largest:
        loss(features, torch.ones(M)).backward()
    assert gradients(model, loss).norm() > 0
    assert M * 8 <= largest.num_elements <= M * M // 16  # negative columns double the width of a tile


@pytest.mark.parametrize("kind", [PairCELoss, SampledSoftmaxLoss])
def test_many_documents_shown_to_one_query_are_not_listed_at_once(kind, monkeypatch):
    monkeypatch.setattr("st_fpsloss.batch.negatives._TILE_PAIRS", M * 8)
    model, (_, documents) = id_batch(num_negatives=0)
    loss = kind(model, negatives="explicit")
    with LargestTensor() as largest:  # half of the rows clicked, half not: M * M / 4 pairs
        loss([model.preprocess(["0"] * M, task="query"), documents], torch.arange(M) % 2).backward()
        loss.batch_statistics()
    assert gradients(model, loss).norm() > 0
    assert M * 8 <= largest.num_elements <= M * M // 16


def test_the_recorder_sees_a_matrix_of_all_cells():
    queries = torch.randn(64, 8, requires_grad=True)
    with LargestTensor() as largest:
        (queries @ torch.randn(8, 64)).logsumexp(1).sum().backward()
    assert largest.num_elements == 64 * 64


@pytest.mark.slow
def test_a_step_of_16384_rows_with_static_queries():
    queries, documents = zipf_clicks(16384)
    documents = [" ".join(text.split()[:3]) + f" {len(text)}" for text in documents]  # short ones, for a quick test
    model = static_query_model()
    loss = FPSLoss(model, scale=3.0, duplicates="keep", similarity="dot", cache_gradients=16384)
    features = [model.preprocess(queries, task="query"), model.preprocess(documents, task="document")]
    value = loss([dict(column) for column in features])
    value.backward()
    for task in ("query", "document"):
        assert gradients(model[0].sub_modules[task], loss).norm() > 0
    with torch.no_grad():
        U, W = (model(column)["sentence_embedding"] for column in features)
        naive = sum(
            torch.nn.functional.cross_entropy(3 * U[rows] @ W.T, rows, reduction="sum")
            for rows in torch.arange(len(U)).split(1024)
        )
    torch.testing.assert_close(value.detach(), naive / len(U), rtol=1e-5, atol=1e-5)
