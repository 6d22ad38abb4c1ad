"""Writes the table of text_towers.py out of its results.

python -m training_scripts.studies.text_towers_table --folder runs/text_towers --output results/text_towers.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from st_fpsloss.evaluation.bootstrap import bootstrap_interval, paired_difference
from st_fpsloss.utils.files import json_lines, write_whole
from training_scripts.studies import text_towers as study

REFERENCE = "CachedMultipleNegativesRankingLoss on the encoder"


def per_query(results: Iterable[dict[str, Any]]) -> np.ndarray:
    """NDCG@10 of each test query, the mean over seeds."""
    return np.mean([result["per_query"][study.NUM_QUERIES :] for result in results], axis=0)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a line for each row that has been run."""
    by_row: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_row.setdefault(result["row"], []).append(result)
    reference = per_query(by_row[REFERENCE]) if REFERENCE in by_row else None
    header = ["", "seeds", "untrained", *(f"step {step}" for step in study.EVALUATIONS), "95% interval"]
    header += ["less the cached stock loss", "seconds a step", "α", "alignment: seconds, cosine", "ms a query"]
    lines = [f"| {' | '.join(header)} |".replace("|  |", "| |"), "|---" * len(header) + "|"]
    for name in [row.name for row in study.ROWS if row.name in by_row]:
        runs = by_row[name]
        values = per_query(runs)
        at = {point["step"]: [] for run in runs for point in run["points"]}
        for run in runs:
            for point in run["points"]:
                at[point["step"]].append(point["test"])
        low, high = bootstrap_interval(values)
        points = [f"{np.mean(at[step]):.3f}" if step in at else "" for step in (0, *study.EVALUATIONS)]
        difference = ""
        if reference is not None and name != REFERENCE:
            difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired_difference(values, reference))
        last = runs[0]["points"][-1]
        seconds = f"{last['seconds'] / last['step']:.1f}" if last["step"] else ""
        alphas = ", ".join(f"{run['alpha']:.1f}" for run in runs if run.get("alpha"))
        aligned = runs[0].get("agreement")
        alignment = f"{runs[0]['align_seconds']:.0f}, {aligned['cosine']:.2f}" if aligned else ""
        cells = [name, str(len(runs)), *points, f"{low:.3f} to {high:.3f}", difference, seconds, alphas, alignment]
        lines.append("| " + " | ".join([*cells, f"{runs[0]['query_ms']:.1f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the results")
    parser.add_argument("--output", type=Path, required=True, help="a Markdown file, whose table is replaced")
    arguments = parser.parse_args()
    rows = table(json_lines(arguments.folder / "results.jsonl"))
    text = arguments.output.read_text(encoding="utf-8") if arguments.output.exists() else "\n\n"
    before, _, after = text.partition("\n| | seeds")
    _, _, after = after.partition("\n\n")
    write_whole(arguments.output, f"{before.rstrip()}\n\n{rows}\n\n{after.lstrip()}")


if __name__ == "__main__":
    main()
