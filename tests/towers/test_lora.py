"""LoRA on towers: adapters learn, and the saved model is a plain one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss.towers import Tower, id_embedding, two_tower
from st_fpsloss.towers.lora import add_lora, merge_lora
from tests.towers.conftest import train
from tests.towers.test_start import TEXTS
from tests.towers.test_two_tower import IDS


def test_adapters_and_the_mlp_learn_and_are_saved_in_a_plain_model(minilm: str, tmp_path: Path) -> None:
    model = two_tower(Tower(minilm, num_hidden_layers=1), Tower(minilm, num_hidden_layers=2), similarity="cosine")
    untouched = model.encode_query(TEXTS)
    names = add_lora(model, towers=["query"], rank=4)
    np.testing.assert_allclose(model.encode_query(TEXTS), untouched, atol=1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    columns = {"query": TEXTS * 3, "document": TEXTS * 3, "negative": TEXTS[::-1] * 3}
    mapping = {"lora": 1e-2}
    train(model, Dataset.from_dict(columns), tmp_path / "run", learning_rate_mapping=mapping)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert set(names) <= changed
    assert not any("sub_modules.query.0" in name for name in changed - set(names))
    assert any("sub_modules.query.3" in name for name in changed)
    trained = model.encode_query(TEXTS)
    model.save_pretrained(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "run" / "checkpoint-3"):
        assert not any("adapter" in path.name for path in folder.rglob("*"))
        again = SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_allclose(again.encode_query(TEXTS), trained, atol=1e-5)
    merge_lora(model)
    np.testing.assert_allclose(model.encode_query(TEXTS), trained, atol=1e-5)
    assert model.state_dict().keys() == again.state_dict().keys()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(".pooler." in name for name in frozen)


def test_a_tower_without_a_transformer_takes_no_adapters() -> None:
    model = two_tower(*(Tower(id_embedding(IDS, 8)) for _ in range(2)))
    with pytest.raises(ValueError, match="'query', whose encoder is no transformer"):
        add_lora(model)
    with pytest.raises(ValueError, match="'passage', model has the towers"):
        add_lora(model, towers=["passage"])
