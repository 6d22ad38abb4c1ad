"""A training run of a script on the stock trainer: columns, resuming, evaluation, saving and pushing."""

from __future__ import annotations

import logging
import reprlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from st_fpsloss.data.inputs import LABEL_COLUMNS, canonical_string, is_positive
from st_fpsloss.evaluation import RetrievalEvaluator
from st_fpsloss.losses.base import ClickLoss
from st_fpsloss.training import LossStateCallback, last_complete_checkpoint
from st_fpsloss.training.saving import holds_model, replaced_model

_SCALE_SPEED = 10
LAST_CHECKPOINT = "last"
"""What ``--resume_from_checkpoint`` says for the newest complete checkpoint, or the start where there is none."""


@dataclass
class OutputArguments:
    """What becomes of an earlier run in ``--output_dir``."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "remove the checkpoints that output_dir holds, and in the end replace its model"},
    )

    def check(self, training: SentenceTransformerTrainingArguments) -> None:
        """Refuses to train over an earlier run that nothing is said about.

        Raises:
            ValueError: If ``output_dir`` holds checkpoints or a model, or is to be overwritten and gone on with.
        """
        folder, resumes = training.output_dir, training.resume_from_checkpoint is not None
        if self.overwrite_output_dir and resumes:
            raise ValueError("--overwrite_output_dir and --resume_from_checkpoint contradict each other: pass one.")
        if self.overwrite_output_dir or resumes:
            return
        has_checkpoints = any(_checkpoints(training))
        if has_checkpoints or holds_model(folder):
            on = f"--resume_from_checkpoint {LAST_CHECKPOINT} to go on with it, " if has_checkpoints else ""
            held = "checkpoints of an earlier run" if has_checkpoints else "a model"
            raise ValueError(
                f"--output_dir={folder} holds {held}. Pass {on}--overwrite_output_dir to replace it, or another "
                "output_dir."
            )

    def clear(self, training: SentenceTransformerTrainingArguments) -> None:
        """Removes the checkpoints that are to be overwritten: the run must not mix its own with them."""
        if self.overwrite_output_dir and training.should_save:
            for checkpoint in _checkpoints(training):
                shutil.rmtree(checkpoint)


def start_logging(training: SentenceTransformerTrainingArguments) -> None:
    """Logs what the package says, on the main process alone."""
    level = logging.INFO if training.process_index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def checkpoint_to_resume(training: SentenceTransformerTrainingArguments) -> str | None:
    """Returns the checkpoint that ``--resume_from_checkpoint`` names; None starts at the beginning.

    Raises:
        ValueError: If it is no folder.
    """
    asked = training.resume_from_checkpoint
    if asked == LAST_CHECKPOINT:
        return last_complete_checkpoint(training.output_dir)
    if asked is None:
        return None
    if not Path(asked).is_dir():
        raise ValueError(
            f"--resume_from_checkpoint={asked!r} is no folder. Pass a checkpoint, or {LAST_CHECKPOINT} for the newest "
            "complete one in output_dir."
        )
    return asked


def _checkpoints(training: SentenceTransformerTrainingArguments) -> list[Path]:
    return list(Path(training.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def check_rows(rows: Dataset, drawn: Sequence[Any] = ()) -> None:
    """Refuses rows that can teach nothing, before a model is built.

    Args:
        rows: The training rows: query, document, negative columns, and a label.
        drawn: The documents that negatives are drawn from, where they are.

    Raises:
        ValueError: If no row has r > 0, or there is one document and no other to compare it with.
    """
    if not is_positive(rows).any():
        raise ValueError(
            f"--label_column: all {len(rows)} training rows have r <= 0, so there is no click to learn from. Name a "
            "column that is above 0 for clicks, or leave out --label_column where every row is one."
        )
    if any(name.startswith("negative_") for name in rows.column_names):
        return
    documents = chain(rows.with_format(None)["document"], drawn)
    first = next(documents)
    if all(canonical_string(other) == canonical_string(first) for other in documents):  # ends at the second document
        raise ValueError(
            f"--document_column: all {len(rows)} training rows have one and the same document, "
            f"{reprlib.repr(first)}, so there is nothing to compare it with. Name the column "
            "of the documents, or pass rows with at least two."
        )


def set_columns(
    training: SentenceTransformerTrainingArguments, model: SentenceTransformer, columns: Sequence[str]
) -> None:
    """Tells the trainer which column goes to which tower, and which prompts of the model stand before it.

    What the command line says comes first.

    Args:
        training: The training arguments, changed in place.
        model: The model, which may have prompts for queries and documents.
        columns: Those of the training rows: the query, then documents, and a label.
    """
    query, *documents = [column for column in columns if column not in LABEL_COLUMNS]
    towers = {query: "query", **dict.fromkeys(documents, "document")}
    if not training.router_mapping:
        training.router_mapping = towers
    if training.prompts is None:
        prompts = {column: model.prompts.get(tower) for column, tower in towers.items()}
        training.prompts = {column: prompt for column, prompt in prompts.items() if prompt} or None


def speed_up_scale(training: SentenceTransformerTrainingArguments) -> None:
    """Gives α ten times the learning rate of the encoders, unless the command line gives it one.

    At the encoders' own rate a start that is far off is not made good within a run (``results/comparisons.md``).

    Args:
        training: The training arguments, changed in place.
    """
    training.learning_rate_mapping = {
        "logit_scale": _SCALE_SPEED * training.learning_rate,
        **(training.learning_rate_mapping or {}),
    }


def document_prompt(training: SentenceTransformerTrainingArguments) -> str | None:
    """Returns what stands before documents in training, after :func:`set_columns`."""
    prompts = training.prompts
    return prompts.get("document") if isinstance(prompts, dict) else prompts


class _Trainer(SentenceTransformerTrainer):
    """The stock trainer, but the model in ``output_dir`` is replaced whole or not at all."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a checkpoint, or the model, as what calls it wants."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            with replaced_model(self.args.output_dir) as folder:
                super().save_model(str(folder), _internal_call=True)


def run(
    model: SentenceTransformer,
    loss: ClickLoss,
    rows: Dataset,
    evaluator: RetrievalEvaluator | None,
    training: SentenceTransformerTrainingArguments,
) -> dict[str, float]:
    """Trains, evaluates, and writes model, model card and metrics to ``output_dir``; pushes them where asked.

    Args:
        model: The model, changed in place.
        loss: Its loss.
        rows: What to train on.
        evaluator: Evaluates as ``eval_strategy`` says, and at the end; None does not.
        training: The training arguments, after :func:`set_columns`.

    Returns:
        The metrics at the end; {} without an evaluator.
    """
    checkpoint = checkpoint_to_resume(training)
    trainer = _Trainer(
        model=model,
        args=training,
        train_dataset=rows,
        loss=loss,
        evaluator=evaluator,
        callbacks=[LossStateCallback(loss)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics: dict[str, float] = {}
    if evaluator is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    if training.push_to_hub:  # saves first
        trainer.push_to_hub()
    else:
        trainer.save_model()
    return metrics
