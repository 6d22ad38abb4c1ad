from __future__ import annotations

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_fpsloss import Tower, two_tower
from st_fpsloss.cli.loss import LossArguments, make_loss
from st_fpsloss.cli.parser import parse
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.towers import id_embedding

CLICKS = Dataset.from_dict({"query": ["a"], "document": ["b"]})


@pytest.fixture
def model() -> SentenceTransformer:
    return two_tower(Tower(id_embedding(["a"], 4)), Tower(id_embedding(["b"], 4)))


def loss_of(model: SentenceTransformer, *words: str) -> ClickLoss:
    (arguments,) = parse(None, (LossArguments,), words)
    return make_loss("fps", model, arguments, CLICKS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "auto"),
        (("--cache_gradients",), True),
        (("--cache_gradients", "True"), True),
        (("--cache_gradients", "false"), False),
        (("--cache_gradients", "16384"), 16384),
        (("--cache_gradients", "auto"), "auto"),
        (("--cache_gradients", "--scale", "5"), True),
    ],
)
def test_cache_gradients_is_a_flag_or_a_number_of_tokens(
    model: SentenceTransformer, words: tuple[str, ...], expected: bool | int | str
) -> None:
    found = loss_of(model, *words).cache_gradients
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("word", ["much", "1e4", "-5"])
def test_other_values_of_cache_gradients_are_refused(model: SentenceTransformer, word: str) -> None:
    with pytest.raises(ValueError, match=f"--cache_gradients {word}: .*whole number of tokens"):
        loss_of(model, f"--cache_gradients={word}")


@pytest.mark.parametrize(
    ("words", "expected"), [((), False), (("--cache_frozen",), True), (("--cache_frozen", "x"), "x")]
)
def test_cache_frozen_is_a_flag_or_a_folder(
    model: SentenceTransformer, words: tuple[str, ...], expected: bool | str
) -> None:
    assert loss_of(model, *words).get_config_dict()["cache_frozen"] == expected
