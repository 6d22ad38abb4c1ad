"""What a batch has to encode: distinct rows, in mini-batches sorted by length.

A click log repeats its queries and documents, and its texts differ in length. Encoding every row in the order it came,
padded to its neighbours, is mostly repeated work and padding. Here each distinct row of a tower is encoded once, in
mini-batches of rows of about one length; the loss is then computed on unique rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st_fpsloss.encoding.histories import documents_read, with_positions
from st_fpsloss.encoding.prefixes import PrefixRows
from st_fpsloss.encoding.rows import HISTORIES, TokenizedRows

# A mini-batch is closed early where more than this share would be padding...
_MAX_PADDING = 0.05
# ... unless it is so small, as a share of the token budget, that the call costs more than the padding.
_MIN_FILL = 1 / 8


@dataclass(frozen=True)
class BatchPlan:
    """What there is to encode, and where each row of the batch will find its embedding.

    Args:
        mini_batches: the distinct rows of the batch, all columns together, in mini-batches, which give N embeddings:
            one a row, or one an item of a whole history (:class:`st_fpsloss.encoding.prefixes.PrefixRows`). Those
            that read documents come last, with positions among the embeddings of the others, counted from 1.
        route_of: number of the tower of each mini-batch.
        index: (columns, M) position of each row's embedding among the N, M the number of rows of the longest column; -1
            where there is none.
        fingerprints: (N,) int64 identity of each embedding's row, the same in every batch and process.
    """

    mini_batches: list[TokenizedRows]
    route_of: list[int]
    index: Tensor
    fingerprints: Tensor

    @property
    def order(self) -> list[int]:
        """Numbers of the mini-batches in the order in which they are encoded: first the longest rows of each tower.

        Those that read documents come after all others.
        """
        firsts = [self.route_of.index(route) for route in dict.fromkeys(self.route_of)]
        order = firsts + [number for number in range(len(self.mini_batches)) if number not in firsts]
        return sorted(order, key=lambda number: number in self.readers)

    @property
    def readers(self) -> range:
        """Numbers of the mini-batches that read documents."""
        count = len(self.mini_batches)
        return range(sum(HISTORIES not in rows.metadata for rows in self.mini_batches), count)

    @classmethod
    def from_columns(
        cls, parts: Sequence[TokenizedRows], needed: Sequence[Tensor | None], mini_batch_num_tokens: int
    ) -> BatchPlan:
        """Plan the encoding of a batch.

        Args:
            parts: the rows of each column.
            needed: (M,) bool for each column, the rows that the loss will use; None for all.
            mini_batch_num_tokens: tokens, padding included, of one mini-batch.
        """
        num_columns, num_rows_of_column = len(parts), max(map(len, parts))
        histories = [documents_read(*column) for column in zip(parts, needed, strict=True)]
        documents = [rows for rows in histories if rows is not None]
        parts, needed = [*parts, *documents], [*needed, *[None] * len(documents)]
        sizes = [len(rows) for rows in parts]
        index = torch.full((len(parts), max(sizes)), -1, dtype=torch.int64, device=parts[0].lengths.device)
        mini_batches: list[TokenizedRows] = []
        route_of: list[int] = []
        fingerprints: list[Tensor] = []
        num_rows = 0
        for route, numbers in enumerate(_by_route(parts)):
            wanted = [_positions(needed[number], sizes[number], index.device) for number in numbers]
            chosen = [
                parts[number] if len(rows) == sizes[number] else parts[number].select(rows)
                for number, rows in zip(numbers, wanted, strict=True)
            ]
            batches, position, row_fingerprints = _plan_route(chosen, mini_batch_num_tokens)
            of_column = (position + num_rows).split([len(rows) for rows in wanted])
            for number, rows, found in zip(numbers, wanted, of_column, strict=True):
                index[number, rows] = found
            if HISTORIES in parts[numbers[0]].metadata:
                known = torch.cat(fingerprints)
                batches = [with_positions(rows, known) for rows in batches]
            mini_batches += batches
            route_of += [route] * len(batches)
            fingerprints.append(row_fingerprints)
            num_rows += len(row_fingerprints)
        return cls(mini_batches, route_of, index[:num_columns, :num_rows_of_column], torch.cat(fingerprints))


def _by_route(parts: Sequence[TokenizedRows]) -> Iterator[list[int]]:
    """Numbers of the columns that go through one tower, for each tower, those that read documents last.

    A column of prefixes is always on its own.
    """
    routes: dict[Hashable, list[int]] = {}
    for number, rows in enumerate(parts):
        routes.setdefault(number if isinstance(rows, PrefixRows) else rows.route, []).append(number)
    yield from sorted(routes.values(), key=lambda numbers: HISTORIES in parts[numbers[0]].metadata)


def _plan_route(columns: Sequence[TokenizedRows], num_tokens: int) -> tuple[list[TokenizedRows], Tensor, Tensor]:
    """Plan the encoding of columns that go through one tower.

    Returns:
        The mini-batches, the position of each row's embedding among all that they give, and their fingerprints (N,).
    """
    first, *others = columns
    if isinstance(first, PrefixRows) and not others:
        return _plan_prefixes(first, num_tokens)
    return _plan_rows(TokenizedRows.stack(columns), num_tokens)


def _plan_rows(rows: TokenizedRows, num_tokens: int) -> tuple[list[TokenizedRows], Tensor, Tensor]:
    first, inverse, fingerprints = rows.unique()
    batches = _mini_batches(rows, first, num_tokens)
    order = torch.cat(batches) if batches else first
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return [rows.select(first[batch]) for batch in batches], position[inverse], fingerprints[order]


def _plan_prefixes(rows: PrefixRows, num_tokens: int) -> tuple[list[TokenizedRows], Tensor, Tensor]:
    first, inverse, fingerprints = rows.unique()
    mini_batches, of_history, distinct = _plan_rows(rows.histories, num_tokens)
    # Each distinct history gives an embedding a prefix, one after the other.
    counts = torch.zeros_like(distinct)
    counts[of_history] = torch.bincount(rows.history, minlength=len(rows.histories))
    starts = counts.cumsum(0) - counts
    position = starts[of_history[rows.history]] + rows.place
    of_embedding = fingerprints.new_empty(int(counts.sum()))
    of_embedding[position] = fingerprints[inverse]
    # Prefixes that are equal, of different histories too, are one row with one embedding.
    return mini_batches, position[first[inverse]], of_embedding


def _positions(needed: Tensor | None, num_rows: int, device: torch.device) -> Tensor:
    return torch.arange(num_rows, device=device) if needed is None else needed.nonzero().flatten()


def _mini_batches(rows: TokenizedRows, distinct: Tensor, num_tokens: int) -> list[Tensor]:
    """Positions among the ``distinct`` rows of a tower, cut into mini-batches; none where there are no rows."""
    if rows.layout == "bag" and len(distinct):
        # A bag of tokens has neither padding nor activations, and the gradient of each call is a whole table.
        return [torch.arange(len(distinct), device=distinct.device)]
    return sorted_mini_batches(rows.lengths[distinct], num_tokens, padded=rows.layout == "padded")


def sorted_mini_batches(lengths: Tensor, num_tokens: int, padded: bool = True) -> list[Tensor]:
    """Cut rows, longest first (the most memory comes first), into mini-batches of at most ``num_tokens``."""
    order = torch.argsort(lengths, descending=True, stable=True)
    widths = lengths[order].clamp_min(1).tolist()
    cuts: list[int] = []
    begin, filled = 0, 0
    for end, length in enumerate(widths):
        size = widths[begin] * (end + 1 - begin) if padded else filled + length
        wasteful = size - filled - length > _MAX_PADDING * size
        worth_a_call = size - widths[begin] >= _MIN_FILL * num_tokens
        if end > begin and (size > num_tokens or (wasteful and worth_a_call)):
            cuts.append(end)
            begin, filled = end, 0
        filled += length
    return list(order.tensor_split(cuts)) if widths else []
