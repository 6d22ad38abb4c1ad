from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from st_fpsloss.towers import Categorical, History, Numerical, Tags
from st_fpsloss.towers.features.kinds import feature_from_dict
from st_fpsloss.towers.features.values import bucket

GENRES = ["drama", "comedy", "horror"]
ALL_KINDS = [
    Categorical("genre", vocabulary=GENRES, dim=4, id_dropout=0.1),
    Categorical("city", buckets=100),
    Numerical("age", mean=30.5, std=9.25),
    Numerical("price", transform="log").fit([1, 10, 1000.7]),
    Numerical("views", transform="quantile").fit(range(1000)),
    Tags("tags", vocabulary=GENRES, pooling="attention"),
    History("seen", vocabulary=["i1", "i2"], max_length=3, num_hidden_layers=1, dim=8, dropout=0.3),
    History("seen", shared_with="item_id"),
]


class Once:
    """An iterable that can be read once."""

    def __init__(self, values: list) -> None:
        self.values, self.reads = values, 0

    def __iter__(self):
        self.reads += 1
        assert self.reads == 1
        return iter(self.values)


# Fitting


def test_a_vocabulary_is_what_occurs_the_most_frequent_first() -> None:
    values = Once(["comedy", "drama", None, "drama", "horror", "horror", "horror"])
    assert Categorical("genre").fit(values).vocabulary == ("horror", "drama", "comedy")
    assert Tags("genres").fit([["a", "b"], None, [], ["b"]]).vocabulary == ("b", "a")
    assert History("seen").fit([[3, 4, 3], [3]]).vocabulary == ("3", "4")


def test_fit_returns_a_copy_with_all_other_settings() -> None:
    feature = Categorical("genre", dim=7, id_dropout=0.2)
    fitted = feature.fit(GENRES)
    assert (feature.vocabulary, fitted.vocabulary) == (None, tuple(GENRES))
    assert (fitted.dim, fitted.id_dropout) == (7, 0.2)


def test_fit_reads_a_column_of_a_data_set() -> None:
    data = Dataset.from_dict({"age": [20, None, 40], "tags": [["a"], None, ["b", "a"]]})
    age = Numerical("age").fit(data["age"])
    assert (age.mean, age.std) == (30, 10)
    assert Tags("tags").fit(data["tags"]).vocabulary == ("a", "b")


def test_hash_buckets_and_shared_vocabularies_need_no_fit() -> None:
    hashed, shared = Categorical("city", buckets=5), History("seen", shared_with="item_id")
    assert hashed.is_fitted and hashed.fit(Once(["x"])) is hashed
    assert shared.is_fitted and shared.fit(Once([["x"]])) is shared


def test_statistics_are_those_of_the_transformed_numbers() -> None:
    values = np.array([0.0, -3.0, 8.5, 1e6])
    logs = np.sign(values) * np.log1p(np.abs(values))
    price = Numerical("price", transform="log").fit(Once([*values, None]))
    assert (price.mean, price.std) == (pytest.approx(logs.mean()), pytest.approx(logs.std()))


# Tensors


def test_ids_tell_missing_unknown_and_known_apart() -> None:
    genre = Categorical("genre", vocabulary=GENRES)
    assert genre.tensor([None, "western", "drama", "horror"]).tolist() == [0, 1, 2, 4]
    assert genre.num_ids == 5


def test_a_whole_number_and_its_digits_are_one_category() -> None:
    values = [7, "7", np.int64(7), np.array(7), torch.tensor(7), np.str_("7"), True, np.bool_(True)]
    assert Categorical("id", vocabulary=[7, "True"]).tensor(values).tolist() == [2] * 6 + [3] * 2


def test_hash_buckets_are_the_same_in_every_process() -> None:
    # Python's own hash() of a string differs from process to process.
    assert (bucket("straße", 10**9), bucket("7", 10**9)) == (109916002, 149377255)


def test_hash_buckets_spread_values_evenly() -> None:
    ids = Categorical("city", buckets=10).tensor([f"city {n}" for n in range(5000)])
    counts = torch.bincount(ids, minlength=12)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].min() > 400 and counts[2:].max() < 600


def test_numbers_are_standardised_and_missing_ones_flagged() -> None:
    age = Numerical("age", mean=30, std=10)
    values = [40, 25.0, None, np.float32(30), np.int64(50), torch.tensor(20.0), True]
    expected = [[1, 0], [-0.5, 0], [0, 1], [0, 0], [2, 0], [-1, 0], [-2.9, 0]]
    torch.testing.assert_close(age.tensor(values), torch.tensor(expected, dtype=torch.float32))


def test_an_outlier_is_cut_at_ten_deviations() -> None:
    assert Numerical("age", mean=0, std=1).tensor([1e300, -1e300, 9.5])[:, 0].tolist() == [10, -10, 9.5]


def test_a_constant_does_not_blow_up() -> None:
    constant = Numerical("age").fit([0.1] * 7)
    assert constant.tensor([0.1, 0.2])[:, 0].tolist() == pytest.approx([0, 0.1], abs=1e-6)


@pytest.mark.parametrize("values", [np.random.default_rng(0).lognormal(3, 2, 4000), np.repeat([1.0, 2.0, 9.0], 50)])
def test_quantiles_give_any_distribution_one_scale(values: np.ndarray) -> None:
    feature = Numerical("views", transform="quantile").fit(values)
    asked = np.quantile(values, [0.0, 0.013, 0.25, 0.5, 0.77, 1.0])
    below = np.array([((values < x).mean() + (values <= x).mean()) / 2 for x in asked])
    np.testing.assert_allclose(feature.tensor(asked)[:, 0], (below - 0.5) * math.sqrt(12), atol=0.04)
    low, high = feature.tensor([-1e9, 1e9])[:, 0].tolist()
    assert (low, high) == (pytest.approx(-math.sqrt(3)), pytest.approx(math.sqrt(3)))


def test_tags_are_a_set_whatever_they_come_in() -> None:
    tags = Tags("tags", vocabulary=GENRES)
    values = [["horror", "drama"], ("drama", "horror", "drama"), {"drama", "horror"}, np.array(["drama", "horror"])]
    assert tags.tensor(values).tolist() == [[2, 4]] * 4
    assert tags.tensor([["x", "y", None, "comedy"], [], None]).tolist() == [[1, 3], [0, 0], [0, 0]]


def test_a_history_keeps_the_newest_ids_in_their_order() -> None:
    seen = History("seen", vocabulary=[1, 2, 3], max_length=3)
    values = [[3, 3, 2, 1, 2], np.array([1, 9]), (2,), [], None, [None, 2]]
    assert seen.tensor(values).tolist() == [[3, 2, 3], [2, 1, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0], [3, 0, 0]]


@pytest.mark.parametrize("feature", [Tags("x", vocabulary=GENRES), History("x", vocabulary=GENRES)])
def test_lists_are_at_least_one_wide(feature: Tags | History) -> None:
    assert feature.tensor([None, []]).shape == (2, 1)


# Serialisation


@pytest.mark.parametrize("feature", ALL_KINDS, ids=lambda feature: f"{type(feature).__name__}-{feature.name}")
def test_a_feature_is_what_its_dictionary_says(feature) -> None:
    held = feature.to_dict()
    again = feature_from_dict(held)
    assert type(again) is type(feature) and again.to_dict() == held
    values = [feature.example(0), feature.example(1), None]
    if getattr(feature, "shared_with", None) is None:
        torch.testing.assert_close(again.tensor(values), feature.tensor(values))


def test_the_size_of_embeddings_is_written_down_even_if_it_was_chosen_here() -> None:
    assert Categorical("genre", vocabulary=GENRES).to_dict()["dim"] == round(1.6 * 5**0.56)


def test_a_feature_shows_its_size_and_not_its_vocabulary() -> None:
    feature = Categorical("id", vocabulary=range(10_000))
    assert len(repr(feature)) < 100 and "10000 known values" in str(feature)


# Wrong input


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        (ALL_KINDS[2], "old", "'age' got 'old' .a str.: a Numerical needs a number"),
        (ALL_KINDS[2], float("nan"), "'age' got nan .*None where it is missing"),
        (ALL_KINDS[2], np.float32("nan"), "'age' got nan"),
        (ALL_KINDS[2], math.inf, "'age' got inf .*finite"),
        (ALL_KINDS[2], 10**400, "'age' got 1000.*finite"),
        (ALL_KINDS[2], [3], r"'age' got \[3\] .a list."),
        (ALL_KINDS[2], {"years": 3}, "'age' got {'years': 3} .a dict."),
        (ALL_KINDS[0], ["drama"], r"'genre' got \['drama'\] .a list.*Tags"),
        (ALL_KINDS[0], {"name": "drama"}, "'genre' got {'name': 'drama'} .a dict."),
        (ALL_KINDS[0], float("nan"), "'genre' got nan .*None where it is missing"),
        (ALL_KINDS[0], 3.0, "'genre' got 3.0 .a float."),
        (ALL_KINDS[0], b"drama", "'genre' got b'drama' .a bytes."),
        (ALL_KINDS[5], "drama", "'tags' got 'drama' .a str.: Tags need a list"),
        (ALL_KINDS[5], [["drama"]], r"'tags' got \['drama'\] .a list."),
        (ALL_KINDS[5], {"drama": 1}, "'tags' got {'drama': 1} .a dict."),
        (ALL_KINDS[5], [{"name": "drama"}], "'tags' got {'name': 'drama'} .a dict."),
        (ALL_KINDS[6], "i1 i2", "'seen' got 'i1 i2' .a str.: a History needs a list of ids"),
        (ALL_KINDS[6], {"i1"}, "'seen' got {'i1'} .a set."),
        (ALL_KINDS[6], [1.5], "'seen' got 1.5 .a float."),
        (ALL_KINDS[6], np.zeros((2, 2)), "'seen' got array"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(feature, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature.tensor([None, value])
    with pytest.raises(ValueError, match=message):
        type(feature)(feature.name).fit([value])


@pytest.mark.parametrize("kind", [Categorical, Numerical, Tags, History])
def test_a_feature_that_is_not_fitted_says_so(kind) -> None:
    with pytest.raises(ValueError, match=rf"'x' is not fitted: call {kind.__name__}\('x'\).fit"):
        kind("x").tensor([None])
    for nothing in ([], [None, None]):
        with pytest.raises(ValueError, match="fit of 'x' found no"):
            kind("x").fit(nothing)
    for wrong in ("abc", {"a": 1}, 7):
        with pytest.raises(ValueError, match=r"fit of 'x' got a .*one value an example"):
            kind("x").fit(wrong)


def test_a_history_that_shares_a_vocabulary_cannot_be_read_outside_of_a_model() -> None:
    with pytest.raises(ValueError, match="'seen' reads with 'item_id'"):
        ALL_KINDS[-1].tensor([None])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Categorical, {"name": ""}, "name=''"),
        (Categorical, {"name": 3}, "name=3"),
        (Numerical, {"name": "text"}, "name='text' has another meaning"),
        (Tags, {"name": "role"}, "name='role' has another meaning"),
        (Categorical, {"name": "x", "vocabulary": "abc"}, "vocabulary of 'x' is a str"),
        (Categorical, {"name": "x", "vocabulary": []}, "vocabulary of 'x' is empty"),
        (Categorical, {"name": "x", "vocabulary": ["a", 1, "1"]}, "vocabulary of 'x' holds '1' more than once"),
        (Categorical, {"name": "x", "vocabulary": ["a", None]}, "vocabulary of 'x' holds None"),
        (Categorical, {"name": "x", "vocabulary": ["a"], "buckets": 3}, "'x' has a vocabulary and buckets=3"),
        (Categorical, {"name": "x", "buckets": 0}, "buckets=0"),
        (Categorical, {"name": "x", "dim": 2.5}, "dim=2.5"),
        (Categorical, {"name": "x", "id_dropout": 1.0}, "id_dropout=1.0"),
        (Tags, {"name": "x", "pooling": "max"}, "pooling='max'.*mean or attention"),
        (Numerical, {"name": "x", "mean": 3}, "mean=3, std=None"),
        (Numerical, {"name": "x", "mean": 0, "std": 0}, "std=0.0 of 'x' must be above 0"),
        (Numerical, {"name": "x", "mean": math.nan, "std": 1}, "'mean of x' got nan"),
        (Numerical, {"name": "x", "transform": "sqrt"}, "transform='sqrt'"),
        (Numerical, {"name": "x", "mean": 0, "std": 1, "transform": "quantile"}, "quantiles, the others mean and std"),
        (Numerical, {"name": "x", "quantiles": [1, 2]}, "quantiles, the others mean and std"),
        (Numerical, {"name": "x", "quantiles": [2, 1], "transform": "quantile"}, "two ascending numbers"),
        (History, {"name": "x", "max_length": 0}, "max_length=0"),
        (History, {"name": "x", "dim": 9}, "num_attention_heads=2 does not divide dim=9"),
        (History, {"name": "x", "dropout": -0.1}, "dropout=-0.1"),
        (History, {"name": "x", "vocabulary": ["a"], "shared_with": "y"}, "'x' has a vocabulary.*shared_with='y'"),
        (History, {"name": "x", "shared_with": 3}, "shared_with=3"),
    ],
)
def test_a_feature_refuses_wrong_arguments_by_name_and_value(kind, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
