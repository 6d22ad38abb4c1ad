"""Negative columns for a data set of clicks, sampled or mined, resampled every epoch while the data set stays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from sentence_transformers import SentenceTransformer
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_fpsloss.data.inputs import (
    canonical_pairs,
    canonical_string,
    canonical_strings,
    check_columns,
    factorize,
    is_positive,
)
from st_fpsloss.encoding.rows import row_fingerprints
from st_fpsloss.frequencies.table import FrequencyTable
from st_fpsloss.negatives.hard import HARD_NEGATIVES, mine_hard_negatives
from st_fpsloss.negatives.sampler import NegativeSampler, Pools
from st_fpsloss.utils.checks import positive_int

__all__ = ["ResampleNegatives", "mine_hard_negatives", "mixture_frequencies", "resample", "with_negatives"]

logger = logging.getLogger(__name__)

Documents = Mapping[Any, Any] | Sequence[Any]


def with_negatives(
    clicks: Dataset,
    num_negatives: int = 10,
    documents: Documents | None = None,
    power: float = 0.75,
    num_hard: int = 0,
    known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None = None,
    seed: int = 0,
    query: str = "query",
    document: str = "document",
) -> Dataset:
    """Adds columns of negative documents, which are drawn when a row is read.

    A negative is never a known positive of the row's query. Draws depend on seed, epoch and row alone: batches,
    samplers, workers and processes change nothing, and a resumed run goes on with the negatives of the interrupted one.
    They are resampled at the start of each epoch by :class:`st_fpsloss.LossStateCallback` (or
    :class:`ResampleNegatives`, with other losses, or :func:`resample`, without the trainer).

    What is added to the data set is an array of row numbers. (After ``shuffle`` or ``select``, ``datasets`` writes the
    rows in their new order first.) Evaluate on another data set: negatives are resampled for all data sets
    that go back to one call.

    Args:
        clicks: the data set, with the columns ``query`` and ``document``, and ``label`` where it has one.
        num_negatives: columns to add; 5 to 20 are usual.
        documents: the documents to draw from, as a sequence of inputs or a dict of id to input; it has every document
            of the data set. None for the documents of the data set.
        power: a document is drawn in proportion to its clicks to this power: 0.75 as in word2vec, 1 as the clicks are,
            0 for all alike. With ``documents`` and a power above 0, those without a click are never drawn.
        num_hard: how many of the columns are chosen from the row's pool of mined negatives
            (:func:`mine_hard_negatives`), which needs ``documents`` by id. Where a pool is too
            small, sampled ones take their place.
        known_positives: further pairs, query -> documents or (query, document), that are positives: those of the whole
            log, where the data set is a part of it. The rows of the data set with r > 0 always are.
        seed: another seed gives other draws.
        query: name of the column of queries.
        document: name of the column of documents.

    Returns:
        The data set with the columns ``negative_1``, ``negative_2``, ... at its end, for explicit negatives.

    Raises:
        ValueError: If an argument is unfit, ``documents`` lacks a document of the data set, or a query has every
            document for a positive.

    Example:
        >>> from datasets import Dataset
        >>> clicks = Dataset.from_dict({"query": ["red", "red", "blue"], "document": ["rose", "fox", "sky"]})
        >>> with_negatives(clicks, num_negatives=2)[0]
        {'query': 'red', 'document': 'rose', 'negative_1': 'sky', 'negative_2': 'sky'}
    """
    _check_numbers(num_negatives, num_hard, power, seed)
    check_columns(clicks, [query, document, *([HARD_NEGATIVES] if num_hard else [])])
    corpus = _Corpus.of(clicks, documents, document)
    draws = SampledNegatives(clicks, corpus, num_negatives, num_hard, power, known_positives, seed, query, document)
    if num_hard:
        clicks = clicks.remove_columns(HARD_NEGATIVES)
    return _with_row_numbers(clicks, draws.columns).with_transform(draws)


class SampledNegatives:
    """The transform behind :func:`with_negatives`: row numbers in, documents out.

    Attributes:
        columns: names of the negative columns.
        epoch: number of the epoch whose negatives are given; :meth:`set_epoch` changes it.
    """

    def __init__(
        self,
        clicks: Dataset,
        corpus: _Corpus,
        num_negatives: int,
        num_hard: int,
        power: float,
        known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None,
        seed: int,
        query: str,
        document: str,
    ) -> None:
        first = 1
        while f"negative_{first}" in clicks.column_names:
            first += 1
        self.columns = [f"negative_{number}" for number in range(first, first + num_negatives)]
        self._num_hard = num_hard
        self._inputs = corpus.inputs
        self._document_of_row = corpus.of_row
        self._query_of_row, number_of = factorize(canonical_strings(clicks, query))
        self._num_queries = len(number_of)
        self._is_positive = positive = is_positive(clicks)
        queries, documents = _known_pairs(known_positives, number_of, corpus.number_of)
        queries = np.concatenate([self._query_of_row[positive], queries])
        documents = np.concatenate([corpus.of_row[positive], documents])
        counts = np.bincount(corpus.of_row[positive], minlength=len(self._inputs)).astype(np.float64)
        weights = counts**power  # 0 to the power 0 is 1
        self._sampler = _sampler(weights, queries, documents, number_of, seed)
        self._pools = self._allowed_pools(clicks, corpus) if num_hard else Pools.empty(len(clicks))
        # In shared memory, so that the workers of a data loader see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._was_resampled, self._num_served = False, 0

    @property
    def epoch(self) -> int:
        """Number of the epoch whose negatives are given."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Give the negatives of another epoch from now on."""
        self._epoch.fill_(epoch)
        self._was_resampled = True

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Numbers (N, columns) of the negatives of rows (N,): sampled ones, and from column 0 on the hard ones."""
        drawn = self._sampler.draw(rows, self._query_of_row[rows], self.epoch, len(self.columns))
        if self._num_hard:
            hard = self._sampler.choose(rows, self._pools, self.epoch, self._num_hard)
            drawn[:, : self._num_hard] = np.where(hard >= 0, hard, drawn[:, : self._num_hard])
        return drawn

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Replace row numbers by documents."""
        present = [name for name in self.columns if name in batch]
        if not present:
            return batch
        rows = np.array(batch[present[0]], dtype=np.int64)
        self._note(len(rows))
        chosen = {
            name: self._inputs[column].tolist()
            for name, column in zip(self.columns, np.ascontiguousarray(self.numbers(rows).T), strict=True)
        }
        return {name: chosen.get(name, values) for name, values in batch.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> SampledNegatives:
        """Data sets copy their transform with every change of format; this one is large and never changes."""
        return self

    def q(self, in_batch: bool) -> np.ndarray:
        """Probability (D,) that a document column has each document, over the rows and draws of an epoch.

        Args:
            in_batch: whether the column of the positives is one of the columns, as for in-batch negatives, or the
                columns are the negative ones of rows with r > 0 alone, as for explicit negatives.
        """
        num_documents = len(self._inputs)
        rows = np.arange(len(self._is_positive)) if in_batch else np.flatnonzero(self._is_positive)
        expected, missing = self._pools.marginal(rows, self._num_hard, num_documents)
        num_sampled = len(self.columns) - self._num_hard + missing
        per_query = np.bincount(self._query_of_row[rows], num_sampled, minlength=self._num_queries)
        expected = expected + self._sampler.marginal(per_query)
        if in_batch:
            expected = expected + np.bincount(self._document_of_row, minlength=num_documents)
        return expected / expected.sum()

    def frequencies(self, model: SentenceTransformer, in_batch: bool, prompt: str | None) -> dict[str, FrequencyTable]:
        """:meth:`q` as a table; see :func:`mixture_frequencies`."""
        table = FrequencyTable(prior=0.0, frozen=True)
        table.prompt = prompt or ""
        fingerprints = row_fingerprints(model, self._inputs.tolist(), "document", prompt)
        table.update(fingerprints, torch.from_numpy(self.q(in_batch)))
        return {"document": table}

    def _allowed_pools(self, clicks: Dataset, corpus: _Corpus) -> Pools:
        """The mined negatives of each row that are no known positives."""
        mined = clicks.with_format(None)[HARD_NEGATIVES][:]
        lengths = np.array([len(ids) for ids in mined], dtype=np.int64)
        try:
            numbers = [corpus.number_of_id[document_id] for ids in mined for document_id in ids]
        except KeyError as error:
            raise ValueError(
                f"`documents` lacks the id {error.args[0]!r} of a mined negative. Pass the dict of id to input that "
                "the index was built from."
            ) from None
        documents = np.array(numbers, dtype=np.int64)
        row = np.repeat(np.arange(len(mined)), lengths)
        allowed = ~self._sampler.is_positive(self._query_of_row[row], documents)
        return Pools(np.bincount(row[allowed], minlength=len(mined)), documents[allowed])

    def _note(self, num_rows: int) -> None:
        self._num_served += num_rows
        # The model card and some batch samplers read rows too.
        if not self._was_resampled and self._num_served > 3 * len(self._query_of_row) + 10_000:
            self._was_resampled = True  # warn once
            logger.warning(
                "Every epoch gets the same negatives: nothing tells the data set that an epoch begins. Add "
                "`callbacks=[LossStateCallback(loss)]` or `callbacks=[ResampleNegatives()]` to the trainer, or call "
                "`resample(dataset, epoch)`."
            )


def mixture_frequencies(
    dataset: Dataset, model: SentenceTransformer, in_batch: bool, prompt: str | None = None
) -> dict[str, FrequencyTable]:
    """The exact log Q of sampled, hard and in-batch negatives together, for a loss with ``log_q``.

    Q is the probability that a document column of a random row holds the document, over all draws: the mixture of what
    its columns are drawn from. The loss needs no counting and is right from the first step.

    Args:
        dataset: what :func:`with_negatives` gave.
        model: the model, whose document tower says when two inputs are the same.
        in_batch: True for a loss with in-batch negatives (:class:`st_fpsloss.FPSLoss`), whose columns hold the
            positives of other rows too; False for explicit ones.
        prompt: what the training arguments' ``prompts`` put before documents.

    Returns:
        The argument ``frequencies`` of the loss.

    Raises:
        ValueError: If the data set does not draw negatives.

    Example::

        train = with_negatives(clicks, num_negatives=5, power=0)
        loss = FPSLoss(model, log_q="corrected", frequencies=mixture_frequencies(train, model, in_batch=True))
    """
    for transform in _drawing(dataset):
        return transform.frequencies(model, in_batch, prompt)
    raise ValueError("`dataset` draws no negatives. Pass what `with_negatives` returned.")


def resample(dataset: Any, epoch: int) -> None:
    """Draw the negatives of an epoch, in a data set or a dictionary of them; others are left alone.

    Args:
        dataset: what :func:`with_negatives` gave, or what the trainer made of it.
        epoch: number of the epoch.
    """
    for transform in _drawing(dataset):
        transform.set_epoch(epoch)


def _drawing(dataset: Any) -> Iterator[SampledNegatives]:
    """The transforms of a data set, of a dictionary of them, or of what the trainer made of either."""
    if isinstance(dataset, DatasetDict):
        parts = list(dataset.values())
    else:
        parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    for part in parts:
        transform = part.format["format_kwargs"].get("transform") if isinstance(part, Dataset) else None
        while isinstance(transform, partial):  # the trainer wraps it where each of several data sets has a name
            transform = transform.keywords.get("transform")
        if isinstance(transform, SampledNegatives):
            yield transform


class ResampleNegatives(TrainerCallback):
    """Resamples the negatives of :func:`with_negatives` at the start of each epoch.

    :class:`st_fpsloss.LossStateCallback` does this too; this one is for losses that are not of this package.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the training data set which epoch begins, or goes on after a resume."""
        resample(kwargs["train_dataloader"].dataset, int(state.epoch or 0))


@dataclass(frozen=True)
class _Corpus:
    """The D documents to draw from, by number.

    Args:
        inputs: (D,) input of each document.
        number_of: canonical string -> number.
        of_row: (N,) number of the document of each row of the data set.
        number_of_id: id -> number; empty where documents have no ids.
    """

    inputs: np.ndarray
    number_of: dict[str, int]
    of_row: np.ndarray
    number_of_id: dict[Any, int]

    @classmethod
    def of(cls, clicks: Dataset, documents: Documents | None, column: str) -> _Corpus:
        """The given documents, or those of the data set."""
        of_rows = canonical_strings(clicks, column)
        if documents is None:
            of_row, number_of = factorize(of_rows)
            first = np.unique(of_row, return_index=True)[1]
            return cls(_objects(clicks.with_format(None).select(first)[column][:]), number_of, of_row, {})
        if isinstance(documents, str) or not len(documents):
            raise ValueError(f"`documents` must be a dict or a list of inputs, got {documents!r}.")
        by_id = documents if isinstance(documents, Mapping) else dict(enumerate(documents))
        numbers, number_of = factorize(map(canonical_string, by_id.values()))
        of_row, with_missing = factorize(of_rows, number_of)
        if len(with_missing) > len(number_of):
            row = int(np.argmax(of_row >= len(number_of)))
            raise ValueError(
                f"`documents` lacks the document of row {row}, {clicks.with_format(None)[row][column]!r}. Add it, with "
                "the same features, or pass None to draw from the documents of the data set."
            )
        first = np.unique(numbers, return_index=True)[1]
        number_of_id = dict(zip(by_id, numbers.tolist(), strict=True)) if isinstance(documents, Mapping) else {}
        return cls(_objects(list(by_id.values()))[first], number_of, of_row, number_of_id)


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _with_row_numbers(clicks: Dataset, columns: Sequence[str]) -> Dataset:
    """Columns with the names that rows will have, so that the trainer sees them; all share one array of numbers."""
    numbers = pa.array(np.arange(len(clicks)))
    added = Dataset(pa.table({name: numbers for name in columns}))
    return concatenate_datasets([clicks, added], axis=1)


def _known_pairs(
    known_positives: Mapping[Any, Iterable[Any]] | Iterable[tuple[Any, Any]] | None,
    query_number: Mapping[str, int],
    document_number: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the queries and of the documents of those pairs whose query and document there are."""
    pairs = [
        (query_number[query], document_number[document])
        for query, document in zip(*canonical_pairs(known_positives), strict=True)
        if query in query_number and document in document_number
    ]
    queries, documents = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return queries, documents


def _sampler(
    weights: np.ndarray, queries: np.ndarray, documents: np.ndarray, number_of: dict[str, int], seed: int
) -> NegativeSampler:
    try:
        return NegativeSampler(weights, queries, documents, len(number_of), seed)
    except ValueError as error:
        query = list(number_of)[error.args[1]]
        raise ValueError(
            f"The query {query.removeprefix(chr(0))!r} has every document that can be drawn for a positive: no "
            "negative is left. Pass more `documents` (with `power=0` to draw those without clicks too), or leave the "
            "query out."
        ) from None


def _check_numbers(num_negatives: int, num_hard: int, power: float, seed: int) -> None:
    positive_int("num_negatives", num_negatives)
    if not isinstance(num_hard, int) or not 0 <= num_hard <= num_negatives:
        raise ValueError(f"`num_hard` must be a whole number from 0 to `num_negatives`, got {num_hard!r}.")
    if not 0 <= power < float("inf"):
        raise ValueError(f"`power` must not be negative, got {power!r}; 0 draws all documents alike.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number that is not negative, got {seed!r}.")
