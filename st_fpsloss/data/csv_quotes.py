"""Whether the quotes in a CSV or TSV file are syntax.

A value that begins with ``"`` is a quoted one, as in RFC 4180, if all such values of the file are well-formed: it ends
with ``"`` before a delimiter or a line's end, holds ``""`` for ``"``, and may hold delimiters and line breaks. If one
is not, quotes are plain characters in the whole of a TSV file, as in the logs of searches, and a CSV file is refused.
Refused is too what can be read both ways: a well-formed value holds a line break and a delimiter, and every line of the
file is a whole row if quotes are plain characters. Where other lines need their quotes to be rows, such a value is read
as one, with a warning.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# From a value's first quote to its last, which a delimiter, a line's end or the file's end follows.
_QUOTED = {delimiter: re.compile(rb'"[^"]*(?:""[^"]*)*"(?=[%b\r\n]|\Z)' % delimiter.encode()) for delimiter in ",\t"}
# Up to 1,000 quoted values of one line each, to the first quote of the next value: what needs no closer look, at once.
_PLAINLY_QUOTED = {
    delimiter: re.compile(rb'(?:"[^"\r\n]*"(?=[%b\r\n])[^"]*(?<=[%b\r\n])(?=")){0,1000}' % ((delimiter.encode(),) * 2))
    for delimiter in ",\t"
}


def quotes_are_syntax(path: Path, delimiter: str) -> bool:
    """Whether the quotes of a file are syntax, or characters of its values.

    Arrow alone would join the lines between two stray quotes to one value, silently.

    Args:
        path: A CSV file (delimiter ``","``) or a TSV file (a tab).
        delimiter: What stands between two values.

    Raises:
        ValueError: If the file can be read both ways, or a value of a CSV file begins with a quote and does not end
            with one.
    """
    state = path.stat()
    return _quotes_are_syntax(path, delimiter, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _quotes_are_syntax(path: Path, delimiter: str, size: int, changed: int) -> bool:
    """The scan, once a file: the cache goes by its size and time too."""
    ends = (*delimiter.encode(), *b"\r\n")
    joined = None  # where the first value begins that joins what may be rows
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        first = len(_BYTE_ORDER_MARK) if text[:3] == _BYTE_ORDER_MARK else 0
        start = text.find(b'"')
        while start >= 0:
            end = start + 1
            if start == first or text[start - 1] in ends:
                if plain := _PLAINLY_QUOTED[delimiter].match(text, start):
                    start = plain.end()
                value = _QUOTED[delimiter].match(text, start)
                if value is None and delimiter == "\t":
                    return False
                if value is None:
                    raise _unclear_quotes(path, text, start, "begins with a quote and does not end with one")
                end = value.end()
                if joined is None and _joins_rows(text, start, end, delimiter):
                    joined = start
            start = text.find(b'"', end)
        if joined is not None:
            problem = "is one value with quotes, and several rows if they are plain characters"
            text.seek(0)
            if _are_rows(iter(text.readline, b""), delimiter):
                raise _unclear_quotes(path, text, joined, problem)
            logger.warning("%s It is read as one value.", _unclear_quotes(path, text, joined, problem))
    return True


def _joins_rows(text: mmap.mmap, start: int, end: int, delimiter: str) -> bool:
    """Whether a quoted value holds a delimiter and a line break, and its lines are whole rows without the quotes."""
    value = text[start:end]
    if delimiter.encode() not in value or b"\n" not in value:
        return False
    after = text.find(b"\n", end)
    lines = text[text.rfind(b"\n", 0, start) + 1 : after if after >= 0 else len(text)].splitlines()
    return _are_rows([text[: text.find(b"\n")], *lines], delimiter)


def _are_rows(lines: Iterable[bytes], delimiter: str) -> bool:
    """Whether all lines have as many values as the first, the header, if quotes are plain characters."""
    counts = (line.count(delimiter.encode()) for line in lines if line.strip(b"\r\n"))
    first = next(counts, 0)
    return all(count == first for count in counts)


def _unclear_quotes(path: Path, text: mmap.mmap, start: int, problem: str) -> ValueError:
    line = text[:start].count(b"\n") + 1
    shown = text[start : start + 40].splitlines()[0].decode("utf-8", "replace")
    return ValueError(
        f"source={str(path)!r}: what begins with {shown!r} in line {line} {problem}. If the quote is a character of "
        'the value, put the value into quotes and double it (pandas.DataFrame.to_csv does: """tv" is "tv); .jsonl is '
        "always clear."
    )
