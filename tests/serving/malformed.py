"""Requests that have to be refused: path, body, headers, status, and a part of the reason."""

import socket

_DEEP = b'{"query": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

MALFORMED = [
    ("/search", b"", {}, 400, "no JSON in UTF-8"),
    ("/search", b"{", {}, 400, "no JSON in UTF-8"),
    ("/search", b'{"query": "\xff"}', {}, 400, "no JSON in UTF-8"),
    ("/search", b'{"query": "\\ud800"}', {}, 400, "no JSON in UTF-8"),
    ("/search", b'{"query": "a", "k": NaN}', {}, 400, "NaN is no JSON number"),
    ("/search", b'{"query": "a", "k": ' + b"9" * 5000 + b"}", {}, 400, "no JSON in UTF-8"),
    ("/search", _DEEP, {}, 400, "nested too deeply"),
    ("/search", b'["a"]', {}, 400, "send an object"),
    ("/search", {"query": "a"}, {"Content-Type": "text/plain"}, 415, "send JSON as application/json"),
    ("/search", b'{"query": "' + b"a" * 1_000_000 + b'"}', {}, 413, "more than the 262144 bytes"),
    ("/search", {}, {}, 400, "query=None must be a string"),
    ("/search", {"query": 3}, {}, 400, "query=3 must be a string"),
    ("/search", {"query": {"txt": "a"}}, {}, 400, "did you mean 'text'"),
    ("/search", {"query": {"text": ["a"]}}, {}, 400, "'text' got ['a']"),
    ("/search", {"query": "a", "kk": 3}, {}, 400, "did you mean 'k'"),
    ("/search", {"query": "a", "k": 0}, {}, 400, "k=0 must be a whole number from 1 to 1000"),
    ("/search", {"query": "a", "k": 10**9}, {}, 400, "from 1 to 1000"),
    ("/search", {"query": "a", "k": True}, {}, 400, "k=True"),
    ("/search", {"query": "a", "exclude": "d1"}, {}, 400, "exclude='d1' must be a list"),
    ("/search", {"query": "a", "exclude": [1]}, {}, 400, "ids of this index are of type str"),
    ("/search", {"query": "a", "exclude": ["d"] * 10_001}, {}, 400, "at most 10000"),
    ("/search", {"query": "a", "filter": ["d1"]}, {}, 400, "must be an object of column"),
    ("/search", {"query": "a", "filter": {"size": 3}}, {}, 400, "size"),
    ("/search", {"query": "a", "filter": {"year": "old"}}, {}, 400, "year"),
    ("/search", {"query": "a", "filter": {"year": 10**30}}, {}, 400, "year"),
    ("/search", {"query": "a", "filter": {"year": {"from": 3}}}, {}, 400, "a range is"),
    ("/search", {"query": "a", "filter": {"year": [1990, "old"]}}, {}, 400, "year"),
    ("/search", {"query": "a", "filter": {"colour": {"min": [1]}}}, {}, 400, "colour"),
    ("/nothing", {}, {}, 404, "Not Found"),
    ("/health", {}, {}, 405, "Method Not Allowed"),
    ("/remove", {"ids": ["d1"]}, {}, 401, "Send the token"),
    ("/remove", {"ids": ["d1"]}, {"Authorization": "Bearer wrong"}, 401, "Send the token"),
]


def raw_answer(port, content):
    """What the server answers to bytes that are no HTTP."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(content)
        return connection.makefile("rb").read()
