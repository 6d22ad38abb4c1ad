from __future__ import annotations

import pytest

from tests.benchmarks.log_q_cost import stage_seconds, step_seconds


@pytest.mark.slow
def test_log_q_and_masks_cost_less_than_3_percent_of_a_step_and_the_figures_less_than_1():
    stage, whole = stage_seconds(4096, runs=5), step_seconds(4096, 256, runs=2)
    assert stage["mask, log_q"] - stage["keep"] < 0.03 * whole
    assert stage["both directions: mask, log_q"] - stage["both directions: keep"] < 0.03 * whole
    assert stage["the guard's figures"] < 0.01 * whole
