r"""Search an index over HTTP: JSON, a page for people, health and Prometheus metrics.

    GET  /          a page to search with
    POST /search    {"query": "red shoes", "k": 10, "exclude": ["d7"], "filter": {"price": {"max": 50}}}
    POST /add       {"documents": [{"id": "d1", "document": "a red shoe", "fields": {"colour": "red"}}]}, with the token
    POST /remove    {"ids": ["d1"]}, with the token
    GET  /health, /metrics, /schema

A query is a text, or an object with "text" and side features. The server listens on this machine alone unless --host
says otherwise, and takes a new generation of the index without a restart. There it refuses other names than localhost
in Host, so that no page of others can call it; a proxy has to set Host to 127.0.0.1.

Examples:
    st-fpsloss serve --model runs/shop --index runs/shop/index

    st-fpsloss serve --query_encoder runs/shop-queries --index runs/shop/index --port 9000

    curl -H "Content-Type: application/json" -d '{"query": "red shoes"}' http://127.0.0.1:8000/search

    curl -H "Content-Type: application/json" -H "Authorization: Bearer $(cat token)" \
        -d '{"ids": ["d1"]}' http://127.0.0.1:8000/remove
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from st_fpsloss.cli.parser import parse

if TYPE_CHECKING:
    from st_fpsloss.serving.query_encoder import QueryEncoder
    from st_fpsloss.serving.torch_encoder import TorchQueryEncoder

logger = logging.getLogger(__name__)

_SHORTEST_TOKEN = 16
_REFRESH_SECONDS = 1.0
_LOOPBACK = ("127.0.0.1", "localhost")


@dataclass
class Options:
    """What to serve, and where."""

    index: Path = field(metadata={"help": "folder of the index"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the model that made the index"})
    query_encoder: Path | None = field(
        default=None, metadata={"help": "in place of the model: folder of its exported query tower; needs no torch"}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 is every one"})
    port: int = field(default=8000, metadata={"help": "port to listen on"})
    token_file: Path | None = field(
        default=None, metadata={"help": "file with the token that /add and /remove ask for; none: they are turned off"}
    )
    cache_size: int = field(default=10_000, metadata={"help": "query embeddings that are kept"})
    timeout: float = field(default=10.0, metadata={"help": "seconds for a search"})
    trust_remote_code: bool = field(default=False, metadata={"help": "needed for a model with features or a bias"})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.query_encoder is None):
            raise ValueError("--model and --query_encoder are two ways to embed queries: pass one.")
        if not self.timeout > 0:
            raise ValueError(f"--timeout {self.timeout} must be above 0.")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is told to stop; requests that are being answered are finished."""
    (options,) = parse(__doc__, (Options,), argv, prog="st-fpsloss serve")
    try:
        import uvicorn

        from st_fpsloss.serving.app import Limits, Server
    except ImportError as error:
        raise ImportError(f'The server needs: pip install "st-fpsloss[serve]" ({error})') from error
    from st_fpsloss.serving.live_index import LiveIndex
    from st_fpsloss.serving.query_vectors import QueryVectors

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    token = _token(options.token_file)
    encoder = _encoder(options)
    index = LiveIndex(options.index, encoder.check_index)
    queries = QueryVectors(encoder.encode, options.cache_size)
    server = Server(encoder, index, queries, token, Limits(seconds=options.timeout))
    index.watch(_REFRESH_SECONDS)
    logger.info("Serving %d documents on http://%s:%d", len(index.current), options.host, options.port)
    uvicorn.run(
        server.app(_LOOPBACK if options.host in _LOOPBACK else None),
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=1000,
        timeout_graceful_shutdown=int(options.timeout) + 1,
    )


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < _SHORTEST_TOKEN:
        raise ValueError(f"--token_file {path} holds {len(token)} characters: use at least {_SHORTEST_TOKEN}.")
    return token


def _encoder(options: Options) -> QueryEncoder | TorchQueryEncoder:
    if options.query_encoder is not None:
        from st_fpsloss.serving.query_encoder import QueryEncoder

        return QueryEncoder.load(options.query_encoder)
    from st_fpsloss.cli.models import load_model
    from st_fpsloss.serving.torch_encoder import TorchQueryEncoder

    return TorchQueryEncoder(load_model(str(options.model), options.trust_remote_code))
