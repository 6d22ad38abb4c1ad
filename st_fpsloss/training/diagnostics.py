"""Means of what losses tell of their batches (:mod:`st_fpsloss.losses.diagnostics`), over a training."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class LossDiagnostics:
    """Running means of the figures of a loss over the batches that were looked at.

    - ``alpha_at_bound``: share of these batches after which α stood at ``max_scale``.
    - ``without_positives``, ``without_negatives``: share of these batches that had no row with r > 0, or such rows but
      no negative for any of them. The loss then is constant. Not with SigmoidLoss, which learns from each by itself.
    - ``masked_share``: share of a row's document columns, its positive's aside, that are false negatives of it.
    - ``masked_q``: share of all draws that the other positives of a row's query have. With ``log_q="corrected"`` alone.
    - ``repeated_rows``: share of the rows of all columns that repeat another one, and so were not encoded.
    - ``distinct_negatives``: different negatives of a row; ``effective_negatives``: how many equal ones would have the
      entropy of the weights that the softmax gives them. FPSLoss alone.
    - ``norm_popularity``: Spearman's correlation over a batch's distinct documents between the norm of the embedding
      and log Q. With a dot product and log Q alone.
    """

    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, figures: dict[str, float]) -> None:
        """Enter the figures of one more batch."""
        for name, value in figures.items():
            self._sums[name] += value
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """The mean of each figure over the batches that had it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
