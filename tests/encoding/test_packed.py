"""Rows packed one after the other for flash attention: the same losses and gradients as padded ones.

A CPU has no flash attention. A function registered with transformers in its place reads the borders of rows that
sentence-transformers hands over, as flash attention does, and knows nothing of padding.
"""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AttentionInterface, DataCollatorWithFlattening

from st_fpsloss import FPSLoss, PairCELoss
from st_fpsloss.encoding.plan import BatchPlan
from st_fpsloss.encoding.rows import TokenizedRows
from tests.encoding.test_left_padding import MODES, padded_features
from tests.encoding.tiny_models import tiny_encoder, tiny_two_tower
from tests.losses.conftest import gradients, sentences


def attention_within_borders(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Attention over (1, heads, tokens, head dim) that ends at ``cu_seq_lens_q``."""
    assert attention_mask is None
    borders: Tensor = kwargs["cu_seq_lens_q"]
    assert kwargs["max_length_k"] == torch.diff(borders).max()
    row = torch.repeat_interleave(torch.arange(len(borders) - 1), torch.diff(borders))
    place = torch.arange(len(row))
    seen = row[:, None] == row
    if module.is_causal:
        seen &= place[:, None] >= place
    if sliding_window is not None:  # ModernBERT's local layers see as far to both sides
        seen &= (place[:, None] - place).abs() < sliding_window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("within_borders", attention_within_borders)


def pack(model: SentenceTransformer) -> SentenceTransformer:
    """Let a model's Transformers pack their inputs, as they do where flash attention is installed."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.model.set_attn_implementation("within_borders")
            module.data_collator = DataCollatorWithFlattening(
                return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
            )
            if module.model_forward_params is not None:
                module.model_forward_params |= {
                    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
                }  # fmt: skip
            module._flatten_position_offset = module._infer_flatten_position_offset()
            module.can_flatten_inputs = True
    return model


@pytest.fixture(scope="module", params=["qwen", "modernbert"])
def models(request) -> tuple[SentenceTransformer, SentenceTransformer]:
    """The same model with padding and with packing."""
    return tiny_two_tower(request.param), pack(tiny_two_tower(request.param))


@pytest.mark.parametrize("loss_kind", [FPSLoss, PairCELoss])
@pytest.mark.parametrize("mode", [*MODES, dict()], ids=str)
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(models, loss_kind, mode):
    found = []
    for model in models:
        model.zero_grad()
        features = padded_features(model)
        value = loss_kind(model, scale=1.0, **mode)(features)
        value.backward()
        found.append((value.detach(), gradients(model, None), features))
    (expected, plain, padded), (value, ours, packed) = found
    assert "cu_seq_lens_q" in packed[0] and "cu_seq_lens_q" not in padded[0]
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert plain.norm() > 0 and (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("pooling", Pooling.POOLING_MODES)
def test_rows_come_back_in_another_order_as_they_were(pooling):
    model = pack(tiny_encoder("modernbert", pooling))
    texts = sentences(6, 12, seed=1)
    order = [3, 0, 5]
    chosen = TokenizedRows.from_features(model.preprocess(texts, prompt="lazy dog ")).select(torch.tensor(order))
    expected = model.preprocess([texts[n] for n in order], prompt="lazy dog ")
    features = chosen.features()
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert value.dtype == features[name].dtype and torch.equal(value, features[name]), name
        else:
            assert value == features[name], name
    torch.testing.assert_close(model(features)["sentence_embedding"], model(expected)["sentence_embedding"])


def test_each_distinct_row_is_planned_once_and_nothing_is_padded(models):
    _, model = models
    texts = sentences(100, 30, seed=3)
    part = TokenizedRows.from_features(model.preprocess(texts + texts[::-1], task="document"))
    plan = BatchPlan.from_columns([part], [None], 200)
    assert sum(rows.num_tokens for rows in plan.mini_batches) == part.lengths[:100].sum()
    assert all(rows.num_tokens <= 200 for rows in plan.mini_batches)
    assert len(plan.mini_batches) <= 1.2 * part.lengths[:100].sum() / 200 + 1
    assert torch.equal(plan.index[0, :100], plan.index[0, 100:].flip(0))


def test_side_features_of_packed_rows_stay_with_their_rows(models):
    _, model = models
    features = model.preprocess(sentences(4, 5, seed=3), task="query") | {"age": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    rows = TokenizedRows.from_features(features).select(torch.tensor([2, 1]))
    assert rows.features()["age"].tolist() == [3.0, 2.0]
