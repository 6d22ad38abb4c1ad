"""What is compared: each contender learns from the training clicks, and gives scores of the test's queries."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from st_fpsloss.cli.benchmark.models import Settings, Trained, train_ours, train_stock
from st_fpsloss.cli.benchmark.task import Judgments, Task
from st_fpsloss.cli.models import load_model
from st_fpsloss.evaluation.baselines import BM25, EASE, Histories, IdBaseline, ItemKNN, Popularity
from st_fpsloss.evaluation.evaluator import ScoreFunction
from st_fpsloss.retrieval.encode import checked_similarity

POPULARITY, OURS = "popularity", "FPSLoss"
_MOST_CLICKED = 10_000  # items that EASE takes: it inverts a matrix of items by items
_PAIRS_OF_ITEMS = 200_000_000  # of the histories, that ItemKNN counts at most
_RECENT_KNN = [{"num_neighbours": 200, "shrink": 10.0, "decay": decay} for decay in (0.7, 0.8, 0.9)]
_RECENT_EASE = [{"l2": l2, "decay": decay} for l2 in (500.0, 100.0) for decay in (0.8, 0.95)]
_MIN_HISTORIES = 0.1  # share of the test's queries with a history, for baselines that read nothing else


@dataclass(frozen=True)
class Fitted:
    """A contender that has learned.

    Attributes:
        score: Scores of the test's queries for all documents.
        seconds: It took to learn, its choice of settings included, the evaluations in training not.
        settings: What was chosen on validation, or learned.
        curve: (seconds, NDCG@10 on validation) in training.
    """

    score: ScoreFunction
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Contender:
    """A name, what it is in a few words, and how it learns."""

    name: str
    about: str
    fit: Callable[[Task, Settings], Fitted]


def contenders_of(task: Task) -> list[Contender]:
    """The contenders that a task allows, the cheap ones first.

    Raises:
        ImportError: If BM25 is wanted and not installed.
    """
    found = [Contender(POPULARITY, "ranks by the number of clicks, for everybody alike", _popularity)]
    with_history = np.mean([bool(task.test.histories.get(query)) for query in task.test.relevant])
    if task.user_items or with_history >= _MIN_HISTORIES:
        found += _of_histories()
    if not task.user_items and with_history >= _MIN_HISTORIES:
        found.append(Contender("same query", "what the very query clicked before, then popularity", _same_query))
    if task.user_items:
        stock, ours = "the same id model and its history", "id model: history and items in one table"
    else:
        if importlib.util.find_spec("bm25s") is None:
            raise ImportError("BM25 needs bm25s: pip install st-fpsloss[benchmark].")
        stock, ours = "the encoder itself", "two towers that start as the encoder"
        found += [
            Contender("BM25", "words that a query and a document share", _bm25),
            Contender("untouched encoder", "the encoder without any training", _untouched),
        ]
    return [
        *found,
        Contender("MultipleNegativesRankingLoss", f"{stock}, trained with the stock loss", _trained(train_stock)),
        Contender(OURS, f"{ours}, trained with FPSLoss, log_q corrected", _trained(train_ours)),
    ]


def _of_histories() -> list[Contender]:
    plain_knn = [{"num_neighbours": count} for count in (10, 50, 200)]
    plain_ease = [{"l2": l2} for l2 in (100.0, 30.0, 300.0, 1000.0)]
    recent = "the newest clicks weigh more"
    return [
        Contender("ItemKNN", "items clicked by the same users", _chosen(ItemKNN, plain_knn)),
        Contender("ItemKNN (recency)", f"ItemKNN; {recent}", _chosen(ItemKNN, _RECENT_KNN)),
        Contender("EASE", "a linear autoencoder over items", _chosen(EASE, plain_ease)),
        Contender("EASE (recency)", f"EASE; {recent}", _chosen(EASE, _RECENT_EASE)),
    ]


def _popularity(task: Task, settings: Settings) -> Fitted:
    started = time.perf_counter()
    popularity = Popularity().fit(task.validation.histories)
    return Fitted(_id_scores(popularity, task, task.test), time.perf_counter() - started)


def _chosen(kind: type[IdBaseline], grid: Sequence[dict[str, Any]]) -> Callable[[Task, Settings], Fitted]:
    """Fits with all settings of a grid, as far as the time reaches, and takes what ranks best on validation."""

    def fit(task: Task, settings: Settings) -> Fitted:
        started = time.perf_counter()
        histories, note = _histories_for(kind, task)
        found: list[tuple[float, dict[str, Any], IdBaseline]] = []
        for chosen in grid:
            if found and time.perf_counter() - started > settings.seconds:
                break
            baseline = kind(**chosen).fit(histories)
            validation = task.validation_evaluator
            score = baseline.score_function(task.validation.histories, validation.corpus_ids)
            found.append((float(validation.per_query(score)["ndcg@10"].mean()), chosen, baseline))
        _, chosen, baseline = max(found, key=lambda one: one[0])
        seconds = time.perf_counter() - started
        return Fitted(_id_scores(baseline, task, task.test), seconds, {**chosen, **note})

    return fit


def _histories_for(kind: type[IdBaseline], task: Task) -> tuple[Histories, dict[str, Any]]:
    """What a baseline learns from: clicks of the most clicked items alone, noted, where all would not fit in memory."""
    histories = task.validation.histories
    if kind is EASE:
        fits = len(task.clicks) <= _MOST_CLICKED
    else:
        fits = sum(len(items) ** 2 for items in histories.values()) <= _PAIRS_OF_ITEMS
    if fits:
        return histories, {}
    kept = {item for item, _ in task.clicks.most_common(_MOST_CLICKED)}
    note = {"items": f"the {_MOST_CLICKED:,} most clicked"}
    return {user: [item for item in items if item in kept] for user, items in histories.items()}, note


def _same_query(task: Task, settings: Settings) -> Fitted:
    started = time.perf_counter()
    popularity = _id_scores(Popularity().fit(task.validation.histories), task, task.test)
    column = {number: place for place, number in enumerate(task.documents)}

    def score(query_ids: list[Any]) -> np.ndarray:
        scores = popularity(query_ids) / (1.0 + max(task.clicks.values()))  # below one click
        for row, query in enumerate(query_ids):
            for document in task.test.histories.get(query, ()):
                scores[row, column[document]] += 1.0
        return scores

    return Fitted(score, time.perf_counter() - started)


def _id_scores(baseline: IdBaseline, task: Task, judgments: Judgments) -> ScoreFunction:
    return baseline.score_function(judgments.histories, list(task.documents))


def _bm25(task: Task, settings: Settings) -> Fitted:
    started = time.perf_counter()
    bm25 = BM25().fit(task.documents)
    return Fitted(bm25.score_function(task.queries, list(task.documents)), time.perf_counter() - started)


def _untouched(task: Task, settings: Settings) -> Fitted:
    return Fitted(embedding_scores(load_model(settings.encoder, False), task), 0.0)


def _trained(train: Callable[[Task, Settings], Trained]) -> Callable[[Task, Settings], Fitted]:
    def fit(task: Task, settings: Settings) -> Fitted:
        trained = train(task, settings)
        seconds = trained.budget.curve[-1][0]
        return Fitted(embedding_scores(trained.model, task), seconds, trained.facts, trained.budget.curve)

    return fit


def embedding_scores(model: SentenceTransformer, task: Task) -> ScoreFunction:
    """Embeds the test's queries and all documents once, for the several rankings that are read from them.

    Args:
        model: Its similarity is dot or cosine.
        task: The task.

    Returns:
        The model's similarities, equal for equal embeddings: computed in float64, rounded to float32.
    """
    inputs = task.query_inputs(task.test)
    cosine = checked_similarity(model) == "cosine"

    def embed(encode: Callable[..., Any], values: list[Any]) -> np.ndarray:
        found = np.asarray(encode(values, batch_size=256, show_progress_bar=False), dtype=np.float64)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12) if cosine else found

    queries = embed(model.encode_query, list(inputs.values()))
    corpus = embed(model.encode_document, list(task.document_inputs.values()))
    row = {query: number for number, query in enumerate(inputs)}

    def score(query_ids: list[Any]) -> np.ndarray:
        return (queries[[row[query] for query in query_ids]] @ corpus.T).astype(np.float32)

    return score
