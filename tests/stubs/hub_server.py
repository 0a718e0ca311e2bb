"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP API as `huggingface_hub` uses for bundles.

Repositories, one commit after the other, files in git and in LFS. Xet storage is left out: set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """What the stand-in holds.

    Attributes:
        url: For HF_ENDPOINT.
        commits: By repository the files of each commit, the last being `main`.
        private: The repositories that were made private.
        token: That writing needs.
        lfs: Large files by their SHA-256.
        requests: Methods and paths, in their order.
    """

    url: str = ""
    commits: dict[str, list[Files]] = field(default_factory=dict[str, list[Files]])
    private: set[str] = field(default_factory=set[str])
    token: str = "hf_secret"
    lfs: Files = field(default_factory=Files)
    requests: list[str] = field(default_factory=list[str])

    def sha(self, repository: str, index: int = -1) -> str:
        number = index % len(self.commits[repository])
        return hashlib.sha1(f"{repository} {number}".encode(), usedforsecurity=False).hexdigest()

    def files(self, repository: str, revision: str) -> Files | None:
        """Of a branch or a commit; None where there is no such one."""
        commits = self.commits.get(repository)
        if commits is None or revision == "main":
            return None if commits is None else commits[-1]
        return next((files for k, files in enumerate(commits) if self.sha(repository, k) == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for method, pattern, handle in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                handle(self, body, **match.groupdict())
                return
        self._send({"error": "Not Found"}, 404)

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._send({"error": "Invalid username or password."}, 401)
        return False

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        wanted = json.loads(body)
        repository = f"{wanted['organization']}/{wanted['name']}"
        exists = repository in self.hub.commits
        self.hub.commits.setdefault(repository, [{}])
        if wanted.get("visibility") == "private" and not exists:
            self.hub.private.add(repository)
        self._send({"url": f"{self.hub.url}/{repository}"}, 409 if exists else 200)

    def info(self, body: bytes, repository: str, revision: str | None = None) -> None:
        files = self.hub.files(repository, revision or "main")
        if files is None:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        index = next(k for k, each in enumerate(self.hub.commits[repository]) if each is files)
        siblings = [{"rfilename": name} for name in files]
        self._send({"id": repository, "sha": self.hub.sha(repository, index), "siblings": siblings, "private": False})

    def tree(self, body: bytes, repository: str, revision: str) -> None:
        files = self.hub.files(repository, revision) or {}
        self._send([self._entry(name, data) for name, data in files.items()])

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if (digest := hashlib.sha256(data).hexdigest()) in self.hub.lfs:
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        return entry

    def resolve(self, body: bytes, repository: str, revision: str, name: str) -> None:
        files = self.hub.files(repository, revision) or {}
        if name not in files:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[name]
        etag = hashlib.sha256(data).hexdigest()
        self._send(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"})

    def preupload(self, body: bytes, repository: str, revision: str) -> None:
        if self._may_write():
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send({"files": modes})

    def lfs_batch(self, body: bytes, repository: str) -> None:
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}},
            }
            for each in json.loads(body)["objects"]
        ]
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() == oid:
            self.hub.lfs[oid] = body
        self._send({}, 200 if oid in self.hub.lfs else 400)

    def validate(self, body: bytes) -> None:
        content: str = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def commit(self, body: bytes, repository: str, revision: str) -> None:
        if not self._may_write():
            return
        files = dict(self.hub.commits[repository][-1])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        self.hub.commits[repository].append(files)
        sha = self.hub.sha(repository)
        self._send({"commitUrl": f"{self.hub.url}/{repository}/commit/{sha}", "commitOid": sha, "success": True})


_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_REPOSITORY}", _Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/tree/{_REVISION}", _Handler.tree),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_REPOSITORY}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"/{_REPOSITORY}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"/{_REPOSITORY}/resolve/{_REVISION}/(?P<name>.+)", _Handler.resolve),
]


@contextmanager
def hub_server() -> Generator[Hub, None, None]:
    """The stand-in, on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
