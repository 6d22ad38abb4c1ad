"""RetrievalEvaluator's metrics by popularity, against naive references."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from st_fpsloss.evaluation import RetrievalEvaluator, paired_difference
from st_fpsloss.evaluation.popularity import click_deciles
from tests.evaluation.test_evaluator import (
    NUM_DOCUMENTS,
    NUM_QUERIES,
    log,
    make,
    model_of,
    naive_metrics,
    naive_ranking,
    vectors,
)

AT = (1, 5, 20)


def naive_deciles(clicks: list[int]) -> list[int]:
    """Click by click: the tenth that the middle of each document's clicks falls into."""
    deciles, before, total = [0] * len(clicks), Fraction(0), sum(clicks)
    for document in sorted(range(len(clicks)), key=lambda d: clicks[d]):
        middle = before + Fraction(clicks[document], 2)
        deciles[document] = next((t for t in range(1, 10) if middle < Fraction(t * total, 10)), 10)
        before += clicks[document]
    return deciles


def zipf_clicks(seed: int = 0) -> list[int]:
    """Many ties and some documents without a click."""
    rng = np.random.default_rng(seed)
    return np.bincount(np.minimum(rng.zipf(1.3, 3000), NUM_DOCUMENTS) - 1, minlength=NUM_DOCUMENTS).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_each_decile_holds_about_a_tenth_of_the_clicks(seed):
    rng = np.random.default_rng(seed)
    clicks = rng.integers(0, 30, 2000).tolist()
    deciles = click_deciles(clicks)
    assert deciles.tolist() == naive_deciles(clicks)
    for decile in range(1, 11):
        assert sum(np.array(clicks)[deciles == decile]) == pytest.approx(sum(clicks) / 10, abs=30)
    means = [np.array(clicks)[deciles == decile].mean() for decile in range(1, 11)]
    assert means == sorted(means)  # 10 is the most clicked


def test_a_document_with_most_of_the_clicks_leaves_deciles_empty():
    clicks = [900, 50, 50, 0]
    assert click_deciles(clicks).tolist() == naive_deciles(clicks) == [6, 1, 1, 1]


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_by_popularity_equal_the_naive_ones(ties):
    queries, corpus, relevant_docs, seen_docs = log()
    clicks = zipf_clicks()
    embeddings = vectors(NUM_QUERIES + NUM_DOCUMENTS)
    model = model_of(queries, corpus, np.sign(embeddings[:, :4]) if ties else embeddings)
    scores = model.similarity(
        model.encode_query(list(queries.values())), model.encode_document(list(corpus.values()))
    ).numpy()
    deciles = naive_deciles(clicks)
    expected: dict[str, list[float]] = {}
    shown: dict[int, set[int]] = {k: set() for k in AT}
    for row, (query_id, relevant) in zip(scores, relevant_docs.items(), strict=True):
        ranking = naive_ranking(row, relevant, set(seen_docs[query_id]))
        for k in AT:
            shown[k].update(ranking[:k])
            for decile in range(1, 11):
                of_decile = {d: grade for d, grade in relevant.items() if deciles[d] == decile}
                if of_decile:
                    value = naive_metrics(ranking, of_decile, k)["ndcg"]
                    expected.setdefault(f"test_ndcg@{k}_decile_{decile}", []).append(value)
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    means |= {f"test_coverage@{k}": len(shown[k]) / NUM_DOCUMENTS for k in AT}

    arguments = {"at": AT, "name": "test"}
    plain = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, **arguments)
    popularity = {document_id: clicks[d] for d, document_id in enumerate(corpus) if clicks[d]}
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, popularity=popularity, **arguments)
    results, usual = evaluator(model), plain(model)
    assert {name: results[name] for name in usual} == usual
    assert {name: value for name, value in results.items() if name not in usual} == pytest.approx(means, abs=1e-12)
    assert evaluator.evaluate_scores(lambda ids: scores[[list(queries).index(i) for i in ids]]) == results
    assert set(evaluator.per_query(model)) == set(plain.per_query(model))


def test_coverage_goes_beyond_k_where_queries_differ_and_counts_what_is_there():
    evaluator = make(popularity={"d1": 3, "d2": 1}, seen_docs={"q1": ["d2"]}, at=(1, 5))
    apart = evaluator.evaluate_scores(lambda ids: np.array([[1.0, 2.0], [1.0, 2.0]]))  # q1 may not see d2
    assert (apart["coverage@1"], apart["coverage@5"]) == (1.0, 1.0)
    same = make(popularity={"d1": 1}, at=(1, 5)).evaluate_scores(lambda ids: np.array([[1.0, 2.0], [1.0, 2.0]]))
    assert (same["coverage@1"], same["coverage@5"]) == (0.5, 1.0)


def test_two_models_are_compared_on_the_same_queries():
    queries, corpus, relevant_docs, seen_docs = log()
    evaluator = RetrievalEvaluator(queries, corpus, relevant_docs, seen_docs, at=(10,))
    models = [model_of(queries, corpus, vectors(NUM_QUERIES + NUM_DOCUMENTS, seed)) for seed in (0, 1)]
    first, second = (evaluator.per_query(model)["ndcg@10"] for model in models)
    mean, low, high = paired_difference(first, second, num_samples=4000)
    assert mean == pytest.approx(evaluator(models[0])["ndcg@10"] - evaluator(models[1])["ndcg@10"])
    spread = 1.96 * np.std(first - second) / math.sqrt(NUM_QUERIES)  # what the interval is for a mean of many
    assert (low, high) == (pytest.approx(mean - spread, abs=spread / 5), pytest.approx(mean + spread, abs=spread / 5))


@pytest.mark.parametrize(
    ("popularity", "message"),
    [
        ({}, "popularity={} has to be a dict of document id to clicks"),
        ([1, 2], "popularity=.* has to be a dict"),
        ({"d1": 1, "d9": 2}, "popularity names 1 ids that are not in corpus, the first 'd9'"),
        ({"d1": -1}, "popularity has -1 clicks for document 'd1'"),
        ({"d1": math.nan}, "popularity has nan clicks"),
        ({"d1": "many"}, "popularity has 'many' clicks"),
        ({"d1": 0}, "no clicks for any document"),
    ],
)
def test_unusable_popularity_is_refused(popularity, message):
    with pytest.raises(ValueError, match=message):
        make(popularity=popularity)
