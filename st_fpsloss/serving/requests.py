"""Requests of the server: JSON bodies read within limits, and refused with a reason."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

if TYPE_CHECKING:
    from starlette.requests import Request

_DISCARDED = 16  # times the limit: so much of a body that is too long is read, so that its sender reads the answer


@dataclass(frozen=True)
class SearchRequest:
    """What ``/search`` is asked for.

    Args:
        query: A string, or a dict with ``"text"`` and features.
        k: Documents to return.
        exclude: Ids of documents to leave out.
        filter: Which documents may be returned; None for all.
    """

    query: Any
    k: int
    exclude: tuple[Any, ...]
    filter: pc.Expression | None


async def json_body(request: Request, most_bytes: int, seconds: float) -> dict[str, Any]:
    """Reads the JSON object in a request.

    Args:
        request: The request.
        most_bytes: A longer body is refused.
        seconds: A body that takes longer is refused.

    Raises:
        HTTPException: 408, 413, 415, or 400 for a body that is no JSON object in UTF-8.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"Content-Type is {kind or 'missing'}: send JSON as application/json.")
    try:
        body = await asyncio.wait_for(_bytes(request, most_bytes), seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The connection was closed in the middle of the body.") from None
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except RecursionError:
        raise HTTPException(400, "The body is nested too deeply.") from None
    except ValueError as error:
        raise HTTPException(400, f"The body is no JSON in UTF-8: {error}".splitlines()[0][:300]) from None
    if not isinstance(value, dict):
        raise HTTPException(400, f"The body is a JSON {type(value).__name__}: send an object.")
    return value


async def _bytes(request: Request, most: int) -> bytes:
    """The body; one that is too long is read to its end, up to a bound, and not kept."""
    body, length = bytearray(), 0
    async for chunk in request.stream():
        length += len(chunk)
        if length <= most:
            body += chunk
        elif length > _DISCARDED * most:
            break
    if length > most:
        raise HTTPException(413, f"The body has more than the {most} bytes that are allowed.")
    return bytes(body)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def search_request(body: Mapping[str, Any], most_documents: int, most_ids: int) -> SearchRequest:
    """Reads a search out of ``{"query": ..., "k": 10, "exclude": [ids], "filter": {column: values}}``.

    Raises:
        HTTPException: 400, naming what is wrong.
    """
    check_names(body, ("query", "k", "exclude", "filter"))
    query, k, exclude = body.get("query"), body.get("k", 10), body.get("exclude") or []
    if not isinstance(query, (str, dict)):
        raise HTTPException(400, f"query={query!r:.100} must be a string, or an object with the features' names.")
    if type(k) is not int or not 1 <= k <= most_documents:
        raise HTTPException(400, f"k={k!r:.100} must be a whole number from 1 to {most_documents}.")
    check_ids("exclude", exclude, most_ids)
    return SearchRequest(query, k, tuple(exclude), filter_expression(body.get("filter"), most_ids))


def check_names(body: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses a name that a request does not have."""
    for name in body:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean {close[0]!r}?" if close else f"a request has {', '.join(known)}."
            raise HTTPException(400, f"Unknown name {name!r:.100} in the request: {cure}")


def check_ids(name: str, ids: Any, most: int) -> None:
    """Refuses what is no list of at most so many ids."""
    if not isinstance(ids, list) or not all(type(one) in (str, int) for one in ids):
        raise HTTPException(400, f"{name}={ids!r:.100} must be a list of ids, strings or whole numbers.")
    if len(ids) > most:
        raise HTTPException(400, f"{name} has {len(ids)} ids: at most {most} are allowed.")


def filter_expression(described: Any, most: int) -> pc.Expression | None:
    """Turns ``{"genre": "drama", "colour": ["red", "blue"], "year": {"min": 1990, "max": 1999}}`` into an expression.

    All conditions have to hold. A column is one that the index stores, or ``id``.

    Raises:
        HTTPException: 400, naming what is wrong.
    """
    if described is None:
        return None
    if not isinstance(described, dict):
        raise HTTPException(400, f"filter={described!r:.100} must be an object of column to value, list or range.")
    if len(described) > 20:
        raise HTTPException(400, f"filter has {len(described)} columns: at most 20 are allowed.")
    expression: pc.Expression | None = None
    for column, wanted in described.items():
        try:
            condition = _condition(column, wanted, most)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise HTTPException(400, f"filter of {column!r:.100}: {error}"[:300]) from None
        expression = condition if expression is None else expression & condition
    return expression


def _condition(column: str, wanted: Any, most: int) -> pc.Expression:
    field = pc.field(column)
    if isinstance(wanted, list):
        if len(wanted) > most:
            raise ValueError(f"{len(wanted)} values, and at most {most} are allowed.")
        return field.isin(wanted)
    if not isinstance(wanted, dict):
        return field.is_null() if wanted is None else field == wanted
    bounds = {"min": field.__ge__, "max": field.__le__}
    if not wanted or not wanted.keys() <= bounds.keys() or None in wanted.values():
        raise ValueError('a range is {"min": ..., "max": ...} or one of the two.')
    first, *second = [bounds[name](bound) for name, bound in wanted.items()]
    return first & second[0] if second else first
