"""The results of the contenders, one line of JSON each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from st_fpsloss.cli.benchmark.contenders import Contender
from st_fpsloss.cli.benchmark.models import Settings
from st_fpsloss.cli.benchmark.task import Task
from st_fpsloss.evaluation.popularity import NUM_DECILES
from st_fpsloss.utils.files import append_json_line, json_lines

logger = logging.getLogger(__name__)

METRICS = ("ndcg@10", "hr@10", "recall@100")
Result = dict[str, Any]
"""``contender``, ``about``, ``metrics`` (metric -> a value for each query), ``deciles`` (decile -> NDCG@10), ``cold``
(NDCG@10 and recall@100 for each query with a cold document), ``seconds``, ``settings``, ``curve``."""


def measure_all(
    task: Task,
    settings: Settings,
    contenders: Sequence[Contender],
    path: Path,
    on_result: Callable[[list[Result]], None],
) -> list[Result]:
    """Runs the contenders whose result is not yet in the file.

    Args:
        task: What is ranked.
        settings: Of training.
        contenders: In this order.
        path: The file of results. Its first line says what they are of.
        on_result: Is given all results so far, whenever there is a new one, and at the start where there are some.

    Returns:
        The results.

    Raises:
        ValueError: If the file has the results of another log or of other settings.
    """
    of = {"task": task.fingerprint(), **asdict(settings)}
    lines = json_lines(path)
    if lines and lines[0] != of:
        changed = [name for name in of if lines[0].get(name) != of[name]]
        what = "another log or split" if "task" in changed else f"another {', '.join(changed)}"
        raise ValueError(f"{path} holds results of {what}: pass another --output_dir, or remove the file.")
    if not lines:
        append_json_line(path, of)
    results = lines[1:]
    if results:
        logger.info("Already there: %s", ", ".join(result["contender"] for result in results))
        on_result(results)
    done = {result["contender"] for result in results}
    for contender in contenders:
        if contender.name in done:
            continue
        logger.info("%s ...", contender.name)
        results.append(measure(task, settings, contender))
        append_json_line(path, results[-1])
        on_result(results)
    return results


def measure(task: Task, settings: Settings, contender: Contender) -> Result:
    """Lets a contender learn, and ranks the test."""
    fitted = contender.fit(task, settings)
    started = time.perf_counter()
    evaluator, cold_evaluator = task.test_evaluator, task.cold_evaluator
    of_query = evaluator.per_query(fitted.score)
    of_all = evaluator.evaluate_scores(fitted.score)
    deciles = {decile: of_all.get(f"ndcg@10_decile_{decile}") for decile in range(1, NUM_DECILES + 1)}
    cold = _cold_values(cold_evaluator.per_query(fitted.score)) if cold_evaluator is not None else None
    return {
        "contender": contender.name,
        "about": contender.about,
        "metrics": {metric: _rounded(of_query[metric]) for metric in METRICS},
        "deciles": {str(decile): value for decile, value in deciles.items() if value is not None},
        "coverage@10": of_all["coverage@10"],
        "cold": cold,
        "seconds": {"learning": round(fitted.seconds, 1), "ranking": round(time.perf_counter() - started, 1)},
        "settings": fitted.settings,
        "curve": list(fitted.curve),
    }


def _cold_values(of_query: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {metric: _rounded(of_query[metric]) for metric in ("ndcg@10", "recall@100")}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]
