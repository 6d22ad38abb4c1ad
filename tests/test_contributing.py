"""CONTRIBUTING's map: every folder is on it, and everything that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_folder_is_on_the_map_and_every_path_is_there() -> None:
    named = set(re.findall(r"`((?:st_fpsloss|tests|training_scripts|results)/[\w/.]*)`", TEXT))
    assert [path for path in named if not (ROOT / path).exists()] == []
    folders = {f"st_fpsloss/{path.parent.name}/" for path in (ROOT / "st_fpsloss").glob("*/__init__.py")}
    assert folders - named == set()


def test_the_classes_and_functions_of_the_walks_are_in_the_files_behind_them() -> None:
    for name, path in re.findall(r"`([A-Za-z_.]+)`\s+\(`(st_fpsloss/[\w/]+\.py)`", TEXT):
        source = (ROOT / path).read_text(encoding="utf-8")
        for part in name.split("."):
            pattern = rf"^(class |def |    def |){part}\b"
            assert re.search(pattern, source, flags=re.MULTILINE), (name, path)


def test_no_folder_imports_what_stands_above_it() -> None:
    order = re.findall(r"^\| `st_fpsloss/(\w+)/`", TEXT, flags=re.MULTILINE)
    arrows = set()
    for path in (ROOT / "st_fpsloss").glob("*/**/*.py"):
        folder = path.relative_to(ROOT / "st_fpsloss").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("st_fpsloss."):
                arrows.add((folder, str(node.module).split(".")[1], path.name))
    assert len(arrows) > 100
    assert [arrow for arrow in arrows if order.index(arrow[0]) > order.index(arrow[1])] == []
