"""Inputs as numbers: which rows of a data set have the same query or document, be they strings or dicts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

LABEL_COLUMNS = ("label", "labels", "score", "scores")
"""Columns that sentence-transformers' collator takes for the label."""


def canonical_string(value: Any) -> str:
    """One string for one input: the string itself, or a dict's JSON without its missing features.

    Example:
        >>> canonical_string({"text": "a film", "year": None}) == canonical_string({"year": None, "text": "a film"})
        True
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        present = {name: _plain(part) for name, part in value.items() if part is not None}
        return "\0" + json.dumps(present, sort_keys=True, ensure_ascii=False, default=lambda other: other.tolist())
    return str(value)


def _plain(value: Any) -> Any:
    """Equal numbers become one: a table's column may have 3 as 3.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def distinct(inputs: Iterable[Any]) -> dict[str, Any]:
    """Canonical string -> input, each once, in the order in which they first occur.

    Example:
        >>> list(distinct(["tent", {"text": "a", "year": None}, "tent", {"text": "a"}]).values())
        ['tent', {'text': 'a', 'year': None}]
    """
    found: dict[str, Any] = {}
    for value in inputs:
        found.setdefault(canonical_string(value), value)
    return found


def canonical_strings(dataset: Dataset, column: str) -> list[str]:
    """The canonical string of every row of a column."""
    values = dataset.data.column(column)
    if dataset._indices is not None:
        values = values.take(dataset._indices.column(0))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return values.to_pylist()
    return [canonical_string(value) for value in dataset.with_format(None)[column]]


def factorize(strings: Iterable[str], known: Mapping[str, int] | None = None) -> tuple[np.ndarray, dict[str, int]]:
    """A number for each canonical string: that in ``known``, the others counted on from there.

    Returns:
        (numbers, number_of): (N,) int64, and canonical string -> number.
    """
    number_of = dict(known or {})
    numbers = [number_of.setdefault(text, len(number_of)) for text in strings]
    return np.array(numbers, dtype=np.int64), number_of


def is_positive(dataset: Dataset) -> np.ndarray:
    """Which rows, (N,) bool, have r > 0; all of them without a label."""
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return np.asarray(dataset.with_format(None)[name][:], dtype=np.float64) > 0
    return np.ones(len(dataset), dtype=bool)


def pairs_of(
    known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None,
) -> tuple[list[Any], list[Any]]:
    """The queries and the documents of known pairs, given as query -> documents or as an iterable of pairs.

    Raises:
        ValueError: If the documents of a query are one input instead of many, or an entry is no pair.
    """
    if known_positives is None:
        return [], []
    if isinstance(known_positives, Mapping):
        for query, documents in known_positives.items():
            if isinstance(documents, (str, Mapping)) or not isinstance(documents, Iterable):
                raise ValueError(
                    f"`known_positives[{query!r}]` must be the documents of that query, got {documents!r}: "
                    "pass a list or a set of them."
                )
        pairs = [(query, document) for query, documents in known_positives.items() for document in documents]
    else:
        pairs = list(known_positives)
        for pair in pairs:
            if isinstance(pair, (str, Mapping)) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"`known_positives` must hold pairs (query, document), got {pair!r}.")
    return [query for query, _ in pairs], [document for _, document in pairs]


def canonical_pairs(
    known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None,
) -> tuple[list[str], list[str]]:
    """Canonical strings of the queries and of the documents of known pairs."""
    queries, documents = pairs_of(known_positives)
    return [canonical_string(query) for query in queries], [canonical_string(document) for document in documents]


def check_columns(dataset: Dataset, columns: Sequence[str], argument: str = "clicks") -> None:
    """Raise a ValueError unless the argument is a data set with these columns."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`{argument}` must be a datasets.Dataset, got {type(dataset).__name__}.")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"`{argument}` has no column {missing[0]!r}; its columns are {dataset.column_names}.")
    if not len(dataset):
        raise ValueError(f"`{argument}` is empty. Pass a data set with at least one row.")
