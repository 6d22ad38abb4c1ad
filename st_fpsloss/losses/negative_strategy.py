"""Which negatives a loss takes: the columns named for each row, or the columns of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from st_fpsloss.batch.clicks import ClickBatch, Duplicates, Relevance
from st_fpsloss.batch.negatives import NegativePairs, Positives, explicit_negatives, explicit_tiles
from st_fpsloss.batch.statistics import has_in_batch_negatives
from st_fpsloss.encoding.rows import TokenizedRows
from st_fpsloss.losses.checks import check_choice
from st_fpsloss.objectives.pairwise import InBatchPairs, hardest_negatives
from st_fpsloss.utils.checks import positive_int

Negatives = Literal["explicit", "in_batch"]


@dataclass(frozen=True)
class NegativeStrategy:
    """The choice that a user made.

    Args:
        negatives: explicit, in-batch, or None: explicit where the batch has negative columns, else in-batch.
        hardest: only this many in-batch negatives of a row, those most similar to its query; None for all.
        semi_hard: only in-batch negatives within the margin.

    Raises:
        ValueError: If an argument is none of its choices, or they do not go together.
    """

    negatives: Negatives | None
    hardest: int | None = None
    semi_hard: bool = False

    def __post_init__(self) -> None:
        check_choice("negatives", self.negatives, (None, *get_args(Negatives)))
        if self.hardest is not None:
            positive_int("hardest", self.hardest)
        if self.hardest is not None and self.semi_hard:
            raise ValueError(
                "`hardest` and `semi_hard` are two ways to choose in-batch negatives: pass one. The hardest are those "
                "that come before the positive, the semi-hard those that come right after it."
            )
        if self._chooses_in_batch and self.negatives == "explicit":
            raise ValueError("`hardest` and `semi_hard` choose among in-batch negatives: pass `negatives='in_batch'`.")

    @property
    def _chooses_in_batch(self) -> bool:
        return self.hardest is not None or self.semi_hard

    def is_explicit(self, num_documents: int) -> bool:
        """Whether a batch with this many document columns is to be learned from its explicit negatives."""
        if self.negatives is None:
            return num_documents > 1 and not self._chooses_in_batch
        return self.negatives == "explicit"

    def check(self, num_columns: int, labels: Tensor | None) -> None:
        """Raise a ValueError if there can be no negatives in batches of this form."""
        if self.is_explicit(num_columns - 1) and num_columns < 3 and labels is None:
            raise ValueError(
                "`negatives='explicit'` needs columns of negative documents after query and document, or a `label` of "
                "0 on rows that were shown and not clicked, but the data set has neither. Add them, or pass "
                "`negatives='in_batch'`."
            )

    def needed_rows(self, relevance: Tensor, columns: Sequence[TokenizedRows], gathers: bool) -> list[Tensor | None]:
        """For each column, the (M,) bool rows whose embeddings are used.

        A row with r ≤ 0 has no positive. In-batch, its document is a negative of all others; explicit, of the positives
        of the same query, wherever in the batch (or, if ``gathers``, on other ranks) these are.
        """
        positive = relevance > 0
        if not self.is_explicit(len(columns) - 1):
            return [positive, *[None] * (len(columns) - 1)]
        of_anchor: Tensor | None = None
        if not gathers:
            fingerprints = columns[0].fingerprints()
            of_anchor = torch.isin(fingerprints, fingerprints[positive])
        return [of_anchor, of_anchor, *[positive] * (len(columns) - 2)]

    def has_negatives(self, batch: ClickBatch, relevance: Relevance, duplicates: Duplicates) -> bool:
        """Whether any row with r > 0 has a negative."""
        if self.is_explicit(len(batch.document)):
            positives = Positives.of(batch, relevance)
            return any(
                len(explicit_negatives(batch, positives.select(rows), duplicates).positive) > 0
                for rows in explicit_tiles(batch, positives)
            )
        return has_in_batch_negatives(batch, "query_to_doc", duplicates)

    def hardest_of(self, pairs: InBatchPairs, queries: Tensor, documents: Tensor) -> NegativePairs:
        """The hardest in-batch negatives of the rows of ``pairs``.

        Args:
            pairs: the rows, and what is no negative of them.
            queries: (P, dim) embedding of each row's query.
            documents: (B, dim) embeddings of the unique documents.
        """
        assert self.hardest is not None
        return NegativePairs(*hardest_negatives(queries, documents, pairs, self.hardest))

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card; what is not in use is left out."""
        settings = {"negatives": self.negatives, "hardest": self.hardest, "semi_hard": self.semi_hard or None}
        return {name: value for name, value in settings.items() if value is not None or name == "negatives"}
