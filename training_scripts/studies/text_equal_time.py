"""FPSLoss and the stock losses on text clicks, each for the same seconds of the processor.

Clicks are function names and the first sentences of their docstrings, all of them but a fifth that is judged; encoders
are all-MiniLM-L6-v2. Every run has one thread, and ends when training has used its seconds; evaluation is left out.

    python -m training_scripts.studies.text_equal_time --model MINILM --folder runs/text_towers --seconds 250
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TrainerCallback, set_seed

from st_fpsloss import FPSLoss, LossStateCallback
from st_fpsloss.evaluation import bootstrap_interval, paired_difference
from st_fpsloss.utils.files import append_json_line, json_lines
from training_scripts.studies import text_towers
from training_scripts.studies.text_towers import Data, encoder, load, towers

LEARNING_RATE, WARMUP_STEPS = 1e-4, 3


@dataclass(frozen=True)
class Contender:
    """A model, and the loss that trains it."""

    model: Callable[[str, list[str]], SentenceTransformer]
    loss: Callable[[SentenceTransformer], torch.nn.Module]


CONTENDERS = {
    "CachedMultipleNegativesRankingLoss": Contender(
        encoder, lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
    ),
    "FPSLoss": Contender(encoder, lambda model: FPSLoss(model, scale=20.0)),
    "FPSLoss, log_q": Contender(encoder, lambda model: FPSLoss(model, scale=20.0, log_q="corrected")),
    "FPSLoss, two towers": Contender(towers(), lambda model: FPSLoss(model, scale=20.0)),
}


class Budget(TrainerCallback):
    """Ends training after so many seconds of the processor."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps = seconds, 0

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        """Starts the clock."""
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Looks at the clock."""
        self.steps = state.global_step
        control.should_training_stop = time.process_time() - self._started >= self.seconds


def execute(name: str, seed: int, seconds: float, batch_size: int, path: str, data: Data) -> dict[str, Any]:
    """Trains one contender for its time, and judges it at the end."""
    set_seed(seed)
    contender = CONTENDERS[name]
    model = contender.model(path, data.texts)
    loss, budget = contender.loss(model), Budget(seconds)
    ours = isinstance(loss, FPSLoss)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARMUP_STEPS,
            # What the documentation of the stock loss advises; FPSLoss masks what repeats.
            batch_sampler=BatchSamplers.BATCH_SAMPLER if ours else BatchSamplers.NO_DUPLICATES,
            router_mapping={"query": "query", "document": "document"} if isinstance(model[0], Router) else {},
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=seed,
        )
        callbacks = [budget, *([LossStateCallback(loss)] if ours else [])]
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data.clicks, loss=loss, callbacks=callbacks
        ).train()
    values = data.evaluator.per_query(model)["ndcg@10"]
    return {
        "contender": name,
        "seed": seed,
        "seconds": seconds,
        "batch_size": batch_size,
        "steps": budget.steps,
        "per_query": [round(float(value), 4) for value in values],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means with intervals, and what each is ahead of the stock loss on the same queries."""
    lines = ["| | steps | NDCG@10 (95% interval) | less the stock loss (95% interval) |", "|---|---|---|---|"]
    stock = next((result for result in results if result["contender"].startswith("Cached")), None)
    for result in results:
        values = result["per_query"]
        low, high = bootstrap_interval(values)
        ahead = ""
        if stock is not None and result is not stock:
            ahead = "{:+.4f} ({:+.4f} to {:+.4f})".format(*paired_difference(values, stock["per_query"]))
        mean = sum(values) / len(values)
        lines.append(f"| {result['contender']} | {result['steps']} | {mean:.4f} ({low:.4f} to {high:.4f}) | {ahead} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of all-MiniLM-L6-v2")
    parser.add_argument("--folder", type=Path, required=True, help="of the data and of the results")
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "equal_time.jsonl"
    setting = {"seed": arguments.seed, "seconds": arguments.seconds, "batch_size": arguments.batch_size}

    def finished() -> list[dict[str, Any]]:
        return [result for result in json_lines(path) if setting.items() <= result.items()]

    text_towers.NUM_CLICKS, text_towers.NUM_DOCUMENTS, text_towers.NUM_QUERIES = 10**9, 4000, 1000
    data = load(arguments.folder)
    for name in arguments.contenders:
        if name not in {result["contender"] for result in finished()}:
            append_json_line(path, execute(name, **setting, path=arguments.model, data=data))
    print(table(finished()))


if __name__ == "__main__":
    main()
