"""What README, docs and skills show exists: options of commands, names that are imported, links between pages."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from st_fpsloss.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "skills").rglob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def shown_options() -> dict[str, set[str]]:
    """Command -> options that the pages give it."""
    found: dict[str, set[str]] = {}
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["st-fpsloss"]:
                found.setdefault(words[1], set()).update(word for word in words if word.startswith("--"))
    return found


@pytest.mark.parametrize("command", sorted(shown_options()))
def test_every_option_that_is_shown_is_one_of_its_command(command, capsys):
    assert command in COMMANDS
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    known = set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))
    assert shown_options()[command] - known == set()


def test_every_name_that_is_imported_exists():
    imported = 0
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("st_fpsloss"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
                    imported += 1
    assert imported > 20


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_name_of_the_api_pages_exists():
    names = re.findall(
        r"^::: (st_fpsloss[\w.]*)\.(\w+)$", "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.M
    )
    assert len(names) > 30
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
