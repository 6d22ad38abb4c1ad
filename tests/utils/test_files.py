from __future__ import annotations

from pathlib import Path

from st_fpsloss.utils.files import append_json_line, json_lines


def test_a_line_that_a_kill_cut_off_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert json_lines(path) == []
    append_json_line(path, {"α": 1})
    append_json_line(path, {"α": 2})
    path.write_bytes(path.read_bytes()[:-4])
    assert json_lines(path) == [{"α": 1}]
    append_json_line(path, {"α": 3})
    assert json_lines(path) == [{"α": 1}, {"α": 3}]
