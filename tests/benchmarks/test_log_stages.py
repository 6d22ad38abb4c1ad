from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.log_stages import STAGES, write_log


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_every_stage_runs(stage: str, tmp_path: Path) -> None:
    write_log(tmp_path / "log.parquet", 300_000)
    chosen = STAGES[stage]
    assert chosen.run(chosen.prepare(tmp_path / "log.parquet")) in (200_000, 300_000)
