from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss import FPSLoss
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.towers import id_embedding
from tests.losses.conftest import gradients
from tests.towers.conftest import CLICKS, IDS, columns, featured_model, first, train


def column_features(model: SentenceTransformer) -> list[dict]:
    data = columns()
    if "text" not in first(model, "document").describe_input():
        data = {name: [{k: v for k, v in row.items() if k != "text"} for row in rows] for name, rows in data.items()}
    return [model.preprocess(data[name], task="document" if n else "query") for n, name in enumerate(data)]


@pytest.mark.parametrize("text", ["words", "static", None])
def test_rows_are_unique_by_text_and_features_whatever_batch_they_are_in(text: str | None) -> None:
    model = featured_model(id_embedding(IDS, 16) if text == "static" else text)
    row = {"item_id": "i1", "genres": ["drama"], "year": 1990, **({"text": "i1"} if text else {})}
    others = [
        {**row, "item_id": "i2"},
        {**row, "genres": ["drama", "horror"]},
        {**row, "year": 1991},
        {**row, "genres": None},
    ]
    keys = TokenizedRows.from_features(model.preprocess([row, *others, row], task="document")).fingerprints()
    assert len(set(keys.tolist())) == 5 and keys[0] == keys[-1]
    assert TokenizedRows.from_features(model.preprocess([row], task="document")).fingerprints()[0] == keys[0]
    seen = [{"seen": ["i1"]}, {"seen": ["i1", "i2"]}, {"seen": ["i2", "i1"]}, {}]
    keys = TokenizedRows.from_features(model.preprocess(seen, task="query")).fingerprints()
    assert len(set(keys.tolist())) == 4
    assert TokenizedRows.from_features(model.preprocess(seen[:1], task="query")).fingerprints()[0] == keys[0]


@pytest.mark.parametrize("text", ["words", "static", None])
def test_kept_and_cached_gradients_are_equal_with_id_dropout(text: str | None) -> None:
    found = []
    for cache_gradients in (False, True):
        model = featured_model(id_embedding(IDS, 16) if text == "static" else text, id_dropout=0.3).train()
        loss = FPSLoss(model, cache_gradients=cache_gradients, mini_batch_num_tokens=4)
        torch.manual_seed(1)
        value = loss(column_features(model))
        value.backward()
        found.append((value.item(), gradients(model, loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 2e-6 * found[0][1].norm()


def test_the_loss_on_unique_rows_is_the_loss_on_all_rows() -> None:
    model = featured_model().eval()
    loss = FPSLoss(model)
    value = loss(column_features(model))
    value.backward()
    unique = gradients(model, loss)
    model.zero_grad()
    rows = [model(features)["sentence_embedding"] for features in column_features(model)]
    ids = torch.tensor([[n % 7 for n in range(CLICKS)], [3 * n % 7 for n in range(CLICKS)]])
    plain = loss.compute_loss_from_embeddings(rows, query_ids=torch.arange(CLICKS) % 5, document_ids=ids)
    torch.testing.assert_close(value, plain)
    plain.backward()
    assert (gradients(model, loss) - unique).norm() < 1e-5 * unique.norm()


def test_every_trainable_parameter_receives_a_gradient() -> None:
    model = featured_model()
    FPSLoss(model)(column_features(model)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_stock_trainer_trains_saves_and_resumes_towers_with_features(tmp_path: Path) -> None:
    model, data = featured_model(), Dataset.from_dict(columns(24))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, data, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("pooler" in name), name
    resumed = featured_model()
    train(resumed, data, tmp_path, str(tmp_path / "checkpoint-2"))
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-4, atol=1e-5)
