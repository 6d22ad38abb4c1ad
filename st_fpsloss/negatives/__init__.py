"""Negative documents for fine-tuning: sampled, mined with an index, or taken from graded judgements."""

from st_fpsloss.negatives.graded import graded_pairs
from st_fpsloss.negatives.hard import mine_hard_negatives
from st_fpsloss.negatives.sampled import mixture_frequencies, with_negatives

__all__ = [
    "graded_pairs",
    "mine_hard_negatives",
    "mixture_frequencies",
    "with_negatives",
]
