"""Ranks and ranking metrics against trec_eval and against a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval

from st_fpsloss.evaluation.bootstrap import bootstrap_interval, paired_difference
from st_fpsloss.evaluation.metrics import (
    best_documents,
    check_at,
    check_grades,
    list_ranks,
    ranking_metrics,
    relevant_ranks,
)

AT = (1, 3, 10, 20)


def random_queries(seed: int, num_queries: int, num_documents: int, ties: bool):
    """Scores, and for each query relevant positions with grades 1 to 3, and seen positions that are not relevant."""
    rng = np.random.default_rng(seed)
    queries = []
    for _ in range(num_queries):
        scores = rng.integers(0, 6, num_documents).astype(float) if ties else rng.permutation(num_documents) / 7
        shuffled = rng.permutation(num_documents)
        num_relevant, num_seen = rng.integers(1, 15), rng.integers(0, 20)
        relevant, seen = shuffled[:num_relevant], shuffled[num_relevant : num_relevant + num_seen]
        queries.append((scores, relevant, rng.integers(1, 4, num_relevant).astype(float), seen))
    return queries


def measure(queries, at=AT):
    ranks = [relevant_ranks(*query) for query in queries]
    offsets = np.cumsum([0, *map(len, ranks)])
    return ranking_metrics(np.concatenate(ranks), np.concatenate([q[2] for q in queries]), offsets, at)


def naive_ranking(scores, relevant, grades, seen):
    """Grades of the ranked candidates, sorted the pessimistic way."""
    grade_of = dict(zip(relevant.tolist(), grades.tolist(), strict=True))
    candidates = [d for d in range(len(scores)) if d not in set(seen.tolist())]
    candidates.sort(key=lambda d: (-scores[d], grade_of.get(d, 0.0), d))
    return candidates, [grade_of.get(d, 0.0) for d in candidates]


def naive_metrics(ranked, num_relevant, ideal, k):
    found, precisions, dcg, first = 0, 0.0, 0.0, None
    for rank, grade in enumerate(ranked[:k], start=1):
        if grade > 0:
            found += 1
            precisions += found / rank
            dcg += grade / math.log2(rank + 1)
            first = first or rank
    best = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(ideal[:k], start=1))
    return {
        "hr": float(found > 0),
        "ndcg": dcg / best,
        "recall": found / num_relevant,
        "mrr": 1 / first if first else 0.0,
        "map": precisions / min(k, num_relevant),
    }


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_a_naive_loop_over_the_pessimistic_ranking(ties):
    queries = random_queries(seed=0, num_queries=60, num_documents=80, ties=ties)
    metrics = measure(queries)
    for number, query in enumerate(queries):
        ranked = naive_ranking(*query)[1]
        for k in AT:
            expected = naive_metrics(ranked, len(query[1]), sorted(query[2], reverse=True), k)
            for name, value in expected.items():
                assert metrics[f"{name}@{k}"][number] == pytest.approx(value, abs=1e-12), (name, k, number)


def test_metrics_equal_trec_eval_where_nothing_is_tied():
    queries = random_queries(seed=1, num_queries=50, num_documents=60, ties=False)
    metrics = measure(queries)
    judgments, run = {}, {}
    for number, (scores, relevant, grades, seen) in enumerate(queries):
        judgments[str(number)] = {str(d): int(g) for d, g in zip(relevant, grades, strict=True)}
        run[str(number)] = {str(d): float(scores[d]) for d in range(len(scores)) if d not in set(seen.tolist())}
    cuts = ",".join(map(str, AT))
    evaluator = pytrec_eval.RelevanceEvaluator(
        judgments, {f"ndcg_cut.{cuts}", f"recall.{cuts}", f"map_cut.{cuts}", f"success.{cuts}", "recip_rank"}
    )
    for query, trec in evaluator.evaluate(run).items():
        number, num_relevant = int(query), len(judgments[query])
        for k in AT:
            assert metrics[f"ndcg@{k}"][number] == pytest.approx(trec[f"ndcg_cut_{k}"], abs=1e-12)
            assert metrics[f"recall@{k}"][number] == pytest.approx(trec[f"recall_{k}"], abs=1e-12)
            # trec_eval divides by all relevant documents, even by those that k leaves no room for.
            scaled = trec[f"map_cut_{k}"] * num_relevant / min(k, num_relevant)
            assert metrics[f"map@{k}"][number] == pytest.approx(scaled, abs=1e-12)
            hit = trec[f"success_{k}"]
            assert metrics[f"hr@{k}"][number] == hit
            assert metrics[f"mrr@{k}"][number] == pytest.approx(trec["recip_rank"] * hit, abs=1e-12)


def test_metrics_by_hand():
    metrics = ranking_metrics(np.array([4, 2]), np.array([3.0, 1.0]), np.array([0, 2]), [1, 2, 4])
    ideal = 3 + 1 / math.log2(3)
    assert [metrics[f"hr@{k}"][0] for k in (1, 2, 4)] == [0, 1, 1]
    assert [metrics[f"recall@{k}"][0] for k in (1, 2, 4)] == [0, 0.5, 1]
    assert [metrics[f"mrr@{k}"][0] for k in (1, 2, 4)] == [0, 0.5, 0.5]
    assert [metrics[f"map@{k}"][0] for k in (1, 2, 4)] == [0, 0.25, 0.5]
    assert metrics["ndcg@2"][0] == pytest.approx((1 / math.log2(3)) / ideal)
    assert metrics["ndcg@4"][0] == pytest.approx((1 / math.log2(3) + 3 / math.log2(5)) / ideal)


def test_a_constant_score_puts_relevant_documents_last():
    ranks = relevant_ranks(np.zeros(10), np.array([0, 5]), np.array([1.0, 2.0]), seen=np.array([9]))
    assert ranks.tolist() == [8, 9]  # 7 candidates without relevance, then grade 1, then grade 2


def test_infinite_scores_are_ranked_and_seen_documents_are_not():
    scores = np.array([-np.inf, np.inf, 0.0, -np.inf])
    assert relevant_ranks(scores, np.array([0]), np.array([1.0]), seen=np.array([1])).tolist() == [3]


def test_best_documents_are_the_beginning_of_the_ranking():
    for query in random_queries(seed=2, num_queries=30, num_documents=50, ties=True):
        ranking = naive_ranking(*query)[0]
        for k in (1, 7, 1000):
            scores, relevant, grades, seen = query
            assert best_documents(scores, k, relevant, grades, seen).tolist() == ranking[:k]


def test_best_documents_of_a_query_that_has_seen_everything_are_none():
    everything = np.arange(3)
    assert best_documents(np.zeros(3), 2, np.array([], int), np.array([]), everything).tolist() == []


def test_a_document_that_was_not_ranked_counts_as_missed():
    ranks = list_ranks(["a", "b"], ["b", "z"])
    assert ranks.tolist() == [2.0, math.inf]
    metrics = ranking_metrics(ranks, np.array([1.0, 5.0]), np.array([0, 2]), [2])
    assert metrics["recall@2"].tolist() == [0.5] and metrics["map@2"].tolist() == [0.25]


def test_a_ranking_with_a_document_twice_is_refused():
    with pytest.raises(ValueError, match="'a' more than once"):
        list_ranks(["a", "b", "a"], ["b"])


@pytest.mark.parametrize("at", [[], [0], [-1], [2.5], ["10"], [True], [1, None], "10", 0])
def test_cutoffs_that_are_no_positive_integers_are_refused(at):
    with pytest.raises(ValueError, match="at "):
        check_at(at)


def test_cutoffs_are_sorted_and_unique():
    assert check_at((np.int64(20), 5, 20)) == (5, 20)


@pytest.mark.parametrize("relevant", ["d1", 3, None, {"d1": float("nan")}, {"d1": math.inf}, {"d1": "2"}, {"d1": None}])
def test_judgments_that_are_none_are_refused(relevant):
    with pytest.raises(ValueError, match=r"relevant_docs\['q'\]"):
        check_grades(relevant, "relevant_docs['q']")


def test_a_query_without_relevant_documents_has_no_metrics():
    with pytest.raises(ValueError, match="query number 1 has no relevant document"):
        ranking_metrics(np.array([1.0]), np.array([1.0]), np.array([0, 1, 1]), [1])
    with pytest.raises(ValueError, match="grade above 0"):
        ranking_metrics(np.array([1.0]), np.array([0.0]), np.array([0, 1]), [1])


def test_bootstrap_interval_covers_the_mean_and_narrows_with_more_queries():
    rng = np.random.default_rng(0)
    values = rng.random(2000)
    low, high = bootstrap_interval(values)
    standard_error = values.std() / math.sqrt(len(values))
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    few_low, few_high = bootstrap_interval(values[:50])
    assert few_high - few_low > 3 * (high - low)
    narrow_low, narrow_high = bootstrap_interval(values, confidence=0.5)
    assert narrow_high - narrow_low < 0.5 * (high - low)


def test_bootstrap_interval_is_the_percentiles_of_resampled_means():
    values = np.random.default_rng(0).random(300)
    rng = np.random.default_rng(7)
    means = [values[rng.integers(0, 300, 300)].mean() for _ in range(500)]
    expected = np.quantile(means, [0.05, 0.95])
    np.testing.assert_allclose(bootstrap_interval(values, num_samples=500, confidence=0.9, seed=7), expected)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = np.random.default_rng(0).random(100)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_paired_difference_sees_what_separate_intervals_do_not():
    rng = np.random.default_rng(0)
    worse = rng.random(500)
    better = worse + 0.01 + 0.01 * rng.standard_normal(500)
    mean, low, high = paired_difference(better, worse)
    assert low < mean < high and low > 0 and mean == pytest.approx((better - worse).mean())
    assert bootstrap_interval(better)[0] < bootstrap_interval(worse)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "at least one"),
        ({"values": [1.0, float("nan")]}, "no NaN"),
        ({"values": [1.0], "num_samples": 0}, "num_samples=0"),
        ({"values": [1.0], "confidence": 95}, "confidence=95"),
    ],
)
def test_intervals_of_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)


def test_pairs_of_different_length_are_refused():
    with pytest.raises(ValueError, match="same queries"):
        paired_difference([1.0, 2.0], [1.0])
