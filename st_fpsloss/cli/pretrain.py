r"""Pretrain a two-tower model on a click log with FPSLoss, evaluate it, and save it.

The rows are (query, document), from files or the Hub. A query or document is a text, or a JSON object with "text" and
side features. Model, model card and metrics are written to --output_dir.

Examples:
    A search log: a light tower of 2 layers for queries, the newest 5% of the clicks held out.

    st-fpsloss pretrain --dataset clicks.parquet --query_column search --document_column product \
        --query_model sentence-transformers/all-MiniLM-L6-v2 --query_layers 2 \
        --document_model sentence-transformers/all-MiniLM-L6-v2 \
        --eval_fraction 0.05 --time_column clicked_at --output_dir runs/shop --num_train_epochs 1

    A data set of the Hub, and the model pushed to it.

    st-fpsloss pretrain --dataset sentence-transformers/natural-questions \
        --query_column query --document_column answer --eval_fraction 0.02 --similarity cosine \
        --query_model sentence-transformers/all-MiniLM-L6-v2 --query_layers 2 \
        --document_model sentence-transformers/all-MiniLM-L6-v2 \
        --output_dir runs/nq --push_to_hub --hub_model_id me/nq-two-tower

    Users and films with side features, as st-fpsloss movielens writes them.

    st-fpsloss pretrain --dataset data/movielens/train.jsonl \
        --eval_dataset data/movielens/validation.jsonl --documents data/movielens/documents.jsonl --exclude_seen \
        --query_features user=Categorical age=Numerical gender=Categorical occupation=Categorical \
        --document_features film=Categorical genres=Tags year=Numerical \
        --similarity cosine --scale 5 --embedding_dim 128 --hidden_dims 256 --dropout 0.2 \
        --output_dir runs/films --learning_rate 1e-3 --num_train_epochs 10

    The same options from a file; what follows it comes first.

    st-fpsloss pretrain options.yaml --learning_rate 5e-4 --output_dir runs/slower

    On several processes, going on after an interruption with the same command.

    accelerate launch --num_processes 2 -m st_fpsloss.cli pretrain ... --gather_across_devices \
        --save_steps 1000 --resume_from_checkpoint last
"""

from __future__ import annotations

from collections.abc import Sequence

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import set_seed

from st_fpsloss.cli.data import DataArguments, EvaluationArguments
from st_fpsloss.cli.loss import LossArguments, loss_defaults, make_loss
from st_fpsloss.cli.models import TowerArguments, tower_defaults
from st_fpsloss.cli.parser import parse
from st_fpsloss.cli.training import (
    OutputArguments,
    check_rows,
    checkpoint_to_resume,
    run,
    set_columns,
    speed_up_scale,
    start_logging,
)

KINDS = (
    DataArguments,
    TowerArguments,
    LossArguments,
    EvaluationArguments,
    OutputArguments,
    SentenceTransformerTrainingArguments,
)
DEFAULTS = {"output_dir": "runs/pretrain", "per_device_train_batch_size": 512}
COMMON = (
    "dataset", "query_column", "document_column", "label_column",
    "query_model", "document_model", "shared_tower", "query_layers", "align",
    "query_features", "document_features",
    "embedding_dim", "hidden_dims", "similarity", "log_q", "directions", "scale", "max_scale", "cache_gradients",
    "eval_dataset", "eval_fraction", "time_column", "documents", "exclude_seen",
    "output_dir", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "eval_strategy",
    "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub",
)  # fmt: skip
# Learned without a tight bound, α grows past what ranks best; see results/comparisons.md.
MAX_SCALE = 30.0
LOG_Q = {"mask": "corrected", "keep": "standard"}  # by the way that duplicates are treated
USED = {
    "embedding_dim": "that of the encoders",
    "hidden_dims": "one layer, twice the embedding_dim",
    "log_q": f"{LOG_Q['mask']}; with --duplicates keep {LOG_Q['keep']}",
    "max_scale": f"{MAX_SCALE:g}, or the scale where that is more",
    "learning_rate_mapping": 'with a cosine {"logit_scale": 10 times the learning_rate}',
}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the whole of it; returns the metrics on what was held out."""
    used = {**tower_defaults(), **loss_defaults("fps"), **USED}
    data, towers, loss_arguments, evaluation, output, training = parse(
        __doc__, KINDS, argv, prog="st-fpsloss pretrain", common=COMMON, used=used, **DEFAULTS
    )
    start_logging(training)
    output.check(training)
    set_seed(training.seed)
    with training.main_process_first(local=False, desc="reading the data"):
        rows, held_out = evaluation.read(data, data.label_column)
    check_rows(rows)
    evaluator = evaluation.evaluator(data, rows, held_out, training.per_device_eval_batch_size)
    model = towers.build(rows)
    if checkpoint_to_resume(training) is None:
        towers.align_towers(model, rows, training.seed)
    set_columns(training, model, rows.column_names)
    log_q = LOG_Q[loss_arguments.duplicates or "mask"]
    max_scale = max(MAX_SCALE, loss_arguments.scale or 0.0)
    loss = make_loss("fps", model, loss_arguments, rows, training.prompts, log_q=log_q, max_scale=max_scale)
    if loss.similarity == "cosine":
        speed_up_scale(training)
    output.clear(training)
    return run(model, loss, rows, evaluator, training)
