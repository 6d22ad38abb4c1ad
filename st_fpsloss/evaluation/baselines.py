"""What a model has to beat: popularity, item neighbours, EASE and BM25, as score functions of RetrievalEvaluator.

Each is fitted, and then gives the scores of queries for the documents of a corpus, to be judged under the very
protocol of a model::

    knn = ItemKNN(decay=0.8).fit(histories)
    evaluator.per_query(knn.score_function(histories, evaluator.corpus_ids))

A history is what one user (or query) clicked, oldest first; :func:`item_histories` reads them from a log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from scipy import sparse

from st_fpsloss.data.group_by_user import group_by_user, id_column
from st_fpsloss.evaluation.evaluator import ScoreFunction

Histories = Mapping[Any, Sequence[Any]]
"""User -> ids of the items clicked, oldest first."""

Fitted = TypeVar("Fitted", bound="IdBaseline")


def item_histories(log: Dataset, user: str, item: str, time: str) -> dict[Any, list[Any]]:
    """Gives the items of each user, oldest first; rows of one time keep the order of the log.

    Args:
        log: The log, one row for each click.
        user: The column of user ids (integers or strings).
        item: The column of item ids (integers or strings).
        time: The column of times (numbers, timestamps or dates).

    Returns:
        User id -> item ids.

    Raises:
        ValueError: If a column is missing or unfit, or the log is empty.

    Example:
        >>> log = Dataset.from_dict({"user": [1, 1, 2], "item": [5, 6, 7], "time": [20, 10, 30]})
        >>> item_histories(log, "user", "item", "time")
        {1: [6, 5], 2: [7]}
    """
    rows = group_by_user(log, user, time)
    items = id_column(log, item, "item").take(rows.order).to_pylist()
    return {one: items[start:stop] for one, start, stop in zip(rows.users, rows.starts, rows.stops, strict=True)}


class IdBaseline(ABC):
    """A recommender that knows items by their ids alone.

    Args:
        decay: Weight of an item of the history for each item that came after it: 1 takes all alike, 0.8 mostly the
            last ten.

    Raises:
        ValueError: If ``decay`` is not above 0 and at most 1.
    """

    def __init__(self, decay: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay!r} has to lie above 0 and be at most 1.")
        self.decay = decay
        self._column: dict[Any, int] = {}

    def fit(self: Fitted, histories: Histories) -> Fitted:
        """Learns from the clicks of the training data.

        Args:
            histories: User -> items.

        Returns:
            The baseline itself.

        Raises:
            ValueError: If there are no clicks.
        """
        self._column = {}
        for items in histories.values():
            for item in items:
                self._column.setdefault(item, len(self._column))
        if not self._column:
            raise ValueError("histories has no item. Pass the clicks of the training data.")
        clicks = self._matrix(list(histories.values()), decay=1.0)
        clicks.data[:] = 1.0  # a repeated click counts once
        self._fit(clicks)
        return self

    def score_function(self, histories: Histories, corpus_ids: Sequence[Any]) -> ScoreFunction:
        """Scores the documents of a corpus for users whose histories are known.

        Args:
            histories: User (query id) -> items known at evaluation; a user without an entry has none.
            corpus_ids: The documents, in the order of the scores' columns. What was never clicked stands last.

        Returns:
            What :meth:`st_fpsloss.RetrievalEvaluator.evaluate_scores` and ``per_query`` take.
        """
        columns = np.array([self._column.get(document_id, len(self._column)) for document_id in corpus_ids])

        def score(query_ids: Sequence[Any]) -> np.ndarray:
            matrix = self._matrix([histories.get(query_id, ()) for query_id in query_ids], self.decay)
            scores = np.asarray(self._scores(matrix), dtype=np.float64)
            last = np.full((len(scores), 1), min(scores.min(), 0.0) - 1.0)
            return np.concatenate([scores, last], axis=1)[:, columns]

        return score

    def _matrix(self, histories: Sequence[Sequence[Any]], decay: float) -> sparse.csr_matrix:
        """(users, items) weights of the items in the histories; unknown items are left out."""
        rows, columns, weights = [], [], []
        for row, items in enumerate(histories):
            for age, item in enumerate(reversed(items)):
                if item in self._column:
                    rows.append(row)
                    columns.append(self._column[item])
                    weights.append(decay**age)
        return sparse.csr_matrix((weights, (rows, columns)), shape=(len(histories), len(self._column)))

    @abstractmethod
    def _fit(self, clicks: sparse.csr_matrix) -> None:
        """Learn from (users, items), 1 where a user clicked an item."""

    @abstractmethod
    def _scores(self, histories: sparse.csr_matrix) -> Any:
        """Scores (users, items) for weighted histories (users, items)."""


class Popularity(IdBaseline):
    """Ranks by the number of users who clicked an item, for everybody alike.

    Example:
        >>> popularity = Popularity().fit({"ann": ["a", "b"], "bob": ["b"]})
        >>> popularity.score_function({}, ["a", "b", "new"])(["carl"])
        array([[ 1.,  2., -1.]])
    """

    def _fit(self, clicks: sparse.csr_matrix) -> None:
        self._counts = np.asarray(clicks.sum(axis=0)).ravel()

    def _scores(self, histories: sparse.csr_matrix) -> np.ndarray:
        return np.tile(self._counts, (histories.shape[0], 1))


class ItemKNN(IdBaseline):
    """Sums the cosines between an item and those of the history (Sarwar et al. 2001).

    Args:
        num_neighbours: The most similar items alone count for an item; None for all.
        shrink: Added to the denominator of the cosine, against items with few clicks.
        decay: As in :class:`IdBaseline`.

    Example:
        >>> knn = ItemKNN().fit({"ann": ["a", "b"], "bob": ["a", "b"], "carl": ["c", "b"]})
        >>> knn.score_function({"dan": ["a"]}, ["b", "c"])(["dan"]).round(2)
        array([[0.82, 0.  ]])
    """

    def __init__(self, num_neighbours: int | None = 10, shrink: float = 0.0, decay: float = 1.0) -> None:
        super().__init__(decay)
        self.num_neighbours = num_neighbours
        self.shrink = shrink

    def _fit(self, clicks: sparse.csr_matrix) -> None:
        together = (clicks.T @ clicks).tocsr()
        norms = np.sqrt(together.diagonal())
        together.setdiag(0)
        together.eliminate_zeros()
        rows = np.repeat(np.arange(together.shape[0]), np.diff(together.indptr))
        together.data /= norms[rows] * norms[together.indices] + self.shrink
        # Rows are candidates, columns the items of a history.
        self._similarity = together if self.num_neighbours is None else _largest(together, self.num_neighbours)

    def _scores(self, histories: sparse.csr_matrix) -> np.ndarray:
        return (histories @ self._similarity.T).toarray()


def _largest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """The largest values of each row; equal ones to the last of them stay together."""
    for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        values = matrix.data[start:stop]
        if len(values) > count:
            values[values < np.partition(values, -count)[-count]] = 0.0
    matrix.eliminate_zeros()
    return matrix


class EASE(IdBaseline):
    """The linear autoencoder without self-similarity, in closed form (Steck 2019).

    Memory and time go by the square and the cube of the number of items: for up to some 20,000.

    Args:
        l2: Weight of the L2 penalty.
        decay: As in :class:`IdBaseline`.

    Example:
        >>> ease = EASE(l2=1.0).fit({"ann": ["a", "b"], "bob": ["a", "b"], "carl": ["c", "b"]})
        >>> ease.score_function({"dan": ["a"]}, ["b", "c"])(["dan"]).round(2)
        array([[ 0.67, -0.25]])
    """

    def __init__(self, l2: float = 100.0, decay: float = 1.0) -> None:
        super().__init__(decay)
        self.l2 = l2

    def _fit(self, clicks: sparse.csr_matrix) -> None:
        gram = (clicks.T @ clicks).toarray()
        inverse = np.linalg.inv(gram + self.l2 * np.eye(len(gram)))
        self._weights = -inverse / np.diag(inverse)
        np.fill_diagonal(self._weights, 0.0)

    def _scores(self, histories: sparse.csr_matrix) -> np.ndarray:
        return histories @ self._weights


class BM25:
    """Ranks texts by the words that they share with the query, with the package ``bm25s`` (extra ``benchmark``).

    Args:
        k1: Saturation of a word's frequency.
        b: How much the length of a text counts.

    Example:
        >>> bm25 = BM25().fit({"d1": "red running shoes", "d2": "blue tent"})
        >>> bm25.score_function({"q": "a tent"}, ["d1", "d2"])(["q"]).argmax()
        np.int64(1)
    """

    def __init__(self, k1: float = 1.5, b: float = 0.75) -> None:
        self.k1 = k1
        self.b = b

    def fit(self, corpus: Mapping[Any, str]) -> BM25:
        """Counts the words of the documents.

        Args:
            corpus: Document id -> text.

        Returns:
            The baseline itself.

        Raises:
            ImportError: If ``bm25s`` is not installed.
        """
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("BM25 needs bm25s: pip install st-fpsloss[benchmark].") from error
        self._position = {document_id: position for position, document_id in enumerate(corpus)}
        self._index = bm25s.BM25(k1=self.k1, b=self.b)
        self._index.index(_words(list(corpus.values())), show_progress=False)
        return self

    def score_function(self, queries: Mapping[Any, str], corpus_ids: Sequence[Any]) -> ScoreFunction:
        """Scores documents that :meth:`fit` was given for queries.

        Args:
            queries: Query id -> text.
            corpus_ids: The documents, in the order of the scores' columns.

        Returns:
            What :meth:`st_fpsloss.RetrievalEvaluator.evaluate_scores` and ``per_query`` take.

        Raises:
            ValueError: If a document was not there.
        """
        unknown = [document_id for document_id in corpus_ids if document_id not in self._position]
        if unknown:
            raise ValueError(f"corpus_ids has {unknown[0]!r}, which the corpus of fit lacks. Fit the whole corpus.")
        positions = np.array([self._position[document_id] for document_id in corpus_ids])

        def score(query_ids: Sequence[Any]) -> np.ndarray:
            words = _words([queries[query_id] for query_id in query_ids])
            none = np.zeros(len(self._position))
            return np.stack([(self._index.get_scores(one) if one else none)[positions] for one in words])

        return score


def _words(texts: list[str]) -> list[list[str]]:
    import bm25s

    return bm25s.tokenize(texts, return_ids=False, stopwords=None, show_progress=False)
