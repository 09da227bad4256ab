"""A stand-in of the Hugging Face hub: as much of its HTTP interface as a push needs, in a thread of this process.

Large files are uploaded as with Git LFS. Clients must not use Xet, the hub's other protocol, which is a library's own
(``HF_HUB_DISABLE_XET``).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "secret-token-of-the-tests"  # matches no pattern of tokens, so only those who know it can hide it
OPEN = ("POST /api/validate-yaml", "GET /api/agent-harnesses")  # requests of the client that need no token
LARGE = (".safetensors", ".gguf")  # files that are uploaded apart from the commit


@dataclass
class Repository:
    """A repository: its files, and how many commits it has."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """The state of the stand-in; ``fails`` maps the beginning of a request, as ``POST /api/repos``, to a status."""

    address: str = ""
    user: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "user",
            "name": "ada",
            "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
            "auth": {"accessToken": {"displayName": "tests", "role": "write"}},
        }
    )
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    fails: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refused: int = 0  # requests without the token


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        line = f"{self.command} {self.path.partition('?')[0]}"
        self.hub.requests.append(line)
        status = next((code for start, code in self.hub.fails.items() if line.startswith(start)), None)
        if status is not None:
            self._answer(status, {"error": f"status {status} was asked for"})
        elif self.path.startswith("/large/"):
            self.hub.large[self.path.rpartition("/")[2]] = body
            self._answer(200, {})
        elif line in OPEN:
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.hub.refused += 1
            self._answer(401, {"error": "Invalid credentials"})
        else:
            self._answer(*self._served(line, body))

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _chunks(self) -> bytes:
        """Return a body that is sent in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(content)

    def _served(self, line: str, body: bytes) -> tuple[int, object]:
        """Return the status and the answer to a request of the user."""
        hub = self.hub
        path = line.partition(" ")[2]
        if path == "/api/whoami-v2":
            return 200, hub.user
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                each
                if each["oid"] in hub.large
                else {**each, "actions": {"upload": {"href": f"{hub.address}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        _, _, kind, owner, name, *rest = path.split("/")
        found = hub.repositories.get(f"{owner}/{name}")
        if kind != "models" or found is None:
            return 404, {"error": "Repository not found"}
        match rest:
            case ["preupload", _]:
                files = [
                    {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular"}
                    for each in json.loads(body)["files"]
                ]
                return 200, {"files": [each | {"shouldIgnore": False} for each in files]}
            case ["commit", _]:
                return 200, self._commit(found, f"{owner}/{name}", [json.loads(row) for row in body.splitlines()])
        siblings = [{"rfilename": each} for each in found.files]
        info = {"id": f"{owner}/{name}", "private": found.private, "siblings": siblings, "sha": "0" * 40, "tags": []}
        return 200, info

    def _create(self, asked: dict[str, Any]) -> tuple[int, object]:
        name = f"{asked.get('organization') or self.hub.user['name']}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            return 409, url | {"error": "You already created this repository"}
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private, {".gitattributes": b""})
        return 200, url

    def _commit(self, to: Repository, name: str, rows: list[dict[str, Any]]) -> object:
        for row in rows:
            value = row["value"]
            match row["key"]:
                case "file":
                    to.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.hub.large[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    to.files[value["path"]] = content
                case "deletedFile":
                    del to.files[value["path"]]
        to.commits += 1
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.hub.address}/{name}/commit/{'0' * 40}"}


@contextmanager
def running() -> Iterator[Hub]:
    """Run a stand-in inside the ``with`` block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
