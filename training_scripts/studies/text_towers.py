"""Two towers of BERT and MLP on a small log of text clicks, beside their own encoder and the stock losses.

Clicks are function names and the first sentences of their docstrings (training_scripts/docstrings.py), encoders
all-MiniLM-L6-v2. Every row of the table trains on the same clicks with the same steps, learning rate and batches. All
figures of one run are taken in one process with one thread: time is the processor's, evaluation left out.

    python -m training_scripts.studies.text_towers --model MINILM --folder runs/text_towers

Results are lines of JSON, each written when its run ends: stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from docstrings import docstrings_of_functions
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TrainerCallback, set_seed

from st_fpsloss import FPSLoss, LossStateCallback, RetrievalEvaluator, Tower, align_towers, two_tower
from st_fpsloss.towers.lora import add_lora
from st_fpsloss.utils.files import append_json_line, json_lines, write_whole

NUM_CLICKS = 3000
NUM_DOCUMENTS, NUM_QUERIES = 1200, 250  # that are ranked, and of each of validation and test
MAX_SEQ_LENGTH = 64
BATCH_SIZE, EVALUATIONS = 128, (12, 24, 48)
LEARNING_RATE, WARMUP_STEPS = 1e-4, 3
HEADS = r"\.\d+\.linear\."


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        model: makes the model; None is the encoder itself.
        loss: ``"fps"``, ``"mnrl"`` or ``"cached"``; None does not train.
        log_q: of FPSLoss.
        align: teach the query tower the document tower's embeddings of the log's texts first.
        rates: learning rates by pattern, in multiples of LEARNING_RATE.
        lora: adapters learn in place of the encoders.
        scale: where the α of FPSLoss starts.
        steps: of training.
    """

    name: str
    model: Callable[[str, list[str]], SentenceTransformer]
    loss: str | None = "fps"
    log_q: str | None = "corrected"
    align: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    lora: bool = False
    scale: float | None = None
    steps: int = 24


def encoder(path: str, texts: list[str]) -> SentenceTransformer:
    """The encoder itself."""
    model = SentenceTransformer(path, device="cpu")
    model.max_seq_length = MAX_SEQ_LENGTH
    return model


def towers(texts_for_pca: bool = False, **arguments: Any) -> Callable[[str, list[str]], SentenceTransformer]:
    """Two towers; ``query_`` in front of an argument of Tower gives it to the query tower alone."""

    def build(path: str, texts: list[str]) -> SentenceTransformer:
        of_query = {name[6:]: value for name, value in arguments.items() if name.startswith("query_")}
        of_both = {name: value for name, value in arguments.items() if name in ("hidden_dims", "frozen", "dropout")}
        return two_tower(
            Tower(path, max_seq_length=MAX_SEQ_LENGTH, **{**of_both, **of_query}),
            Tower(path, max_seq_length=MAX_SEQ_LENGTH, **of_both),
            embedding_dim=arguments.get("embedding_dim"),
            similarity="cosine",
            texts=texts if texts_for_pca else None,
        )

    return build


def random_heads(path: str, texts: list[str]) -> SentenceTransformer:
    """Two towers as they were before they started as their encoder: six layers each, random heads."""
    model = towers(hidden_dims=(512,), embedding_dim=256)(path, texts)
    for module in model.modules():
        if isinstance(module, Dense):
            module.linear.reset_parameters()
    return model


def static_query(path: str, texts: list[str]) -> SentenceTransformer:
    """A StaticEmbedding from scratch reads queries."""
    tokenizer = SentenceTransformer(path, device="cpu").tokenizer
    static = StaticEmbedding(tokenizer, embedding_dim=384)
    return two_tower(
        Tower(static, hidden_dims=()),
        Tower(path, max_seq_length=MAX_SEQ_LENGTH),
        embedding_dim=384,
        similarity="cosine",
    )


BEST = {"log_q": None, "scale": 20.0}
ROWS = [
    Row("the encoder, untrained", encoder, loss=None),
    Row("FPSLoss on the encoder", encoder),
    Row("two towers", towers()),
    Row("CachedMultipleNegativesRankingLoss on the encoder", encoder, "cached"),
    Row("two towers, random heads", random_heads),
    Row("FPSLoss on the encoder, no log_q", encoder, log_q=None),
    Row("FPSLoss on the encoder, no log_q, α from 20", encoder, steps=48, **BEST),
    Row("two towers, no log_q, α from 20", towers(), steps=48, **BEST),
    Row("... query tower of 2 layers, aligned", towers(query_num_hidden_layers=2), align=True, **BEST),
    Row("... query tower a StaticEmbedding, aligned", static_query, align=True, **BEST),
    Row("... heads ten times as fast", towers(), rates={HEADS: 10}, **BEST),
    Row("... query tower of 2 layers, not aligned", towers(query_num_hidden_layers=2), **BEST),
    Row("... frozen encoders, heads ten times as fast", towers(frozen=True), rates={HEADS: 10}, **BEST),
    Row("... LoRA of rank 16 at ten times the rate", towers(), rates={"lora": 10}, lora=True, **BEST),
    Row("MultipleNegativesRankingLoss on the encoder", encoder, "mnrl"),
    Row("... 256 dimensions by PCA", towers(texts_for_pca=True, embedding_dim=256), **BEST),
    Row("... dropout .1 in the MLP", towers(dropout=0.1), **BEST),
]


@dataclass(frozen=True)
class Data:
    """The log, and whose rankings are judged."""

    clicks: Dataset
    evaluator: RetrievalEvaluator
    texts: list[str]  # the log's own, for what learns without clicks


def load(folder: Path) -> Data:
    """The small log; queries of validation and test, against what is relevant to them and a sample of the rest.

    Of the distinct pairs a tenth is validation, a tenth test. Other documents of a
    query, trained or not, are left out of its ranking.
    """
    path = folder / "docstrings.tsv"
    if not path.exists():
        write_whole(path, "".join(f"{query}\t{text}\n" for query, text in docstrings_of_functions()))
    clicks = [tuple(line.split("\t")) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = sorted(set(clicks))
    part_of = dict(zip(pairs, np.minimum(np.random.default_rng(0).random(len(pairs)) * 10, 2).astype(int), strict=True))
    number_of = {text: number for number, text in enumerate(dict.fromkeys(text for _, text in clicks))}
    documents_of: list[dict[str, set[int]]] = [{}, {}, {}]  # of each part: query -> its documents
    for (query, text), part in part_of.items():
        documents_of[part].setdefault(query, set()).add(number_of[text])

    generator = np.random.default_rng(0)
    relevant = {
        (part, query): documents_of[part][query]
        for part in range(2)
        for query in generator.permutation(sorted(documents_of[part]))[:NUM_QUERIES].tolist()
    }
    needed = sorted(set().union(*relevant.values()))
    others = np.setdiff1d(generator.permutation(len(number_of)), needed, assume_unique=True)
    texts = list(number_of)
    documents = {number: texts[number] for number in [*needed, *others[: NUM_DOCUMENTS - len(needed)].tolist()]}
    seen = {
        (part, query): set().union(*(documents_of[n].get(query, set()) for n in range(3) if n != part))
        & documents.keys()
        for part, query in relevant
    }
    queries = {key: key[1] for key in relevant}
    training = Dataset.from_dict(
        dict(zip(("query", "document"), zip(*(p for p in clicks if part_of[p] == 2), strict=True), strict=True))
    )
    training = training.shuffle(seed=0).select(range(min(NUM_CLICKS, len(training))))
    return Data(
        clicks=training,
        evaluator=RetrievalEvaluator(queries, documents, relevant, seen_docs=seen, at=(10,), batch_size=128),
        texts=list(dict.fromkeys([*training["query"], *training["document"]])),
    )


class Curve(TrainerCallback):
    """Evaluates at some steps, and keeps the processor's time of training alone."""

    def __init__(self, data: Data, model: SentenceTransformer) -> None:
        self.data, self.model = data, model
        self.seconds, self.points = 0.0, []
        self.per_query = np.zeros(0)

    def evaluate(self, step: int) -> None:
        """Adds a point."""
        self.per_query = self.data.evaluator.per_query(self.model)["ndcg@10"]
        validation, test = self.per_query[:NUM_QUERIES].mean(), self.per_query[NUM_QUERIES:].mean()
        self.points.append(
            {"step": step, "seconds": round(self.seconds, 2), "validation": float(validation), "test": float(test)}
        )
        print(self.points[-1], flush=True)

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        """Starts the clock."""
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stops the clock, evaluates where it is due, starts it again."""
        self.seconds += time.process_time() - self._started
        if state.global_step in EVALUATIONS:
            self.evaluate(state.global_step)
        self._started = time.process_time()


def execute(row: Row, seed: int, path: str, data: Data) -> dict[str, Any]:
    """Trains and evaluates one row."""
    set_seed(seed)
    model = row.model(path, data.texts)
    if row.lora:
        add_lora(model, rank=16)
    result: dict[str, Any] = {"row": row.name, "seed": seed}
    if row.align:
        started = time.process_time()
        result["agreement"] = align_towers(model, data.texts, seed=seed)
        result["align_seconds"] = round(time.process_time() - started, 1)
    curve = Curve(data, model)
    if row.loss is None or row.align or "not aligned" in row.name:
        curve.evaluate(0)
    if row.loss is not None:
        result["alpha"] = _train(row, seed, data, model, curve)
    result["points"] = curve.points
    result["per_query"] = [round(float(value), 4) for value in curve.per_query]
    started = time.process_time()
    model.encode_query([query for _, query in data.evaluator.query_ids][:200], batch_size=1)
    result["query_ms"] = round((time.process_time() - started) * 5, 2)
    return result


def _train(row: Row, seed: int, data: Data, model: SentenceTransformer, curve: Curve) -> float | None:
    stock = {
        "mnrl": lambda: MultipleNegativesRankingLoss(model),
        "cached": lambda: CachedMultipleNegativesRankingLoss(model, mini_batch_size=64),
    }
    loss = FPSLoss(model, log_q=row.log_q, scale=row.scale) if row.loss == "fps" else stock[row.loss]()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=row.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            learning_rate_mapping={pattern: LEARNING_RATE * factor for pattern, factor in row.rates.items()},
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARMUP_STEPS,
            # What their documentation advises; FPSLoss masks what repeats.
            batch_sampler=BatchSamplers.BATCH_SAMPLER if row.loss == "fps" else BatchSamplers.NO_DUPLICATES,
            router_mapping={"query": "query", "document": "document"} if isinstance(model[0], Router) else {},
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=seed,
        )
        callbacks = [curve, *([LossStateCallback(loss)] if row.loss == "fps" else [])]
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data.clicks, loss=loss, callbacks=callbacks
        ).train()
    return round(loss.alpha, 3) if row.loss == "fps" else None


def main() -> None:
    """Runs what is missing, rows of one seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of all-MiniLM-L6-v2")
    parser.add_argument("--folder", type=Path, required=True, help="of the data and of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="parts of the names of rows; all of them by default")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = arguments.folder / "results.jsonl"
    data = load(arguments.folder)
    for seed in arguments.seeds:
        for row in ROWS:
            done = {(result["row"], result["seed"]) for result in json_lines(results)}
            if (row.name, seed) in done or (row.loss is None and seed > 0):
                continue
            if arguments.rows is None or any(part in row.name for part in arguments.rows):
                print(row.name, seed, flush=True)
                append_json_line(results, execute(row, seed, arguments.model, data))


if __name__ == "__main__":
    main()
