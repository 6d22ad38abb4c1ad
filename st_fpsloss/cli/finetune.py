r"""Fine-tune a pretrained model on one's own task, with the loss and the negatives that suit it.

The model is a folder (what st-fpsloss pretrain wrote, or any sentence-transformers model) or a Hub id. The rows are
(query, document), from files or the Hub, with negative columns, a label, a grade, or none of these. Model, model card
and metrics are written to --output_dir.

Examples:
    Clicks, each against 10 sampled documents that its query did not click.

    st-fpsloss finetune --model runs/shop --dataset orders.parquet \
        --query_column search --document_column product --loss sampled_softmax --negatives sampled \
        --num_negatives 10 --eval_fraction 0.05 --output_dir runs/shop-orders

    Half of the negatives mined with the model itself, and the result pushed to the Hub.

    st-fpsloss finetune --model me/nq-two-tower --dataset sentence-transformers/natural-questions \
        --query_column query --document_column answer --loss fps --negatives mixed --num_negatives 4 \
        --hard_first_rank 5 --hard_margin 0.05 --output_dir runs/nq --push_to_hub --hub_model_id me/nq-two-tower-2

    Shown and not clicked: a label of 0 makes a row's document a negative of its query.

    st-fpsloss finetune --model runs/shop --dataset impressions.parquet --label_column clicked \
        --loss triplet --margin 0.2 --output_dir runs/shop-triplet

    Ratings: the films that a user gave more stars against those with fewer. The files come from
    st-fpsloss movielens, the model, which has features, from st-fpsloss pretrain. With more than two grades a
    document is the better in one row and the worse in another, so positives are not masked (--duplicates keep).

    st-fpsloss finetune --model runs/films --trust_remote_code \
        --dataset data/movielens/train.jsonl --grade_column rating --max_pairs 50 --loss pair_ce \
        --eval_dataset data/movielens/validation.jsonl --documents data/movielens/documents.jsonl --exclude_seen \
        --output_dir runs/films-rated --learning_rate 1e-4 --num_train_epochs 1

    On several processes, going on after an interruption with the same command.

    accelerate launch --num_processes 2 -m st_fpsloss.cli finetune ... --save_steps 1000 \
        --resume_from_checkpoint last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss.cli.data import DataArguments, EvaluationArguments
from st_fpsloss.cli.loss import LossArguments, LossName, loss_defaults, make_loss
from st_fpsloss.cli.models import load_model
from st_fpsloss.cli.negatives import NegativeArguments
from st_fpsloss.cli.parser import parse
from st_fpsloss.cli.training import (
    OutputArguments,
    check_rows,
    document_prompt,
    run,
    set_columns,
    start_logging,
)
from st_fpsloss.data.inputs import distinct


@dataclass
class Options:
    """What to fine-tune, and how."""

    _argument_group_name = "model"

    model: str = field(metadata={"help": "folder or Hub id of the pretrained model"})
    loss: LossName = field(default="pair_ce", metadata={"help": "the loss"})
    trust_remote_code: bool = field(default=False, metadata={"help": "needed for a model with features or a bias"})


KINDS = (
    Options,
    DataArguments,
    NegativeArguments,
    LossArguments,
    EvaluationArguments,
    OutputArguments,
    SentenceTransformerTrainingArguments,
)
DEFAULTS = {"output_dir": "runs/finetune", "per_device_train_batch_size": 64}
COMMON = (
    "model", "loss", "trust_remote_code",
    "dataset", "query_column", "document_column", "label_column",
    "negatives", "negative_columns", "num_negatives", "hard_first_rank", "hard_margin", "grade_column", "max_pairs",
    "scale", "margin", "log_q", "cache_gradients",
    "eval_dataset", "eval_fraction", "time_column", "documents", "exclude_seen",
    "output_dir", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "eval_strategy",
    "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub",
)  # fmt: skip
USED = {
    "log_q": "corrected; with --duplicates keep standard",
    "duplicates": "mask; with --grade_column keep",
}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the whole of it; returns the metrics on what was held out."""
    options, data, negatives, loss_arguments, evaluation, output, training = parse(
        __doc__, KINDS, argv, prog="st-fpsloss finetune", common=COMMON, used={**loss_defaults(), **USED}, **DEFAULTS
    )
    start_logging(training)
    output.check(training)
    set_seed(training.seed)
    negatives.check(options.loss, data.label_column, loss_arguments)
    label = negatives.grade_column or data.label_column
    with training.main_process_first(local=False, desc="reading the data"):
        rows, held_out = evaluation.read(data, label, negatives.negative_columns)
    evaluator = evaluation.evaluator(data, rows, held_out, training.per_device_eval_batch_size)
    corpus = evaluation.corpus(data, rows)
    if negatives.grade_column is not None:
        rows = negatives.compare_grades(rows, loss_arguments, training.seed)
    check_rows(rows, corpus if negatives.are_drawn else ())
    model = load_model(options.model, options.trust_remote_code)
    rows = negatives.add_columns(rows, model, corpus, training)
    set_columns(training, model, rows.column_names)
    settings = negatives.settings(options.loss, rows, model, loss_arguments, training)
    if options.loss == "full_softmax":
        every = distinct([*corpus, *rows.with_format(None)["document"]])
        settings |= {"corpus": list(every.values()), "corpus_prompt": document_prompt(training)}
    loss = make_loss(options.loss, model, loss_arguments, rows, training.prompts, **settings)
    output.clear(training)
    return run(model, loss, rows, evaluator, training)
