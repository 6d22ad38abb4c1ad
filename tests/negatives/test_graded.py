from __future__ import annotations

import itertools
import random

import pytest
import torch
from datasets import Dataset

from st_fpsloss import PairCELoss
from st_fpsloss.negatives.graded import graded_pairs
from tests.losses.conftest import small_model
from tests.training.runs import trainer


def judgements(rows: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    pairs = rng.sample(list(itertools.product(range(6), range(9))), k=rows)
    return Dataset.from_dict(
        {
            "query": [f"q{q}" for q, _ in pairs],
            "document": [f"d{d}" for _, d in pairs],
            "grade": [rng.choice([0.0, 1.0, 2.5, 4.0]) for _ in pairs],
        }
    )


def as_set(pairs: Dataset) -> list[tuple]:
    return sorted(zip(*pairs[:].values(), strict=True))


@pytest.mark.parametrize("min_difference", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_every_document_makes_a_pair_with_every_worse_one_of_its_query(seed, min_difference):
    rows = list(judgements(40, seed))
    expected = sorted(
        (a["query"], a["document"], b["document"])
        for a, b in itertools.permutations(rows, 2)
        if a["query"] == b["query"] and a["grade"] - b["grade"] > min_difference
    )
    pairs = graded_pairs(judgements(40, seed), min_difference=min_difference)
    assert pairs.column_names == ["query", "document", "negative_1"]
    assert as_set(pairs) == expected


def test_a_limit_takes_pairs_of_each_query_at_random():
    data = judgements(40, 0)
    whole, some = as_set(graded_pairs(data)), as_set(graded_pairs(data, max_pairs=4))
    assert set(some) <= set(whole)
    for query in {row[0] for row in whole}:
        assert sum(row[0] == query for row in some) == min(4, sum(row[0] == query for row in whole))
    assert as_set(graded_pairs(data, max_pairs=4, seed=1)) != some == as_set(graded_pairs(data, max_pairs=4))


def test_clicks_and_impressions_are_two_grades():
    shown = Dataset.from_dict({"query": ["q", "q", "r"], "document": ["a", "b", "a"], "label": [1, 0, 1]})
    assert as_set(graded_pairs(shown, grade="label")) == [("q", "a", "b")]


def test_a_document_is_not_worse_than_itself_where_it_was_judged_twice():
    data = Dataset.from_dict({"query": ["q"] * 3, "document": ["a", "a", "b"], "grade": [1, 5, 3]})
    assert as_set(graded_pairs(data)) == [("q", "a", "b"), ("q", "b", "a")]


def test_inputs_may_be_dicts_and_rows_in_another_order():
    data = Dataset.from_dict(
        {
            "query": [{"text": "q", "age": 3}] * 2 + [{"text": "q", "age": 4}],
            "document": [{"text": t} for t in "abc"],
            "grade": [1, 2, 3],
        }
    ).shuffle(seed=0)
    assert graded_pairs(data)[:] == {
        "query": [{"text": "q", "age": 3}], "document": [{"text": "b"}], "negative_1": [{"text": "a"}]
    }  # fmt: skip


def test_it_is_fast_on_many_rows():
    rng = random.Random(0)
    data = Dataset.from_dict(
        {
            "query": [f"q{rng.randrange(20_000)}" for _ in range(200_000)],
            "document": [f"d{rng.randrange(1000)}" for _ in range(200_000)],
            "grade": rng.choices(range(1, 6), k=200_000),
        }
    )
    assert len(graded_pairs(data)) > 500_000


def test_ratings_train_pair_ce(tmp_path):
    texts = ["quick brown fox", "a lazy dog", "seven wizards", "potent elixirs"]
    rows = [(query, text, grade) for query in ("moonlit", "beneath towers") for grade, text in enumerate(texts)]
    data = Dataset.from_dict(dict(zip(("query", "document", "grade"), map(list, zip(*rows, strict=True)), strict=True)))
    model = small_model()
    mapping = {"query": "query", "document": "document", "negative_1": "document"}
    loss = PairCELoss(model, duplicates="keep")
    job = trainer(tmp_path, model, loss, dataset=graded_pairs(data), max_steps=40, router_mapping=mapping)
    job.train()
    model.eval()
    with torch.no_grad():
        scores = (
            model.encode_query(["moonlit"], convert_to_tensor=True)
            @ model.encode_document(texts, convert_to_tensor=True).T
        )
    assert scores[0].argsort().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graded_pairs(judgements(9, 0), grade="stars"), "`judgements` has no column 'stars'"),
        (lambda: graded_pairs(judgements(9, 0), grade="query"), "must hold numbers"),
        (
            lambda: graded_pairs(Dataset.from_dict({"query": ["q"], "document": ["d"], "grade": [None]})),
            "row 0 of the column 'grade' holds no finite number",
        ),
        (lambda: graded_pairs(judgements(9, 0), min_difference=-1), "`min_difference`"),
        (lambda: graded_pairs(judgements(9, 0), max_pairs=0), "max_pairs=0 must"),
        (lambda: graded_pairs(judgements(9, 0), min_difference=10), "nothing to compare"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
