"""Files are read whole and in order, and one that is not what its name says is refused."""

from __future__ import annotations

import csv
import json
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import DatasetDict

from st_fpsloss.data import load_clicks, load_inputs
from tests.click_logs import CHOICE, FILES, LOADED, ROWS, STREAMS, load, place, refusal, write


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


UNREADABLE = ["cannot be read as", "write it again"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("log.parquet", b"asked,item\na,b\n", UNREADABLE),
        ("log.parquet", None, UNREADABLE),  # Truncated; written in the test.
        ("log.csv", b"PAR1\x15\x04\x15\x00", UNREADABLE),
        ("log.csv", b"\x1f\x8b\x08\x00" + bytes(range(256)), UNREADABLE),
        ("log.csv", b"asked,item\na,b\n\xff\xfe\xfd,c\n", [*UNREADABLE, "line 3 ", "encoding='latin-1'"]),
        ("log.jsonl", b'{"asked": "a", "item": "\xe4"}\n', [*UNREADABLE, "line 1 ", "encoding='latin-1'"]),
        ("log.csv", "asked,item\na,b\n".encode("utf-16"), [*UNREADABLE, "encoding='utf-16'"]),
        ("log.csv", "asked,item\na,b\n".encode("utf-16-le"), [*UNREADABLE, "encoding='utf-16-le'"]),
        ("log.csv", b"asked,item\na,b\nc\n", ["line 3 of log.csv has 1 values where the header has 2"]),
        ("log.tsv", b"asked\titem\na\tb\tc\n", ["line 2 of log.tsv has 3 values where the header has 2"]),
        ("log.jsonl", b"asked,item\na,b\n", ["line 1 of log.jsonl is no JSON"]),
        ("log.jsonl", b'["asked", "item"]\n', ["line 1 of log.jsonl is no JSON object"]),
        ("log.jsonl", b'{"asked": "a", "item": "b"}\n{"asked": "a", "it', ["line 2 of log.jsonl is no JSON"]),
        ("log.jsonl", b"PAR1\x15\x04\x15\x00\xff", UNREADABLE),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    name: str, content: bytes | None, parts: list[str], streaming: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(parquet_bytes(tmp_path)[:-20] if content is None else content)
    with pytest.raises(ValueError, match=refusal(name, *parts)):
        list(load_clicks(tmp_path / name, "asked", "item", streaming=streaming))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_other_encodings_are_read_where_they_are_named(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"log{suffix}", [{"query": "Äpfel", "document": "d\u00a0é"}] * 2)
    path.write_text(path.read_text("utf-8").replace("\\u00c4", "Ä"), encoding=encoding)
    for streaming in (False, True):
        clicks = load_clicks(path, encoding=encoding, streaming=streaming)
        assert [row["query"] for row in clicks] == ["Äpfel", "Äpfel"]
    assert load_inputs(path, "query", encoding=encoding) == {0: "Äpfel", 1: "Äpfel"}
    with pytest.raises(ValueError, match="encoding='utf-88' is not known"):
        load_clicks(path, encoding="utf-88")


def test_the_line_of_a_bad_row_is_that_of_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('\ufeffquery,document\n\n"a\nb",d\n\n\n"c\n\nd",\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"document='document': line 7 of log\.csv holds ''"):
        load_clicks(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_no_text(number: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"query": "a", "document": "b"}\n{"query": "a", "document": ' + number + "}")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"document='document': line 2 of log\.jsonl holds -?(nan|inf)"):
            list(load_clicks(path, streaming=streaming))


def test_uuids_are_texts(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=number) for number in (1, 2)]
    column = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([one.bytes for one in ids], pa.binary(16)))
    pa.parquet.write_table(pa.table({"query": ["a", "b"], "document": column}), tmp_path / "log.parquet")
    for streaming in (False, True):
        clicks = load_clicks(tmp_path / "log.parquet", streaming=streaming)
        assert [row["document"] for row in clicks] == [str(one) for one in ids]


def test_a_path_that_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(ValueError, match=r"source='a+\.csv' (cannot be looked at|is no file)"):
        load_clicks("a" * 5_000 + ".csv")


def test_parquet_that_is_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    rows = [{"query": f"query number {number}", "document": "d"} for number in range(5_000)]
    path = write(tmp_path / "log.parquet", rows)
    content = bytearray(path.read_bytes())
    content[4:2_000] = b"\xff" * 1_996
    path.write_bytes(content)
    with pytest.raises(ValueError, match=refusal("log.parquet", "cannot be read as parquet")):
        load_clicks(path)


@pytest.mark.parametrize("kind", ["dataset", *FILES, *STREAMS])
def test_bad_rows_are_left_out_counted_and_the_first_three_logged(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"item": item} for item in ("x", "", " ", "y", "", "", "z") for row in ROWS[:1]]
    clicks = list(load(kind, rows, tmp_path, **CHOICE, on_bad_row="skip"))
    assert [row["document"] for row in clicks] == ["x", "y", "z"]
    shown = [record.getMessage() for record in caplog.records if "A row is left out" in record.getMessage()]
    assert [place(kind, index) in message for index, message in zip((1, 2, 4), shown[:3], strict=True)] == [True] * 3
    if kind != "stream":  # which has no end at which to report
        assert "4 rows of " in caplog.records[-1].getMessage()
    with pytest.raises(ValueError, match=r"document='item'.*or pass on_bad_row='skip'"):
        list(load(kind, rows, tmp_path, **CHOICE))


def test_broken_lines_are_bad_rows_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.csv").write_text("query,document\na,b\nc\nd,e,f\ng,h\n")
    (tmp_path / "log.jsonl").write_text('{"query": "a", "document": "b"}\nx\n{"query": "g", "document": "h"}\n[]\n')
    for name, lines in (("log.csv", "34"), ("log.jsonl", "24")):
        caplog.clear()
        assert load_clicks(tmp_path / name, on_bad_row="skip")["query"][:] == ["a", "g"]
        messages = [record.getMessage() for record in caplog.records]
        assert all(f"line {line} of {name}" in message for line, message in zip(lines, messages, strict=False))
        assert messages[-1] == f"2 rows of {name} were left out."


def test_a_log_without_a_good_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [{"query": "", "document": "b"}] * 2)
    with pytest.raises(ValueError, match="no good row: all 2 rows are left out"):
        load_clicks(path, on_bad_row="skip")
    with pytest.raises(ValueError, match="on_bad_row='drop' has to be 'raise' or 'skip'"):
        load_clicks(path, on_bad_row="drop")


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
