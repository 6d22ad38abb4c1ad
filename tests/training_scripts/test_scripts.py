"""The scripts that one copies run as they stand, at tiny size, each on what the one before left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

import training_scripts.studies  # noqa: F401  (the scripts import each other by their bare names)
from st_fpsloss.towers import id_transformer
from training_scripts import (
    evaluate_and_index,
    finetune_grades,
    hard_negatives,
    pretrain_text_clicks,
    pretrain_users_items,
)

SCRIPTS = Path(pretrain_text_clicks.__file__).parent
PACKAGES = ["--packages", "unittest", "logging", "asyncio"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformer of one layer, in place of the Hub's."""
    folder = tmp_path_factory.mktemp("encoder")
    log = pretrain_text_clicks.docstring_clicks(PACKAGES[1:])
    words = sorted({word for text in [*log["query"], *log["document"]] for word in text.split()})
    torch.manual_seed(0)
    transformer = id_transformer(words, 32, 2, 2, max_seq_length=64, dropout=0.0)
    SentenceTransformer(modules=[transformer, Pooling(32)]).save_pretrained(str(folder))
    return str(folder)


def test_texts_are_pretrained_mined_evaluated_and_searched(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained, hard = tmp_path / "pretrained", tmp_path / "hard"
    words = [*PACKAGES, "--max_steps", "4"]
    pretrain_text_clicks.main([*words, "--model", encoder, "--output_dir", str(pretrained), "--batch_size", "32"])
    before, after = hard_negatives.main([*words, "--model", f"{pretrained}/model", "--output_dir", str(hard)])
    one, other = (SentenceTransformer(f"{path}/model").encode_query(["add handler"]) for path in (pretrained, hard))
    assert abs(one - other).max() > 1e-6
    models = ["--models", f"{pretrained}/model", f"{hard}/model"]
    found = evaluate_and_index.main(
        [*PACKAGES, *models, "--index", str(tmp_path / "index"), "--queries", "add handler"]
    )
    assert len(found[0]) == 3
    shown = capsys.readouterr().out
    assert f"NDCG@10 {before:.4f} before, {after:.4f} after" in shown
    assert f"{hard}/model less {pretrained}/model: " in shown and "\nadd handler\n" in shown


def test_users_and_items_are_pretrained_and_fine_tuned_on_stars(tmp_path: Path) -> None:
    metrics = pretrain_users_items.main(["--max_steps", "60", "--output_dir", str(tmp_path / "clicks")])
    assert metrics["ndcg@10"] > 0.02  # by chance 0.004
    words = ["--model", f"{tmp_path}/clicks/model", "--max_steps", "20", "--output_dir", str(tmp_path / "rated")]
    before, after = finetune_grades.main(words)
    assert after > before > 0.5
    assert SentenceTransformer(f"{tmp_path}/rated/model", trust_remote_code=True).similarity_fn_name == "cosine"


def test_the_scripts_are_short_enough_to_copy() -> None:
    modules = (evaluate_and_index, finetune_grades, hard_negatives, pretrain_text_clicks, pretrain_users_items)
    for module in modules:
        assert 60 <= len(Path(module.__file__).read_text().splitlines()) <= 105, module.__name__
        assert sys.modules[module.__name__].__doc__
