"""MovieLens-100K as a retrieval task: users and their films as queries, films as documents, and two towers for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer

from st_fpsloss.data import histories
from st_fpsloss.data.movielens import MovieLens100K
from st_fpsloss.data.next_item import next_item_windows
from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.towers import Categorical, History, Numerical, Tags, Tower, two_tower
from st_fpsloss.towers.features.base import Feature
from st_fpsloss.training.prefix_collator import PrefixCollator

COLUMNS = {"user": "user_id", "item": "item_id", "time": "timestamp"}
CUTOFFS = (10, 20)


@dataclass(frozen=True)
class Task:
    """MovieLens under the protocol leave-last-one-out."""

    users: dict[int, dict[str, Any]]
    documents: dict[int, Any]
    trained: list[Any]  # documents that have a click in training
    catalogue: list[Any]  # documents of the softmax over all films: these, unless said otherwise
    rows: Dataset  # query: windows of histories, every prefix of which is a click, for PrefixCollator
    clicks: int  # how many clicks the rows hold
    queries: dict[int, Any]  # user -> query at test, that is with the validation film
    seen: dict[int, list[int]]  # user -> films in training and validation
    validation: RetrievalEvaluator
    test: RetrievalEvaluator
    popularity: np.ndarray  # clicks of each document in training, in the order of `documents`

    def collator(self, model: SentenceTransformer) -> PrefixCollator:
        """What makes batches of the rows."""
        return PrefixCollator(model, history="seen", documents=self.documents)


def user_query(films: Sequence[str], user: Mapping[str, Any]) -> dict[str, Any]:
    """A user as a query: the ids of the films seen, oldest first, with age, gender and occupation."""
    return {"seen": list(films), **user}


def film_document(film: Mapping[str, Any]) -> dict[str, Any]:
    """A film as a document: its id, the words of its title, genres and year."""
    words = film["title"].lower().split()
    return {"film": str(film["item_id"]), "title": words, "genres": film["genres"], "year": film["year"]}


def make_task(
    data: MovieLens100K,
    max_history: int,
    held_out: Collection[int] = (),
    query: Callable[[Sequence[str], Mapping[str, Any]], Any] = user_query,
    document: Callable[[Mapping[str, Any]], Any] = film_document,
) -> Task:
    """Queries, documents and judgments.

    Args:
        data: The data.
        max_history: At most this many films of a user are read, the latest ones.
        held_out: Films that are left out of training and of all histories; they stay documents.
        query: Makes a query of film ids and a user's features.
        document: Makes a document of a film.
    """
    splits = data.splits()
    train, known = splits["train"], concatenate_datasets([splits["train"], splits["validation"]])
    users = {row["user_id"]: {name: row[name] for name in ("age", "gender", "occupation")} for row in data.users}
    documents = {row["item_id"]: document(row) for row in data.items}

    def kept(ratings: Dataset) -> Dataset:
        if not held_out:
            return ratings
        return ratings.select(np.flatnonzero(~np.isin(ratings["item_id"][:], list(held_out))))

    def queries(ratings: Dataset) -> dict[int, Any]:
        films = histories(kept(ratings), **COLUMNS, max_history=max_history)
        return {user: query(films[user].split(), users[user]) for user in films}

    windows = next_item_windows(kept(train), **COLUMNS, max_history=max_history)
    counts = Counter(kept(train)["item_id"])
    trained = [document for item, document in documents.items() if counts[item]]
    asked, seen = queries(known), films_by_user(known)
    evaluator = partial(RetrievalEvaluator, corpus=documents, at=CUTOFFS, batch_size=256)
    return Task(
        users=users,
        documents=documents,
        trained=trained,
        catalogue=trained,
        rows=Dataset.from_dict(
            {
                "query": [
                    query(films, users[user]) for user, films in zip(windows["user"], windows["items"], strict=True)
                ]
            }
        ),
        clicks=sum(len(films) - 1 for films in windows["items"]),
        queries=asked,
        seen=seen,
        validation=evaluator(
            queries(train),
            relevant_docs=films_by_user(splits["validation"]),
            seen_docs=films_by_user(train),
            name="validation",
        ),
        test=evaluator(asked, relevant_docs=films_by_user(splits["test"]), seen_docs=seen, name="test"),
        popularity=np.array([counts[item] for item in documents], dtype=np.float64),
    )


def films_by_user(ratings: Dataset) -> dict[int, list[int]]:
    """User -> films, in the order of the rows."""
    films: dict[int, list[int]] = {}
    for user, item in zip(ratings["user_id"], ratings["item_id"], strict=True):
        films.setdefault(user, []).append(item)
    return films


@dataclass(frozen=True)
class Model:
    """Settings of the two towers, both linear: no search found hidden layers to help on this little data.

    Attributes:
        dim: Size of the embeddings, of features as of towers.
        max_history: Films of a user that are read.
        similarity: ``"cosine"`` or ``"dot"``.
        document_bias: A learned score of each film's own; needs ``"dot"``.
        film: Features of a film beside its id.
        user: Features of a user beside the history.
        title_films: Words of titles count that are in so many films: a rarer one only names its film once more.
        dropout: Of the history's embeddings.
        tower_dropout: Of both towers' features, side by side.
        id_dropout: Share of the films that are read as unknown in training.
    """

    dim: int = 128
    max_history: int = 50
    similarity: str = "cosine"
    document_bias: bool = False
    film: Sequence[str] = ("title", "genres", "year")
    user: Sequence[str] = ("age", "gender", "occupation")
    title_films: int = 4
    dropout: float = 0.2
    tower_dropout: float = 0.2
    id_dropout: float = 0.0

    def query(self, films: Sequence[str], user: Mapping[str, Any]) -> dict[str, Any]:
        """A query with what the towers read."""
        return user_query(films, {name: user[name] for name in self.user})

    def document(self, film: Mapping[str, Any]) -> dict[str, Any]:
        """A document with what the towers read."""
        return {name: value for name, value in film_document(film).items() if name in ("film", *self.film)}

    def task(self, data: MovieLens100K, held_out: Collection[int] = ()) -> Task:
        """The data as these towers read it; see :func:`make_task`."""
        return make_task(data, self.max_history, held_out, self.query, self.document)


def build_model(task: Task, settings: Model) -> SentenceTransformer:
    """Two towers: history, age, gender and occupation; and a film's id, title, genres and year.

    The history is a sum of the films' embeddings weighted by recency, and reads the very table that the ids have.
    """
    dim = settings.dim
    words = title_words(task.trained, settings.title_films)
    of_film: dict[str, Callable[[list[Any]], Feature]] = {
        "film": Categorical("film", dim=dim, id_dropout=settings.id_dropout).fit,
        "title": lambda titles: Tags("title", vocabulary=tuple(words), dim=dim),
        "genres": Tags("genres", dim=dim).fit,
        "year": Categorical("year", dim=dim).fit,
    }
    of_user: dict[str, Callable[[list[Any]], Feature]] = {
        "age": Numerical("age").fit,
        "gender": Categorical("gender").fit,
        "occupation": Categorical("occupation").fit,
    }
    seen = History(
        "seen",
        shared_with="film",
        dim=dim,
        max_length=settings.max_history,
        num_hidden_layers=0,
        dropout=settings.dropout,
    )
    users = list(task.users.values())
    query = Tower(
        features=[seen, *(of_user[name]([user[name] for user in users]) for name in settings.user)],
        hidden_dims=(),
        dropout=settings.tower_dropout,
    )
    document = Tower(
        features=[of_film[name]([film[name] for film in task.trained]) for name in ("film", *settings.film)],
        hidden_dims=(),
        dropout=settings.tower_dropout,
    )
    return two_tower(
        query,
        document,
        embedding_dim=dim,
        similarity=settings.similarity,
        document_bias=settings.document_bias,
    )


def title_words(documents: Sequence[Mapping[str, Any]], films: int) -> list[str]:
    """Words that are in the titles of at least so many films, the most frequent first."""
    counts = Counter(word for document in documents for word in set(document.get("title", ())))
    return [word for word, count in counts.most_common() if count >= films]
