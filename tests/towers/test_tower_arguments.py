from __future__ import annotations

from pathlib import Path

import pytest
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import XLNetConfig

from st_fpsloss.towers import Tower, id_embedding, two_tower
from tests.towers.test_two_tower import IDS, save_folder, tiny_encoder, tiny_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "transformer=None"),
        ({"transformer": ""}, "transformer=''"),
        ({"transformer": 3}, "transformer=3"),
        ({"transformer": Pooling(4)}, "transformer=Pooling"),
        ({"transformer": "x", "features": ["genre"]}, "features holds 'genre'"),
        ({"transformer": "x", "features": "genre"}, "features='genre'"),
        ({"transformer": "x", "num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"transformer": "x", "num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"transformer": "x", "max_seq_length": 2.5}, "max_seq_length=2.5"),
        ({"transformer": "x", "pooling": "average"}, "pooling='average'.*mean"),
        ({"transformer": "x", "hidden_dims": 512}, r"hidden_dims=512.*\(512,\)"),
        ({"transformer": "x", "hidden_dims": "512"}, "hidden_dims='512'"),
        ({"transformer": "x", "hidden_dims": (8, -1)}, r"hidden_dims\[1\]=-1"),
        ({"transformer": "x", "dropout": 1.0}, "dropout=1.0"),
        ({"transformer": "x", "dropout": float("nan")}, "dropout=nan"),
        ({"transformer": "x", "dropout": "0.1"}, "dropout='0.1'"),
    ],
)
def test_a_tower_refuses_wrong_arguments_by_name_and_value(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tower(**arguments)


def test_a_tower_refuses_modules_that_are_no_encoder_and_says_which_part_to_give() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"model\[0\]"):
        Tower(model)
    with pytest.raises(ValueError, match="sub_modules"):
        Tower(model[0])
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        Tower(tiny_encoder().half())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": "some/model"}, r'query=Tower\("some/model"\)'),
        ({"document": None}, "document is a NoneType"),
        ({"embedding_dim": 0}, "embedding_dim=0"),
        ({"embedding_dim": 2.0}, "embedding_dim=2.0"),
        ({"similarity": "euclidean"}, "similarity='euclidean'.*dot, cosine"),
        ({"document_bias": True, "similarity": "cosine"}, 'similarity="dot"'),
        ({"prompts": "query: "}, "prompts='query: '"),
        ({"prompts": {"query": None}}, "must map names to texts"),
        ({"prompts": {"passage": "passage: "}}, "'passage'.*\"document\""),
    ],
)
def test_two_tower_refuses_wrong_arguments_by_name_and_value(arguments: dict, message: str) -> None:
    tower = Tower(id_embedding(IDS, 8))
    with pytest.raises(ValueError, match=message):
        two_tower(**{"query": tower, "document": tower, **arguments})


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (Tower("no/such-model"), "transformer='no/such-model' could not be loaded"),
        (Tower("no/such/folder"), "transformer='no/such/folder' could not be loaded"),
        (Tower(tiny_encoder(), num_hidden_layers=4), "num_hidden_layers=4.*3 layers"),
        (Tower(tiny_encoder(), max_seq_length=13), "max_seq_length=13.*12 positions"),
        (Tower(id_embedding(IDS, 8), num_hidden_layers=1), "num_hidden_layers=1 needs a Transformer"),
        (Tower(id_embedding(IDS, 8), max_seq_length=9), "max_seq_length=9 needs a Transformer"),
    ],
)
def test_two_tower_refuses_transformers_that_do_not_fit(tower: Tower, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_tower(tower, Tower(id_embedding(IDS, 8)))


def test_an_unknown_layout_is_refused_instead_of_left_uncut(tmp_path: Path) -> None:
    folder = save_folder(XLNetConfig(vocab_size=30, d_model=16, n_layer=3, n_head=2, d_inner=32), tmp_path)
    with pytest.raises(ValueError, match="XLNetModel"):
        two_tower(Tower(folder, num_hidden_layers=2), Tower(folder))


def test_a_folder_that_starts_with_a_router_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="starts with a Router"):
        two_tower(Tower(str(tmp_path)), Tower(str(tmp_path)))
