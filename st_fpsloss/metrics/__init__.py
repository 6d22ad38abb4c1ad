"""Metric modules for ``evaluate``, shipped with the package so that they load without a network."""

from __future__ import annotations

from pathlib import Path


def metric_path() -> str:
    """Folder of the retrieval metric module, for ``evaluate.load``.

    Returns:
        The path of the installed folder.

    Example:
        >>> import evaluate
        >>> retrieval = evaluate.load(metric_path())
        >>> retrieval.compute(predictions=[["d2", "d1"]], references=[{"d1": 1}], at=[1, 2])["hr@2"]
        1.0
    """
    return str(Path(__file__).parent / "retrieval")
