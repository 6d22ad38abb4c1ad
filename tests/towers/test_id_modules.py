from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoTokenizer

from st_fpsloss.towers import id_embedding, id_transformer

IDS = ["b07:x", "42", "Émile", "un-known"]


def model_of(ids: list, **kwargs) -> SentenceTransformer:
    return SentenceTransformer(modules=[id_transformer(ids, hidden_size=16, **kwargs), Pooling(16)])


def test_every_id_is_one_token_whatever_its_characters() -> None:
    tokenizer = id_transformer(IDS, hidden_size=8).tokenizer
    assert tokenizer.tokenize(" ".join(IDS)) == IDS
    assert len(tokenizer) == len(IDS) + 3
    assert tokenizer.tokenize("émile 421 42") == ["[UNK]", "[UNK]", "42"]


def test_whole_numbers_are_ids_too() -> None:
    assert id_transformer(np.arange(3), hidden_size=8).tokenizer.tokenize("0 2 3") == ["0", "2", "[UNK]"]


def test_a_long_history_keeps_its_newest_items_before_and_after_saving(tmp_path: Path) -> None:
    model = model_of(range(10), max_seq_length=4)
    model.save_pretrained(str(tmp_path))
    for built in (model, SentenceTransformer(str(tmp_path))):
        assert built.max_seq_length == 4
        assert built.tokenizer.truncation_side == "left"
        np.testing.assert_array_equal(built.encode("1 2 3 4 5 6"), built.encode("4 5 6"))
        assert not np.allclose(built.encode("4 5 6"), built.encode("5 6"))


def test_the_order_of_a_history_matters_to_the_transformer_and_not_to_the_bag() -> None:
    sequence, bag = model_of(range(10)), SentenceTransformer(modules=[id_embedding(range(10), 16)])
    assert not np.allclose(sequence.encode("1 2 3"), sequence.encode("3 2 1"))
    np.testing.assert_allclose(bag.encode("1 2 3"), bag.encode("3 2 1"), rtol=1e-5, atol=1e-6)


def test_an_empty_history_has_an_embedding_alone_and_in_a_batch() -> None:
    model = model_of(range(10))
    alone = model.encode([""])
    assert np.isfinite(alone).all() and np.abs(alone).sum() > 0
    np.testing.assert_allclose(model.encode(["1 2 3", ""])[1], alone[0], rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing() -> None:
    model = model_of(range(10))
    np.testing.assert_allclose(model.encode(["1", "1 2 3 4 5"])[0], model.encode(["1"])[0], rtol=1e-4, atol=1e-6)


def test_the_transformer_survives_saving_and_loads_by_stock_classes(tmp_path: Path) -> None:
    model = model_of(IDS)
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path))
    np.testing.assert_array_equal(again.encode(["42 Émile", "new"]), model.encode(["42 Émile", "new"]))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.is_fast and tokenizer("Émile 42")["input_ids"] == model.tokenizer("Émile 42")["input_ids"]


def test_sizes_are_those_that_were_asked_for() -> None:
    config = id_transformer(
        range(5),
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=20,
        max_seq_length=9,
        dropout=0.3,
    ).model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (12, 3, 4)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (20, 9, 8)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.3
    assert id_transformer(range(5), hidden_size=12).model.config.intermediate_size == 48


def test_the_unused_pooler_is_frozen_and_all_else_trains() -> None:
    module = id_transformer(range(5), hidden_size=8)
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == {
        "model.pooler.dense.weight",
        "model.pooler.dense.bias",
    }


def test_the_folder_it_was_built_in_is_forgotten() -> None:
    module = id_transformer(range(5), hidden_size=8)
    assert [module.model.config._name_or_path, module.model.name_or_path, module.tokenizer.name_or_path] == [""] * 3


def test_every_rank_of_a_process_group_can_build_it() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert model_of(range(5)).encode(["1 2"]).shape == (1, 16)
    finally:
        dist.destroy_process_group()


def test_the_same_seed_gives_the_same_weights() -> None:
    def made() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        transformer = id_transformer(range(5), hidden_size=8)
        return transformer.model.embeddings.word_embeddings.weight, id_embedding(range(5), 8).embedding.weight

    for first, second in zip(made(), made(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_bag_is_the_mean_of_its_words() -> None:
    bag = id_embedding(["7", "genre:comedy"], embedding_dim=16)
    table = {word: bag.embedding.weight[index].detach().numpy() for word, index in bag.tokenizer.get_vocab().items()}
    out = SentenceTransformer(modules=[bag]).encode(["7 genre:comedy genre:comedy", "8", ""])
    expected = [(table["7"] + 2 * table["genre:comedy"]) / 3, table["[UNK]"], np.zeros(16)]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)


def test_rows_of_a_bag_start_at_about_unit_length() -> None:
    lengths = id_embedding(range(2000), embedding_dim=64).embedding.weight.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1, abs=0.02)


def test_a_bag_survives_saving(tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[id_embedding(IDS, 8)])
    model.save_pretrained(str(tmp_path))
    texts = ["42 b07:x", "new", ""]
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path)).encode(texts), model.encode(texts))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "ids is empty"),
        ("abc", "ids='abc'"),
        (7, "ids=7"),
        (["a", "b", "a"], "'a' more than once"),
        ([1, "1"], "'1' more than once"),
        (["a", "b c"], "'b c'.*white space"),
        (["a", " b"], "' b'.*white space"),
        (["a", "b\u00a0c"], "white space"),
        ([""], "''"),
        ([1.0], "1.0, a float"),
        ([None], "None"),
        ([True], "True"),
        (["[UNK]"], "reserved"),
        (["x[PAD]y"], "reserved"),
    ],
)
def test_ids_that_would_not_be_one_token_each_are_refused(ids: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        id_transformer(ids)
    with pytest.raises(ValueError, match=message):
        id_embedding(ids, embedding_dim=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "num_attention_heads=4.*hidden_size=10"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"max_seq_length": 1}, "max_seq_length=1"),
        ({"dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        id_transformer(["a"], **arguments)


def test_an_embedding_without_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding_dim=0"):
        id_embedding(["a"], embedding_dim=0)
