from __future__ import annotations

import pytest

from st_fpsloss.frequencies.sketch import FrequencySketch
from st_fpsloss.frequencies.table import FrequencyTable
from tests.benchmarks.frequencies import cost, stream


@pytest.mark.slow
def test_a_sketch_of_a_twelfth_of_a_counter_a_key_is_right_where_it_matters() -> None:
    found = stream(num_distinct=1_000_000, width=2**14 * 4 // 3)
    assert found["MiB in memory"] < 20
    assert found["relative error of Q, top 1000: 99%"] < 0.01
    assert found["error of log Q over draws: mean absolute"] < 0.4
    assert abs(found["error of log Q over draws: mean"]) < 0.1
    assert found["the same of the bare count-min sketch"] > 0.5  # what the sample of exact counts is for


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FrequencyTable, FrequencySketch])
def test_counting_4096_rows_takes_less_than_a_hundredth_of_their_12_seconds(kind) -> None:
    assert cost(kind(), num_known=1_000_000) < 0.12
