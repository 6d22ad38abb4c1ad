"""Graded data, such as ratings or hand-made judgements, as pairs of a better and a worse document of one query."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from datasets import Dataset

from st_fpsloss.data.inputs import canonical_strings, check_columns, factorize
from st_fpsloss.utils.checks import positive_int


def graded_pairs(
    judgements: Dataset,
    query: str = "query",
    document: str = "document",
    grade: str = "grade",
    min_difference: float = 0.0,
    max_pairs: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Turns (query, document, grade) into (query, better document, worse document), for PairCELoss and TripletLoss.

    Of each query, every document makes a pair with every document of a lower grade. Queries without two different
    grades have no pair. A grade may be an impression without a click (0) and one with a click (1), stars, or a judge's
    verdict; only the order within a query counts.

    With more than two grades a document may be the better in one row and the worse in another. Train with
    ``duplicates="keep"`` then: ``"mask"`` takes a document that is the better anywhere for no negative of its query.

    Args:
        judgements: the data set; queries and documents are strings or dicts.
        query: name of the column of queries.
        document: name of the column of documents.
        grade: name of the column of grades, numbers.
        min_difference: the better grade exceeds the worse one by more than this; 0 takes every difference.
        max_pairs: pairs a query at most, chosen at random; None for all. A query with n documents has up to
            n·(n-1)/2, and would outweigh the others.
        seed: of that choice.

    Returns:
        A data set with the columns ``query``, ``document`` (the better) and ``negative_1`` (the worse), in the order of
        the queries' first rows.

    Raises:
        ValueError: If an argument is unfit, a grade is missing or no finite number, or there is no pair.

    Example:
        >>> from datasets import Dataset
        >>> stars = Dataset.from_dict(
        ...     {"query": ["ann"] * 3 + ["bob"], "document": ["f1", "f2", "f3", "f1"], "grade": [3, 5, 3, 4]}
        ... )
        >>> graded_pairs(stars)[:]
        {'query': ['ann', 'ann'], 'document': ['f2', 'f2'], 'negative_1': ['f1', 'f3']}
    """
    check_columns(judgements, [query, document, grade], argument="judgements")
    if not min_difference >= 0:
        raise ValueError(f"`min_difference` must not be negative, got {min_difference!r}.")
    if max_pairs is not None:
        positive_int("max_pairs", max_pairs)
    grades = _grades(judgements, grade)
    of_row, _ = factorize(canonical_strings(judgements, query))
    better, worse = _pairs(of_row, grades, min_difference)
    document_of_row, _ = factorize(canonical_strings(judgements, document))
    different = document_of_row[better] != document_of_row[worse]  # one document may have been judged twice
    better, worse = better[different], worse[different]
    if max_pairs is not None:
        better, worse = _at_most(of_row, better, worse, max_pairs, seed)
    if not len(better):
        raise ValueError(
            f"`judgements` has no query with two grades that differ by more than `min_difference` = {min_difference}: "
            "there is nothing to compare."
        )
    table = judgements.with_format("arrow")[:]
    columns = {"query": (query, better), "document": (document, better), "negative_1": (document, worse)}
    return Dataset(pa.table({name: table[source].take(pa.array(rows)) for name, (source, rows) in columns.items()}))


def _grades(judgements: Dataset, column: str) -> np.ndarray:
    try:
        grades = np.array(judgements.with_format(None)[column][:], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`grade`: the column {column!r} must hold numbers: {error}") from error
    if not np.isfinite(grades).all():
        row = int(np.argmin(np.isfinite(grades)))
        raise ValueError(f"`grade`: row {row} of the column {column!r} holds no finite number. Leave such rows out.")
    return grades


def _pairs(of_row: np.ndarray, grades: np.ndarray, min_difference: float) -> tuple[np.ndarray, np.ndarray]:
    """All rows (better, worse) of one query, by query.

    Sorted by query and grade, the worse rows of each row are a run that begins where its query does.
    """
    order = np.lexsort((np.arange(len(grades)), grades, of_row))
    query, sorted_grades = of_row[order], grades[order]
    starts = np.searchsorted(query, query)  # where each row's query begins
    # Grades by their rank, so that (query, rank) is one number to search for.
    ranks = np.unique(grades)
    rank = np.searchsorted(ranks, sorted_grades)
    below = np.searchsorted(ranks, sorted_grades - min_difference, side="left")  # ranks less than this are worse
    stops = np.searchsorted(query * (len(ranks) + 1) + rank, query * (len(ranks) + 1) + below)
    lengths = np.maximum(stops - starts, 0)
    better = np.repeat(np.arange(len(order)), lengths)
    first = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
    return order[better], order[first + np.arange(len(better))]


def _at_most(
    of_row: np.ndarray, better: np.ndarray, worse: np.ndarray, max_pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """At most so many pairs of each query, at random, in the order they came."""
    query = of_row[better]
    order = np.lexsort((np.random.default_rng(seed).random(len(better)), query))
    position = np.arange(len(better)) - np.searchsorted(query[order], query[order])
    kept = np.sort(order[position < max_pairs])
    return better[kept], worse[kept]
