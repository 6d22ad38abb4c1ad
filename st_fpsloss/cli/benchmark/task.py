"""A click log as a ranking task: what is trained on, what validation and test rank, and for which queries."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from st_fpsloss.data import hold_out, leave_last_out
from st_fpsloss.data.inputs import canonical_strings, distinct, factorize, is_positive
from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.evaluation.baselines import item_histories

AT = (10, 100)
MAX_HISTORY = 50
"""A user's newest items that an id model reads."""

_HELD_OUT = 0.1  # of the rows for test, and as many for validation
_MAX_VALIDATION_DOCUMENTS = 2000  # validation is ranked many times in training
_SPLITS = {
    "time": "The newest tenth of the clicks is the test, the tenth before it the validation.",
    "last": "The last click of each {query} is the test, the one before it the validation; the rest is trained on.",
    "random": "A tenth of the clicks, at random, is the test, another one the validation.",
}


@dataclass(frozen=True)
class Judgments:
    """The queries that are ranked, what they clicked before, and what they click next.

    Attributes:
        histories: Query -> documents clicked before, oldest first.
        relevant: Query -> documents that a good ranking has in front.
    """

    histories: Mapping[int, list[int]]
    relevant: Mapping[int, set[int]]


@dataclass(frozen=True)
class Task:
    """A log whose queries and documents are numbered, split in three.

    Attributes:
        user_items: Whether queries are users, known by their histories, and documents items, known by their ids;
            otherwise both are texts.
        split: How it was split, in words.
        queries: Number -> text of a query (user).
        documents: Number -> text of a document (item).
        train: Clicks to train on: ``query``, ``document`` and ``time``, all numbers.
        validation: What settings and epochs are chosen on.
        test: What is reported.
    """

    user_items: bool
    split: str
    queries: dict[int, str]
    documents: dict[int, str]
    train: Dataset
    validation: Judgments
    test: Judgments

    @cached_property
    def clicks(self) -> Counter[int]:
        """Clicks of each document in training."""
        return Counter(self.train["document"][:])

    @property
    def word(self) -> str:
        """What one query is called."""
        return "user" if self.user_items else "query"

    def query_inputs(self, judgments: Judgments) -> dict[int, Any]:
        """What a model is given for the queries that are judged."""
        if not self.user_items:
            return {query: self.queries[query] for query in judgments.relevant}
        histories = judgments.histories
        return {query: {"items": _strings(histories.get(query, ())[-MAX_HISTORY:])} for query in judgments.relevant}

    @cached_property
    def document_inputs(self) -> dict[int, Any]:
        """What a model is given for the documents."""
        return {number: {"item": str(number)} for number in self.documents} if self.user_items else self.documents

    @cached_property
    def validation_evaluator(self) -> RetrievalEvaluator:
        """Ranks for the validation's queries; the clicked documents and a sample of the others."""
        numbers, clicked = list(self.documents), set().union(*self.validation.relevant.values())
        if len(numbers) > _MAX_VALIDATION_DOCUMENTS:
            sample = np.random.default_rng(0).permutation(numbers)[:_MAX_VALIDATION_DOCUMENTS].tolist()
            numbers = list(dict.fromkeys([*clicked, *sample]))
        return self._evaluator(self.validation, {number: self.document_inputs[number] for number in numbers})

    @cached_property
    def test_evaluator(self) -> RetrievalEvaluator:
        """Ranks all documents for the test's queries, and measures by popularity too."""
        return self._evaluator(self.test, self.document_inputs, popularity=dict(self.clicks))

    @cached_property
    def cold_evaluator(self) -> RetrievalEvaluator | None:
        """The same for documents without a click in training alone; None where the test has none."""
        cold = {
            query: {number for number in numbers if not self.clicks[number]}
            for query, numbers in self.test.relevant.items()
        }
        judgments = Judgments(self.test.histories, {query: numbers for query, numbers in cold.items() if numbers})
        return self._evaluator(judgments, self.document_inputs) if judgments.relevant else None

    def _evaluator(self, judgments: Judgments, corpus: dict[int, Any], **options: Any) -> RetrievalEvaluator:
        inputs = self.query_inputs(judgments)
        seen = {}
        if self.user_items:
            seen = {query: [one for one in judgments.histories.get(query, ()) if one in corpus] for query in inputs}
        return RetrievalEvaluator(inputs, corpus, judgments.relevant, seen, at=AT, batch_size=256, **options)

    def facts(self) -> dict[str, Any]:
        """What a report says of the log."""
        cold = sum(not self.clicks[number] for number in self.documents)
        return {
            "clicks for training": len(self.train),
            f"{'users' if self.user_items else 'queries'}": len(self.queries),
            "documents": len(self.documents),
            "documents without a click in training": cold,
            f"{self.word} rankings in the test": len(self.test.relevant),
            "of these with earlier clicks": sum(bool(self.test.histories.get(one)) for one in self.test.relevant),
            "split": self.split,
            "candidates": "All documents"
            + (", without those that the user clicked before." if self.user_items else ". Clicked ones stay in."),
        }

    def fingerprint(self) -> str:
        """Equal for equal tasks."""
        digest = hashlib.sha256()
        for text in (*self.queries.values(), "\0", *self.documents.values()):
            digest.update(text.encode() + b"\0")
        for column in ("query", "document", "time"):
            digest.update(np.ascontiguousarray(self.train[column][:]).tobytes())
        for judgments in (self.validation, self.test):
            digest.update(repr([(query, sorted(found)) for query, found in judgments.relevant.items()]).encode())
        return digest.hexdigest()[:16]


def make_task(rows: Dataset, user_items: bool, split: str | None, max_queries: int, seed: int = 0) -> Task:
    """Splits a log and makes it a task.

    Args:
        rows: The columns of :func:`st_fpsloss.data.load_clicks`: ``query``, ``document``, perhaps ``label`` (rows of 0
            or below are left out) and ``time``. Without times the order of the rows counts.
        user_items: Queries are users, documents items.
        split: ``"time"``, ``"last"``, ``"random"``; None for the first of them that the log allows.
        max_queries: At most so many queries are ranked in validation and in test, drawn at random.
        seed: Of what is drawn.

    Returns:
        The task.

    Raises:
        ValueError: If the log cannot be split so, or nothing is left to rank.
    """
    rows = rows.select(np.flatnonzero(is_positive(rows)))
    if not len(rows):
        raise ValueError("--label_column: no row is above 0, so there is no click.")
    query_numbers, _ = factorize(canonical_strings(rows, "query"))
    document_numbers, _ = factorize(canonical_strings(rows, "document"))
    has_time = "time" in rows.column_names
    times = rows["time"][:] if has_time else np.arange(len(rows), dtype=np.float64)
    log = Dataset.from_dict({"query": query_numbers, "document": document_numbers, "time": times})
    split = split or _first_split(query_numbers, has_time)
    parts = _split(log, split, has_time, seed)
    train, known = parts["train"], concatenate_datasets([parts["train"], parts["validation"]])
    return Task(
        user_items=user_items,
        split=_SPLITS[split].format(query="user" if user_items else "query"),
        queries=_texts(rows, "query", user_items),
        documents=_texts(rows, "document", user_items),
        train=train,
        validation=_judgments(train, parts["validation"], "validation", user_items, max_queries, seed),
        test=_judgments(known, parts["test"], "test", user_items, max_queries, seed),
    )


def _first_split(queries: np.ndarray, has_time: bool) -> str:
    """By time; by the last clicks where most clicks are of queries that have three."""
    if has_time:
        return "time"
    counts = np.bincount(queries)
    return "last" if counts[counts >= 3].sum() > len(queries) / 2 else "random"


def _split(log: Dataset, split: str, has_time: bool, seed: int) -> DatasetDict:
    if split == "last":
        if max(Counter(log["query"][:]).values()) < 3:
            raise ValueError("--split last: no query has 3 clicks, for training, validation and test.")
        return leave_last_out(log, "query", "time")
    if split == "time" and not has_time:
        raise ValueError("--split time needs --time_column.")
    time = "time" if split == "time" else None
    outer = hold_out(log, _HELD_OUT, time, seed)
    inner = hold_out(outer["train"], _HELD_OUT / (1 - _HELD_OUT), time, seed)
    return DatasetDict({"train": inner["train"], "validation": inner["test"], "test": outer["test"]})


def _judgments(
    known: Dataset, held_out: Dataset, name: str, user_items: bool, max_queries: int, seed: int
) -> Judgments:
    histories = item_histories(known, "query", "document", "time")
    relevant: dict[int, set[int]] = {}
    for query, document in zip(held_out["query"][:], held_out["document"][:], strict=True):
        if not user_items or document not in histories.get(query, ()):
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise ValueError(f"--dataset: in the {name} split every user clicks what he or she clicked before.")
    chosen = sorted(relevant)
    if len(chosen) > max_queries:
        chosen = sorted(np.random.default_rng(seed).permutation(chosen)[:max_queries].tolist())
    return Judgments(histories, {query: relevant[query] for query in chosen})


def _texts(rows: Dataset, column: str, user_items: bool) -> dict[int, str]:
    """Number -> text, in the order in which factorize numbers; of a user or an item any input will do."""
    inputs = distinct(rows.with_format(None)[column])
    if user_items:
        return dict(enumerate(inputs))
    texts = [(value.get("text") if isinstance(value, Mapping) else value) or "" for value in inputs.values()]
    if not all(texts):
        raise ValueError(
            f'--{column}_column: some inputs have no "text". Pass --user_items where queries are users and documents '
            "are items, both known by their ids."
        )
    return dict(enumerate(texts))


def _strings(numbers: Any) -> list[str]:
    return [str(number) for number in numbers]
