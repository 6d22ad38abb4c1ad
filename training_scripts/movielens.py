"""Train a two-tower recommender on MovieLens-100K with FPSLoss, compare it with baselines, and recommend films.

The query is a user: the last films that he or she rated, age, gender and occupation. The document is a film: its id,
title, genres and year. The data is split by leave-last-one-out (each user's last film is the test, the one before the
validation), and all 1,682 films are ranked. Three rows are printed: popularity, the same model under a plain in-batch
softmax, and the model of the preset: by default FPSLoss with the popularity correction ``log_q``; ``--preset best`` is
what ranked best on validation.

Examples:
    python training_scripts/movielens.py --output_dir runs/movielens
    python training_scripts/movielens.py --preset best --seed 1
"""

from __future__ import annotations

import json
import logging
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from movielens_task import Model, Task, build_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss import DocumentIndex, FPSLoss, FullSoftmaxLoss, LossStateCallback, RetrievalEvaluator
from st_fpsloss.cli.parser import parse
from st_fpsloss.data.movielens import load_movielens_100k
from st_fpsloss.evaluation import bootstrap_interval
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.utils.files import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN_METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"loss": "fps"},
    "best": {"loss": "catalogue"},
}
ROWS = {
    "plain": "in-batch softmax, no log_q",
    "fps": "FPSLoss, log_q",
    "catalogue": "softmax over all films",
}


@dataclass
class Options:
    """What can be changed from the command line."""

    preset: Literal["default", "best"] = field(default="default", metadata={"help": "defaults of all others"})
    output_dir: Path = field(default=Path("runs/movielens"), metadata={"help": "receives model, index, metrics, plot"})
    cache_dir: Path | None = field(default=None, metadata={"help": "keeps the data; default ~/.cache/st_fpsloss"})
    loss: Literal["fps", "catalogue"] = field(
        default="fps", metadata={"help": "negatives: the clicks of the batch, by FPSLoss with log_q, or all films"}
    )
    epochs: int = field(default=8, metadata={"help": "passes over the 97,171 training clicks"})
    batch_size: int = field(default=1500, metadata={"help": "clicks in a batch, about"})
    max_history: int = field(default=50, metadata={"help": "a query has the user's last so many films"})
    learning_rate: float = field(default=3e-3, metadata={"help": "of the encoders, at most"})
    scale: float = field(default=7.0, metadata={"help": "start of the learned α; the baselines' fixed scale"})
    scale_learning_rate: float = field(default=1e-4, metadata={"help": "of log α; 0 leaves it fixed"})
    seed: int = field(default=0, metadata={"help": "of weights, dropout and the order of clicks"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole of it."""
    options = read_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started = time.time()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    data = load_movielens_100k(options.cache_dir)
    settings = Model(max_history=options.max_history)
    task = settings.task(data)

    rows = [popularity_row(task)]
    rows.append(train_task(task, settings, options, "plain")[0])
    row, model, log_history = train_task(task, settings, options, options.loss)
    rows.append(row)

    model.save_pretrained(str(options.output_dir / "model"))
    index = DocumentIndex.build(model, task.documents, options.output_dir / "index", overwrite=True)
    best = recommend(model, index, task, k=100)
    write_top_k(best, options.output_dir / "topk.tsv")
    write_json({"rows": rows, "options": {k: str(v) for k, v in vars(options).items()}}, options.output_dir)
    plot(log_history, options.output_dir / "learning_curve.png")
    print_table(rows)
    titles = dict(zip(data.items["item_id"], data.items["title"], strict=True))
    print_recommendations(best, task, titles, users=sorted(best)[:3])
    print(f"\nmodel/ index/ metrics.json topk.tsv learning_curve.png are in {options.output_dir}.")
    print(f"That took {time.time() - started:.0f} seconds.")


def read_options(argv: Sequence[str] | None) -> Options:
    """The command line, with the defaults of the preset that it names."""
    first = ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=list(PRESETS), default="default")
    preset = first.parse_known_args(argv)[0].preset
    (options,) = parse(__doc__, (Options,), argv, **PRESETS[preset])
    return options


def make_loss(model: SentenceTransformer, task: Task, options: Options, kind: str) -> ClickLoss:
    """The loss of a row: ``"plain"``, the formula of MultipleNegativesRankingLoss; ``"fps"``; or ``"catalogue"``."""
    learn, tokens = options.scale_learning_rate > 0, 16384
    if kind == "plain":
        return FPSLoss(model, scale=options.scale, learn_scale=False, duplicates="keep", mini_batch_num_tokens=tokens)
    if kind == "fps":
        return FPSLoss(model, scale=options.scale, learn_scale=learn, log_q="corrected", mini_batch_num_tokens=tokens)
    return FullSoftmaxLoss(model, task.catalogue, scale=options.scale, learn_scale=False, mini_batch_num_tokens=tokens)


def train_task(
    task: Task, settings: Model, options: Options, kind: str
) -> tuple[dict[str, Any], SentenceTransformer, list[dict[str, Any]]]:
    """Train one model, keep its best epoch on validation, and test that one once."""
    set_seed(options.seed)
    print(f"\n{ROWS[kind]}")
    model = build_model(task, settings)
    loss = make_loss(model, task, options, kind)
    windows = max(1, round(options.batch_size * len(task.rows) / task.clicks))
    row, log_history = fit(
        model, loss, task.rows, task.validation, options, kind, windows, data_collator=task.collator(model)
    )
    return {"model": ROWS[kind], **row, **test_metrics(task.test, model)}, model, log_history


def fit(
    model: SentenceTransformer,
    loss: ClickLoss,
    rows: Dataset,
    validation: RetrievalEvaluator,
    options: Options,
    name: str,
    rows_per_batch: int,
    **more: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train a model to its best epoch on validation."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(options.output_dir / "checkpoints" / name),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=rows_per_batch,
        learning_rate=options.learning_rate,
        learning_rate_mapping={"logit_scale": options.scale_learning_rate},
        warmup_steps=0.1,
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
        train_dataset=rows,
        loss=loss,
        evaluator=validation,
        callbacks=[LossStateCallback(loss)],
        **more,
    )
    started = time.time()
    trainer.train()
    row = {"train_seconds": round(time.time() - started), "seed": options.seed}
    row |= {"validation_ndcg@10": trainer.state.best_metric, "alpha": loss.alpha}
    return row, trainer.state.log_history


def popularity_row(task: Task) -> dict[str, Any]:
    """The baseline that recommends everyone the same."""

    def scores(user_ids: list[Any]) -> np.ndarray:
        return np.broadcast_to(task.popularity, (len(user_ids), len(task.popularity)))

    validation = task.validation.evaluate_scores(scores)["validation_ndcg@10"]
    return {"model": "popularity", "validation_ndcg@10": validation} | test_metrics(task.test, scores)


def test_metrics(test: RetrievalEvaluator, source: Any) -> dict[str, Any]:
    """Means over the users at test, and the 95% bootstrap interval of NDCG@10."""
    values = test.per_query(source)
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


def print_recommendations(
    best: dict[int, list[tuple[int, float]]], task: Task, titles: dict[int, str], users: list[int]
) -> None:
    """What some users saw last, and what the model recommends them."""
    for user in users:
        print(f"\nUser {user} saw last: {'; '.join(titles[film] for film in task.seen[user][-5:])}")
        for rank, (film, score) in enumerate(best[user][:5], start=1):
            print(f"  {rank}. {titles[film]} ({score:.3f})")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
