"""Files are read whole and in order, and one that is not what its name says is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import DatasetDict

from st_fpsloss.data import load_clicks
from tests.click_logs import CHOICE, LOADED, ROWS, refusal, write


def test_files_of_one_kind_are_read_one_after_the_other(tmp_path: Path) -> None:
    paths = [write(tmp_path / "one[1].csv", ROWS[:2]), str(write(tmp_path / ".two.csv", ROWS[2:]))]
    assert list(load_clicks(paths, **CHOICE)) == LOADED
    assert list(load_clicks(paths, **CHOICE, streaming=True)) == LOADED
    assert load_clicks(paths, **CHOICE, streaming=True).num_shards == 2


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


# Quotes.


def values(path: Path, text: str) -> list[tuple[str, str]]:
    """Query and document of the rows of a CSV or TSV file; read whole and as a stream alike."""
    path.write_text(text, encoding="utf-8", newline="")
    rows = list(load_clicks(path))
    assert list(load_clicks(path, streaming=True)) == rows
    return [(row["query"], row["document"]) for row in rows]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_with_stray_quotes_has_a_row_a_line(end: str, tmp_path: Path) -> None:
    rows = [('"tv', "d1"), ("blue", "d2"), ('"pc', "d3"), ('"new york"', "d4"), ('19" rack', '""'), ("last", '"')]
    text = end.join(map("\t".join, [("query", "document"), *rows])) + end
    assert values(tmp_path / "log.tsv", text) == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_file_that_pandas_wrote_is_read_back(suffix: str, quoting: Any, tmp_path: Path) -> None:
    rows = [
        ('"tv', "d1"),
        ('a "b", c', "one\ntwo"),
        ("x, y\tz", 'line, one,\r\nline\ttwo\t"end"'),
        ("plain", '17" rack'),
    ]
    frame = pd.DataFrame(rows, columns=["query", "document"])
    text = frame.to_csv(index=False, sep="," if suffix == ".csv" else "\t", quoting=quoting, lineterminator="\n")
    assert values(tmp_path / f"log{suffix}", text) == rows
    assert values(tmp_path / f"mark{suffix}", "\ufeff" + text) == rows


@pytest.mark.parametrize(
    ("suffix", "rows", "line", "problem"),
    [
        (".csv", ["red|d0", '"tv|d1', "blue|d2", '"pc|d3'], 3, "begins with a quote and does not end with one"),
        (".csv", ['"tv|d1', "blue|d2"], 2, "begins with a quote and does not end with one"),
        (".csv", ['"tv|d1', "blue|d2", 'pc"|d3'], 2, "several rows if they are plain characters"),
        (".tsv", ["red|d0", '"tv|d1', "blue|d2", 'pc"|d3'], 3, "several rows if they are plain characters"),
    ],
)
def test_quotes_that_may_join_rows_are_refused_with_their_line(
    suffix: str, rows: list[str], line: int, problem: str, tmp_path: Path
) -> None:
    text = "\n".join(["query|document", *rows]).replace("|", "," if suffix == ".csv" else "\t")
    path = tmp_path / f"log{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=refusal(path.name, "'\"tv", f"in line {line} ", problem, ".jsonl")):
        load_clicks(path)


def test_lines_that_may_be_rows_in_a_file_that_needs_its_quotes_are_one_value_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = 'query,document\nx,"a, b"\nq,"one\ntwo, three"\n'
    assert values(tmp_path / "log.csv", text) == [("x", "a, b"), ("q", "one\ntwo, three")]
    (record,) = caplog.records
    assert "in line 3 is one value with quotes, and several rows" in record.message
    assert record.message.endswith("It is read as one value.")


# Files that are refused.


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [("log.csv", "query;document\na;1,5\n", "';'"), ("log.csv", "query\tdocument\na\tb\n", r"'\t'")],
)
def test_another_delimiter_is_named(name: str, text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=refusal(f"looks like {found}, where ',' is needed", f"sep={found}")):
        load_clicks(tmp_path / name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("log.csv", ""), ("log.csv", "query,document\n"), ("log.tsv", "query\tdocument"), ("log.jsonl", "\n\n")],
)
def test_an_empty_file_is_refused(name: str, content: str, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=refusal(name, "is empty", "at least one row")):
        load_clicks(tmp_path / name, streaming=streaming)


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
