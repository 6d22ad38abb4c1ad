"""Atomic writes: a file is written whole or not at all, or added to line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file (text in UTF-8) under a temporary name, then rename it: nobody ever finds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file to which lines of JSON are appended; [] where there is none yet.

    A last line without the newline after it was cut off by a kill: it is taken out of the file, too.
    """
    if not path.exists():
        return []
    *lines, cut = path.read_text(encoding="utf-8").split("\n")
    if cut:
        write_whole(path, "\n".join([*lines, ""]))
    return [json.loads(line) for line in filter(None, lines)]


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add an object to such a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
