"""A log of texts that is on every machine: (name of a Python function, first sentence of its docstring).

The sources are those of the standard library and of installed packages, parsed and not imported. Every function is a
click, so names and sentences repeat as people repeat them: ``forward`` has hundreds of docstrings.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

STANDARD_LIBRARY = "stdlib"
PACKAGES = (STANDARD_LIBRARY, "torch", "transformers", "datasets", "sentence_transformers", "numpy", "pandas")


def docstring_clicks(packages: Sequence[str] = PACKAGES) -> Dataset:
    """The log as columns: ``query``, a function's name as words, and ``document``, the sentence."""
    pairs = list(docstrings_of_functions(packages))
    return Dataset.from_dict({"query": [name for name, _ in pairs], "document": [text for _, text in pairs]})


def docstrings_of_functions(packages: Sequence[str] = PACKAGES) -> Iterator[tuple[str, str]]:
    """(name as words, first sentence of the docstring) of every documented function in the sources."""
    for path in tqdm(_sources(packages), desc="Reading docstrings", unit="file"):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # test data of the packages
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                name, sentence = _words(node.name), _words(re.split(r"\.\s|\n\n", text, maxsplit=1)[0])
                if name and 3 <= len(sentence.split()) <= 40:
                    yield name, sentence


def _sources(packages: Sequence[str]) -> list[Path]:
    folders: list[Path] = []
    for package in packages:
        if package == STANDARD_LIBRARY:
            folders.append(Path(sysconfig.get_paths()["stdlib"]))
        elif spec := importlib.util.find_spec(package):
            folders += map(Path, spec.submodule_search_locations or [])
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if "site-packages" not in path.relative_to(folder).parts
    )


def _words(text: str) -> str:
    """Lower-case words; snake_case and CamelCase are taken apart."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return " ".join(re.findall(r"[a-z]+|[0-9]+", spaced.lower()))
