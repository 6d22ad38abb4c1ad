from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.model_card import BaseModelCardData

from st_fpsloss import FPSLoss, LossStateCallback
from st_fpsloss.model_card import record_training
from st_fpsloss.towers import Tower, id_embedding, two_tower
from tests.towers.conftest import IDS, columns, featured_model, features, train, words


def card_of(model: SentenceTransformer, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return (folder / "README.md").read_text()


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def run(code: str, folder: Path) -> dict:
    """Runs the snippet as a reader would, on the saved folder; it prints what its comments say."""
    held: dict = {}
    exec(code.replace("sentence_transformers_model_id", str(folder)), held)
    return held


def check_runs(card: str, folder: Path, capsys: pytest.CaptureFixture) -> dict:
    code = snippet(card)
    assert code.count("trust_remote_code=True") == 1
    capsys.readouterr()
    held = run(code, folder)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tensor")]
    assert f"# {printed[0]}" in code  # the scores in the card are those that the reader sees
    return held


def test_the_snippet_of_a_model_with_features_runs_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held = check_runs(card_of(featured_model(), tmp_path), tmp_path, capsys)
    assert held["queries"][0].keys() == {"seen", "age", "job"}
    assert all(row.keys() == {"text", "item_id", "genres", "year"} for row in held["documents"])
    assert held["similarities"].shape == (1, 3)


def test_the_snippet_runs_where_one_tower_reads_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = two_tower(Tower(words()), Tower(id_embedding(IDS, 8), features=features()[1]), embedding_dim=8)
    held = check_runs(card_of(model, tmp_path), tmp_path, capsys)
    assert isinstance(held["queries"][0], str) and isinstance(held["documents"][0], dict)


def test_the_snippet_of_a_text_model_with_a_bias_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = two_tower(Tower(words()), Tower(words()), embedding_dim=8, document_bias=True)
    held = check_runs(card_of(model, tmp_path), tmp_path, capsys)
    assert isinstance(held["queries"][0], str) and isinstance(held["documents"][0], str)


def test_the_card_says_what_to_install_and_what_an_input_may_hold(tmp_path: Path) -> None:
    card = card_of(featured_model(), tmp_path)
    assert "pip install -U st-fpsloss" in card
    assert "- `seen`: a list of ids, the newest last, at most 5 of them, 20 known values" in card
    assert "- `genres`: a list of categories, 3 known values" in card
    assert '"i17"' not in card  # no vocabulary, however the model is printed


def test_a_trained_model_shows_inputs_of_its_data_if_it_is_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = featured_model()
    model.model_card_data.show_training_rows = True
    data = columns()
    data["query"][0] = {"seen": [f"i{n}" for n in range(20)], "age": 77, "job": None}
    train(model, Dataset.from_dict(data), tmp_path / "out")
    held = check_runs(card_of(model, tmp_path / "model"), tmp_path / "model", capsys)
    assert held["queries"] == [{"seen": ["i15", "i16", "i17", "i18", "i19"], "age": 77}]
    assert held["documents"][1] == data["document"][1]


def test_a_loaded_model_keeps_its_card_and_a_new_name(tmp_path: Path) -> None:
    card = card_of(featured_model(), tmp_path / "one")
    again = SentenceTransformer(str(tmp_path / "one"), trust_remote_code=True)
    assert card_of(again, tmp_path / "two") == card
    again.model_card_data.model_id = "me/films"
    assert 'SentenceTransformer("me/films", trust_remote_code=True)' in card_of(again, tmp_path / "three")


def test_what_the_stock_card_was_told_is_kept(tmp_path: Path) -> None:
    model = featured_model()
    model.model_card_data.set_license("apache-2.0")
    stock = SentenceTransformerModelCardData(license="mit", model_id="me/films")
    built = SentenceTransformer(modules=list(model), model_card_data=stock)
    card = card_of(built, tmp_path)
    assert "license: mit" in card and 'SentenceTransformer("me/films", trust_remote_code=True)' in card


def test_a_card_of_another_kind_is_left_alone() -> None:
    class Own(SentenceTransformerModelCardData):
        pass

    own = Own()
    assert SentenceTransformer(modules=list(featured_model()), model_card_data=own).model_card_data is own


def test_a_text_model_keeps_the_stock_card() -> None:
    model = two_tower(Tower(words()), Tower(words()))
    assert type(model.model_card_data) is SentenceTransformerModelCardData
    assert isinstance(featured_model().model_card_data, BaseModelCardData)


def test_no_training_row_is_shown_unless_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = featured_model()
    data = columns()
    data["query"][0] = {"seen": ["i3"], "age": 77, "job": "nurse"}
    data["document"][1] = {"text": "zebra crossing"}
    train(model, Dataset.from_dict(data), tmp_path / "out")
    card = card_of(model, tmp_path / "model")
    assert "zebra" not in card and "77" not in snippet(card)
    check_runs(card, tmp_path / "model", capsys)


@pytest.mark.parametrize("kind", ["features", "text"])
def test_the_card_of_a_trained_model_has_its_towers_loss_clicks_and_pictures(tmp_path: Path, kind: str) -> None:
    model = featured_model() if kind == "features" else two_tower(Tower(words()), Tower(words()), embedding_dim=8)
    data = Dataset.from_dict(columns() if kind == "features" else {"query": IDS, "document": IDS[::-1]})
    loss = FPSLoss(model)
    record_training(model, {"": loss}, data)
    model.model_card_data.training_logs = [
        {"Step": step, "Epoch": 1.0, "Training Loss": 1 / step} for step in (1, 2, 3)
    ]
    card = card_of(model, tmp_path)
    assert "| query tower |" in card and "MLP" in card
    assert f"<code>FPSLoss</code> with these parameters, α = {round(loss.alpha, 4)} at the end (learned)" in card
    assert f"| rows | {len(data)} |" in card
    assert ("trust_remote_code=True" in card) == (kind == "features")
    for wrong in ("paraphrase", "Semantic Textual", "Supported Modality"):
        assert wrong not in card
    for name in ("learning_curve.png", "softmax.png"):
        assert f'src="assets/{name}"' in card and (tmp_path / "assets" / name).stat().st_size > 1000
    assert model.model_card_data.softmax.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_a_run_with_the_callback_puts_the_learned_scale_and_the_clicks_into_every_card(tmp_path: Path) -> None:
    model = two_tower(Tower(words()), Tower(words()), embedding_dim=8)
    loss = FPSLoss(model, scale=2.0)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=10,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        router_mapping={"query": "query", "document": "document"},
        report_to=[],
    )
    clicks = Dataset.from_dict({"query": IDS, "document": IDS[::-1]})
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=clicks, loss=loss, callbacks=[LossStateCallback(loss)]
    ).train()
    assert loss.alpha != 2.0
    card = card_of(model, tmp_path / "model")
    assert f"α = {round(loss.alpha, 4)} at the end" in card and "| rows | 20 |" in card and "i17" not in card
    early = (tmp_path / "run" / "checkpoint-2" / "README.md").read_text()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["LossStateCallback"]["attributes"]["losses"][""]["logit_scale"]
    assert f"α = {round(math.exp(stored), 4)} at the end" in early
