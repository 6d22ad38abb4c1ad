"""How often each row is drawn: a streaming estimate of Q for the ``log_q`` correction of in-batch negatives.

In-batch negatives are drawn by popularity, so plain training learns p(d|q)/p(d). Subtracting ``log Q(d)`` from the
logits of the negatives restores p(d|q) (Yi et al. 2019, *Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
Recommendations*). Rows are known by the fingerprints of what is encoded: no id columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_fpsloss.encoding.fingerprints import input_fingerprints
from st_fpsloss.frequencies.counts import FingerprintCounts

FORGOTTEN = 1 / 16
"""With a half-life, a count below this is as good as none."""

_CHUNK = 65_536  # inputs preprocessed at a time

AnyFrequencies = TypeVar("AnyFrequencies", bound="Frequencies")


class Frequencies(ABC):
    """Base of the tables that know how often rows are drawn. ``Q = (count + prior) / (draws + prior * distinct rows)``.

    With a half-life a draw counts half after that many further draws. Nothing is aged one by one: newer draws are
    entered with a weight that grows, and the weight is taken out when a count is read.

    Args:
        prior: added to every count, so that a row that was never seen is not impossible.
        frozen: do not count during training; for counts taken from the whole log beforehand.
        half_life: number of draws (entries of the counted columns, on all ranks together) after which a draw counts
            half; None never forgets.

    Raises:
        ValueError: If ``prior`` is negative or ``half_life`` is not above 0.
    """

    def __init__(self, prior: float = 1.0, frozen: bool = False, half_life: float | None = None) -> None:
        if not 0 <= prior < math.inf:
            raise ValueError(f"`prior` must not be negative, got {prior!r}. 0 takes the counts as they are.")
        if half_life is not None and not 0 < half_life < math.inf:
            raise ValueError(f"`half_life` must be a number of draws above 0, got {half_life!r}. None never forgets.")
        self.prior = prior
        self.frozen = frozen
        self.half_life = half_life
        self.prompt: str | None = None  # what the rows counted by from_inputs begin with; None where none were
        self._total = 0.0
        self._log2_weight = 0.0

    @classmethod
    def from_inputs(
        cls: type[AnyFrequencies],
        model: SentenceTransformer,
        inputs: Iterable[Any],
        task: Literal["query", "document"],
        counts: Iterable[float] | None = None,
        prompt: str | None = None,
        **settings: Any,
    ) -> AnyFrequencies:
        """Counts of a whole log, or counts that are known from elsewhere: right from the first step of training on.

        For negative columns that are sampled, see :func:`st_fpsloss.negatives.sampled.mixture_frequencies`.

        Args:
            model: the model, whose tower says when two inputs are the same.
            inputs: queries or documents, strings or dicts, as often as the log has them.
            task: the tower that they go through.
            counts: how often the log has each of the inputs, where they stand there once.
            prompt: what the training arguments' ``prompts`` put before them.
            settings: the arguments of the class.

        Returns:
            The table, frozen unless the settings say ``frozen=False`` (training then counts on).

        Raises:
            ValueError: If there are no inputs, or ``counts`` are not one finite number of at least 0 an input.

        Example::

            documents = FrequencyTable.from_inputs(model, clicks["document"], "document")
            loss = FPSLoss(model, log_q="corrected", frequencies={"document": documents})
        """
        if task not in ("query", "document"):
            raise ValueError(f'`task` must be "query" or "document", got {task!r}.')
        table = cls(**{"frozen": True, **settings})
        table.prompt = prompt or ""
        for some_inputs, some_counts in _chunks(inputs, counts):
            fingerprints, inverse = np.unique(input_fingerprints(model, some_inputs, task, prompt), return_inverse=True)
            table.update(torch.from_numpy(fingerprints), torch.from_numpy(np.bincount(inverse, some_counts)))
        return table

    @property
    def total(self) -> float:
        """Number of draws counted; with a half-life, what is left of them."""
        return self._total * 2.0**-self._log2_weight

    def update(self, fingerprints: Tensor, counts: Tensor) -> None:
        """Count draws.

        Args:
            fingerprints: (N,) int64, of distinct rows.
            counts: (N,) how often each was drawn.
        """
        drawn = counts.cpu().numpy().astype(np.float64)
        if self.half_life is not None:
            self._age(drawn.sum() / self.half_life)
        weight = 2.0**self._log2_weight
        self._total += float(drawn.sum()) * weight  # whole numbers first: the same in whatever order rows come
        self._add(fingerprints.cpu().numpy(), drawn * weight)

    def _age(self, half_lives: float) -> None:
        self._log2_weight += half_lives
        if self._log2_weight < 1:
            return
        factor = 2.0**-self._log2_weight
        self._log2_weight = 0.0
        self._total *= factor
        self._scale(factor)

    def log_q(
        self, fingerprints: Tensor, further: FrequencyTable | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Log probability (N,) that one draw is each of the ``fingerprints`` (N,) int64.

        Before anything is counted, these are all that is known, and one is as probable as the other. A row that was
        never drawn counts like the rarest that was, where the prior is 0.

        Args:
            fingerprints: the rows.
            further: draws that are counted beside those of this table.
            dtype: of the result.
        """
        wanted = fingerprints.cpu().numpy()
        drawn, total, num_distinct = self._drawn(wanted), self.total, self._num_distinct()
        if further is not None and len(further):
            drawn, total = drawn + further._drawn(wanted), total + further.total
            num_distinct += int((self._drawn(further.counts()[0]) == 0).sum())
        if not total:
            return torch.full((len(wanted),), -math.log(max(1, len(wanted))), dtype=dtype, device=fingerprints.device)
        counts = drawn + self.prior
        if not counts.all():
            counts[counts == 0] = self._rarest() if self._total else 1.0
        q = counts / (total + self.prior * max(1.0, num_distinct))
        return torch.as_tensor(np.log(q), dtype=dtype, device=fingerprints.device)

    def _drawn(self, fingerprints: np.ndarray) -> np.ndarray:
        """How often (N,) each row was drawn, with a half-life what is left of it."""
        return self._counts_of(fingerprints) * 2.0**-self._log2_weight

    def _rarest(self) -> float:
        """How often the rarest row was drawn that was drawn at all."""
        counts = self._known_counts()
        return float(counts[counts > 0].min()) * 2.0**-self._log2_weight

    def export_state(self) -> dict[str, Any]:
        """What was counted, as values that JSON keeps exact to the bit; the settings are not part of it."""
        return {
            "class": type(self).__name__,
            "total": self._total,
            "log2_weight": self._log2_weight,
            **self._export_counts(),
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`export_state` gave.

        Raises:
            ValueError: If another kind of table gave it.
        """
        if state["class"] != type(self).__name__:
            raise ValueError(
                f"The checkpoint holds the counts of a {state['class']}, but `frequencies` has a "
                f"{type(self).__name__}. Resume with the `frequencies` that the run was started with."
            )
        self._import_counts(state)
        self._total = state["total"]
        self._log2_weight = state["log2_weight"]

    @abstractmethod
    def _add(self, fingerprints: np.ndarray, weighted: np.ndarray) -> None:
        """Add (N,) weighted draws of (N,) distinct rows."""

    @abstractmethod
    def _scale(self, factor: float) -> None:
        """Multiply all counts, and forget rows with less than ``FORGOTTEN``."""

    @abstractmethod
    def _counts_of(self, fingerprints: np.ndarray) -> np.ndarray:
        """Weighted counts (N,) of (N,) rows."""

    @abstractmethod
    def _known_counts(self) -> np.ndarray:
        """Weighted counts of rows, all of them or a sample."""

    @abstractmethod
    def _num_distinct(self) -> float:
        """Number of different rows that are not forgotten."""

    @abstractmethod
    def _export_counts(self) -> dict[str, Any]:
        """The counts for :meth:`export_state`."""

    @abstractmethod
    def _import_counts(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`_export_counts` gave."""


class FrequencyTable(Frequencies):
    """Exact counts of the rows seen so far, one entry a distinct row.

    A million rows take 150 MB in memory and 12 MB in a checkpoint's ``trainer_state.json``. Beyond some millions take
    :class:`st_fpsloss.frequencies.sketch.FrequencySketch`. With a half-life, rows that do not come any more make room.

    Args:
        prior: added to every count, so that a row that was never seen is not impossible.
        frozen: do not count during training; for counts taken from the whole log beforehand.
        half_life: number of draws after which a draw counts half, for a log that drifts; None never forgets.

    Example:
        >>> import torch
        >>> table = FrequencyTable(prior=0.0)
        >>> table.update(torch.tensor([7, 9]), torch.tensor([3, 1]))
        >>> table.log_q(torch.tensor([9, 7])).exp()
        tensor([0.2500, 0.7500])
    """

    def __init__(self, prior: float = 1.0, frozen: bool = False, half_life: float | None = None) -> None:
        super().__init__(prior, frozen, half_life)
        self._counts = FingerprintCounts()

    def __len__(self) -> int:
        return len(self._counts)

    def _add(self, fingerprints: np.ndarray, weighted: np.ndarray) -> None:
        self._counts.add(fingerprints, weighted)

    def _scale(self, factor: float) -> None:
        self._counts.scale(factor)
        self._counts.keep(self._counts.values >= FORGOTTEN)

    def _counts_of(self, fingerprints: np.ndarray) -> np.ndarray:
        return self._counts.of(fingerprints)

    def _known_counts(self) -> np.ndarray:
        return self._counts.values

    def _num_distinct(self) -> float:
        return len(self)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Fingerprints (N,) int64 of all rows that were drawn, and how often each was."""
        return self._counts.fingerprints, self._counts.values * 2.0**-self._log2_weight

    def _export_counts(self) -> dict[str, Any]:
        return self._counts.export_state()

    def _import_counts(self, state: Mapping[str, Any]) -> None:
        self._counts.import_state(state)


def _parts(inputs: Iterable[Any]) -> Iterator[list[Any]]:
    if isinstance(inputs, Sequence):  # a column of a data set is slow to iterate over and fast to slice
        for start in range(0, len(inputs), _CHUNK):
            yield list(inputs[start : start + _CHUNK])
        return
    remaining = iter(inputs)
    while some := list(islice(remaining, _CHUNK)):
        yield some


def _chunks(inputs: Iterable[Any], counts: Iterable[float] | None) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Inputs and their counts, some at a time, checked."""
    if isinstance(inputs, (str, Mapping)):
        raise ValueError(f"`inputs` must be many strings or dicts, got a {type(inputs).__name__}: pass a list.")
    remaining_counts = None if counts is None else iter(counts)
    empty = True
    for some in _parts(inputs):
        empty = False
        if remaining_counts is None:
            yield some, np.ones(len(some))
            continue
        numbers = np.fromiter(islice(remaining_counts, len(some)), dtype=np.float64)
        if len(numbers) < len(some):
            raise ValueError("`counts` must have one number for each of the `inputs`, but there are fewer counts.")
        wrong = ~((numbers >= 0) & np.isfinite(numbers))
        if wrong.any():
            raise ValueError(f"`counts` must be finite and not negative, got {numbers[wrong][0]}.")
        yield some, numbers
    if remaining_counts is not None and next(remaining_counts, None) is not None:
        raise ValueError("`counts` must have one number for each of the `inputs`, but there are more counts.")
    if empty:
        raise ValueError("`inputs` is empty. Pass the queries or documents of the log.")
