"""Which side a tokenizer pads on changes nothing: no embedding, no identity, no loss, no gradient, no cost."""

from __future__ import annotations

from itertools import chain, product
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_fpsloss import FPSLoss, FullSoftmaxLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.rows import TokenizedRows
from tests.encoding.tiny_models import tiny_encoder, tiny_two_tower
from tests.losses.conftest import gradients, sentences

LOSSES = {
    "full product softmax": (FPSLoss, {}),
    "sampled softmax": (SampledSoftmaxLoss, {}),
    "sampled softmax, in-batch": (SampledSoftmaxLoss, {"negatives": "in_batch"}),
    "pairs": (PairCELoss, {}),
    "triplets": (TripletLoss, {}),
    "sigmoid": (SigmoidLoss, {"bias": -1.0}),
}
MODES = [dict(cache_gradients=False), dict(cache_gradients=True, mini_batch_num_tokens=40)]


def columns() -> list[list[str]]:
    """Queries, documents, and negatives that hold the positives of other rows, in columns of different width."""
    documents = sentences(6, 12, seed=1)
    documents.sort(key=lambda text: len(text.split()))
    return [sentences(4, 5, seed=2) + ["quick fox"] * 2, documents, [documents[n] for n in (4, 3, 3, 0, 1, 4)]]


def padded_features(model: SentenceTransformer) -> list[dict[str, Any]]:
    return [model.preprocess(texts, task="document" if number else "query") for number, texts in enumerate(columns())]


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], SentenceTransformer]:
    """Models of equal weights."""
    return {(kind, side): tiny_two_tower(kind, side) for kind in ("qwen", "modernbert") for side in ("left", "right")}


@pytest.mark.parametrize("kind", ["qwen", "modernbert"])
@pytest.mark.parametrize("name", LOSSES)
def test_left_right_and_no_padding_give_equal_losses_and_gradients(models, kind, name):
    loss_kind, options = LOSSES[name]
    model = models[kind, "right"]
    unpadded = [
        [model(model.preprocess([text], task="document" if n else "query"))["sentence_embedding"][0] for text in column]
        for n, column in enumerate(columns())
    ]
    texts = {text: number for number, text in enumerate(dict.fromkeys(chain(*columns())))}
    ids = torch.tensor([[texts[text] for text in column] for column in columns()])
    first = {text: unpadded[n][m] for n in (2, 1, 0) for m, text in enumerate(columns()[n])}
    stacked = [torch.stack([first[text] for text in column]) for column in columns()]
    options = {**options, "scale": 1.0}
    if options.get("negatives") == "in_batch":
        stacked, ids = stacked[:2], ids[:2]
    expected = loss_kind(model, **options).compute_loss_from_embeddings(stacked, query_ids=ids[0], document_ids=ids[1:])
    model.zero_grad()
    expected.backward()
    plain = gradients(model, None)  # type: ignore[arg-type]
    for side in ("left", "right"):
        padded = models[kind, side]
        for mode in MODES:
            padded.zero_grad()
            features = padded_features(padded)[: len(ids)]
            assert (features[1]["attention_mask"][:, 0] == 0).any() == (side == "left")
            value = loss_kind(padded, **options, **mode)(features)
            value.backward()
            torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
            assert (gradients(padded, None) - plain).norm() < 1e-5 * plain.norm()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["qwen", "modernbert"])
def test_the_softmax_over_a_corpus_is_the_same_whatever_the_padding(models, kind):
    queries, documents, negatives = columns()
    corpus = list(dict.fromkeys([*negatives, *documents]))

    def plain(model: SentenceTransformer) -> torch.Tensor:
        u, w = (
            torch.stack([model(model.preprocess([text], task=task))["sentence_embedding"][0] for text in texts])
            for task, texts in (("query", queries), ("document", corpus))
        )
        return torch.nn.functional.cross_entropy(u @ w.T, torch.tensor([corpus.index(text) for text in documents]))

    model = models[kind, "right"]
    model.zero_grad()
    expected = plain(model)
    expected.backward()
    wanted = gradients(model, None)  # type: ignore[arg-type]
    for side, mode in product(("left", "right"), MODES):
        padded = models[kind, side]
        padded.zero_grad()
        value = FullSoftmaxLoss(padded, corpus, scale=1.0, **mode)(padded_features(padded)[:2])
        value.backward()
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert (gradients(padded, None) - wanted).norm() < 1e-5 * wanted.norm()  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls", "max", "weightedmean"])
@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_a_row_has_the_embedding_that_the_model_gives_it_as_it_came(kind, pooling):
    model = tiny_encoder(kind, pooling, "left")
    features = model.preprocess(sentences(6, 12, seed=1), prompt="lazy dog ")
    assert (features["attention_mask"][:, 0] == 0).any()
    rows = TokenizedRows.from_features(features)
    assert torch.equal(rows.lengths, features["attention_mask"].sum(dim=1))
    torch.testing.assert_close(
        model(rows.features())["sentence_embedding"], model(features)["sentence_embedding"], rtol=1e-5, atol=1e-5
    )


def test_position_ids_go_with_their_tokens():
    model = tiny_encoder("qwen", "mean", "left")
    features = model.preprocess(sentences(6, 12, seed=1))
    features["position_ids"] = 3 * (features["attention_mask"].cumsum(1) - 1).clamp_min(0)  # no others would do
    rows = TokenizedRows.from_features(features)
    torch.testing.assert_close(
        model(rows.features())["sentence_embedding"], model(features)["sentence_embedding"], rtol=1e-5, atol=1e-5
    )


def test_as_many_tokens_are_planned_on_both_sides(models):
    planned = {}
    for side in ("left", "right"):
        model = models["qwen", side]
        texts = sentences(200, 30, seed=3)
        parts = [TokenizedRows.from_features(model.preprocess(texts, task=task)) for task in ("query", "document")]
        plan = BatchPlan.from_columns(parts, [None, None], 100)
        planned[side] = [rows.tensors["input_ids"].shape for rows in plan.mini_batches]
        assert sum(rows.lengths.sum() for rows in plan.mini_batches) == sum(part.lengths.sum() for part in parts)
    assert planned["left"] == planned["right"]
