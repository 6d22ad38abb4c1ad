"""Training warns where a model ranks below its own encoder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Dense

from st_fpsloss import FPSLoss, LossStateCallback, Tower, two_tower

COLOURS, THINGS = ("red", "blue", "green", "black", "white"), ("shoes", "coat", "hat", "bag")
PAIRS = [(f"{colour} {thing}", f"a {thing} for the winter, {colour}") for colour in COLOURS for thing in THINGS]
LOG = Dataset.from_dict({"query": [q for q, _ in PAIRS], "document": [d for _, d in PAIRS]})


def train(model: SentenceTransformer, folder: Path, learning_rate: float, caplog: pytest.LogCaptureFixture) -> str:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=20,
        learning_rate=learning_rate,
        router_mapping={"query": "query", "document": "document"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = FPSLoss(model)
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=LOG, loss=loss, callbacks=[LossStateCallback(loss)]
    ).train()
    return caplog.text


def model_of(minilm: str) -> SentenceTransformer:
    return two_tower(*(Tower(minilm, num_hidden_layers=3, frozen=True) for _ in range(2)), similarity="cosine")


def test_random_heads_are_warned_of_before_training_and_after(
    minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = model_of(minilm)
    for module in model.modules():
        if isinstance(module, Dense):
            module.linear.reset_parameters()
    logged = train(model, tmp_path, 0.0, caplog)
    assert logged.count("ranks below its own document encoder before training") == 1
    assert logged.count("still ranks below its own document encoder") == 1


def test_towers_that_start_as_their_encoder_are_not_warned_of_unless_training_spoils_them(
    minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(minilm)
    assert "below its own" not in train(model, tmp_path, 1e-4, caplog)
    assert model[0].sub_modules["query"][0].training is False
    caplog.clear()
    for parameter in model[0].sub_modules["query"][3].parameters():
        parameter.data.normal_()
    train(model, tmp_path, 1e-4, caplog)
    warned = [record for record in caplog.records if "below its own" in record.message]
    assert len(warned) == 2 and {record.levelno for record in warned} == {logging.WARNING}


def test_a_log_that_is_no_text_is_not_looked_at(minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from st_fpsloss.training.encoder_check import EncoderCheck

    check = EncoderCheck()
    model = model_of(minilm)
    for log in (LOG.select(range(5)), LOG.select_columns("query"), LOG.map(lambda row: {"query": {"text": "x"}}), None):
        assert check.before(model, log) == [] and check.after(model) == []
