r"""Find out whether training is worth it on a click log: baselines, the stock loss and FPSLoss at equal time.

The log is split, each contender learns from the older part, and all rank the test: popularity, ItemKNN and EASE where
queries repeat, BM25 and the untouched encoder where there are texts, then MultipleNegativesRankingLoss and FPSLoss with
--minutes of training each. --output_dir receives report.md, report.html and results.jsonl; a command that was stopped
goes on where it was.

Examples:
    A search log: queries and documents are texts.

    st-fpsloss benchmark --dataset clicks.parquet --query_column search --document_column product \
        --time_column clicked_at --encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/worth-it

    Users and items, known by their ids; each user's last click is the test.

    st-fpsloss movielens --output_dir data/movielens
    st-fpsloss benchmark --user_items --split last --time_column timestamp \
        --dataset data/movielens/train.jsonl data/movielens/validation.jsonl data/movielens/test.jsonl \
        --output_dir runs/worth-it-movielens
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from st_fpsloss.cli.data import DataArguments
from st_fpsloss.cli.parser import parse

COMMON = (
    "dataset", "query_column", "document_column", "label_column", "time_column", "user_items", "split", "encoder",
    "minutes", "output_dir", "num_train_epochs", "batch_size", "learning_rate", "max_queries",
)  # fmt: skip
_BATCH_SIZE = {True: 1500, False: 128}  # by user_items
_LEARNING_RATE = {True: 3e-3, False: 5e-5}


@dataclass
class Options:
    """What is compared, and for how long."""

    _argument_group_name = "benchmark"

    output_dir: Path = field(metadata={"help": "receives the report and the results"})
    minutes: float = field(default=3.0, metadata={"help": "of training for each model, at most"})
    user_items: bool = field(
        default=False, metadata={"help": "queries are users, documents items, both known by their ids"}
    )
    time_column: str | None = field(default=None, metadata={"help": "times of the clicks (default: order of the rows)"})
    split: Literal["time", "last", "random"] | None = field(
        default=None,
        metadata={
            "help": "test on the newest clicks, on each query's last one, or on random ones (default: time with "
            "--time_column, else last where queries repeat, else random)"
        },
    )
    encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Hub id or folder of the encoder of texts"}
    )
    num_train_epochs: int = field(default=10, metadata={"help": "passes over the clicks, at most"})
    batch_size: int | None = field(default=None, metadata={"help": "clicks in a batch (default: 128, of ids 1500)"})
    learning_rate: float | None = field(default=None, metadata={"help": "at most (default: 5e-5, of ids 3e-3)"})
    max_queries: int = field(default=2000, metadata={"help": "queries that are ranked, at most"})


def main(argv: Sequence[str] | None = None) -> bool | None:
    """Run the whole of it; returns whether it is worth it."""
    options, data = parse(__doc__, (Options, DataArguments), argv, prog="st-fpsloss benchmark", common=COMMON)
    # The imports of training, after help and wrong options.
    from st_fpsloss.cli.benchmark.contenders import contenders_of
    from st_fpsloss.cli.benchmark.measure import Result, measure_all
    from st_fpsloss.cli.benchmark.models import Settings
    from st_fpsloss.cli.benchmark.report import write_report
    from st_fpsloss.cli.benchmark.task import make_task
    from st_fpsloss.cli.models import load_model
    from st_fpsloss.retrieval.encode import checked_similarity

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "bm25s", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if not options.user_items:
        checked_similarity(load_model(options.encoder))  # before baselines take their time
    rows = data.read(label=data.label_column, time=options.time_column)
    task = make_task(rows, options.user_items, options.split, options.max_queries)
    contenders = contenders_of(task)
    settings = Settings(
        seconds=60 * options.minutes,
        epochs=options.num_train_epochs,
        encoder="" if options.user_items else options.encoder,
        batch_size=options.batch_size or _BATCH_SIZE[options.user_items],
        learning_rate=options.learning_rate or _LEARNING_RATE[options.user_items],
    )
    facts = {
        **task.facts(),
        "training": f"At most {options.minutes:g} minutes and {settings.epochs} epochs for each model, batches of "
        f"{settings.batch_size}, learning rate {settings.learning_rate:g}, seed {settings.seed}.",
        **({} if options.user_items else {"encoder": options.encoder}),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)

    def report(results: list[Result]) -> None:
        write_report(options.output_dir, facts, results)

    results = measure_all(task, settings, contenders, options.output_dir / "results.jsonl", report)
    verdict = write_report(options.output_dir, facts, results)
    print(f"{verdict.headline}\n{' '.join(verdict.sentences)}\nThe report is {options.output_dir / 'report.html'}.")
    return verdict.worth
