from __future__ import annotations

import pytest

from tests.benchmarks.negatives import measure


@pytest.mark.slow
def test_200_000_rows_with_10_negatives_a_second_on_one_core():
    measured = measure(num_rows=1_000_000)
    assert measured["numbers of negatives"] > 200_000
    assert measured["texts of negatives"] > 200_000
