"""The two data sets of compare_losses.py: MovieLens-100K, and docstrings of the Python code on this machine."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from st_fpsloss import RetrievalEvaluator
from st_fpsloss.clicks import histories, next_item_pairs
from st_fpsloss.files import write_whole
from st_fpsloss.movielens import load_movielens_100k
from st_fpsloss.scripts.movielens_task import COLUMNS, films_by_user

MAX_HISTORY = 10
# Installed with this package; their sources are parsed, not imported.
PACKAGES = ("torch", "transformers", "datasets", "sentence_transformers", "numpy", "pandas")
NUM_JUDGED_QUERIES = 1500  # of each of validation and test


@dataclass(frozen=True)
class Task:
    """Training pairs, and evaluators that rank all documents."""

    pairs: Dataset  # query, document
    documents: dict[int, str]
    words: list[str]  # all that queries and documents consist of
    clicks: dict[int, int]  # document -> its pairs in training
    validation: RetrievalEvaluator
    test: RetrievalEvaluator
    test_targets: dict[Any, int] | None  # query id -> its relevant document, where each has exactly one


def movielens(folder: Path) -> Task:
    """A query is the ids of a user's last ten films, a document is a film's id; leave-last-one-out."""
    data = load_movielens_100k()
    splits = data.splits()
    known = concatenate_datasets([splits["train"], splits["validation"]])
    documents = {film: str(film) for film in data.items["item_id"]}

    def evaluator(past: Dataset, future: Dataset) -> RetrievalEvaluator:
        queries = histories(past, **COLUMNS, max_history=MAX_HISTORY)
        return RetrievalEvaluator(
            queries, documents, films_by_user(future), seen_docs=films_by_user(past), at=(10,), batch_size=512
        )

    return Task(
        pairs=next_item_pairs(splits["train"], **COLUMNS, max_history=MAX_HISTORY),
        documents=documents,
        words=list(documents.values()),
        clicks=dict(Counter(splits["train"]["item_id"])),
        validation=evaluator(splits["train"], splits["validation"]),
        test=evaluator(known, splits["test"]),
        test_targets={user: film for user, (film,) in films_by_user(splits["test"]).items()},
    )


def docstrings(folder: Path) -> Task:
    """A query is a function's name as words, a document the first sentence of a docstring of that name.

    The pairs are those of the Python standard library and of the packages that this one depends on, as installed.
    Names and docstrings repeat as people repeat them: ``forward`` has thousands of docstrings, and the same sentence
    stands at many functions. Every function is one click, so the log's repetition is the code's. Of the distinct pairs
    a random tenth is held out for validation and another for test, wherever both its query and its document also occur
    in training; a query's other held-out documents and those of its training pairs are left out of the ranking.
    The log is kept in ``folder``: other versions of the packages have other docstrings.
    """
    path = folder / "docstrings.tsv"
    if not path.exists():
        write_whole(path, "".join(f"{query}\t{text}\n" for query, text in _functions()))
    clicks = [tuple(line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = sorted(set(clicks))
    drawn = np.random.default_rng(0).random(len(pairs))
    part_of = {pair: 0 if share < 0.1 else 1 if share < 0.2 else 2 for pair, share in zip(pairs, drawn, strict=True)}
    training = [pair for pair in clicks if part_of[pair] == 2]
    trained_queries = {query for query, _ in training}
    number_of = {text: number for number, text in enumerate(dict.fromkeys(text for _, text in training))}

    held_out: list[dict[str, set[int]]] = [{}, {}, {}]
    for (query, text), part in part_of.items():
        if query in trained_queries and text in number_of:
            held_out[part].setdefault(query, set()).add(number_of[text])
    documents = {number: text for text, number in number_of.items()}

    def evaluator(part: int) -> RetrievalEvaluator:
        judged = dict(list(held_out[part].items())[:: max(1, len(held_out[part]) // NUM_JUDGED_QUERIES)])
        others = [held_out[number] for number in range(3) if number != part]
        seen = {query: set().union(*(other.get(query, set()) for other in others)) for query in judged}
        return RetrievalEvaluator(
            {query: query for query in judged}, documents, judged, seen_docs=seen, at=(10,), batch_size=512
        )

    return Task(
        pairs=Dataset.from_dict(
            {"query": [query for query, _ in training], "document": [text for _, text in training]}
        ),
        documents=documents,
        words=sorted({word for pair in training for text in pair for word in text.split()}),
        clicks=dict(Counter(number_of[text] for _, text in training)),
        validation=evaluator(0),
        test=evaluator(1),
        test_targets=None,
    )


def _functions() -> Iterator[tuple[str, str]]:
    """(name as words, first sentence of the docstring) of every documented function in the sources."""
    for path in tqdm(_sources(), desc="Reading docstrings", unit="file"):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # test data of the packages
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                name, sentence = _words(node.name), _words(re.split(r"\.\s|\n\n", text, maxsplit=1)[0])
                if name and 3 <= len(sentence.split()) <= 40:
                    yield name, sentence


def _sources() -> list[Path]:
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders += [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
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


TASKS = {"movielens": movielens, "docstrings": docstrings}
