"""A click log becomes the columns of the trainer, bad logs are refused, and the splits follow their protocols."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Json, Value, concatenate_datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from st_fpsloss.clicks import histories, leave_last_out, load_clicks, next_item_pairs, split_by_time

ROWS = [
    {"session": 1, "asked": "red shoes", "item": "leather shoe", "other": "tent", "worse": "stove", "clicks": 1.0},
    {"session": 2, "asked": "tent", "item": "tent", "other": "red shoes", "worse": "pan", "clicks": 0.0},
    {"session": 3, "asked": "NA", "item": "007", "other": "null", "worse": "a\tb, c", "clicks": 2.5},
]
LOADED = [
    {
        "query": row["asked"],
        "document": row["item"],
        "negative_1": row["worse"],
        "negative_2": row["other"],
        "label": row["clicks"],
    }
    for row in ROWS
]
CHOICE: dict[str, Any] = {"query": "asked", "document": "item", "negatives": ["worse", "other"], "label": "clicks"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    log = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        log.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        log.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def stream(rows: list[dict[str, Any]], features: Features | None = None) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate, features=features)


def load(kind: str, rows: list[dict[str, Any]], folder: Path, **choice: Any) -> Dataset | IterableDataset:
    """Loads the rows from a source of the kind: a suffix, "streamed" + suffix, "dataset" or "stream"."""
    if kind == "dataset":
        return load_clicks(Dataset.from_list(rows), **choice)
    if kind == "stream":
        return load_clicks(stream(rows), **choice)
    streaming = kind.startswith("streamed")
    return load_clicks(write(folder / f"log{kind.removeprefix('streamed')}", rows), streaming=streaming, **choice)


FILES = [".csv", ".tsv", ".parquet", ".jsonl"]
STREAMS = ["stream", *(f"streamed{suffix}" for suffix in FILES)]


@pytest.mark.parametrize("kind", ["dataset", *FILES, *STREAMS])
def test_every_source_gives_the_same_columns_in_the_order_that_the_trainer_reads(kind: str, tmp_path: Path) -> None:
    clicks = load(kind, ROWS, tmp_path, **CHOICE)
    assert isinstance(clicks, IterableDataset if kind in STREAMS else Dataset)
    assert list(clicks) == LOADED
    assert [list(row) for row in clicks] == [list(row) for row in LOADED]
    assert clicks.column_names == ["query", "document", "negative_1", "negative_2", "label"]
    assert list(clicks.features) == clicks.column_names
    assert clicks.features["label"] == Value("float64")


def test_files_of_one_kind_are_read_one_after_the_other(tmp_path: Path) -> None:
    paths = [write(tmp_path / "one[1].csv", ROWS[:2]), str(write(tmp_path / ".two.csv", ROWS[2:]))]
    assert list(load_clicks(paths, **CHOICE)) == LOADED
    assert list(load_clicks(paths, **CHOICE, streaming=True)) == LOADED
    assert load_clicks(paths, **CHOICE, streaming=True).num_shards == 2


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


def test_dicts_that_datasets_stores_as_json_stay_too() -> None:
    rows = {"query": [{"text": "a"}, {"text": "b", "age": 3}], "document": ["x", "y"]}
    log = Dataset.from_dict(rows, features=Features({"query": Json(), "document": Value("string")}))
    for clicks in (load_clicks(log), load_clicks(log.to_iterable_dataset())):
        assert [row["query"] for row in clicks] == rows["query"]


def test_jsonl_unites_the_keys_of_its_dicts_and_takes_numbers_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"query": {"text": "a"}, "document": 18446744073709551615}\n\n'
        '{"query": {"text": "b", "age": 3}, "document": "x9"}\n'
    )
    assert list(load_clicks(path)) == [
        {"query": {"text": "a", "age": None}, "document": "18446744073709551615"},
        {"query": {"text": "b", "age": 3}, "document": "x9"},
    ]


def test_dicts_of_several_files_are_united(tmp_path: Path) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, query in zip(paths, [{"text": "a"}, {"text": "b", "age": 3}], strict=True):
        path.write_text(json.dumps({"query": query, "document": "d"}))
    assert load_clicks(paths)["query"][:] == [{"text": "a", "age": None}, {"text": "b", "age": 3}]


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


def refusal(*parts: str) -> str:
    """A pattern that finds all parts, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("log.csv", ""), ("log.csv", "query,document\n"), ("log.tsv", "query\tdocument"), ("log.jsonl", "\n\n")],
)
def test_an_empty_file_is_refused(name: str, content: str, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=refusal(name, "is empty", "at least one row")):
        load_clicks(tmp_path / name, streaming=streaming)


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
    with pytest.raises(ValueError, match=refusal(f"{argument}='{column}'", "row 3", "leave it out")):
        load(kind, rows, tmp_path, **CHOICE)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("column", "argument", "value"), [*BAD_TEXTS, ("clicks", "label", float("nan"))])
def test_a_stream_gives_the_rows_before_a_bad_one_and_names_that(
    kind: str, column: str, argument: str, value: Any, tmp_path: Path
) -> None:
    rows = iter(load(kind, [*ROWS, ROWS[0] | {column: value}, ROWS[1]], tmp_path, **CHOICE))
    assert [next(rows) for _ in LOADED] == LOADED
    with pytest.raises(ValueError, match=refusal(f"{argument}='{column}'", "row 3", "leave it out")):
        next(rows)


@pytest.mark.parametrize("kind", ["dataset", *FILES])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_label_that_is_no_finite_number_is_refused_with_its_row(kind: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=refusal("label='clicks'", "row 3", "finite number")):
        load(kind, [*ROWS, ROWS[0] | {"clicks": value}], tmp_path, **CHOICE)


@pytest.mark.parametrize("kind", ["dataset", *FILES])
def test_a_label_that_is_a_word_is_refused_and_a_number_in_letters_is_read(kind: str, tmp_path: Path) -> None:
    rows = [row | {"clicks": str(row["clicks"])} for row in ROWS]
    assert list(load(kind, rows, tmp_path, **CHOICE)) == LOADED
    with pytest.raises(ValueError, match=refusal("label='clicks'", "row 3", "'often'")):
        load(kind, [*rows, rows[0] | {"clicks": "often"}], tmp_path, **CHOICE)


def test_rows_are_counted_on_beyond_the_first_piece_of_a_log(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "document": "d"} for number in range(25_000)] + [{"query": "", "document": "d"}]
    for kind in ("dataset", ".parquet", ".jsonl", ".csv"):
        with pytest.raises(ValueError, match="row 25000"):
            load(kind, rows, tmp_path)


def test_a_list_is_no_text(tmp_path: Path) -> None:
    for kind in ("dataset", ".parquet", ".jsonl"):
        with pytest.raises(ValueError, match=refusal("document='document'", "row 0", "['b']")):
            load(kind, [{"query": "a", "document": ["b"]}], tmp_path)


def test_a_missing_dict_is_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"query": {"text": "a"}, "document": "b"}, {"query": None, "document": "b"}]
    for kind in ("dataset", ".parquet", ".jsonl", "stream"):
        with pytest.raises(ValueError, match=refusal("query='query'", "row 1", "None")):
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


def test_dicts_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    rows = [{"query": {"text": "a", "age": 3}, "document": "b"}, {"query": {"text": "a", "age": "x"}, "document": "b"}]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=refusal("column 'query' in lines 1 to 2 of log.jsonl", "one type")):
        load_clicks(path)
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, row in zip(paths, rows, strict=True):
        path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=refusal("one.jsonl, two.jsonl", "one type")):
        load_clicks(paths)


def parquet_bytes(folder: Path) -> bytes:
    return write(folder / "whole.parquet", ROWS).read_bytes()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.parquet", b"asked,item\na,b\n"),
        ("log.parquet", None),  # Truncated; written in the test.
        ("log.csv", b"PAR1\x15\x04\x15\x00"),
        ("log.csv", b"\x1f\x8b\x08\x00" + bytes(range(256))),
        ("log.csv", b"asked,item\na,b\n\xff\xfe\xfd,c\n"),
        ("log.csv", "asked,item\na,b\n".encode("utf-16")),
        ("log.csv", b"asked,item\na,b\nc\n"),
        ("log.tsv", b"asked\titem\na\tb\tc\n"),
        ("log.jsonl", b"asked,item\na,b\n"),
        ("log.jsonl", b'["asked", "item"]\n'),
        ("log.jsonl", b'{"asked": "a", "item": "b"}\n{"asked": "a", "it'),
        ("log.jsonl", b"PAR1\x15\x04\x15\x00\xff"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    name: str, content: bytes | None, streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(parquet_bytes(tmp_path)[:-20] if content is None else content)
    with pytest.raises(ValueError, match=refusal(name, f"cannot be read as {name[4:]}", "write it again")):
        list(load_clicks(tmp_path / name, "asked", "item", streaming=streaming))


def test_parquet_that_is_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    rows = [{"query": f"query number {number}", "document": "d"} for number in range(5_000)]
    path = write(tmp_path / "log.parquet", rows)
    content = bytearray(path.read_bytes())
    content[4:2_000] = b"\xff" * 1_996
    path.write_bytes(content)
    with pytest.raises(ValueError, match=refusal("log.parquet", "cannot be read as parquet")):
        load_clicks(path)


def test_a_stream_of_jsonl_breaks_off_at_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"query": "a", "document": "b"}\n{"query": "c", "document": "d"}\n{"query": ')
    rows = iter(load_clicks(path, streaming=True))
    assert [next(rows)["query"], next(rows)["query"]] == ["a", "c"]
    with pytest.raises(ValueError, match="line 3 is no JSON"):
        next(rows)


def test_a_csv_header_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("query,document,query\na,b,c\n")
    with pytest.raises(ValueError, match=refusal("query='query'", "2 columns of this name")):
        load_clicks(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("log.txt", ["'log.txt'", "unknown suffix '.txt'", ".csv, .tsv, .parquet, .jsonl"]),
        ("nowhere.csv", ["'nowhere.csv'", "is no file", "Check the path"]),
        (["a.csv", "nowhere.csv"], ["'a.csv'", "is no file"]),
        ([], ["source=[]", "at least one path"]),
        (7, ["source=7", "int", "Pass a path"]),
        ([7], ["source=[7]", "Pass a path"]),
        (DatasetDict(), ["DatasetDict", "one split"]),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(source: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=refusal(*parts)):
        load_clicks(source)


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / "log.csv", ROWS), write(tmp_path / "log.tsv", ROWS)]
    with pytest.raises(ValueError, match=refusal(".csv, .tsv", "Pass files of one kind")):
        load_clicks(paths, **CHOICE)


def test_a_dataset_is_not_streamed() -> None:
    with pytest.raises(ValueError, match="to_iterable_dataset"):
        load_clicks(Dataset.from_list(ROWS), **CHOICE, streaming=True)


# Splits and histories, against the protocol written out row by row.


def random_log(users: list[Any], seed: int = 0, rows: int = 400) -> Dataset:
    """A log with many ties in time; ``row`` is the row's number."""
    random = np.random.default_rng(seed)
    return Dataset.from_dict(
        {
            "row": list(range(rows)),
            "user": [users[number] for number in random.integers(0, len(users), rows)],
            "item": random.integers(0, 50, rows).tolist(),
            "time": random.integers(0, 20, rows).tolist(),
        }
    )


def rows_of_users(log: Dataset) -> dict[Any, list[dict[str, Any]]]:
    """The reference: rows of each user by time; sorted() is stable."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in log:
        found[row["user"]].append(row)
    return {user: sorted(found[user], key=lambda row: row["time"]) for user in sorted(found)}


USERS: list[list[Any]] = [list(range(-5, 150)), [f"u{number}" for number in range(150)]]


@pytest.mark.parametrize("users", USERS)
def test_leave_last_out_takes_the_last_two_rows_of_users_with_three(users: list[Any]) -> None:
    log = random_log(users)
    reference = rows_of_users(log)
    assert {1, 2, 3} <= {len(rows) for rows in reference.values()}
    splits = leave_last_out(log, user="user", time="time")
    kept = [rows for rows in reference.values() if len(rows) >= 3]
    train = [row for rows in reference.values() for row in (rows[:-2] if len(rows) >= 3 else rows)]
    assert list(splits["test"]) == [rows[-1] for rows in kept]
    assert list(splits["validation"]) == [rows[-2] for rows in kept]
    assert list(splits["train"]) == train


def test_leave_last_out_of_a_shuffled_log_goes_by_the_shuffled_order() -> None:
    shuffled = random_log(list(range(30))).shuffle(seed=3)
    expected = [rows[-1] for rows in rows_of_users(shuffled).values() if len(rows) >= 3]
    assert list(leave_last_out(shuffled, user="user", time="time")["test"]) == expected


def test_leave_last_out_sorts_dates_and_times_of_day() -> None:
    days = [datetime(2024, 3, day) for day in (9, 10, 2)]
    for times in (days, [day.date() for day in days], [day.timestamp() for day in days]):
        log = Dataset.from_dict({"user": [1, 1, 1], "item": [9, 10, 2], "time": times})
        assert leave_last_out(log, user="user", time="time")["test"]["item"][:] == [10]


def test_split_by_time_cuts_at_the_first_time_that_is_no_longer_of_a_split() -> None:
    log = random_log([1, 2])
    splits = split_by_time(log, time="time", validation_from=10, test_from=15.5)
    assert list(splits["train"]) == [row for row in log if row["time"] < 10]
    assert list(splits["validation"]) == [row for row in log if 10 <= row["time"] < 15.5]
    assert list(splits["test"]) == [row for row in log if row["time"] >= 15.5]


@pytest.mark.parametrize("unit", ["timestamp[s]", "timestamp[us]", "date32"])
@pytest.mark.parametrize("as_point", [str, lambda day: day, lambda day: datetime(day.year, day.month, day.day)])
def test_split_by_time_takes_dates(unit: str, as_point: Any) -> None:
    days = [datetime(2024, 3, day) for day in (9, 10, 2)]
    log = Dataset.from_dict({"time": days}).cast_column("time", Value(unit))
    splits = split_by_time(
        log, "time", validation_from=as_point(date(2024, 3, 9)), test_from=as_point(date(2024, 3, 10))
    )
    assert [split["time"][0].day for split in splits.values()] == [2, 9, 10]


@pytest.mark.parametrize(
    ("points", "empty"), [((-1, 5), "train"), ((5, 5.5), None), ((5.2, 5.8), "validation"), ((5, 99), "test")]
)
def test_an_empty_split_is_refused_by_name(points: tuple[float, float], empty: str | None) -> None:
    log = random_log([1, 2])
    if empty is None:
        assert len(split_by_time(log, "time", *points)["validation"])
        return
    with pytest.raises(ValueError, match=refusal(f"The {empty} split is empty", "from 0 to 19", "Choose other points")):
        split_by_time(log, "time", *points)


@pytest.mark.parametrize(
    ("points", "parts"),
    [
        ((10, 10), ["validation_from=10", "before test_from=10"]),
        (("10", 15), ["validation_from='10'", "pass a number"]),
        ((10, float("nan")), ["test_from=nan", "pass a number"]),
    ],
)
def test_points_that_do_not_fit_are_refused(points: tuple[Any, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=refusal(*parts)):
        split_by_time(random_log([1, 2]), "time", *points)


@pytest.mark.parametrize("point", [5, "soon", datetime.fromisoformat("2024-01-01T00:00:00+01:00")])
def test_points_that_do_not_fit_dates_are_refused(point: Any) -> None:
    log = Dataset.from_dict({"time": [datetime(2024, 3, day) for day in (9, 10, 2)]})
    with pytest.raises(ValueError, match=refusal("validation_from", "ISO string")):
        split_by_time(log, "time", validation_from=point, test_from="2024-03-10")


@pytest.mark.parametrize("users", USERS)
@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_a_pair_is_the_last_items_before_and_the_item(users: list[Any], max_history: int) -> None:
    log = random_log(users[:20])
    expected = []
    for rows in rows_of_users(log).values():
        items = [str(row["item"]) for row in rows]
        for position in range(1, len(items)):
            history = items[:position][-max_history:]
            expected.append({"query": " ".join(history), "document": items[position]})
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=max_history)
    assert pairs.column_names == ["query", "document"]
    assert list(pairs) == expected
    assert list(load_clicks(pairs)) == expected


@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_a_history_for_evaluation_ends_with_the_last_row(max_history: int) -> None:
    log = random_log(USERS[1][:20])
    expected = {
        user: " ".join([str(row["item"]) for row in rows][-max_history:]) for user, rows in rows_of_users(log).items()
    }
    found = histories(log, user="user", item="item", time="time", max_history=max_history)
    assert found == expected
    assert list(found) == sorted(found)


def test_histories_of_train_and_validation_are_the_queries_of_the_test_rows() -> None:
    log = random_log(list(range(30)))
    splits = leave_last_out(log, user="user", time="time")
    known = concatenate_datasets([splits["train"], splits["validation"]])
    found = histories(known, user="user", item="item", time="time", max_history=5)
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=5)
    last_pairs = iter(pairs)
    for user, rows in rows_of_users(log).items():
        own = [next(last_pairs) for _ in rows[1:]]
        if len(rows) >= 3:
            assert found[user] == own[-1]["query"]


def test_pairs_span_more_than_one_batch() -> None:
    log = random_log(list(range(5)), rows=25_000)
    pairs = next_item_pairs(log, user="user", item="item", time="time", max_history=2)
    assert len(pairs) == 24_995
    last = rows_of_users(log)[4]
    assert pairs[-1] == {"query": f"{last[-3]['item']} {last[-2]['item']}", "document": str(last[-1]["item"])}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"user": [1, None, 1]}, ["user='user'", "row 1", "missing"]),
        ({"user": [1.0, 1.0, 1.0]}, ["user='user'", "double", "int64"]),
        ({"user": ["a", " ", "b"]}, ["user='user'", "row 1", "blank"]),
        ({"item": ["a", "b", "c d"]}, ["item='item'", "row 2", "'c d'", "white space"]),
        ({"item": ["", "b", "c"]}, ["item='item'", "row 0", "white space"]),
        ({"item": [[1], [2], [3]]}, ["item='item'", "ids are integers or strings"]),
        ({"time": ["9", "10", "11"]}, ["time='time'", "string", "cast_column"]),
        ({"time": [1.0, float("nan"), 2.0]}, ["time='time'", "row 1", "missing"]),
        ({"time": [1, None, 2]}, ["time='time'", "row 1", "missing"]),
        ({"time": [True, False, True]}, ["time='time'", "bool"]),
    ],
)
def test_unfit_columns_are_refused_with_the_row(change: dict[str, Any], parts: list[str]) -> None:
    log = Dataset.from_dict({"user": [1, 1, 1], "item": [1, 2, 3], "time": [1, 2, 3]} | change)
    for function in (next_item_pairs, histories):
        with pytest.raises(ValueError, match=refusal(*parts)):
            function(log, user="user", item="item", time="time", max_history=5)
    if "item" not in change:
        with pytest.raises(ValueError, match=refusal(*parts)):
            leave_last_out(log, user="user", time="time")


def test_logs_that_cannot_be_split_are_refused() -> None:
    log = Dataset.from_dict({"user": [1, 2, 2], "item": [1, 2, 3], "time": [1, 2, 3]})
    with pytest.raises(ValueError, match="no user has 3 rows"):
        leave_last_out(log, user="user", time="time")
    with pytest.raises(ValueError, match=refusal("user='usr'", "closest is 'user'")):
        leave_last_out(log, user="usr", time="time")
    with pytest.raises(ValueError, match="log is empty"):
        leave_last_out(log.select([]), user="user", time="time")
    with pytest.raises(ValueError, match="IterableDataset"):
        leave_last_out(log.to_iterable_dataset(), user="user", time="time")
    with pytest.raises(ValueError, match="no row has a history"):
        next_item_pairs(log.select([0, 1]), user="user", item="item", time="time", max_history=5)


@pytest.mark.parametrize("max_history", [0, -1, 2.5, True, None])
def test_a_history_has_at_least_one_item(max_history: Any) -> None:
    log = random_log([1, 2])
    for function in (next_item_pairs, histories):
        with pytest.raises(ValueError, match=refusal(f"max_history={max_history!r}", "at least 1")):
            function(log, user="user", item="item", time="time", max_history=max_history)
