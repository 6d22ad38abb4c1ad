"""Click logs for tests, in every kind of source that load_clicks reads."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset

from st_fpsloss.data import load_clicks

ROWS = [
    {"session": 1, "asked": "red shoes", "item": "leather shoe", "other": "tent", "worse": "stove", "clicks": 1.0},
    {"session": 2, "asked": "tent", "item": "tent", "other": "red shoes", "worse": "pan", "clicks": 0.0},
    {"session": 3, "asked": "NA", "item": "007", "other": "null", "worse": "a\tb, c", "clicks": 2.5},
]
LOADED = [
    {
        "query": row["asked"],
        "document": row["item"],
        "negative_1": row["worse"],
        "negative_2": row["other"],
        "label": row["clicks"],
    }
    for row in ROWS
]
CHOICE: dict[str, Any] = {"query": "asked", "document": "item", "negatives": ["worse", "other"], "label": "clicks"}

FILES = [".csv", ".tsv", ".parquet", ".jsonl"]
STREAMS = ["stream", *(f"streamed{suffix}" for suffix in FILES)]

# Ids for random_log, as integers and as strings.
USERS: list[list[Any]] = [list(range(-5, 150)), [f"u{number}" for number in range(150)]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    log = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        log.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        log.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def stream(rows: list[dict[str, Any]], features: Features | None = None) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate, features=features)


def load(kind: str, rows: list[dict[str, Any]], folder: Path, **choice: Any) -> Dataset | IterableDataset:
    """Loads the rows from a source of the kind: a suffix, "streamed" + suffix, "dataset" or "stream"."""
    if kind == "dataset":
        return load_clicks(Dataset.from_list(rows), **choice)
    if kind == "stream":
        return load_clicks(stream(rows), **choice)
    streaming = kind.startswith("streamed")
    return load_clicks(write(folder / f"log{kind.removeprefix('streamed')}", rows), streaming=streaming, **choice)


def random_log(users: list[Any], seed: int = 0, rows: int = 400) -> Dataset:
    """A log with many ties in time; ``row`` is the row's number."""
    random = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            "row": list(range(rows)),
            "user": [users[number] for number in random.integers(0, len(users), rows)],
            "item": random.integers(0, 50, rows).tolist(),
            "time": random.integers(0, 20, rows).tolist(),
        }
    )


def rows_of_users(log: Dataset) -> dict[Any, list[dict[str, Any]]]:
    """The reference: rows of each user by time; sorted() is stable."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in log:
        found[row["user"]].append(row)
    return {user: sorted(found[user], key=lambda row: row["time"]) for user in sorted(found)}


def refusal(*parts: str) -> str:
    """A pattern that finds all parts, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


def place(kind: str, index: int) -> str:
    """What an error calls the row with this index in a source of the kind: its line in a text file."""
    suffix = kind.removeprefix("streamed")
    if suffix in (".csv", ".tsv"):
        return f"line {index + 2} of log{suffix}"
    return f"line {index + 1} of log.jsonl" if suffix == ".jsonl" else f"row {index}"
