"""The HTTP server of ``st-fpsloss serve``: search, changes, health, metrics and a page, as a Starlette app."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from st_fpsloss.serving.live_index import LiveIndex
from st_fpsloss.serving.metrics import Metrics
from st_fpsloss.serving.query_vectors import Overloaded, QueryVectors
from st_fpsloss.serving.requests import SearchRequest, check_ids, check_names, json_body, search_request

if TYPE_CHECKING:
    from starlette.requests import Request

    from st_fpsloss.retrieval import DocumentIndex
    from st_fpsloss.serving.query_encoder import QueryEncoder
    from st_fpsloss.serving.torch_encoder import TorchQueryEncoder

logger = logging.getLogger(__name__)

_SHOWN_VALUES = 200  # of a vocabulary, on the page
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

Endpoint = Callable[["Request"], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Args:
        body_bytes: Length of the body of a search.
        change_bytes: Length of the body of an addition or a removal.
        documents: The largest ``k``.
        ids: Ids in an exclusion, a filter or a removal.
        concurrent: Requests that are being answered; one more is turned away.
        seconds: Time for a search; also for a body to arrive.
        change_seconds: Time for an addition or a removal.
    """

    body_bytes: int = 256 * 1024
    change_bytes: int = 16 * 1024 * 1024
    documents: int = 1000
    ids: int = 10_000
    concurrent: int = 256
    seconds: float = 10.0
    change_seconds: float = 600.0


class Server:
    """Answers requests from one index, with one query tower.

    Args:
        encoder: The query tower: exported, or of a model in memory, which can embed documents too.
        index: The index.
        queries: What embeds queries with that tower.
        token: What ``/add`` and ``/remove`` ask for; None: they are turned off.
        limits: What a request may cost.
    """

    def __init__(
        self,
        encoder: QueryEncoder | TorchQueryEncoder,
        index: LiveIndex,
        queries: QueryVectors,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._encoder, self._index, self._queries, self._token = encoder, index, queries, token
        self._limits = limits or Limits()
        self._metrics = Metrics(queries, index)
        self._in_flight = 0
        self._searches = ThreadPoolExecutor(4, "search")
        self._changes = ThreadPoolExecutor(1, "change")
        self._page = (files("st_fpsloss.serving") / "page.html").read_text(encoding="utf-8")

    def app(self, hosts: tuple[str, ...] | None = None) -> Starlette:
        """Makes the app.

        Args:
            hosts: Names that the server may be called by, against pages of others that call it by theirs; None: any.
        """
        routes = [
            Route("/", self._measured(self._show_page)),
            Route("/search", self._measured(self._search), methods=["POST"]),
            Route("/add", self._measured(self._add), methods=["POST"]),
            Route("/remove", self._measured(self._remove), methods=["POST"]),
            Route("/schema", self._measured(self._schema)),
            Route("/health", self._measured(self._health)),
            Route("/metrics", self._show_metrics),
        ]
        middleware = [] if hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
        return Starlette(
            routes=routes,
            middleware=middleware,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _refusal, Exception: _failure},
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._index.close()
        self._queries.close()
        self._searches.shutdown(cancel_futures=True)
        self._changes.shutdown()
        logger.info("Stopped.")

    def _measured(self, endpoint: Endpoint) -> Endpoint:
        """Counts and times an endpoint, and turns requests away when there are too many."""

        async def measured(request: Request) -> Response:
            start, status = time.perf_counter(), 500
            self._in_flight += 1
            self._metrics.in_flight.set(self._in_flight)
            try:
                if self._in_flight > self._limits.concurrent:
                    raise HTTPException(503, "Too many requests at once: try again later.", {"Retry-After": "1"})
                response = await endpoint(request)
                status = response.status_code
                return response
            except HTTPException as error:
                status = error.status_code
                raise
            finally:
                self._in_flight -= 1
                self._metrics.in_flight.set(self._in_flight)
                self._metrics.requests.labels(request.url.path, str(status)).inc()
                self._metrics.seconds.labels(request.url.path).observe(time.perf_counter() - start)

        return measured

    async def _search(self, request: Request) -> Response:
        start = time.perf_counter()
        body = await json_body(request, self._limits.body_bytes, self._limits.seconds)
        wanted = search_request(body, self._limits.documents, self._limits.ids)
        try:
            found = await asyncio.wait_for(self._found(wanted), self._limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"The search took more than {self._limits.seconds:g} seconds.") from None
        except Overloaded as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse({**found, "milliseconds": round(1000 * (time.perf_counter() - start), 2)})

    async def _found(self, wanted: SearchRequest) -> dict[str, Any]:
        # A search that is given up leaves the embedding alone: others may wait for it.
        vector = await asyncio.shield(asyncio.wrap_future(self._queries.submit(wanted.query)))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searches, _searched, self._index.current, vector, wanted)

    async def _add(self, request: Request) -> Response:
        self._check_token(request)
        model = getattr(self._encoder, "model", None)
        if model is None:
            raise HTTPException(
                403, "This server has the query tower alone: start it with the whole model to add documents."
            )
        body = await json_body(request, self._limits.change_bytes, self._limits.seconds)
        check_names(body, ["documents"])
        documents = _documents(body.get("documents"))
        changes = await self._changed(lambda index: index.update(model, documents, show_progress_bar=False))
        counts = {"added": changes.added, "changed": changes.changed, "unchanged": changes.unchanged}
        return JSONResponse({**counts, "documents": len(self._index.current)})

    async def _remove(self, request: Request) -> Response:
        self._check_token(request)
        body = await json_body(request, self._limits.change_bytes, self._limits.seconds)
        check_names(body, ["ids"])
        ids = body.get("ids")
        check_ids("ids", ids, self._limits.ids)
        await self._changed(lambda index: index.remove(ids or []))
        return JSONResponse({"removed": len(set(ids or [])), "documents": len(self._index.current)})

    async def _changed(self, apply: Callable[[DocumentIndex], Any]) -> Any:
        work = asyncio.get_running_loop().run_in_executor(self._changes, self._index.change, apply)
        try:
            return await asyncio.wait_for(asyncio.shield(work), self._limits.change_seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, "The change takes long; it goes on.") from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except RuntimeError as error:
            raise HTTPException(409, str(error)) from None

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            raise HTTPException(403, "Changes are turned off: start the server with a file that holds a token.")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token.encode()):
            raise HTTPException(401, "Send the token: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"})

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=_HEADERS)

    async def _schema(self, request: Request) -> Response:
        features = [
            {
                "name": feature.name,
                "kind": type(feature).__name__,
                "about": str(feature),
                "example": feature.example(0),
                "values": list(getattr(feature, "vocabulary", None) or ())[:_SHOWN_VALUES],
            }
            for feature in self._encoder.features
        ]
        index = self._index.current
        return JSONResponse(
            {
                "text": self._encoder.reads_text,
                "features": features,
                "columns": index.columns,
                "numbers_as_ids": pa.types.is_integer(index._id_type),
                "documents": len(index),
                "most_documents": self._limits.documents,
            }
        )

    async def _health(self, request: Request) -> Response:
        index, problem = self._index.current, self._index.problem
        health = {"status": "ok", "documents": len(index), "generation": index.info["generation"]}
        return JSONResponse(health if problem is None else {**health, "status": "outdated", "problem": problem})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


def _searched(index: DocumentIndex, vector: np.ndarray, wanted: SearchRequest) -> dict[str, Any]:
    """The answer to a search, from one generation of the index."""
    [found] = index.search_vectors(vector[None], wanted.k, exclude=[wanted.exclude], filter=wanted.filter)
    results = [
        {"id": one, "score": score, "document": index.document(one), "fields": _jsonable(index.fields(one))}
        for one, score in found
    ]
    return {"results": results, "generation": index.info["generation"]}


def _jsonable(fields: dict[str, Any]) -> dict[str, Any]:
    """Stored values that JSON does not have, such as dates, as strings; NaN as null."""
    plain = {name: json.loads(json.dumps(value, default=str)) for name, value in fields.items()}
    return {name: None if value != value else value for name, value in plain.items()}


def _documents(described: Any) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Reads ``[{"id": ..., "document": ..., "fields": {...}}]``."""
    if not isinstance(described, list) or not described:
        raise HTTPException(400, 'documents must be a list of {"id": ..., "document": ..., "fields": {...}}.')
    documents = []
    for number, one in enumerate(described):
        if not isinstance(one, dict) or not {"id", "document"} <= one.keys() <= {"id", "document", "fields"}:
            raise HTTPException(400, f"documents[{number}] must have id, document and, where there are any, fields.")
        if not isinstance(one["document"], (str, dict)) or not isinstance(one.get("fields", {}), dict):
            raise HTTPException(400, f"documents[{number}]: document is a string or an object, fields is an object.")
        check_ids(f"documents[{number}].id", [one["id"]], 1)
        documents.append((one["id"], one["document"], one.get("fields", {})))
    return documents


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed; its log says why."}, 500)
