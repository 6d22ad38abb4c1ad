"""Train a two-tower recommender on MovieLens-100K with FPSLoss, compare it with baselines, and recommend films.

The query is the list of the last films that a user rated, the document is a film's id, genres, decade and title. The
data is split by leave-last-one-out (each user's last film is the test, the one before the validation), and all 1,682
films are ranked. Three rows are printed: popularity, the same model under a plain in-batch softmax, and
FPSLoss with the popularity correction ``log_q``.

Example:
    python training_scripts/movielens.py --output_dir runs/movielens
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import HfArgumentParser, set_seed

from st_fpsloss import DocumentIndex, FPSLoss, LossStateCallback, RetrievalEvaluator, Tower, two_tower
from st_fpsloss.clicks import histories, next_item_pairs
from st_fpsloss.evaluation import bootstrap_interval
from st_fpsloss.files import write_whole
from st_fpsloss.movielens import MovieLens100K, load_movielens_100k
from st_fpsloss.towers import id_embedding, id_transformer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = {"user": "user_id", "item": "item_id", "time": "timestamp"}
SHOWN_METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")
CUTOFFS = (10, 20)


@dataclass
class Options:
    """What can be changed from the command line."""

    output_dir: Path = field(default=Path("runs/movielens"), metadata={"help": "receives model, index, metrics, plot"})
    cache_dir: Path | None = field(default=None, metadata={"help": "keeps the data; default ~/.cache/st_fpsloss"})
    epochs: int = field(default=6, metadata={"help": "passes over the 97,171 training pairs"})
    batch_size: int = field(default=512, metadata={"help": "clicks in a batch, negatives of each other"})
    max_history: int = field(default=10, metadata={"help": "a query is the user's last so many films"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the encoders"})
    scale: float = field(default=5.0, metadata={"help": "start of the learned α; the baseline's fixed scale"})
    scale_learning_rate: float = field(default=1e-4, metadata={"help": "of log α"})
    seed: int = field(default=0, metadata={"help": "of weights, dropout and the order of clicks"})


@dataclass(frozen=True)
class Task:
    """MovieLens as queries and documents."""

    pairs: Dataset  # query, document
    documents: dict[int, str]
    titles: dict[int, str]
    popularity: np.ndarray  # clicks of each document in training, in the order of `documents`
    queries: dict[int, str]  # user -> query at test, that is with the validation film
    seen: dict[int, list[int]]  # user -> films in training and validation
    validation: RetrievalEvaluator
    test: RetrievalEvaluator


def main() -> None:
    """Run the whole of it."""
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started = time.time()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    task = make_task(load_movielens_100k(options.cache_dir), options.max_history)

    rows = [popularity_row(task)]
    rows.append(train(task, options, "in-batch softmax, no log_q", plain_loss)[0])
    row, model, log_history = train(task, options, "FPSLoss, log_q", fps_loss)
    rows.append(row)

    model.save_pretrained(str(options.output_dir / "model"))
    index = DocumentIndex.build(model, task.documents, options.output_dir / "index", overwrite=True)
    best = recommend(model, index, task, k=100)
    write_top_k(best, options.output_dir / "topk.tsv")
    write_json({"rows": rows, "options": {k: str(v) for k, v in vars(options).items()}}, options.output_dir)
    plot(log_history, options.output_dir / "learning_curve.png")
    print_table(rows)
    print_recommendations(best, task, users=sorted(best)[:3])
    print(f"\nmodel/ index/ metrics.json topk.tsv learning_curve.png are in {options.output_dir}.")
    print(f"That took {time.time() - started:.0f} seconds.")


def make_task(data: MovieLens100K, max_history: int) -> Task:
    """Queries, documents and judgments by the protocol leave-last-one-out."""
    splits = data.splits()
    known = concatenate_datasets([splits["train"], splits["validation"]])
    documents = {film["item_id"]: describe(film) for film in data.items}
    pairs = next_item_pairs(splits["train"], **COLUMNS, max_history=max_history)
    pairs = pairs.map(lambda batch: {"document": [documents[int(film)] for film in batch["document"]]}, batched=True)
    counts = Counter(splits["train"]["item_id"])
    seen_in_train, seen = films_by_user(splits["train"]), films_by_user(known)
    queries = histories(known, **COLUMNS, max_history=max_history)
    evaluator = partial(RetrievalEvaluator, corpus=documents, at=CUTOFFS, batch_size=256)
    return Task(
        pairs=pairs,
        documents=documents,
        titles={film["item_id"]: film["title"] for film in data.items},
        popularity=np.array([counts[film] for film in documents], dtype=np.float64),
        queries=queries,
        seen=seen,
        validation=evaluator(
            histories(splits["train"], **COLUMNS, max_history=max_history),
            relevant_docs=films_by_user(splits["validation"]),
            seen_docs=seen_in_train,
            name="validation",
        ),
        test=evaluator(queries, relevant_docs=films_by_user(splits["test"]), seen_docs=seen, name="test"),
    )


def describe(film: dict[str, Any]) -> str:
    """A film as words: its id, genres, decade and title."""
    words = [f"film:{film['item_id']}", *(f"genre:{genre}" for genre in film["genres"])]
    if film["year"] is not None:
        words.append(f"decade:{film['year'] // 10 * 10}")
    return " ".join([*words, *film["title"].lower().split()])


def films_by_user(ratings: Dataset) -> dict[int, list[int]]:
    """User -> films, in the order of the rows."""
    films: dict[int, list[int]] = {}
    for user, film in zip(ratings["user_id"], ratings["item_id"], strict=True):
        films.setdefault(user, []).append(film)
    return films


def build_model(task: Task) -> SentenceTransformer:
    """Queries by a light tower, a bag of film ids; documents by a transformer over words; each with an MLP."""
    words = dict.fromkeys(word for document in task.documents.values() for word in document.split())
    query = Tower(id_embedding(task.documents, embedding_dim=128), hidden_dims=(256,), dropout=0.2)
    document = Tower(
        id_transformer(words, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, max_seq_length=32),
        hidden_dims=(256,),
        dropout=0.2,
    )
    return two_tower(query, document, embedding_dim=128, similarity="cosine")


def fps_loss(model: SentenceTransformer, options: Options) -> FPSLoss:
    """FPSLoss with the popularity of in-batch negatives corrected."""
    return FPSLoss(model, scale=options.scale, log_q="corrected", mini_batch_num_tokens=8192)


def plain_loss(model: SentenceTransformer, options: Options) -> FPSLoss:
    """The plain in-batch softmax, the formula of MultipleNegativesRankingLoss, through the same engine."""
    return FPSLoss(model, scale=options.scale, learn_scale=False, duplicates="keep", mini_batch_num_tokens=8192)


def train(task: Task, options: Options, name: str, make_loss: Any) -> tuple[dict[str, Any], SentenceTransformer, list]:
    """Train one model, keep its best epoch on validation, and test that one once."""
    set_seed(options.seed)
    print(f"\n{name}")
    model = build_model(task)
    loss = make_loss(model, options)
    checkpoints = options.output_dir / "checkpoints" / make_loss.__name__
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        learning_rate_mapping={"logit_scale": options.scale_learning_rate},
        lr_scheduler_type="constant",
        router_mapping={"query": "query", "document": "document"},
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_validation_ndcg@10",
        logging_steps=20,
        report_to=[],
        seed=options.seed,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=task.pairs,
        loss=loss,
        evaluator=task.validation,
        callbacks=[LossStateCallback(loss)],
    )
    started = time.time()
    trainer.train()
    row = {"model": name, "train_seconds": round(time.time() - started), "seed": options.seed}
    row |= {"validation_ndcg@10": trainer.state.best_metric, "alpha": loss.alpha}
    return row | test_metrics(task, model), model, trainer.state.log_history


def popularity_row(task: Task) -> dict[str, Any]:
    """The baseline that recommends everyone the same."""

    def scores(user_ids: list[Any]) -> np.ndarray:
        return np.broadcast_to(task.popularity, (len(user_ids), len(task.popularity)))

    validation = task.validation.evaluate_scores(scores)["validation_ndcg@10"]
    return {"model": "popularity", "validation_ndcg@10": validation} | test_metrics(task, scores)


def test_metrics(task: Task, source: Any) -> dict[str, Any]:
    """Means over the users at test, and the 95% bootstrap interval of NDCG@10."""
    values = task.test.per_query(source)
    low, high = bootstrap_interval(values["ndcg@10"])
    return {name: float(values[name].mean()) for name in SHOWN_METRICS} | {"ndcg@10_interval": [low, high]}


def recommend(
    model: SentenceTransformer, index: DocumentIndex, task: Task, k: int
) -> dict[int, list[tuple[int, float]]]:
    """The best k films of each user that the user has not seen, from the index."""
    users = list(task.queries)
    found = index.search(
        model, list(task.queries.values()), k=k, exclude=[task.seen[user] for user in users], batch_size=256
    )
    return dict(zip(users, found, strict=True))


def write_top_k(best: dict[int, list[tuple[int, float]]], path: Path) -> None:
    """user_id, item_id and rank from 1, separated by tabs."""
    lines = ["user_id\titem_id\trank"]
    lines += [f"{user}\t{film}\t{rank}" for user in best for rank, (film, _) in enumerate(best[user], start=1)]
    write_whole(path, "\n".join(lines) + "\n")


def write_json(content: dict[str, Any], folder: Path) -> None:
    """Everything that the table shows, for other programs."""
    write_whole(folder / "metrics.json", json.dumps(content, indent=2) + "\n")


def plot(log_history: list[dict[str, Any]], path: Path) -> None:
    """Validation NDCG@10, training loss and α over the steps."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    curves = {
        "eval_validation_ndcg@10": "NDCG@10 on validation",
        "loss": "training loss",
        "loss/alpha": "learned scale α",
    }
    for axis, (key, title) in zip(axes, curves.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else None, markersize=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows of metrics.json, for people."""
    print(
        f"\n{'test, 943 users, 1,682 films':32}{'HR@10':>8}{'NDCG@10':>9}{'95% interval':>18}{'HR@20':>8}{'seconds':>9}"
    )
    for row in rows:
        low, high = row["ndcg@10_interval"]
        interval = f"{low:.4f} to {high:.4f}"
        print(
            f"{row['model']:32}{row['hr@10']:8.4f}{row['ndcg@10']:9.4f}{interval:>18}{row['hr@20']:8.4f}"
            f"{row.get('train_seconds', ''):>9}"
        )


def print_recommendations(best: dict[int, list[tuple[int, float]]], task: Task, users: list[int]) -> None:
    """What some users saw last, and what the model recommends them."""
    for user in users:
        print(f"\nUser {user} saw last: {'; '.join(task.titles[film] for film in task.seen[user][-5:])}")
        for rank, (film, score) in enumerate(best[user][:5], start=1):
            print(f"  {rank}. {task.titles[film]} ({score:.3f})")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
