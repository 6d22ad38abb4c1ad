"""Draws by number: the distribution they follow, and what they never give."""

from __future__ import annotations

import numpy as np
import pytest

from st_fpsloss.negatives.sampler import NegativeSampler, Pools

NUM_DOCUMENTS, NUM_QUERIES = 40, 25


def random_sampler(seed: int, density: float = 0.3, power: float = 0.75):
    rng = np.random.default_rng(seed)
    weights = (1 / np.arange(1, NUM_DOCUMENTS + 1)) ** power
    queries, documents = np.nonzero(rng.random((NUM_QUERIES, NUM_DOCUMENTS)) < density)
    return NegativeSampler(weights, queries, documents, NUM_QUERIES, seed), set(zip(queries, documents, strict=True))


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The statistic, and what it exceeds with a probability of about one in a thousand (Wilson and Hilferty)."""
    held = expected > 0
    assert observed[~held].sum() == 0
    statistic = float(((observed[held] - expected[held]) ** 2 / expected[held]).sum())
    degrees = held.sum() - 1
    return statistic, float(degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3)


@pytest.mark.parametrize("seed", range(20))
def test_a_known_positive_is_never_drawn(seed):
    sampler, positives = random_sampler(seed, density=seed / 23)  # up to queries that have nearly everything
    rows = np.arange(2000)
    queries = rows % NUM_QUERIES
    drawn = sampler.draw(rows, queries, epoch=seed, num_negatives=7)
    assert drawn.min() >= 0 and drawn.max() < NUM_DOCUMENTS
    assert not {(q, d) for q, row in zip(queries, drawn, strict=True) for d in row} & positives


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_follow_the_distribution_without_the_positives_of_the_query(seed, power):
    sampler, positives = random_sampler(seed, power=power)
    num_rows = 4000
    for query in (0, 7, 24):
        drawn = sampler.draw(np.arange(num_rows), np.full(num_rows, query), epoch=0, num_negatives=5)
        expected = (1 / np.arange(1, NUM_DOCUMENTS + 1)) ** power
        expected[[d for q, d in positives if q == query]] = 0
        observed = np.bincount(drawn.ravel(), minlength=NUM_DOCUMENTS)
        statistic, limit = chi_square(observed, expected / expected.sum() * drawn.size)
        assert statistic < limit


def test_the_chi_square_tells_another_distribution_apart():
    sampler, _ = random_sampler(0, density=0.0, power=0.75)
    drawn = sampler.draw(np.arange(4000), np.zeros(4000, dtype=np.int64), epoch=0, num_negatives=5)
    expected = (1 / np.arange(1, NUM_DOCUMENTS + 1)) ** 0.8
    statistic, limit = chi_square(
        np.bincount(drawn.ravel(), minlength=NUM_DOCUMENTS), expected / expected.sum() * 20000
    )
    assert statistic > limit


@pytest.mark.parametrize("varied", ["rows", "columns", "epochs", "seeds"])
def test_draws_are_independent_over_rows_columns_epochs_and_seeds(varied):
    def sampler(seed):
        return NegativeSampler(np.ones(10), np.zeros(0, int), np.zeros(0, int), 1, seed)

    rows, query = np.arange(20000), np.zeros(20000, dtype=np.int64)
    first, second = {
        "rows": lambda: (sampler(0).draw(rows + shift, query, 0, 1)[:, 0] for shift in (0, 1)),
        "columns": lambda: sampler(0).draw(rows, query, 0, 2).T,
        "epochs": lambda: (sampler(0).draw(rows, query, epoch, 1)[:, 0] for epoch in (0, 1)),
        "seeds": lambda: (sampler(seed).draw(rows, query, 0, 1)[:, 0] for seed in (0, 1)),
    }[varied]()
    statistic, limit = chi_square(np.bincount(first * 10 + second, minlength=100), np.full(100, 200.0))
    assert statistic < limit


def test_a_draw_depends_on_its_row_alone_not_on_the_others_that_are_drawn_with_it():
    sampler, _ = random_sampler(3)
    rows = np.random.default_rng(0).permutation(500)
    queries = rows % NUM_QUERIES
    together = sampler.draw(rows, queries, epoch=2, num_negatives=4)
    for chosen in (np.array([17]), np.arange(3, 400, 7)):
        assert np.array_equal(sampler.draw(rows[chosen], queries[chosen], epoch=2, num_negatives=4), together[chosen])


def test_many_rare_documents_are_drawn_as_often_as_they_should():
    weights = np.concatenate([[1.0], np.full(5000, 1e-6)])  # the rare ones share a bucket of the guide
    sampler = NegativeSampler(weights, np.zeros(0, int), np.zeros(0, int), 1, seed=0)
    drawn = sampler.draw(np.arange(400_000), np.zeros(400_000, dtype=np.int64), 0, 1).ravel()
    rare = np.count_nonzero(drawn)
    assert abs(rare - 400_000 * 0.005 / 1.005) < 5 * np.sqrt(2000)
    quarters = np.bincount((drawn[drawn > 0] - 1) // 1250, minlength=4)
    statistic, limit = chi_square(quarters, np.full(4, rare / 4))
    assert statistic < limit


def test_documents_of_no_weight_are_never_drawn():
    weights = np.array([0.0, 1.0, 0.0, 2.0, 0.0])
    sampler = NegativeSampler(weights, np.zeros(0, int), np.zeros(0, int), 1, seed=0)
    assert set(sampler.draw(np.arange(5000), np.zeros(5000, dtype=np.int64), 0, 3).ravel()) == {1, 3}


def test_a_query_that_has_nearly_all_the_mass_is_drawn_for_exactly():
    weights = np.concatenate([[1e9], np.ones(4)])
    sampler = NegativeSampler(weights, np.zeros(2, int), np.array([0, 4]), 1, seed=0)
    drawn = sampler.draw(np.arange(3000), np.zeros(3000, dtype=np.int64), 0, 1).ravel()
    statistic, limit = chi_square(np.bincount(drawn, minlength=5), np.array([0, 1000.0, 1000.0, 1000.0, 0]))
    assert statistic < limit


def test_the_expected_number_of_draws_of_each_document():
    sampler, _ = random_sampler(4)
    draws_of_query = np.random.default_rng(0).integers(0, 4000, NUM_QUERIES)
    rows, queries = np.arange(draws_of_query.sum()), np.repeat(np.arange(NUM_QUERIES), draws_of_query)
    observed = np.bincount(sampler.draw(rows, queries, 0, 1).ravel(), minlength=NUM_DOCUMENTS)
    expected = sampler.marginal(draws_of_query)
    assert expected.sum() == pytest.approx(len(rows))
    statistic, limit = chi_square(observed, expected)
    assert statistic < limit


def test_different_documents_are_chosen_from_a_pool_each_as_often():
    sampler, _ = random_sampler(0)
    lengths = np.tile([0, 1, 5], 4000)
    pools = Pools(lengths, np.concatenate([np.arange(n) + 10 * n for n in lengths]))
    rows = np.arange(len(lengths))
    chosen = sampler.choose(rows, pools, epoch=0, num_negatives=3)
    assert (chosen[::3] == -1).all()
    assert (chosen[1::3] == [10, -1, -1]).all()
    of_five = chosen[2::3]
    assert all(len(set(row)) == 3 for row in of_five.tolist())
    statistic, limit = chi_square(np.bincount(of_five.ravel() - 50), np.full(5, 2400.0))
    assert statistic < limit
    expected, missing = pools.marginal(rows, 3, 60)
    assert missing.tolist()[:3] == [3, 2, 0]
    assert expected[10] == 4000 and expected[50:55] == pytest.approx(np.full(5, 2400.0))
    assert (sampler.choose(rows, pools, epoch=1, num_negatives=3)[2::3] != of_five).any()


def test_a_query_without_a_negative_is_refused():
    with pytest.raises(ValueError) as error:
        NegativeSampler(np.array([1.0, 1.0, 0.0]), np.array([0, 1, 1]), np.array([0, 0, 1]), 2, seed=0)
    assert error.value.args[1] == 1
