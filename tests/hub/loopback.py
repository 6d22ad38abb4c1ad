"""A Hub on loopback: enough of its HTTP API for the real ``huggingface_hub`` client to create, push, list and download.

Repositories live in memory. A commit is atomic, as on the Hub: files that were uploaded and never committed are visible
to nobody. Large files travel by the LFS protocol, small ones inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
USER = "tester"
_LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".faiss", ".png")


@dataclass
class Repository:
    """One model repository: a list of commits, each a whole tree of path -> content."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(sha, files) of a branch or commit."""
        if revision == "main":
            return self.commits[-1]
        return next(((sha, tree) for sha, tree in self.commits if sha == revision), None)


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse_commits_to: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, handler in self._ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                handler(self, body, *match.groups())
                return
        self._error(404, "EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = _route

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._authorised):
            self._error(401 if not self._authorised else 404, "RepoNotFound")
            return None
        return repository

    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"name": USER, "type": "user", "orgs": []}) if self._authorised else self._error(
            401, "Unauthorized"
        )

    def _create(self, body: bytes) -> None:
        if not self._authorised:
            return self._error(401, "Unauthorized")
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._answer(409, url)
        self.hub.repositories[name] = Repository(asked.get("private") is True or asked.get("visibility") == "private")
        return self._answer(200, url)

    def _validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if not self._authorised:
            return self._error(401, "Unauthorized")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        if not self._authorised:
            return self._error(401, "Unauthorized")
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{asked['oid']}", "header": {}}}
            objects.append(entry)
        return self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(422, "WrongChecksum")
        self.hub.lfs[oid] = body
        return self._answer(200)

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._authorised:
            return self._error(401, "Unauthorized")
        repository = self._repository(name)
        if repository is None:
            return None
        if name == self.hub.refuse_commits_to:
            return self._error(500, "ServerError")
        tree = dict(repository.commits[-1][1])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                tree[value["path"]] = self.hub.lfs[value["oid"]]
            elif operation["key"] == "deletedFile":
                tree.pop(value["path"], None)
        sha = hashlib.sha1(f"{len(repository.commits)}{sorted(tree)}".encode()).hexdigest()
        repository.commits.append((sha, tree))
        return self._answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha})

    def _tree_at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        found = repository.tree(revision)
        if found is None:
            self._error(404, "RevisionNotFound")
        return found

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self._tree_at(name, revision or "main")
        if found:
            sha, tree = found
            siblings = [{"rfilename": path} for path in tree]
            answer = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}
            self._answer(200, answer)

    def _list(self, body: bytes, name: str, revision: str) -> None:
        found = self._tree_at(name, revision)
        if found:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in found[1].items()
            ]
            self._answer(200, entries)

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._tree_at(name, revision)
        if not found:
            return None
        sha, tree = found
        if path not in tree:
            return self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = tree[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": sha}
        if self.command == "HEAD":
            return self._answer(200, b"", Content_Length=str(len(content)), **headers)
        return self._answer(200, content, **headers)

    _ROUTES = (
        (r"GET /api/whoami-v2", _whoami),
        (r"POST /api/repos/create", _create),
        (r"POST /api/validate-yaml", _validate),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)", _preupload),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        (r"PUT /lfs/(\w+)", _upload),
        (r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)", _commit),
        (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", _list),
        (r"GET /api/models/([^/]+/[^/]+)/revision/([^/]+)", _info),
        (r"GET /api/models/([^/]+/[^/]+)", _info),
        (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
    )


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A running Hub; its ``address`` is what ``HF_ENDPOINT`` has to be."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
