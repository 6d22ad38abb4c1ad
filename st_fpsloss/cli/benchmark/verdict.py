"""Is it worth it? The answer in words, also when a baseline wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from st_fpsloss.cli.benchmark.contenders import OURS, POPULARITY
from st_fpsloss.cli.benchmark.measure import Result
from st_fpsloss.evaluation import paired_difference

METRIC = "ndcg@10"
_FEW_QUERIES = 300
# Of several comparisons with popularity one is soon outside of 95% by chance; so is one difference of few rankings.
_SURE = 0.99


@dataclass(frozen=True)
class Difference:
    """A mean difference on the same queries, and its interval."""

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def sign(self) -> int:
        """1 above 0, -1 below, 0 where the interval has both."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.confidence:.0%} interval {self.low:+.4f} to {self.high:+.4f})"


@dataclass(frozen=True)
class Verdict:
    """``worth`` is None before FPSLoss and something to compare it with are measured."""

    worth: bool | None
    headline: str
    sentences: Sequence[str]


def mean_of(result: Result, metric: str = METRIC) -> float:
    """The mean over queries."""
    return float(np.mean(result["metrics"][metric]))


def difference(result: Result, other: Result, metric: str = METRIC, confidence: float = 0.95) -> Difference:
    """What a contender has more than another one."""
    values, others = result["metrics"][metric], other["metrics"][metric]
    return Difference(*paired_difference(values, others, confidence=confidence), confidence)


def best_of_others(results: Sequence[Result]) -> Result | None:
    """The contender beside FPSLoss with the best NDCG@10 on the test, which favours it a little."""
    return max((result for result in results if result["contender"] != OURS), key=mean_of, default=None)


def give_verdict(results: Sequence[Result]) -> Verdict:
    """Judges the results.

    Args:
        results: Of all contenders, or of those that are measured so far.

    Returns:
        The verdict: "yes" where FPSLoss is better than the best of the others, with a 95% interval of the paired
        difference that leaves out 0 (99% where the test has few rankings).
    """
    ours = next((result for result in results if result["contender"] == OURS), None)
    best = best_of_others(results)
    if ours is None or best is None:
        return Verdict(None, "Not finished: start the same command again, and it goes on where it was.", [])
    few = len(ours["metrics"][METRIC]) < _FEW_QUERIES
    by = difference(ours, best, confidence=_SURE if few else 0.95)
    name = best["contender"]
    figures = f"NDCG@10 is {mean_of(ours):.4f} against {mean_of(best):.4f}"
    learned = _beat_popularity(results)
    if not learned:
        headline = "No: this log teaches nothing beyond popularity."
    elif by.sign > 0:
        headline = f"Yes: {OURS} ranks better than {name}, the best of the others."
    elif by.sign < 0:
        headline = f"No: {name} ranks better than {OURS}."
    else:
        headline = f"No: {name} is as good as {OURS}: the difference is within the interval."
    sentences = [f"{figures}, the difference {by}."]
    if learned:
        sentences.append(f"Better than popularity beyond doubt: {', '.join(learned)}.")
    else:
        sentences.append(
            "No contender ranks better than popularity beyond doubt. Either what a query clicks does not depend on the "
            "query, or the log is too small: check that the columns belong together, or collect more clicks."
        )
    sentences += _about_training(results, ours, best) if learned and by.sign <= 0 else []
    sentences += _about_cold(ours, best) if learned else []
    sentences += _about_curves(results) if learned else []
    if few:
        sentences.append(f"The test has {len(ours['metrics'][METRIC])} rankings only: the intervals are wide.")
    return Verdict(bool(learned) and by.sign > 0, headline, sentences)


def _beat_popularity(results: Sequence[Result]) -> list[str]:
    """Who ranks better than popularity, best first."""
    popularity = next((result for result in results if result["contender"] == POPULARITY), None)
    if popularity is None:
        return []
    others = sorted((result for result in results if result is not popularity), key=mean_of, reverse=True)
    return [result["contender"] for result in others if difference(result, popularity, confidence=_SURE).sign > 0]


def _about_training(results: Sequence[Result], ours: Result, best: Result) -> list[str]:
    """Where FPSLoss is not the best: whether training pays at all, and what it costs more."""
    if best["curve"]:
        rest = best_of_others([result for result in results if result is not best])
        if rest is not None and difference(best, rest).sign > 0:
            who = "both leave" if difference(ours, rest).sign > 0 else "the stock loss leaves"
            return [f"Training a model pays, {who} {rest['contender']} behind, and the stock loss will do."]
    elif ours["seconds"]["learning"] > best["seconds"]["learning"]:
        return [
            f"{best['contender']} learned in {best['seconds']['learning']:.0f} seconds, {OURS} in "
            f"{ours['seconds']['learning']:.0f}."
        ]
    return []


def _about_curves(results: Sequence[Result]) -> list[str]:
    """Whose training was stopped while its model still became better."""
    rising = [result["contender"] for result in results if _still_rises([value for _, value in result["curve"]])]
    if not rising:
        return []
    return [
        f"On validation {' and '.join(rising)} still became better at the end: more --minutes may change the picture."
    ]


def _still_rises(values: Sequence[float]) -> bool:
    return len(values) > 1 and values[-1] > max(values[:-1])


def _about_cold(ours: Result, best: Result) -> list[str]:
    if not ours["cold"]:
        return []
    by = Difference(*paired_difference(ours["cold"]["recall@100"], best["cold"]["recall@100"]))
    if not by.sign:
        return []
    word = "more" if by.sign > 0 else "fewer"
    return [f"Of the documents that training never saw, {OURS} finds {word}: recall@100 {by}."]
