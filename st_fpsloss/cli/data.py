"""Rows from files or from the Hub: the training data of a script, what is held out of it, and its evaluator."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from st_fpsloss.data import hold_out, load_clicks, load_inputs
from st_fpsloss.data.columns import check_column
from st_fpsloss.data.files import SUFFIXES, checked_paths, column_names, holds_numbers, number_columns
from st_fpsloss.data.inputs import LABEL_COLUMNS, distinct
from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.evaluation.from_clicks import clicks_evaluator

logger = logging.getLogger(__name__)

_FILES = "files, or a Hub id"


@dataclass
class DataArguments:
    """Which rows to read."""

    _argument_group_name = "data"

    dataset: list[str] = field(
        metadata={"help": f"rows of queries and documents: files ({', '.join(SUFFIXES)}), or a Hub id"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set on the Hub"})
    dataset_split: str = field(default="train", metadata={"help": "split of the data set on the Hub"})
    query_column: str = field(default="query", metadata={"help": "texts, or JSON objects (structs) with features"})
    document_column: str = field(default="document", metadata={"help": "documents of the queries, the same"})
    label_column: str | None = field(
        default=None, metadata={"help": "relevance or grade: above 0 a click, else shown and not clicked"}
    )
    encoding: str = field(default="utf-8", metadata={"help": "of text files"})
    time_format: str | None = field(
        default=None, metadata={"help": "of times that are neither numbers nor ISO dates, such as %%d.%%m.%%Y"}
    )
    on_bad_row: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "skip: leave out rows that cannot be used, and report how many"}
    )

    def read(self, dataset: Sequence[str] | None = None, split: str | None = None, **columns: Any) -> Dataset:
        """Reads the rows, or those of another data set with the same columns.

        Args:
            dataset: Files or the id of a data set; None for the script's own.
            split: Split on the Hub; None for the script's own.
            columns: Further columns, as :func:`st_fpsloss.data.load_clicks` names them.

        Returns:
            The columns of :func:`st_fpsloss.data.load_clicks`.
        """
        source = source_of(
            self.dataset if dataset is None else dataset, self.dataset_config, split or self.dataset_split
        )
        return self._load(source, **columns)

    def read_seen(self, dataset: Sequence[str]) -> Dataset:
        """Reads rows whose documents are left out of rankings; with their label, where they have that column."""
        source = source_of(dataset, self.dataset_config, self.dataset_split)
        has_label = self.label_column in source_names(source, encoding=self.encoding)
        return self._load(source, label=self.label_column if has_label else None)

    def _load(self, source: list[str] | Dataset, **columns: Any) -> Dataset:
        if columns.get("label") is None:
            used = {self.query_column, self.document_column, columns.get("time"), *columns.get("negatives", ())}
            _warn_of_a_label(source, used, self.encoding)
        return load_clicks(
            source,
            query=self.query_column,
            document=self.document_column,
            time_format=self.time_format,
            encoding=self.encoding,
            on_bad_row=self.on_bad_row,
            **columns,
        )

    def read_documents(self, documents: Sequence[str] | None) -> list[Any]:
        """Reads the column of documents alone; [] for None."""
        if documents is None:
            return []
        source = source_of(documents, None, self.dataset_split)
        return list(
            load_inputs(source, self.document_column, encoding=self.encoding, on_bad_row=self.on_bad_row).values()
        )


@dataclass
class EvaluationArguments:
    """What to evaluate on while and after training."""

    _argument_group_name = "evaluation"

    eval_dataset: list[str] | None = field(
        default=None, metadata={"help": f"rows to evaluate on, with the same columns: {_FILES}"}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "split on the Hub to evaluate on, of the data set or of the eval_dataset"}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "hold out this part of the training rows, such as 0.05"}
    )
    time_column: str | None = field(
        default=None, metadata={"help": "hold out the newest rows by this column, not random ones"}
    )
    documents: list[str] | None = field(
        default=None,
        metadata={"help": f"the whole corpus (default: the documents of the rows): {_FILES}"},
    )
    exclude_seen: bool = field(default=False, metadata={"help": "rank for a query what it does not have in training"})
    at: list[int] = field(default_factory=lambda: [1, 10, 20, 100], metadata={"help": "cutoffs of the metrics"})

    def read(
        self, data: DataArguments, label: str | None, negatives: Sequence[str] = ()
    ) -> tuple[Dataset, Dataset | None]:
        """Reads the rows to train on and those to evaluate on.

        Args:
            data: Where they come from.
            label: Column of the relevance or grade.
            negatives: Columns of negative documents, of the training rows alone.

        Returns:
            The two; None where nothing is to be evaluated.

        Raises:
            ValueError: If there is more than one way to hold rows out, and as :func:`st_fpsloss.data.load_clicks`.
        """
        elsewhere = self.eval_dataset is not None or self.eval_split is not None
        if elsewhere and self.eval_fraction is not None:
            raise ValueError(
                "--eval_fraction holds out training rows, --eval_dataset and --eval_split name other rows: pass one."
            )
        if self.time_column is not None and self.eval_fraction is None:
            raise ValueError("--time_column says which rows are held out: pass --eval_fraction too, such as 0.05.")
        if self.eval_fraction is None:
            held_out = data.read(self.eval_dataset, self.eval_split, label=label) if elsewhere else None
            return data.read(label=label, negatives=negatives), held_out
        rows = data.read(label=label, negatives=negatives, time=self.time_column)
        parts = hold_out(rows, self.eval_fraction, None if self.time_column is None else "time")
        if self.time_column is not None:
            parts = parts.remove_columns("time")
        return parts["train"], parts["test"]

    def evaluator(
        self, data: DataArguments, train: Dataset, held_out: Dataset | None, batch_size: int
    ) -> RetrievalEvaluator | None:
        """Returns the evaluator of the rows that are held out, over the corpus; None where there are none."""
        if held_out is None:
            return None
        documents = self.corpus(data, train)
        if self.documents is not None:
            warn_of_missing_documents(documents, held_out)
        seen = train if self.exclude_seen else None
        return clicks_evaluator(held_out, documents, seen, at=self.at, batch_size=batch_size)

    def corpus(self, data: DataArguments, train: Dataset) -> list[Any]:
        """Returns the documents of ``--documents``, or those of the training rows."""
        return data.read_documents(self.documents) or train.with_format(None)["document"][:]


def warn_of_missing_documents(documents: Sequence[Any], rows: Dataset) -> None:
    """Warns where ``--documents`` lacks documents of the rows: often they are written otherwise there."""
    corpus, of_rows = distinct(documents), distinct(rows.with_format(None)["document"])
    missing = [text for text in of_rows if text not in corpus]
    if missing:
        logger.warning(
            "--documents lacks %d of the %d distinct documents of the rows, such as %s; it holds, for one, %s. They "
            "are ranked too. If they are the same documents, write them alike in both.",
            *(len(missing), len(of_rows)),
            *(reprlib.repr(of_rows[missing[0]]), reprlib.repr(next(iter(corpus.values())))),
        )


def _warn_of_a_label(source: list[str] | Dataset, used: set[Any], encoding: str) -> None:
    """Warns of a column that looks like a label, where none is read: its rows with 0 would all be clicks."""
    names = [name for name in LABEL_COLUMNS if name in source_names(source, True, encoding) and name not in used]
    if names:
        logger.warning(
            "%s has the column %r, which is not read: every row is a click. If it says what was clicked, pass "
            "--label_column %s.",
            *("The data set" if isinstance(source, Dataset) else ", ".join(source), names[0], names[0]),
        )


def source_names(source: list[str] | Dataset, numbers: bool = False, encoding: str = "utf-8") -> set[str]:
    """The columns of a source, of files those of any; all, or those that hold numbers."""
    if isinstance(source, Dataset):
        return {one.name for one in source.features.arrow_schema if not numbers or holds_numbers(one.type)}
    names_of = number_columns if numbers else column_names
    return {name for path in checked_paths(source) for name in names_of(path, encoding)}


def check_source_column(source: list[str] | Dataset, column: str, flag: str, encoding: str = "utf-8") -> None:
    """Refuses a source without a column, in the words of the command line."""
    if isinstance(source, Dataset):
        check_column(source.column_names, column, flag, "the data set")
        return
    for path in checked_paths(source):
        check_column(column_names(path, encoding), column, flag, path.name)


def source_of(dataset: Sequence[str], config: str | None, split: str) -> list[str] | Dataset:
    """Returns the files, or the data set that is loaded from the Hub (or from a folder, as ``load_dataset`` does).

    Raises:
        ValueError: If there is no such data set, or a file is of no known kind.
    """
    unknown = [name for name in dataset if Path(name).is_file() and Path(name).suffix.lower() not in SUFFIXES]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is a file of a kind that is not read; those that are: {', '.join(SUFFIXES)}. Unpack it "
            "if it is compressed, or convert it: pandas.read_json(path).to_json(new, orient='records', lines=True)."
        )
    if any(Path(name).suffix.lower() in SUFFIXES for name in dataset):
        return list(dataset)
    if len(dataset) != 1:
        raise ValueError(f"{list(dataset)} are no files of a known kind ({', '.join(SUFFIXES)}), and not one Hub id.")
    try:
        return load_dataset(dataset[0], config, split=split)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{dataset[0]!r} is no file of a known kind ({', '.join(SUFFIXES)}), and loading it from the Hub failed: "
            f"{error}"
        ) from error
