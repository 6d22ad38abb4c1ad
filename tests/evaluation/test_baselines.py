"""Baselines score as their formulas say, and reach the figures that are known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from st_fpsloss import RetrievalEvaluator
from st_fpsloss.data import load_movielens_100k
from st_fpsloss.evaluation.baselines import BM25, EASE, ItemKNN, Popularity, item_histories

RNG = np.random.default_rng(0)
ITEMS = [f"i{number}" for number in range(12)]
HISTORIES = {f"u{user}": [ITEMS[i] for i in RNG.choice(12, RNG.integers(1, 8))] for user in range(30)}
CLICKS = np.array([[float(item in items) for item in ITEMS] for items in HISTORIES.values()])


def weights(decay: float) -> np.ndarray:
    """(users, items) weights of the items in the histories."""
    found = np.zeros_like(CLICKS)
    for row, items in enumerate(HISTORIES.values()):
        for age, item in enumerate(reversed(items)):
            found[row, ITEMS.index(item)] += decay**age
    return found


def naive_cosines(shrink: float, num_neighbours: int | None) -> np.ndarray:
    similarity = np.zeros((12, 12))
    for i in range(12):
        for j in set(range(12)) - {i}:
            norms = math.sqrt(CLICKS[:, i].sum()) * math.sqrt(CLICKS[:, j].sum())
            similarity[i, j] = (CLICKS[:, i] * CLICKS[:, j]).sum() / (norms + shrink)
        if num_neighbours is not None:
            similarity[i, similarity[i] < np.sort(similarity[i])[-num_neighbours]] = 0
    return similarity.T


def naive_ease(l2: float) -> np.ndarray:
    """The ridge regression of each item on all others."""
    solution = np.zeros((12, 12))
    for j in range(12):
        others = np.delete(np.arange(12), j)
        x = CLICKS[:, others]
        solution[others, j] = np.linalg.solve(x.T @ x + l2 * np.eye(11), x.T @ CLICKS[:, j])
    return solution


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize(
    ("baseline", "naive"),
    [
        (lambda decay: ItemKNN(None, decay=decay), lambda: naive_cosines(0.0, None)),
        (lambda decay: ItemKNN(4, shrink=2.0, decay=decay), lambda: naive_cosines(2.0, 4)),
        (lambda decay: EASE(l2=3.0, decay=decay), lambda: naive_ease(3.0)),
    ],
)
def test_scores_are_those_of_the_naive_formula(baseline, naive, decay):
    score = baseline(decay).fit(HISTORIES).score_function(HISTORIES, ITEMS)
    np.testing.assert_allclose(score(list(HISTORIES)), weights(decay) @ naive(), atol=1e-10)


def test_popularity_counts_users_and_what_was_never_clicked_stands_last():
    score = Popularity().fit(HISTORIES).score_function(HISTORIES, ["new", *reversed(ITEMS)])
    np.testing.assert_array_equal(score(["u3", "nobody"]), [[-1.0, *CLICKS.sum(axis=0)[::-1]]] * 2)
    for baseline in (ItemKNN(), EASE()):
        scores = baseline.fit(HISTORIES).score_function(HISTORIES, [*ITEMS, "new"])(["u3"])
        assert scores.argmin() == 12


def test_bm25_is_the_formula_of_lucene():
    texts = {"a": "red shoes red", "b": "blue tent", "c": "the red tent of shoes and shoes"}
    words = {name: text.split() for name, text in texts.items()}
    mean = sum(map(len, words.values())) / 3
    queries = {"q": "red shoes", "none": "xyzzy", "blank": "?"}
    scores = BM25(k1=1.2, b=0.6).fit(texts).score_function(queries, ["c", "a", "b"])(list(queries))
    expected = []
    for name in ("c", "a", "b"):
        total = 0.0
        for word in ("red", "shoes"):
            holders, count = sum(word in text for text in words.values()), words[name].count(word)
            length = 1.2 * (1 - 0.6 + 0.6 * len(words[name]) / mean)
            total += math.log(1 + (3 - holders + 0.5) / (holders + 0.5)) * count / (count + length)
        expected.append(total)
    np.testing.assert_allclose(scores, [expected, [0.0] * 3, [0.0] * 3], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EASE(decay=1.5), "decay=1.5"),
        (lambda: Popularity().fit({"u": []}), "no item"),
        (lambda: BM25().fit({"a": "one two"}).score_function({}, ["b"]), "corpus_ids has 'b'"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_movielens_figures_are_those_of_the_protocol():
    movielens = load_movielens_100k()
    splits = movielens.splits()

    def evaluator(test: Dataset, seen: dict[int, list[int]]) -> RetrievalEvaluator:
        relevant = {user: {item} for user, item in zip(test["user_id"][:], test["item_id"][:], strict=True)}
        corpus = {item: str(item) for item in movielens.items["item_id"]}
        return RetrievalEvaluator(dict.fromkeys(relevant, ""), corpus, relevant, seen, at=(10,))

    def histories(*names: str) -> dict[int, list[int]]:
        return item_histories(concatenate_datasets([splits[name] for name in names]), "user_id", "item_id", "timestamp")

    train, known = histories("train"), histories("train", "validation")
    validation, test = evaluator(splits["validation"], train), evaluator(splits["test"], known)
    for baseline, on_validation, on_test in [
        (Popularity(), 0.0338, 0.0432),
        (ItemKNN(), 0.0726, 0.0692),
        (ItemKNN(200, shrink=10, decay=0.8), 0.1180, 0.1028),
        (EASE(l2=100), 0.0878, 0.0711),
        (EASE(l2=500, decay=0.95), 0.1254, 0.0952),
    ]:
        baseline.fit(train)
        figures = [
            judge.evaluate_scores(baseline.score_function(history, judge.corpus_ids))["ndcg@10"]
            for judge, history in ((validation, train), (test, known))
        ]
        assert figures == pytest.approx([on_validation, on_test], abs=0.001)
