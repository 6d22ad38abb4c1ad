from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from st_fpsloss.towers import Categorical, History, Numerical, Tags
from st_fpsloss.towers.modules.feature_encoders import FeatureFusion
from st_fpsloss.towers.modules.kinds import encoder_of

IDS = [f"i{n}" for n in range(9)]


def history(**arguments) -> History:
    return History("seen", vocabulary=IDS, **{"max_length": 6, "dim": 8, **arguments})


def naive_history_states(encoder: nn.Module, ids: Tensor, num_heads: int) -> Tensor:
    """The states (width, dim) of one history, place by place in float64."""
    encoder = encoder.double()
    states = encoder.table.weight[ids] + encoder.positions[: len(ids)]
    for layer in encoder.layers:
        query, key, value = layer.query_key_value(layer.attention_norm(states)).chunk(3, dim=-1)
        size = query.shape[1] // num_heads
        places = []
        for place in range(len(ids)):
            heads = []
            for head in range(num_heads):
                part = slice(head * size, (head + 1) * size)
                seen = slice(0, place + 1)
                weights = (key[seen, part] @ query[place, part] / math.sqrt(size)).softmax(dim=0)
                heads.append(weights @ value[seen, part])
            places.append(torch.cat(heads))
        states = states + layer.attention_output(torch.stack(places))
        states = states + layer.mlp(states)
    return encoder.norm(states)


# Ids


def test_embeddings_start_at_length_one_and_at_zero_for_missing_and_unknown() -> None:
    torch.manual_seed(0)
    encoder = encoder_of(Categorical("id", vocabulary=range(500), dim=64))
    lengths = encoder.table.weight.norm(dim=1)
    assert lengths[:2].tolist() == [0, 0]
    assert lengths[2:].mean().item() == pytest.approx(1, abs=0.02)


def test_a_category_is_its_row_of_the_table() -> None:
    feature = Categorical("id", vocabulary=IDS, dim=4)
    encoder = encoder_of(feature)
    ids = feature.tensor(["i3", None, "new"])
    torch.testing.assert_close(encoder(ids), encoder.table.weight[[5, 0, 1]])
    assert encoder.output_dim == 4


def test_id_dropout_replaces_ids_by_the_unknown_one_in_training_alone() -> None:
    torch.manual_seed(0)
    encoder = encoder_of(Categorical("id", vocabulary=IDS, dim=4, id_dropout=0.3))
    nn.init.constant_(encoder.table.weight[1], 7.0)
    ids = torch.tensor([5] * 4000 + [0] * 1000)
    dropped = (encoder.train()(ids) == 7).all(dim=1)
    assert dropped[:4000].float().mean() == pytest.approx(0.3, abs=0.03)
    assert not dropped[4000:].any()  # the missing id stays what it is
    assert not (encoder.eval()(ids) == 7).any()


@pytest.mark.parametrize("feature", [Tags("x", vocabulary=IDS, dim=4, id_dropout=0.5), history(id_dropout=0.5)])
def test_id_dropout_makes_the_unknown_id_learn(feature: Tags | History) -> None:
    torch.manual_seed(0)
    encoder = encoder_of(feature).train()
    encoder(feature.tensor([IDS[:5]] * 20)).square().sum().backward()
    assert encoder.table.weight.grad[1].abs().sum() > 0


# Tags


def test_tags_are_the_mean_of_their_embeddings() -> None:
    feature = Tags("x", vocabulary=IDS, dim=4)
    encoder = encoder_of(feature)
    nn.init.normal_(encoder.table.weight)
    table = encoder.table.weight
    found = encoder(feature.tensor([["i0", "i4", "i7"], ["i1"], [], ["new"]]))
    expected = torch.stack([table[[2, 6, 9]].mean(dim=0), table[3], table[0], table[1]])
    torch.testing.assert_close(found, expected)


def test_attention_over_tags_starts_as_the_mean_and_learns_weights() -> None:
    feature = Tags("x", vocabulary=IDS, dim=4, pooling="attention")
    encoder = encoder_of(feature)
    ids = feature.tensor([["i0", "i4", "i7"], ["i1"], []])
    table = encoder.table.weight
    torch.testing.assert_close(encoder(ids)[0], table[[2, 6, 9]].mean(dim=0))
    nn.init.normal_(encoder.weight.weight)
    weights = (table[[2, 6, 9]] @ encoder.weight.weight[0]).softmax(dim=0)
    torch.testing.assert_close(encoder(ids), torch.stack([weights @ table[[2, 6, 9]], table[3], table[0]]))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_padding_changes_nothing(pooling: str) -> None:
    feature = Tags("x", vocabulary=IDS, dim=4, pooling=pooling)
    encoder = encoder_of(feature)
    ids = feature.tensor([["i0", "i4"], [], ["i1"]])
    torch.testing.assert_close(encoder(nn.functional.pad(ids, (0, 5))), encoder(ids))


# Histories


def test_without_layers_a_history_is_a_sum_weighted_by_the_place_from_the_newest() -> None:
    torch.manual_seed(0)
    feature = history(num_hidden_layers=0)
    encoder = encoder_of(feature).double().eval()
    nn.init.normal_(encoder.recency)
    nn.init.normal_(encoder.table.weight)
    table, recency = encoder.table.weight, encoder.recency
    values = [IDS[:6], ["i3", "new", "i3"], ["i8"], []]
    found = encoder(feature.tensor(values))
    expected = [
        sum(recency[age] * table[feature.id(item)] for age, item in enumerate(reversed(items or [None])))
        for items in values
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    prefixes = encoder.prefixes(feature.tensor(values[:3]))
    shorter = [items[: place + 1] for items in values[:3] for place in range(len(items))]
    torch.testing.assert_close(prefixes, encoder(feature.tensor(shorter)))


def test_the_newest_ids_weigh_most_at_first() -> None:
    recency = encoder_of(history(num_hidden_layers=0)).recency
    assert recency[0] == 1 and bool((recency.diff() < 0).all()) and bool((recency > 0).all())


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_history_is_read_as_the_formula_of_a_causal_transformer_says(num_heads: int) -> None:
    torch.manual_seed(0)
    feature = history(num_attention_heads=num_heads)
    encoder = encoder_of(feature).eval()
    nn.init.normal_(encoder.positions)
    values = [IDS[:6], ["i3", "new", "i3"], ["i8"], []]
    ids = feature.tensor(values)
    states, newest = encoder.states(ids), encoder(ids)
    for row, value in enumerate(values):
        length = max(1, len(value))
        expected = naive_history_states(encoder, ids[row, :length], num_heads).float()
        encoder.float()
        torch.testing.assert_close(states[row, :length], expected)
        torch.testing.assert_close(newest[row], expected[-1])


def test_the_state_at_every_place_is_the_history_up_to_there_alone() -> None:
    torch.manual_seed(0)
    feature = history()
    encoder = encoder_of(feature).eval()
    whole = IDS[:6]
    states = encoder.states(feature.tensor([whole]))[0]
    prefixes = encoder(feature.tensor([whole[: place + 1] for place in range(6)]))
    torch.testing.assert_close(states, prefixes)


def test_the_order_of_a_history_matters() -> None:
    torch.manual_seed(0)
    feature = history()
    found = encoder_of(feature).eval()(feature.tensor([["i1", "i2", "i3"], ["i2", "i1", "i3"]]))
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_padding_and_neighbours_change_nothing_in_a_history() -> None:
    torch.manual_seed(0)
    feature = history()
    encoder = encoder_of(feature).eval()
    ids = feature.tensor([["i1"], IDS[:6], []])
    alone = torch.cat([encoder(feature.tensor([value])) for value in (["i1"], IDS[:6], [])])
    torch.testing.assert_close(encoder(ids), alone)
    torch.testing.assert_close(encoder(ids[[0, 2]]), alone[[0, 2]])


def test_every_parameter_of_a_history_learns() -> None:
    feature = history()
    encoder = encoder_of(feature).train()
    encoder(feature.tensor([IDS[:6], IDS[3:], []])).pow(3).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


def test_a_number_passes_as_it_is() -> None:
    values = Numerical("age", mean=0, std=1).tensor([0.5, None])
    assert encoder_of(Numerical("age", mean=0, std=1))(values) is values


# Fusion


def fused(fusion: FeatureFusion, text: Tensor, side: Tensor) -> Tensor:
    return fusion({"sentence_embedding": text, "feature_embedding": side})["sentence_embedding"]


def test_at_first_fusion_lets_nothing_of_the_features_through() -> None:
    fusion, text = FeatureFusion(4, 3), torch.randn(5, 4)
    assert torch.equal(fused(fusion, text, torch.randn(5, 3)), text)


def test_fusion_adds_a_layer_over_a_hidden_layer_and_the_features() -> None:
    fusion, text, side = FeatureFusion(4, 3), torch.randn(5, 4), torch.randn(5, 3)
    nn.init.normal_(fusion.gate.weight)
    hidden = (torch.cat([text, side], dim=1) @ fusion.hidden.weight.T + fusion.hidden.bias).clamp_min(0)
    expected = text + torch.cat([hidden, side], dim=1) @ fusion.gate.weight.T + fusion.gate.bias
    torch.testing.assert_close(fused(fusion, text, side), expected)


def test_one_step_opens_the_gate_and_the_next_reaches_the_features() -> None:
    torch.manual_seed(0)
    fusion, text, side = FeatureFusion(4, 3), torch.randn(5, 4), torch.randn(5, 3, requires_grad=True)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    fused(fusion, text, side).square().sum().backward()
    assert not side.grad.any()
    optimizer.step()
    fused(fusion, text, side).square().sum().backward()
    assert side.grad.abs().min() > 0


def test_dropout_acts_on_the_hidden_layer_of_fusion_in_training_alone() -> None:
    torch.manual_seed(0)
    fusion, text, side = FeatureFusion(4, 3, dropout=0.5), torch.randn(5, 4), torch.randn(5, 3)
    nn.init.normal_(fusion.gate.weight)
    assert not torch.equal(fused(fusion.train(), text, side), fused(fusion.train(), text, side))
    assert torch.equal(fused(fusion.eval(), text, side), fused(fusion.eval(), text, side))
