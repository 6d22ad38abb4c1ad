from __future__ import annotations

import pytest

from tests.benchmarks.feature_cost import extra_cost


@pytest.mark.slow
@pytest.mark.parametrize("cache_gradients", [False, True])
def test_features_lengthen_a_training_step_by_less_than_a_tenth(minilm: str, cache_gradients: bool) -> None:
    assert extra_cost(minilm, batch_size=256, runs=5, cache_gradients=cache_gradients) < 0.10
