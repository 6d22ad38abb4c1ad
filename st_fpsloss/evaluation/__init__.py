"""Ranking quality over a whole corpus, by popularity, with confidence intervals."""

from st_fpsloss.evaluation.bootstrap import bootstrap_interval, paired_difference
from st_fpsloss.evaluation.evaluator import RetrievalEvaluator
from st_fpsloss.evaluation.from_clicks import clicks_evaluator

__all__ = [
    "RetrievalEvaluator",
    "bootstrap_interval",
    "clicks_evaluator",
    "paired_difference",
]
