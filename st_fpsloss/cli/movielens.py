r"""Write MovieLens-100K as files that the other commands read.

A query is a user (id, age, gender, occupation), a document a film (title with id, genres, year), the rating its grade
from 1 to 5. A user's last films are in test.jsonl, those before in validation.jsonl, all others in train.jsonl;
documents.jsonl has all films.

Examples:
    st-fpsloss movielens --output_dir data/movielens

    st-fpsloss movielens --output_dir data/leave-one-out --last 1
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from st_fpsloss.cli.parser import parse
from st_fpsloss.data import MovieLens100K, load_movielens_100k
from st_fpsloss.utils.files import write_whole


@dataclass
class Options:
    """Where the files go."""

    output_dir: Path = field(default=Path("data/movielens"), metadata={"help": "receives the files"})
    last: int = field(default=5, metadata={"help": "films of each user in test, and as many before in validation"})
    cache_dir: Path | None = field(
        default=None, metadata={"help": "keeps what is downloaded (default: ~/.cache/st_fpsloss)"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.last <= 9:
            raise ValueError(f"--last {self.last}: the least active user has 20 films; pass 1 to 9.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole of it."""
    (options,) = parse(__doc__, (Options,), argv, prog="st-fpsloss movielens")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = load_movielens_100k(options.cache_dir)
    films = {row["item_id"]: film(row) for row in data.items}
    users = {row["user_id"]: user(row) for row in data.users}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(
        options.output_dir / "documents.jsonl", ({"id": str(name), "document": one} for name, one in films.items())
    )
    for name, ratings in splits(data, options.last).items():
        rows = (
            {
                "query": users[row["user_id"]],
                "document": films[row["item_id"]],
                "rating": row["rating"],
                "timestamp": row["timestamp"],
            }
            for row in ratings
        )
        write_rows(options.output_dir / f"{name}.jsonl", rows)
    print(f"train.jsonl validation.jsonl test.jsonl documents.jsonl are in {options.output_dir}.")


def splits(data: MovieLens100K, last: int) -> dict[str, list[dict[str, Any]]]:
    """The ratings in three parts, by user and time; ties keep the order of the log."""
    ratings = data.ratings.to_pandas().sort_values(["user_id", "timestamp"], kind="stable")
    later = ratings.groupby("user_id").cumcount(ascending=False)
    parts = {"train": later >= 2 * last, "validation": (later >= last) & (later < 2 * last), "test": later < last}
    return {name: ratings[part].to_dict("records") for name, part in parts.items()}


def user(row: dict[str, Any]) -> dict[str, Any]:
    """A user as side features."""
    return {"user": str(row["user_id"]), **{name: row[name] for name in ("age", "gender", "occupation")}}


def film(row: dict[str, Any]) -> dict[str, Any]:
    """A film as side features; its id has the title, for people to read."""
    return {"film": f"{row['title']} ({row['item_id']})", "genres": row["genres"], "year": row["year"]}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
