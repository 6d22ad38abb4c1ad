"""MovieLens-100K as a retrieval task: users and their films as queries, films as documents, and two towers for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer

from st_fpsloss.clicks import histories
from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.movielens import MovieLens100K
from st_fpsloss.next_item import next_item_windows
from st_fpsloss.prefix_collator import PrefixCollator
from st_fpsloss.towers import Categorical, History, Numerical, Tags, Tower, two_tower

COLUMNS = {"user": "user_id", "item": "item_id", "time": "timestamp"}
CUTOFFS = (10, 20)


@dataclass(frozen=True)
class Task:
    """MovieLens under the protocol leave-last-one-out."""

    users: dict[int, dict[str, Any]]
    documents: dict[int, dict[str, Any]]
    rows: Dataset  # query: windows of histories, every prefix of which is a click, for PrefixCollator
    clicks: int  # how many clicks the rows hold
    queries: dict[int, dict[str, Any]]  # user -> query at test, that is with the validation film
    seen: dict[int, list[int]]  # user -> films in training and validation
    validation: RetrievalEvaluator
    test: RetrievalEvaluator
    popularity: np.ndarray  # clicks of each document in training, in the order of `documents`

    def collator(self, model: SentenceTransformer) -> PrefixCollator:
        """What makes batches of the rows."""
        return PrefixCollator(model, history="seen", documents=self.documents)


def make_task(data: MovieLens100K, max_history: int) -> Task:
    """Queries, documents and judgments.

    Args:
        data: The data.
        max_history: At most this many films of a user are read, the latest ones.
    """
    splits = data.splits()
    known = concatenate_datasets([splits["train"], splits["validation"]])
    users = {row["user_id"]: {name: row[name] for name in ("age", "gender", "occupation")} for row in data.users}
    documents = {row["item_id"]: film(row) for row in data.items}
    counts = Counter(splits["train"]["item_id"])
    seen = films_by_user(known)
    queries = histories_of(users, known, max_history)
    evaluator = partial(RetrievalEvaluator, corpus=documents, at=CUTOFFS, batch_size=256)
    rows = training_rows(users, splits["train"], max_history)
    return Task(
        users=users,
        documents=documents,
        rows=rows,
        clicks=sum(len(query["seen"]) - 1 for query in rows["query"]),
        queries=queries,
        seen=seen,
        validation=evaluator(
            histories_of(users, splits["train"], max_history),
            relevant_docs=films_by_user(splits["validation"]),
            seen_docs=films_by_user(splits["train"]),
            name="validation",
        ),
        test=evaluator(queries, relevant_docs=films_by_user(splits["test"]), seen_docs=seen, name="test"),
        popularity=np.array([counts[document] for document in documents], dtype=np.float64),
    )


def film(row: Mapping[str, Any]) -> dict[str, Any]:
    """A film as a document: its id, the words of its title, genres and year."""
    words = row["title"].lower().split()
    return {"film": str(row["item_id"]), "title": words, "genres": row["genres"], "year": row["year"]}


def training_rows(users: Mapping[int, Mapping[str, Any]], ratings: Dataset, max_history: int) -> Dataset:
    """One column, ``query``: windows of a user's films, with what is known of the user."""
    windows = next_item_windows(ratings, **COLUMNS, max_history=max_history)
    return Dataset.from_dict(
        {
            "query": [
                {"seen": films, **users[user]} for user, films in zip(windows["user"], windows["items"], strict=True)
            ]
        }
    )


def histories_of(
    users: Mapping[int, Mapping[str, Any]], ratings: Dataset, max_history: int
) -> dict[int, dict[str, Any]]:
    """User -> query, with the films in ``ratings`` as the history."""
    texts = histories(ratings, **COLUMNS, max_history=max_history)
    return {user: {"seen": text.split(), **users[user]} for user, text in texts.items()}


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
        dim: Size of the embeddings, of films as of towers.
        max_history: Films of a user that are read.
        similarity: ``"cosine"`` or ``"dot"``.
        document_bias: A learned score of each film's own; needs ``"dot"``.
        film: Features of a film beside its id.
        user: Features of a user beside the history.
        history_layers: Layers of a transformer over the history; 0 for a sum weighted by recency.
        dropout: Of the history's embeddings, and of the towers' inputs.
        id_dropout: Share of the films that are read as unknown in training.
    """

    dim: int = 128
    max_history: int = 50
    similarity: str = "cosine"
    document_bias: bool = False
    film: Sequence[str] = ("title", "genres", "year")
    user: Sequence[str] = ("age", "gender", "occupation")
    history_layers: int = 0
    dropout: float = 0.2
    id_dropout: float = 0.0


def build_model(task: Task, settings: Model) -> SentenceTransformer:
    """Two towers: history, age, gender and occupation; and a film's id, title, genres and year.

    The history reads the very table of embeddings that the films' ids have.
    """
    documents, users = list(task.documents.values()), list(task.users.values())
    of_film = {
        "title": Tags("title", dim=settings.dim),
        "genres": Tags("genres", dim=settings.dim),
        "year": Categorical("year", dim=settings.dim),
    }
    of_user = {
        "age": Numerical("age"),
        "gender": Categorical("gender"),
        "occupation": Categorical("occupation"),
    }
    seen = History(
        "seen",
        shared_with="film",
        dim=settings.dim,
        max_length=settings.max_history,
        num_hidden_layers=settings.history_layers,
        dropout=settings.dropout,
    )
    identity = Categorical("film", dim=settings.dim, id_dropout=settings.id_dropout)
    query = Tower(
        features=[seen, *(of_user[name].fit([user[name] for user in users]) for name in settings.user)],
        hidden_dims=(),
    )
    document = Tower(
        features=[
            identity.fit([document["film"] for document in documents]),
            *(of_film[name].fit([document[name] for document in documents]) for name in settings.film),
        ],
        hidden_dims=(),
    )
    return two_tower(
        query,
        document,
        embedding_dim=settings.dim,
        similarity=settings.similarity,
        document_bias=settings.document_bias,
    )
