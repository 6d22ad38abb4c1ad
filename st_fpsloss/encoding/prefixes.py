"""Every prefix of a history as a query of its own, although the histories are encoded whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st_fpsloss.encoding.rows import Features, TokenizedRows

PREFIXES = "prefixes"
"""Key of a column's features whose rows are histories to be read at every item: the tensors that a prefix cuts.

These are matrices with one entry an item; the first of them holds ids, with 0 behind them.
"""


@dataclass(frozen=True)
class PrefixRows(TokenizedRows):
    """M rows, the prefixes of N histories by history and length, which are what they would be if given one by one.

    A causal encoder gives the embeddings of all prefixes of a history in one pass. So the engine encodes ``histories``
    instead, and takes from them the embeddings of these rows; for all else (identity, masks, log Q) they are rows.

    Args:
        histories: the N rows that are encoded.
        history: (M,) number of the history that each row is a prefix of.
        place: (M,) length of each row's prefix, less 1.
    """

    histories: TokenizedRows
    history: Tensor
    place: Tensor

    @classmethod
    def of(cls, histories: TokenizedRows, cut: tuple[str, ...]) -> PrefixRows:
        """The prefixes of histories, of which the tensors ``cut`` are cut and all others repeated."""
        history, place = (histories.tensors[cut[0]] != 0).nonzero().unbind(1)
        tensors = {name: tensor[history] for name, tensor in histories.tensors.items()}
        for name in cut:
            width = tensors[name].shape[1]
            tensors[name] = tensors[name] * (torch.arange(width, device=place.device) <= place[:, None])
        lengths = place + 1 if "attention_mask" in cut else histories.lengths[history]
        metadata = {name: value for name, value in histories.metadata.items() if name != PREFIXES}
        return cls(
            tensors, lengths, metadata, histories.layout, histories, history, place, documents=histories.documents
        )


def rows_of_column(features: Features) -> TokenizedRows:
    """Rows of one column, as an input module preprocessed it; those of a column of whole histories are its prefixes.

    Raises:
        ValueError: See :meth:`st_fpsloss.encoding.rows.TokenizedRows.from_features`.
    """
    rows = TokenizedRows.from_features(features)
    cut = rows.metadata.get(PREFIXES)
    return PrefixRows.of(rows, cut) if isinstance(cut, tuple) else rows
