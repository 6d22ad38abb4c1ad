"""Write MovieLens-100K as files that pretrain.py, finetune.py, evaluate.py and index.py read.

A query is a user (id, age, gender, occupation), a document a film (title with id, genres, year), the grade its rating
from 1 to 5. The rows are split by leave-last-one-out: a user's last film is in test.jsonl, the one before in
validation.jsonl, the others are in train.jsonl; documents.jsonl has all films.

Example:
    python training_scripts/movielens_files.py --output_dir data/movielens
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from st_fpsloss.cli.command_line import parse
from st_fpsloss.data.movielens import load_movielens_100k
from st_fpsloss.utils.files import write_whole


@dataclass
class Options:
    """Where the files go."""

    output_dir: Path = field(default=Path("data/movielens"), metadata={"help": "receives the files"})
    cache_dir: Path | None = field(default=None, metadata={"help": "keeps the data; default ~/.cache/st_fpsloss"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole of it."""
    (options,) = parse(__doc__, (Options,), argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = load_movielens_100k(options.cache_dir)
    films = {row["item_id"]: film(row) for row in data.items}
    users = {row["user_id"]: user(row) for row in data.users}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(options.output_dir / "documents.jsonl", ({"document": one} for one in films.values()))
    for name, ratings in data.splits().items():
        rows = (
            {
                "query": users[row["user_id"]],
                "document": films[row["item_id"]],
                "rating": row["rating"],
                "timestamp": row["timestamp"],
            }
            for row in ratings.to_list()
        )
        write_rows(options.output_dir / f"{name}.jsonl", rows)
    print(f"train.jsonl validation.jsonl test.jsonl documents.jsonl are in {options.output_dir}.")


def user(row: dict[str, Any]) -> dict[str, Any]:
    """A user as side features."""
    return {"user": str(row["user_id"]), **{name: row[name] for name in ("age", "gender", "occupation")}}


def film(row: dict[str, Any]) -> dict[str, Any]:
    """A film as side features; its id has the title, for people to read."""
    return {"film": f"{row['title']} ({row['item_id']})", "genres": row["genres"], "year": row["year"]}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
