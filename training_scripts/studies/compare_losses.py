"""Compare losses, corrections, similarities, scales and batch sizes on real data, with seeds and intervals.

All runs use one small model and one number of encoded tokens. A result is appended to results.jsonl when its run
ends; started again, the script goes on where it stopped. Table and plot are written anew at the end.

Examples:
    python -m training_scripts.studies.compare_losses --data movielens --study losses --output_dir runs/compare
    python -m training_scripts.studies.compare_losses --data ratings --study graded --num_tokens 1000000
    python -m training_scripts.studies.compare_losses --data docstrings --study scale --seeds 0 1 2
    python -m training_scripts.studies.compare_losses --data movielens --study log_q --report_only
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from st_fpsloss.cli.parser import parse
from st_fpsloss.evaluation import bootstrap_interval, paired_difference
from st_fpsloss.evaluation.popularity import click_deciles
from st_fpsloss.utils.files import write_whole
from training_scripts.studies.data import TASKS, Task
from training_scripts.studies.plans import STUDIES
from training_scripts.studies.runs import ResultsFile, Run, execute

matplotlib.use("Agg")
from matplotlib import pyplot as plt

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """What can be changed from the command line."""

    data: str = field(default="movielens", metadata={"help": "the data set", "choices": list(TASKS)})
    study: str = field(default="losses", metadata={"help": "what to compare", "choices": list(STUDIES)})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one run each"})
    num_tokens: int = field(default=3_000_000, metadata={"help": "that the encoders read in a run"})
    output_dir: Path = field(default=Path("runs/compare"), metadata={"help": "receives results, table and plot"})
    report_only: bool = field(default=False, metadata={"help": "no training: table and plot of what is there"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of a study, and report all of it."""
    (options,) = parse(__doc__, (Options,), argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    results = ResultsFile(options.output_dir / "results.jsonl")
    runs = {
        name: [Run(options.data, stages, seed, options.num_tokens, similarity) for seed in options.seeds]
        for name, (stages, similarity) in STUDIES[options.study]().items()
    }
    task = TASKS[options.data](options.output_dir)
    if task.graded is None and any(stage.graded for same in runs.values() for stage in same[0].stages):
        raise ValueError(f"--study {options.study} compares grades, and --data {options.data} has none: take ratings.")
    if not options.report_only:
        execute_missing(runs, task, results)
    report(runs, task, results, options)


def execute_missing(runs: dict[str, list[Run]], task: Task, results: ResultsFile) -> None:
    """The runs without a result, seed by seed, so that a study that is stopped has all of its configurations."""
    by_seed = [
        (name, run) for same_seed in zip(*runs.values(), strict=True) for name, run in zip(runs, same_seed, strict=True)
    ]
    missing = [(name, run) for name, run in by_seed if run.key not in results.by_key]
    for number, (name, run) in enumerate(missing, start=1):
        result = execute(run, task)
        results.append(run, result)
        logger.info(
            "%d/%d %s, seed %d: NDCG@10 %.4f validation, %.4f test, α %s, %.0f s",
            *(number, len(missing), name, run.seed, result["validation"], result["test"]),
            *(result["losses"][-1]["alpha"], result["seconds"]),
        )


def report(runs: dict[str, list[Run]], task: Task, results: ResultsFile, options: Options) -> None:
    """Write and print the table, and draw it."""
    found = {
        name: [results.by_key[run.key] for run in same if run.key in results.by_key] for name, same in runs.items()
    }
    found = {name: same for name, same in found.items() if same}
    rows = [row_of(name, same, next(iter(found.values()))) for name, same in found.items()]
    name = f"{options.study}_{options.data}"
    table = "\n".join([*HEADER, *(format_row(row) for row in rows)]) + "\n"
    if task.test_targets is not None:
        table += "\n" + decile_table(found, task)
    write_whole(options.output_dir / f"{name}.md", table)
    print(table)
    plot(rows, f"{options.study}, {options.data}", options.output_dir / f"{name}.png")


def row_of(name: str, same: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; intervals over queries, of each query's mean over the seeds."""
    of_query, of_first = (
        np.mean([result["test_per_query"] for result in results], axis=0) for results in (same, first)
    )
    validation = [result["validation"] for result in same]
    return {
        "name": name,
        "seeds": len(same),
        "validation": np.mean(validation),
        "validation_spread": np.std(validation, ddof=1) if len(same) > 1 else 0.0,
        "test": of_query.mean(),
        "interval": bootstrap_interval(of_query),
        "difference": paired_difference(of_query, of_first) if same is not first else None,
        "alpha": np.mean([result["losses"][-1]["alpha"] for result in same]),
        "seconds": np.mean([result["seconds"] for result in same]),
    }


HEADER = (
    "| | seeds | validation NDCG@10 ± over seeds | test NDCG@10 (95%) | test less first row (95%) | α | s |",
    "|---|---|---|---|---|---|---|",
)


def format_row(row: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = row["interval"]
    difference = "" if row["difference"] is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["difference"])
    return (
        f"| {row['name']} | {row['seeds']} | {row['validation']:.4f} ± {row['validation_spread']:.4f} "
        f"| {row['test']:.4f} ({low:.4f} to {high:.4f}) | {difference} | {row['alpha']:.3g} | {row['seconds']:.0f} |"
    )


def decile_table(found: dict[str, list[dict[str, Any]]], task: Task) -> str:
    """Test NDCG@10 by the popularity of the relevant document: tenths of the training clicks, 10 the most popular."""
    clicks = [task.clicks.get(document, 0) for document in task.documents]
    decile_of = dict(zip(task.documents, click_deciles(clicks), strict=True))
    decile = np.array([decile_of[task.test_targets[query]] for query in task.test.query_ids])
    lines = ["| decile | " + " | ".join(map(str, range(1, 11))) + " |", "|---" * 11 + "|"]
    lines.append("| queries | " + " | ".join(str((decile == number).sum()) for number in range(1, 11)) + " |")
    for name, same in found.items():
        of_query = np.mean([result["test_per_query"] for result in same], axis=0)
        means = (of_query[decile == number].mean() for number in range(1, 11))
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """NDCG@10 at test with intervals, and on validation."""
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.32 * len(rows)), constrained_layout=True)
    places = np.arange(len(rows))[::-1]
    test = np.array([row["test"] for row in rows])
    low, high = np.array([row["interval"] for row in rows]).T
    axis.errorbar(test, places, xerr=[test - low, high - test], fmt="o", capsize=3, label="test, 95% over queries")
    axis.scatter([row["validation"] for row in rows], places, marker="x", label="validation")
    axis.set_yticks(places, [row["name"] for row in rows])
    axis.set(xlabel="NDCG@10, mean over seeds", title=title)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
