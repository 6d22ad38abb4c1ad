"""A small training run on the stock trainer, for tests and for processes that tests start."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from st_fpsloss import FPSLoss, LossStateCallback
from tests.losses.conftest import sentences, small_model


def click_log(rows: int = 64, seed: int = 0) -> Dataset:
    """Clicks that repeat queries and documents."""
    rng = random.Random(seed)
    queries, documents = sentences(rows // 4, 6, seed), sentences(rows // 3, 20, seed + 1)
    return Dataset.from_dict({"query": rng.choices(queries, k=rows), "document": rng.choices(documents, k=rows)})


def trainer(
    output_dir: str | Path,
    model: SentenceTransformer | None = None,
    loss: Any = None,
    callback: bool = True,
    dataset: Any = None,
    eval_dataset: Any = None,
    evaluator: Any = None,
    data_collator: Any = None,
    **arguments: Any,
) -> SentenceTransformerTrainer:
    """The stock trainer with its stock arguments."""
    model = small_model(dropout=0.1) if model is None else model
    loss = FPSLoss(model, log_q="corrected") if loss is None else loss
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "router_mapping": {"query": "query", "document": "document"},
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(output_dir), **arguments),
        train_dataset=click_log() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        loss=loss,
        evaluator=evaluator,
        data_collator=data_collator,
        callbacks=[LossStateCallback(loss)] if callback else None,
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
