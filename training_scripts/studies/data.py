"""The data of the studies: MovieLens-100K as clicks and as ratings, and docstrings of Python code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from docstrings import docstrings_of_functions
from movielens_task import COLUMNS, films_by_user

from st_fpsloss import RetrievalEvaluator
from st_fpsloss.data import histories, next_item_pairs
from st_fpsloss.data.movielens import load_movielens_100k
from st_fpsloss.negatives.graded import graded_pairs
from st_fpsloss.utils.files import write_whole

MAX_HISTORY = 10
NUM_JUDGED_QUERIES = 1500  # of each of validation and test
MAX_GRADED_PAIRS = 100  # of a user


@dataclass(frozen=True)
class Task:
    """Training pairs, and evaluators that rank all documents."""

    pairs: Dataset  # query, document
    documents: dict[int, str]
    words: list[str]  # all that queries and documents consist of
    clicks: dict[int, int]  # document -> its pairs in training
    validation: RetrievalEvaluator
    test: RetrievalEvaluator
    test_targets: dict[Any, int] | None = None  # query id -> its relevant document, where each has exactly one
    graded: Dataset | None = None  # query, document, negative_1 of a lower grade


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


def ratings(folder: Path) -> Task:
    """A query is a user's id, a document a film's id, and what is asked is which of two films a user gives more stars.

    A random tenth of the ratings is held out for validation and another for test. A user's held-out films alone are
    ranked, with the gain 2^stars - 1. Every rating in training is a click, whatever its stars; ``graded`` compares
    them.
    """
    data = load_movielens_100k()
    stars = data.ratings.add_column("query", [f"user{user}" for user in data.ratings["user_id"]])
    stars = stars.add_column("document", [f"film{film}" for film in data.ratings["item_id"]])
    part_of = np.minimum(np.random.default_rng(0).random(len(stars)) * 10, 2).astype(int)  # a tenth, a tenth, the rest
    training = stars.select(np.flatnonzero(part_of == 2))
    documents = {film: f"film{film}" for film in data.items["item_id"]}

    def evaluator(part: int) -> RetrievalEvaluator:
        gains: dict[str, dict[int, float]] = {}
        for row in stars.select(np.flatnonzero(part_of == part)).to_list():
            gains.setdefault(row["query"], {})[row["item_id"]] = 2.0 ** row["rating"] - 1
        others = {user: documents.keys() - films.keys() for user, films in gains.items()}
        return RetrievalEvaluator(
            {user: user for user in gains}, documents, gains, seen_docs=others, at=(10,), batch_size=512
        )

    return Task(
        pairs=training.select_columns(["query", "document"]),
        documents=documents,
        words=[*documents.values(), *dict.fromkeys(stars["query"])],
        clicks=dict(Counter(training["item_id"])),
        validation=evaluator(0),
        test=evaluator(1),
        graded=graded_pairs(training, grade="rating", max_pairs=MAX_GRADED_PAIRS),
    )


def docstrings(folder: Path) -> Task:
    """A query is a function's name as words, a document the first sentence of a docstring of that name.

    The pairs are those of the Python standard library and of the packages that this one depends on, as installed.
    Names and docstrings repeat as people repeat them: ``forward`` has hundreds of docstrings, and the same sentence
    stands at many functions. Every function is one click, so the log's repetition is the code's. Of the distinct pairs
    a random tenth is held out for validation and another for test. All docstrings are ranked, those of no training pair
    too; the other documents of a query, trained or held out, are left out of its ranking.
    The log is kept in ``folder``: other versions of the packages have other docstrings.
    """
    path = folder / "docstrings.tsv"
    if not path.exists():
        write_whole(path, "".join(f"{query}\t{text}\n" for query, text in docstrings_of_functions()))
    clicks = [tuple(line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = sorted(set(clicks))
    drawn = np.random.default_rng(0).random(len(pairs))
    part_of = {pair: 0 if share < 0.1 else 1 if share < 0.2 else 2 for pair, share in zip(pairs, drawn, strict=True)}
    training = [pair for pair in clicks if part_of[pair] == 2]
    number_of = {text: number for number, text in enumerate(dict.fromkeys(text for _, text in clicks))}

    documents_of: list[dict[str, set[int]]] = [{}, {}, {}]  # of each part: query -> its documents
    for (query, text), part in part_of.items():
        documents_of[part].setdefault(query, set()).add(number_of[text])
    documents = {number: text for text, number in number_of.items()}

    def evaluator(part: int) -> RetrievalEvaluator:
        judged = dict(list(documents_of[part].items())[:: max(1, len(documents_of[part]) // NUM_JUDGED_QUERIES)])
        others = [documents_of[number] for number in range(3) if number != part]
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
    )


TASKS = {"movielens": movielens, "ratings": ratings, "docstrings": docstrings}
