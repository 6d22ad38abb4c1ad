r"""Search an index for the documents that fit queries best.

Queries are texts, or JSON objects with "text" and side features. Results are tab-separated lines: query, rank, document
id, score, document.

Examples:
    st-fpsloss search --model runs/shop --index runs/shop/index --query "red shoes" "tent" -k 5

    st-fpsloss search --model runs/shop --index runs/shop/index \
        --queries searches.jsonl --query_column search --output found.tsv

    cut -f 1 searches.tsv | st-fpsloss search --model runs/shop --index runs/shop/index --queries -
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from st_fpsloss.cli.data import check_source_column, source_of
from st_fpsloss.cli.models import load_model
from st_fpsloss.cli.parser import parse
from st_fpsloss.data import load_inputs
from st_fpsloss.retrieval import DocumentIndex
from st_fpsloss.utils.files import write_whole

STDIN = "-"


@dataclass
class Options:
    """Where to search, and what for."""

    model: str = field(metadata={"help": "folder or Hub id of the model that made the index"})
    index: Path = field(metadata={"help": "folder of the index"})
    query: list[str] | None = field(default=None, metadata={"help": "queries to search for"})
    queries: list[str] | None = field(
        default=None, metadata={"help": f"files or Hub id of queries; {STDIN}: lines of the standard input"}
    )
    query_column: str = field(default="query", metadata={"help": "column of the queries"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    dataset_split: str = field(default="train", metadata={"help": "split of a data set on the Hub"})
    encoding: str = field(default="utf-8", metadata={"help": "of text files"})
    k: int = field(default=10, metadata={"help": "documents a query", "aliases": ["-k"]})
    output: Path | None = field(default=None, metadata={"help": "file for the results, in place of standard output"})
    batch_size: int = field(default=32, metadata={"help": "inputs in one forward pass"})
    trust_remote_code: bool = field(default=False, metadata={"help": "needed for a model with features or a bias"})

    def __post_init__(self) -> None:
        if (self.query is None) == (self.queries is None):
            raise ValueError("--query and --queries are two ways to give queries: pass one.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole of it."""
    (options,) = parse(__doc__, (Options,), argv, prog="st-fpsloss search")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    queries = read_queries(options)
    index = DocumentIndex.load(options.index)
    model = load_model(options.model, options.trust_remote_code)
    found = index.search(model, queries, options.k, batch_size=options.batch_size)
    lines = ["query\trank\tid\tscore\tdocument"]
    for query, best in zip(queries, found, strict=True):
        for rank, (document_id, score) in enumerate(best, start=1):
            values = (shown(query), rank, document_id, f"{score:.6g}", shown(index.document(document_id)))
            lines.append("\t".join(map(str, values)))
    if options.output is None:
        print("\n".join(lines))
    else:
        write_whole(options.output, "\n".join(lines) + "\n")


def read_queries(options: Options) -> list[Any]:
    """The queries to search for, from the command line, the standard input or files."""
    if options.query is not None or options.queries == [STDIN]:
        lines = options.query or [line.rstrip("\r\n") for line in sys.stdin]
        flag = "--query" if options.query else f"--queries {STDIN}"
        return [parsed_query(line, flag) if line.startswith("{") else line for line in lines if line.strip()]
    source = source_of(options.queries or [], options.dataset_config, options.dataset_split)
    check_source_column(source, options.query_column, "--query_column", options.encoding)
    return list(load_inputs(source, options.query_column, encoding=options.encoding).values())


def parsed_query(line: str, flag: str) -> Any:
    """The query in a line of JSON."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{flag} {line!r} begins with {{ and is no JSON ({error}). Keys and texts need double quotes, and the "
            """shell single ones around them: '{"user": "u1", "age": 30}'."""
        ) from error


def shown(value: Any) -> str:
    """An input on one line, without tabs."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split())
