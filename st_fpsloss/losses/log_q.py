"""What the losses with a softmax share: the correction for negatives that are drawn by popularity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_fpsloss.batch.clicks import ClickBatch, LogQ
from st_fpsloss.batch.distributed import gather_rows, world_size
from st_fpsloss.encoding.rows import Features
from st_fpsloss.frequencies.table import Frequencies, FrequencyTable
from st_fpsloss.losses.arguments import ClickArguments
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.losses.checks import check_choice
from st_fpsloss.losses.diagnostics import flat_softmax_warnings


class LogQLoss(ClickLoss):
    """Base of the losses that take ``log_q``: frequency tables, their state, and looking up log Q."""

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        bias: float,
        learn_bias: bool,
        log_q: LogQ | None = None,
        frequencies: Mapping[str, Frequencies] | None = None,
        **shared: Unpack[ClickArguments],
    ) -> None:
        super().__init__(model, bias=bias, learn_bias=learn_bias, **shared)
        check_choice("log_q", log_q, (None, *get_args(LogQ)))
        if log_q == "corrected" and self.duplicates == "keep":
            raise ValueError("`log_q='corrected'` needs `duplicates='mask'`. With 'keep', use `log_q='standard'`.")
        self.log_q = log_q
        given = _checked_frequencies(frequencies, log_q)
        self.frequencies: dict[str, Frequencies] = {"query": FrequencyTable(), "document": FrequencyTable(), **given}
        # What this rank drew since ranks last told each other; the tables hold what all of them drew before.
        self._drawn_here = {side: FrequencyTable() for side in self.frequencies}
        self._last_features: Any = None
        self._counts = True

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, which is counted once, also where MatryoshkaLoss calls it for each of its dimensions.

        Arguments, result and errors are those of :meth:`ClickLoss.forward`.
        """
        self._counts = sentence_features is not self._last_features
        self._last_features = sentence_features
        return super().forward(sentence_features, labels)

    def count_and_look_up(
        self,
        side: str,
        index: Tensor,
        fingerprints: Tensor,
        drawn: slice = slice(None),
    ) -> Tensor:
        """Log Q of each entry of ``index``, after counting what the batch drew.

        Args:
            side: the table, ``"query"`` or ``"document"``.
            index: numbers of rows, of any shape; -1 where there is none.
            fingerprints: (N,) int64 identity of each numbered row.
            drawn: the part of ``index`` that was drawn by the distribution that Q is to be.

        Returns:
            log Q in the shape of ``index``; 0 where there is none.
        """
        table = self.frequencies[side]
        # The trainer evaluates without gradients, but leaves the loss in training mode.
        if self.training and torch.is_grad_enabled() and self._counts and not table.frozen:
            seen = index[drawn]
            counts = torch.bincount(seen[seen >= 0], minlength=len(fingerprints))
            # No collective here: at one step, ranks may draw from different data sets, each with its loss.
            counted_by = table if self._gathers or world_size() == 1 else self._drawn_here[side]
            counted_by.update(fingerprints[counts > 0], counts[counts > 0])
        log_q = table.log_q(fingerprints, self._drawn_here[side], self._dtype)
        return torch.cat([log_q, log_q.new_zeros(1)])[index]  # the entry after the last is found at -1

    def share_over_ranks(self) -> None:
        """Count what all ranks drew in this step, so that their tables agree."""
        if self.log_q is None or self._gathers or world_size() == 1:
            return
        parts = []
        for number, table in enumerate(self._drawn_here.values()):
            fingerprints, counts = table.counts()
            parts.append(np.stack([np.full(len(counts), number), fingerprints, counts.astype(np.int64)], axis=1))
        rows = gather_rows(torch.as_tensor(np.concatenate(parts), device=self.logit_scale.device))
        for number, side in enumerate(self._drawn_here):
            _, fingerprint, count = rows[rows[:, 0] == number].T
            distinct, inverse = torch.unique(fingerprint, return_inverse=True)
            if len(distinct):
                self.frequencies[side].update(distinct, torch.zeros_like(distinct).index_add_(0, inverse, count))
            self._drawn_here[side] = FrequencyTable()

    def check_log_q(self, name: str, batch: ClickBatch) -> None:
        """Raise a ValueError if the log Q that is to be corrected for is not there."""
        if self.log_q is not None and getattr(batch, name) is None:
            raise ValueError(f"`{name}` is needed for `log_q={self.log_q!r}`: pass the log probability of each column.")

    def setting_warnings(self, model: SentenceTransformer) -> list[str]:
        """What is wrong with the settings, known before training; a sentence each, with its cure."""
        return [*flat_softmax_warnings(self, self.similarity), *super().setting_warnings(model)]

    def export_state(self) -> dict[str, Any]:
        """α, β and the frequency tables."""
        if self.log_q is None:
            return super().export_state()
        return {
            **super().export_state(),
            "frequencies": {side: table.export_state() for side, table in self.frequencies.items()},
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave."""
        super().import_state(state)
        for side, stored in state.get("frequencies", {}).items():
            self.frequencies[side].import_state(stored)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), "log_q": self.log_q}

    @property
    def citation(self) -> str:
        """BibTeX of what the loss builds on."""
        return """
@inproceedings{yi2019sampling,
    title={Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations},
    author={Yi, Xinyang and Yang, Ji and Hong, Lichan and Cheng, Derek Zhiyuan and Heldt, Lukasz and Kumthekar, Aditee and Zhao, Zhe and Wei, Li and Chi, Ed},
    booktitle={Proceedings of the 13th ACM Conference on Recommender Systems},
    year={2019},
}
"""  # noqa: E501


def _checked_frequencies(frequencies: Any, log_q: LogQ | None) -> dict[str, Frequencies]:
    if frequencies is None:
        return {}
    if not isinstance(frequencies, Mapping):
        raise ValueError(
            f"`frequencies` goes by side, got a {type(frequencies).__name__}: pass frequencies={{'document': table}}, "
            "and 'query' for the direction 'doc_to_query'."
        )
    if unknown := set(frequencies) - {"query", "document"}:
        raise ValueError(f"`frequencies` goes by 'query' and 'document', got {sorted(unknown)}.")
    for side, table in frequencies.items():
        if not isinstance(table, Frequencies):
            raise ValueError(
                f"`frequencies[{side!r}]` must be a FrequencyTable or a FrequencySketch, got {type(table).__name__}."
            )
    if log_q is None:
        raise ValueError("`frequencies` has a use with `log_q` alone: pass log_q='corrected' or 'standard' too.")
    if len(frequencies) == 2 and frequencies["query"] is frequencies["document"]:
        raise ValueError("`frequencies` has one table for both sides, which would count both: pass one for each.")
    return dict(frequencies)
