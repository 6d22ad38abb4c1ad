"""A server in a process of its own, and clients that speak to it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

_WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['sentence_transformers'] = None; "
_RUN = "import sys; from st_fpsloss.cli.main import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def serving(*options, log):
    """Runs ``st-fpsloss serve`` until the block ends, where it has a query encoder without torch.

    Gives the process and the port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = _WITHOUT_TORCH + _RUN if "--query_encoder" in options else _RUN
    command = [sys.executable, "-c", code, "serve", "--port", str(port), *map(str, options)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                get(port, "/health")
                break
            except OSError:
                time.sleep(0.05)
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        yield process, port
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def post(port, path, body, headers=()):
    """Returns the status and the JSON of an answer; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, content, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
