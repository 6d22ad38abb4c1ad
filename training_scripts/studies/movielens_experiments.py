"""What each part of the best MovieLens model is worth, and what it does for films without clicks.

``--experiment gains`` trains the steps from a model of titles to the best one. ``--experiment cold_start`` leaves a
tenth of the films out of training, another tenth with each seed, and ranks them all the same.

Every run appends a line to the results; runs that are there are not done again, so that the script can be stopped and
started. At the end it prints a table.

Examples:
    python -m training_scripts.studies.movielens_experiments --experiment gains --results gains.jsonl
    python -m training_scripts.studies.movielens_experiments --experiment cold_start --results cold_start.jsonl
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from movielens import Options as RunOptions
from movielens import fit, make_loss, read_options, test_metrics, train_task
from movielens_task import Model, Task, make_task
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from st_fpsloss.cli.parser import parse
from st_fpsloss.data.movielens import MovieLens100K, load_movielens_100k
from st_fpsloss.evaluation import bootstrap_interval, paired_difference
from st_fpsloss.towers import Categorical, Numerical, Tags, Tower, id_embedding, two_tower
from st_fpsloss.towers.features.base import Feature
from st_fpsloss.utils.files import append_json_line, json_lines

WORDS_OF_LAST = 10
"""Films whose words are a query, in the steps without a history."""
WHOLE = 1000
"""Longer than any history."""
EQUAL = 1e-6
"""Difference of two scores that is rounding."""
BY_USER = "test_ndcg@10_by_user"


@dataclass
class Options:
    """What can be changed from the command line."""

    results: Path = field(metadata={"help": "JSON lines, one a run; appended to"})
    experiment: Literal["gains", "cold_start"] = field(default="gains", metadata={"help": "which table"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the runs"})
    steps: list[str] = field(default_factory=list, metadata={"help": "only these; default all"})
    against: Path | None = field(
        default=None, metadata={"help": "results of tests.benchmarks.sasrec: how each step differs on the same users"}
    )
    cache_dir: Path | None = field(default=None, metadata={"help": "keeps the data; default ~/.cache/st_fpsloss"})


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs that are missing, and print the table."""
    (options,) = parse(__doc__, (Options,), argv)
    runs = GAINS if options.experiment == "gains" else COLD_START
    if unknown := set(options.steps) - set(runs):
        raise ValueError(f"--steps names {sorted(unknown)}: the steps are {list(runs)}.")
    data = load_movielens_100k(options.cache_dir)
    for seed in options.seeds:
        for step, run in runs.items():
            if options.steps and step not in options.steps:
                continue
            if any((row["step"], row["seed"]) == (step, seed) for row in json_lines(options.results)):
                continue
            with tempfile.TemporaryDirectory() as folder:
                settings = replace(read_options(["--preset", "best"]), seed=seed, output_dir=Path(folder))
                set_seed(seed)
                found = run(data, settings)
            append_json_line(options.results, {"step": step, "seed": seed, **found})
    print_table(json_lines(options.results), list(runs))
    if options.against is not None:
        print_differences(json_lines(options.results), json_lines(options.against), list(runs))


def print_table(rows: Sequence[Mapping[str, Any]], steps: Sequence[str]) -> None:
    """Means over seeds, and the spread of what a step has more than one of."""
    for step in steps:
        runs = [row for row in rows if row["step"] == step]
        names = [name for name, value in (runs[0] if runs else {}).items() if isinstance(value, float)]
        values = {name: np.array([run[name] for run in runs]) for name in names}
        print(
            f"{step} ({len(runs)} seeds): " + ", ".join(f"{k} {v.mean():.4f} ±{v.std():.4f}" for k, v in values.items())
        )


def print_differences(
    rows: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]], steps: Sequence[str]
) -> None:
    """NDCG@10 of each step less that of the peer, means over seeds, on the same users, with 95% intervals."""
    peer = np.mean([row[BY_USER] for row in peers], axis=0)
    for step in steps:
        if runs := [row[BY_USER] for row in rows if row["step"] == step]:
            mean, low, high = paired_difference(np.mean(runs, axis=0), peer)
            print(f"{step}: {mean:+.4f} ({low:+.4f} to {high:+.4f})")


# Gains


def run_towers(loss: str, model: Model, data: MovieLens100K, options: RunOptions) -> dict[str, Any]:
    """The towers of movielens.py."""
    if model.similarity == "dot":
        options = replace(options, scale=1.0)
    task = model.task(data)
    row, towers, _ = train_task(task, model, options, loss)
    return {**row, **by_user(task, towers)}


def run_words(with_id: bool, with_features: bool, data: MovieLens100K, options: RunOptions) -> dict[str, Any]:
    """A user is the words of the last films, a film the words of its title."""
    words = {row["item_id"]: row["title"].lower().split() for row in data.items}
    if with_id:
        words = {item: [f"film:{item}", *title] for item, title in words.items()}

    def query(films: Sequence[str], user: Mapping[str, Any]) -> Any:
        text = " ".join(word for film in films[-WORDS_OF_LAST:] for word in words[int(film)])
        return {"text": text, **user} if with_features else text

    def document(film: Mapping[str, Any]) -> Any:
        text = " ".join(words[film["item_id"]])
        return {"text": text, "genres": film["genres"], "year": film["year"]} if with_features else text

    task = make_task(data, WORDS_OF_LAST, query=query, document=document)
    whole = make_task(data, WHOLE).rows["query"]
    clicks = [(row, place) for row in whole for place in range(1, len(row["seen"]))]
    rows = Dataset.from_dict(
        {
            "query": [
                query(row["seen"][:place], {name: row[name] for name in row if name != "seen"}) for row, place in clicks
            ],
            "document": [task.documents[int(row["seen"][place])] for row, place in clicks],
        }
    )
    model = words_model(task, sorted({word for title in words.values() for word in title}), with_features)
    row, _ = fit(
        model, make_loss(model, task, options, "plain"), rows, task.validation, options, "words", options.batch_size
    )
    return {**row, **test_metrics(task.test, model), **by_user(task, model)}


def by_user(task: Task, model: SentenceTransformer) -> dict[str, Any]:
    """NDCG@10 of each user at test, for paired comparisons."""
    return {BY_USER: [round(float(value), 6) for value in task.test.per_query(model)["ndcg@10"]]}


def words_model(task: Task, words: Sequence[str], with_features: bool) -> SentenceTransformer:
    """Two linear towers over one table of words."""
    dim, users = Model.dim, list(task.users.values())

    def fitted(feature: Feature, rows: Sequence[Mapping[str, Any]]) -> Feature:
        return feature.fit([row[feature.name] for row in rows])

    table = id_embedding(words, dim)
    of_user: list[Feature] = [Numerical("age"), Categorical("gender"), Categorical("occupation")]
    of_film: list[Feature] = [Tags("genres"), Categorical("year")]
    query = Tower(table, features=[fitted(f, users) for f in of_user if with_features], hidden_dims=())
    document = Tower(table, features=[fitted(f, task.trained) for f in of_film if with_features], hidden_dims=())
    return two_tower(query, document, embedding_dim=dim, similarity="cosine")


# Cold start


def run_cold_start(model: Model, data: MovieLens100K, options: RunOptions) -> dict[str, Any]:
    """Percentile ranks of the films that users had last, where training never saw these films.

    Among all films, and among those that training never saw, where equal scores count half: films that are unknown
    alike stand, all of them, before those that training found to be no one's.
    """
    films = np.array(data.items["item_id"])
    held_out = set(np.random.default_rng(options.seed).permutation(films)[: len(films) // 10].tolist())
    task = model.task(data, held_out)
    # A film of which nothing is known stands in the softmax as one that nobody clicked: what the id's entry for unknown
    # films says without training is chance, and ranked above most films that were clicked.
    unknown = model.document({"item_id": "unknown", "title": "", "genres": [], "year": None})
    task = replace(task, catalogue=[*task.catalogue, unknown])
    row, towers, _ = train_task(task, model, options, options.loss)
    last = data.splits()["test"]
    pairs = [(user, item) for user, item in zip(last["user_id"], last["item_id"], strict=True) if item in held_out]
    scores = towers.similarity(
        towers.encode_query([task.queries[user] for user, _ in pairs], batch_size=256),
        towers.encode_document(list(task.documents.values()), batch_size=256),
    ).numpy()
    place = {item: number for number, item in enumerate(task.documents)}
    own = np.array([scores[number, place[item]] for number, (_, item) in enumerate(pairs)])
    below = (scores < own[:, None] - EQUAL).sum(axis=1) / (len(films) - 1)  # films of equal score stand before it
    rivals = scores[:, [place[item] for item in sorted(held_out)]] - own[:, None]
    among = ((rivals < -EQUAL).sum(axis=1) + ((np.abs(rivals) <= EQUAL).sum(axis=1) - 1) / 2) / (len(held_out) - 1)
    return {
        "percentile": float(below.mean()),
        "percentile_interval": bootstrap_interval(below),
        "among_held_out": float(among.mean()),
        "among_held_out_interval": bootstrap_interval(among),
        "test_clicks": len(pairs),
        "percentile_by_click": [round(float(value), 4) for value in below],
        "among_held_out_by_click": [round(float(value), 4) for value in among],
        "ndcg@10": row["ndcg@10"],
        "train_seconds": row["train_seconds"],
    }


GAINS: dict[str, Callable[[MovieLens100K, RunOptions], dict[str, Any]]] = {
    "text": partial(run_words, False, False),
    "+ id": partial(run_words, True, False),
    "+ features": partial(run_words, True, True),
    "+ history": partial(run_towers, "plain", Model()),
    "+ log_q": partial(run_towers, "fps", Model()),
    "all films as negatives": partial(run_towers, "catalogue", Model()),
    "dot": partial(run_towers, "catalogue", Model(similarity="dot")),
    "+ document_bias": partial(run_towers, "catalogue", Model(similarity="dot", document_bias=True)),
}
"""What stands in the table, in its order; each step adds to the one before."""

COLD_START: dict[str, Callable[[MovieLens100K, RunOptions], dict[str, Any]]] = {
    "ids alone": partial(run_cold_start, Model(film=(), user=())),
    "text and features": partial(run_cold_start, Model(id_dropout=0.3)),
}


if __name__ == "__main__":
    main()
