r"""Rank the documents for held-out queries with one model or several, and say how sure the figures are.

The rows are (query, document), clicks or judgements with a grade, from files or the Hub. Every metric comes with a 95%
bootstrap interval over the queries. With several models, each is compared with the first on the same queries: an
interval of the difference that leaves out 0 says that the two differ.

Examples:
    What comes next: all documents are ranked but those that a query had before.

    st-fpsloss evaluate --models runs/films runs/films-rated --trust_remote_code \
        --dataset data/movielens/test.jsonl --documents data/movielens/documents.jsonl \
        --seen data/movielens/train.jsonl data/movielens/validation.jsonl --output runs/films/test.json

    What is liked better: of each query, the documents that it has a grade for are ranked.

    st-fpsloss evaluate --models runs/films runs/films-rated --trust_remote_code \
        --dataset data/movielens/test.jsonl --label_column rating --rank judged

    A data set of the Hub, and a model beside it that was never trained on it.

    st-fpsloss evaluate --models me/nq-two-tower sentence-transformers/all-MiniLM-L6-v2 \
        --dataset sentence-transformers/natural-questions --query_column query --document_column answer
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from st_fpsloss.cli.data import DataArguments, warn_of_missing_documents
from st_fpsloss.cli.models import load_model
from st_fpsloss.cli.parser import parse
from st_fpsloss.evaluation import bootstrap_interval, paired_difference
from st_fpsloss.evaluation.from_clicks import clicks_evaluator
from st_fpsloss.utils.files import write_whole

Interval = dict[str, float]
COMMON = (
    "models", "trust_remote_code", "dataset", "query_column", "document_column", "label_column", "documents", "seen",
    "rank", "at", "output", "batch_size",
)  # fmt: skip


@dataclass
class Options:
    """What to evaluate, and where the figures go."""

    _argument_group_name = "evaluation"

    models: list[str] = field(metadata={"help": "folders or Hub ids; the first is what the others are compared with"})
    documents: list[str] | None = field(
        default=None, metadata={"help": "files or Hub id of the whole corpus (default: the documents of the rows)"}
    )
    seen: list[str] | None = field(
        default=None,
        metadata={
            "help": "files or Hub id of rows whose documents, where clicked, are left out of their query's ranking"
        },
    )
    rank: Literal["all", "judged"] = field(
        default="all", metadata={"help": "every document, or for each query those that its rows have"}
    )
    at: list[int] = field(default_factory=lambda: [1, 10, 20, 100], metadata={"help": "cutoffs of the metrics"})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the figures"})
    batch_size: int = field(default=32, metadata={"help": "inputs in one forward pass"})
    trust_remote_code: bool = field(default=False, metadata={"help": "needed for a model with features or a bias"})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the whole of it; returns what the JSON file holds."""
    options, data = parse(__doc__, (Options, DataArguments), argv, prog="st-fpsloss evaluate", common=COMMON)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if len(set(options.models)) < len(options.models):
        raise ValueError(f"--models {' '.join(options.models)} names a model twice.")
    if options.rank == "judged" and (options.documents or options.seen):
        raise ValueError("--rank judged ranks the documents of a query's own rows: leave out --documents and --seen.")
    rows, documents = data.read(label=data.label_column), data.read_documents(options.documents)
    if options.documents is not None:
        warn_of_missing_documents(documents, rows)
    evaluator = clicks_evaluator(
        rows,
        documents=documents,
        seen=None if options.seen is None else data.read_seen(options.seen),
        at=options.at,
        batch_size=options.batch_size,
        judged_only=options.rank == "judged",
    )
    values = {}
    for name in options.models:
        values[name] = evaluator.per_query(load_model(name, options.trust_remote_code))
    first, *others = options.models
    figures = {
        "queries": len(evaluator.query_ids),
        "documents": len(evaluator.corpus_ids),
        "models": {name: {metric: mean(of_query) for metric, of_query in values[name].items()} for name in values},
        "differences": {
            name: {metric: difference(values[name][metric], of_query) for metric, of_query in values[first].items()}
            for name in others
        },
    }
    print_table(figures)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, json.dumps(figures, indent=2) + "\n")
    return figures


def mean(of_query: np.ndarray) -> Interval:
    """The mean over queries and its interval."""
    low, high = bootstrap_interval(of_query)
    return {"mean": float(of_query.mean()), "low": low, "high": high}


def difference(of_query: np.ndarray, of_first: np.ndarray) -> Interval:
    """The mean difference on the same queries and its interval."""
    return dict(zip(("mean", "low", "high"), paired_difference(of_query, of_first), strict=True))


def print_table(figures: dict[str, Any]) -> None:
    """What the JSON file holds, for people."""
    print(f"{figures['queries']} queries, {figures['documents']} documents; mean (95% interval)")
    print_figures(figures["models"], "{:.4f}")
    if figures["differences"]:
        print(f"\ndifference from {next(iter(figures['models']))}, same queries")
        print_figures(figures["differences"], "{:+.4f}")


def print_figures(figures: dict[str, dict[str, Interval]], form: str) -> None:
    """A line a metric, a column a model."""
    texts = {
        name: {
            metric: f"{form.format(value['mean'])} ({form.format(value['low'])} to {form.format(value['high'])})"
            for metric, value in metrics.items()
        }
        for name, metrics in figures.items()
    }
    widths = {name: max(map(len, (name, *column.values()))) + 2 for name, column in texts.items()}
    print(" " * 12 + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for metric in next(iter(texts.values())):
        print(f"{metric:12}" + "".join(f"{texts[name][metric]:>{width}}" for name, width in widths.items()))
