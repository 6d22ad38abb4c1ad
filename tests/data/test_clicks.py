"""A click log becomes the columns of the trainer, and bad logs are refused."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from st_fpsloss.data import load_clicks
from tests.click_logs import CHOICE, FILES, LOADED, ROWS, STREAMS, load, place, refusal, stream


@pytest.mark.parametrize("kind", ["dataset", *FILES, *STREAMS])
def test_every_source_gives_the_same_columns_in_the_order_that_the_trainer_reads(kind: str, tmp_path: Path) -> None:
    clicks = load(kind, ROWS, tmp_path, **CHOICE)
    assert isinstance(clicks, IterableDataset if kind in STREAMS else Dataset)
    assert list(clicks) == LOADED
    assert [list(row) for row in clicks] == [list(row) for row in LOADED]
    assert clicks.column_names == ["query", "document", "negative_1", "negative_2", "label"]
    assert list(clicks.features) == clicks.column_names
    assert clicks.features["label"] == Value("float64")


def test_without_a_label_there_is_no_label_column(tmp_path: Path) -> None:
    assert load(".csv", ROWS, tmp_path, query="asked", document="item").column_names == ["query", "document"]


def test_a_dataset_keeps_its_shuffled_order_and_ignores_its_format() -> None:
    shuffled = Dataset.from_list(ROWS).shuffle(seed=1)
    expected = [LOADED[session - 1] for session in shuffled["session"]]
    assert list(load_clicks(shuffled.with_format("numpy"), **CHOICE)) == expected


@pytest.mark.parametrize("kind", ["dataset", ".parquet", ".jsonl", "stream", "streamed.parquet", "streamed.jsonl"])
def test_dicts_stay_and_other_scalars_become_strings(kind: str, tmp_path: Path) -> None:
    rows = [{"query": {"text": "a", "age": 30, "tags": ["x"]}, "document": 7, "label": True}]
    rows += [{"query": {"text": "b", "age": None, "tags": None}, "document": 8, "label": False}]
    clicks = load(kind, rows, tmp_path, label="label")
    assert list(clicks) == [
        {"query": rows[0]["query"], "document": "7", "label": 1.0},
        {"query": rows[1]["query"], "document": "8", "label": 0.0},
    ]
    assert set(clicks.features["query"]) == {"text", "age", "tags"}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no Json")
def test_dicts_that_datasets_stores_as_json_stay_too() -> None:
    rows = {"query": [{"text": "a"}, {"text": "b", "age": 3}], "document": ["x", "y"]}
    log = Dataset.from_dict(rows, features=Features({"query": datasets.Json(), "document": Value("string")}))
    for clicks in (load_clicks(log), load_clicks(log.to_iterable_dataset())):
        assert [row["query"] for row in clicks] == rows["query"]


def test_a_stream_keeps_its_columns_where_a_row_has_more_and_ignores_its_format() -> None:
    rows: list[dict[str, Any]] = [{"query": 1, "document": 2}, {"note": "late", "query": 3, "document": 4}]
    expected = [{"query": "1", "document": "2"}, {"query": "3", "document": "4"}]
    assert list(load_clicks(stream(rows))) == expected
    formatted = stream(rows, Features({"query": Value("float64"), "document": Value("int64")})).with_format("torch")
    assert next(iter(load_clicks(formatted))) == {"query": "1.0", "document": "2"}


def test_categories_and_dates_and_class_labels_of_a_dataset_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"query": pa.array(["a", "b", "a"]).dictionary_encode(), "document": [date(2024, 2, 29)] * 3})
    pq.write_table(table, tmp_path / "log.parquet")
    assert load_clicks(tmp_path / "log.parquet")[2] == {"query": "a", "document": "2024-02-29"}
    log = Dataset.from_dict(
        {"query": ["a"], "document": ["b"], "seen": [1]},
        features=Features({"query": Value("large_string"), "document": Value("string"), "seen": ClassLabel(2)}),
    )
    assert load_clicks(log, label="seen")[0] == {"query": "a", "document": "b", "label": 1.0}


@pytest.mark.parametrize("kind", ["dataset", ".csv", "stream", "streamed.parquet"])
def test_the_trainer_takes_what_load_clicks_returns(kind: str, tmp_path: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "red", "shoes", "tent", "leather", "shoe"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    before = model[0].embedding.weight.detach().clone()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    clicks = load(kind, ROWS, tmp_path, query="asked", document="item", negatives=["other"], label="clicks")
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=clicks, loss=loss).train()
    assert not np.allclose(before.numpy(), model[0].embedding.weight.detach().numpy())


# Logs that are refused.


@pytest.mark.parametrize("kind", ["dataset", *FILES, *STREAMS])
@pytest.mark.parametrize(
    ("argument", "choice"),
    [("query", {"query": "aksed"}), ("label", {"label": "aksed"}), ("negatives", {"negatives": ["other", "aksed"]})],
)
def test_a_missing_column_is_refused_with_the_columns_there_are(
    kind: str, argument: str, choice: dict[str, Any], tmp_path: Path
) -> None:
    parts = [f"{argument}='aksed'", "'session', 'asked', 'item'", "closest is 'asked'", f"Pass {argument}"]
    with pytest.raises(ValueError, match=refusal(*parts)):
        load(kind, ROWS, tmp_path, **{"query": "asked", "document": "item", **choice})


def test_the_closest_column_is_found_whatever_its_case() -> None:
    with pytest.raises(ValueError, match="closest is 'Q'"):
        load_clicks(Dataset.from_dict({"document": ["a"], "Q": ["b"]}), query="q")


@pytest.mark.parametrize(
    "choice",
    [{"document": "asked"}, {"label": "item"}, {"negatives": ["item"]}, {"negatives": ["other", "other"]}],
)
def test_a_column_used_twice_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="used twice"):
        load_clicks(Dataset.from_list(ROWS), **{"query": "asked", "document": "item", **choice})


def test_one_negative_column_has_to_be_in_a_list() -> None:
    with pytest.raises(ValueError, match=re.escape("Pass negatives=['other']")):
        load_clicks(Dataset.from_list(ROWS), "asked", "item", negatives="other")


def test_an_empty_dataset_or_stream_or_parquet_file_is_refused(tmp_path: Path) -> None:
    empty = Dataset.from_dict(
        {"query": [], "document": []}, features=Features({"query": Value("string"), "document": Value("string")})
    )
    empty.to_parquet(tmp_path / "log.parquet")
    sources = [empty, tmp_path / "log.parquet", stream([]), stream([], empty.features)]
    for source in sources:
        with pytest.raises(ValueError, match="is empty"):
            load_clicks(source)


BAD_TEXTS = [("asked", "query", None), ("asked", "query", ""), ("item", "document", "  "), ("other", "negatives", None)]


@pytest.mark.parametrize("kind", ["dataset", *FILES])
@pytest.mark.parametrize(("column", "argument", "value"), BAD_TEXTS)
def test_a_text_that_is_missing_or_blank_is_refused_with_its_row(
    kind: str, column: str, argument: str, value: str | None, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [*ROWS, ROWS[0] | {column: value}]
    with pytest.raises(ValueError, match=refusal(f"{argument}='{column}'", place(kind, 3), "leave it out")):
        load(kind, rows, tmp_path, **CHOICE)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("column", "argument", "value"), [*BAD_TEXTS, ("clicks", "label", float("nan"))])
def test_a_stream_names_its_bad_row(kind: str, column: str, argument: str, value: Any, tmp_path: Path) -> None:
    rows = load(kind, [*ROWS, ROWS[0] | {column: value}, ROWS[1]], tmp_path, **CHOICE)
    with pytest.raises(ValueError, match=refusal(f"{argument}='{column}'", place(kind, 3), "leave it out")):
        list(rows)


@pytest.mark.parametrize("kind", ["dataset", *FILES])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_label_that_is_no_finite_number_is_refused_with_its_row(kind: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=refusal("label='clicks'", place(kind, 3), "finite number")):
        load(kind, [*ROWS, ROWS[0] | {"clicks": value}], tmp_path, **CHOICE)


@pytest.mark.parametrize("kind", ["dataset", *FILES])
def test_a_label_that_is_a_word_is_refused_and_a_number_in_letters_is_read(kind: str, tmp_path: Path) -> None:
    rows = [row | {"clicks": str(row["clicks"])} for row in ROWS]
    assert list(load(kind, rows, tmp_path, **CHOICE)) == LOADED
    with pytest.raises(ValueError, match=refusal("label='clicks'", place(kind, 3), "'often'")):
        load(kind, [*rows, rows[0] | {"clicks": "often"}], tmp_path, **CHOICE)


def test_rows_are_counted_on_beyond_the_first_piece_of_a_log(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "document": "d"} for number in range(25_000)] + [{"query": "", "document": "d"}]
    for kind in ("dataset", ".parquet", ".jsonl", ".csv"):
        with pytest.raises(ValueError, match=place(kind, 25_000)):
            load(kind, rows, tmp_path)


def test_a_list_is_no_text(tmp_path: Path) -> None:
    for kind in ("dataset", ".parquet", ".jsonl"):
        with pytest.raises(ValueError, match=refusal("document='document'", place(kind, 0), "['b']")):
            load(kind, [{"query": "a", "document": ["b"]}], tmp_path)


def test_a_missing_dict_is_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"query": {"text": "a"}, "document": "b"}, {"query": None, "document": "b"}]
    for kind in ("dataset", ".parquet", ".jsonl", "stream"):
        with pytest.raises(ValueError, match=refusal("query='query'", place(kind, 1), "None")):
            list(load(kind, rows, tmp_path))


def test_a_stream_refuses_a_dict_that_would_lose_a_key() -> None:
    rows = [{"query": {"text": "a"}, "document": "b"}] * 1_000 + [{"query": {"text": "a", "age": 3}, "document": "b"}]
    with pytest.raises(ValueError, match=refusal("row 1000", "['age']", "set the stream's features")):
        list(load_clicks(stream(rows)))
    rows[-1] = {"query": {"text": 5}, "document": "b"}
    with pytest.raises(ValueError, match=refusal("row 1000", "does not fit the types")):
        list(load_clicks(stream(rows)))


def test_a_stream_with_features_names_the_row_whose_value_does_not_fit_them() -> None:
    features = Features({"query": Value("int64"), "document": Value("string"), "clicks": Value("float32")})
    good: dict[str, Any] = {"query": 5, "document": "b", "clicks": 0.5}
    assert list(load_clicks(stream([good], features), label="clicks")) == [
        {"query": "5", "document": "b", "label": 0.5}
    ]
    for change in ({"clicks": "often"}, {"clicks": None}, {"query": None}):
        with pytest.raises(ValueError, match=refusal("row 1", repr(*change.values()))):
            list(load_clicks(stream([good, good | change], features), label="clicks"))


def test_a_dataset_is_not_streamed() -> None:
    with pytest.raises(ValueError, match="to_iterable_dataset"):
        load_clicks(Dataset.from_list(ROWS), **CHOICE, streaming=True)
