from __future__ import annotations

import pytest

from tests.benchmarks.loss_stage import compare


@pytest.mark.slow
def test_the_loss_stage_is_no_slower_than_cross_entropy_at_a_third_of_its_memory():
    results = compare(batch_size=8192, dim=256)
    plain_seconds, plain_mib = results["cross_entropy"]
    for kind in ("keep", "mask"):
        seconds, mib = results[kind]
        assert seconds <= plain_seconds
        assert mib < plain_mib / 3
