from __future__ import annotations

import pytest
import torch
from torch import Tensor

import st_fpsloss.encoding.rows as rows_module
from st_fpsloss.encoding.rows import TokenizedRows


def padded(texts: list[list[int]], width: int | None = None, pad_id: int = 0, left: bool = False, **extra) -> dict:
    """Features of token lists as a tokenizer pads them."""
    width = width or max(map(len, texts))
    ids = torch.full((len(texts), width), pad_id)
    mask = torch.zeros_like(ids)
    for number, tokens in enumerate(texts):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[number, where], mask[number, where] = torch.tensor(tokens, dtype=torch.int64), 1
    return {"input_ids": ids, "attention_mask": mask, "task": "query", **extra}


def keys(features: dict) -> Tensor:
    return TokenizedRows.from_features(features).fingerprints()


def test_equal_rows_form_one_group_and_others_do_not():
    rows = TokenizedRows.from_features(padded([[5, 6], [7], [5, 6], [6, 5], [5, 6, 0]]))
    first, inverse, unique_keys = rows.unique()
    assert inverse[0] == inverse[2]
    assert len(first) == len(set(unique_keys.tolist())) == 4
    assert first[inverse[2]] == 0  # the first of each group stands for it


@pytest.mark.parametrize("other", [dict(width=9), dict(pad_id=3), dict(width=6, left=True)])
def test_identity_does_not_depend_on_padding(other):
    texts = [[5, 6], [7, 0, 8]]
    assert torch.equal(keys(padded(texts)), keys(padded(texts, **other)))


def test_identity_covers_side_features_prompt_and_tower():
    texts = [[5, 6]]
    variants = [
        padded(texts),
        padded(texts, age=torch.tensor([3.0])),
        padded(texts, age=torch.tensor([4.0])),
        padded(texts, tags=torch.tensor([[1, 2]])),
        padded(texts, tags=torch.tensor([[2, 1]])),
        padded(texts, prompt_length=1),
        {**padded(texts), "task": "document"},
        {**padded(texts), "token_type_ids": torch.ones(1, 2, dtype=torch.int64)},
    ]
    assert len({keys(features).item() for features in variants}) == len(variants)


def test_rows_with_nan_features_equal_themselves():
    rows = TokenizedRows.from_features(padded([[1], [1]], age=torch.tensor([float("nan"), float("nan")])))
    assert len(rows.unique()[0]) == 1


def test_a_collision_of_keys_is_resolved_by_equality(monkeypatch):
    monkeypatch.setattr(rows_module, "_mix", lambda values: values * 0)  # every key is 0
    rows = TokenizedRows.from_features(padded([[5, 6], [7], [5, 6], [6, 5]]))
    first, inverse, _ = rows.unique()
    assert len(first) == 3
    assert inverse[0] == inverse[2]
    assert len({int(inverse[i]) for i in (0, 1, 3)}) == 3


def test_a_million_rows_do_not_collide():
    rows = torch.arange(10**6)
    features = {
        "input_ids": torch.stack([rows % 1000, rows // 1000], dim=1),
        "attention_mask": torch.ones(10**6, 2).long(),
    }
    assert len(torch.unique(keys(features))) == 10**6


def test_selection_trims_tokens_but_not_a_side_feature_of_the_same_width():
    features = padded([[1, 2, 3], [4], [5, 6]], pixels=torch.arange(9.0).view(3, 3))
    selected = TokenizedRows.from_features(features).select(torch.tensor([1, 2])).features()
    assert selected["input_ids"].tolist() == [[4, 0], [5, 6]]
    assert selected["pixels"].shape == (2, 3)
    assert selected["task"] == "query"


def test_columns_of_different_width_are_stacked():
    stacked = TokenizedRows.stack(
        [TokenizedRows.from_features(padded([[1, 2, 3]])), TokenizedRows.from_features(padded([[1], [1, 2, 3]]))]
    )
    first, inverse, _ = stacked.unique()
    assert inverse[0] == inverse[2] and len(first) == 2
    assert stacked.lengths.tolist() == [3, 1, 3]


def test_flat_tokens_with_offsets_come_back_as_they_were_with_empty_rows():
    flat = {"input_ids": torch.tensor([4, 5, 6, 4, 5]), "offsets": torch.tensor([0, 2, 2, 3])}  # 4 5 | - | 6 | 4 5
    rows = TokenizedRows.from_features(flat)
    assert rows.lengths.tolist() == [2, 0, 1, 2]
    assert len(rows.unique()[0]) == 3
    back = rows.select(torch.tensor([2, 1, 0])).features()
    assert back["input_ids"].tolist() == [6, 4, 5]
    assert back["offsets"].tolist() == [0, 1, 1]


def test_features_are_fresh_for_each_forward():
    rows = TokenizedRows.from_features(padded([[1, 2]]))
    rows.features()["sentence_embedding"] = torch.zeros(1)
    assert "sentence_embedding" not in rows.features()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (padded([[1], [2]], pixels=torch.zeros(5, 3)), "one entry a row"),
        (padded([[1]], names=["a"]), "'names' is a list"),
    ],
)
def test_what_cannot_be_cut_into_rows_is_refused_by_name(features, message):
    with pytest.raises(ValueError, match=message):
        TokenizedRows.from_features(features)
