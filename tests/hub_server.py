"""A real HTTP server that answers as the Hub does, from directories, counts what it sends, and fails when told to.

It speaks the part of the Hub's API that huggingface_hub 2.4 uses for models: listings of a revision, files (HEAD and
GET, commit and etag in headers, weights by a redirect to another origin that serves ranges), and, for the token, new
repositories and branches, uploads of weights (LFS) and commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Request:
    """One answered request: `nbytes` of a body were sent, of what `range` asked for."""

    method: str
    path: str
    file: str
    range: str
    authorized: bool
    nbytes: int = 0
    received: int = 0


@dataclass
class Failure:
    """What goes wrong with the next `times` requests of this method whose path or file contains `where`."""

    where: str
    kind: str  # stall, pause, reset, truncate, whole (no ranges), or an HTTP status; of a PUT only stall, or a status
    times: int
    method: str
    headers: dict[str, str]


class HubServer:
    """`publish` makes a directory a repository at a revision; `fail` injects failures; `requests` is what was asked.
    Whoever has the `token` may write."""

    def __init__(self, token: str = "hf_secret") -> None:
        self.token = token
        self.requests: list[Request] = []
        self.private: dict[str, bool] = {}
        self.tricks: dict[str, Callable[[BaseHTTPRequestHandler], bool]] = {}
        """What answers, if it wants to, whoever asks for what has this in its path."""
        self.has_xet = False
        """Whether it says of weights that they are to be had from Xet, too."""
        self._storage = Path(tempfile.mkdtemp(prefix="hub-"))
        self._failures: list[Failure] = []
        self._commits: dict[tuple[str, str], Path] = {}
        self._revisions: dict[tuple[str, str], str] = {}
        self._blobs: dict[str, Path] = {}
        self._lock = threading.Lock()
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.warehouse = f"http://localhost:{self.port}"  # the other origin, where weights are
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Is this process's Hub from now on, with this cache. The client reads its constants when they are used."""
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def publish(self, repository: str, path: Path, revision: str = "main") -> str:
        """Returns the commit."""
        files = {file: sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
        made_of = json.dumps([[str(file.relative_to(path)), digest] for file, digest in files.items()])
        commit = hashlib.sha1(made_of.encode()).hexdigest()
        self._commits[repository, commit] = path
        self._revisions[repository, revision] = self._revisions[repository, commit] = commit
        self.private.setdefault(repository, False)
        self._blobs |= {digest: file for file, digest in files.items()}
        return commit

    def create(self, repository: str, private: bool) -> bool:
        """A repository as a new one is; False if it is there already."""
        if self.knows(repository):
            return False
        self.private[repository] = private
        first = Path(tempfile.mkdtemp(dir=self._storage))
        (first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.publish(repository, first)
        return True

    def stored(self, digest: str) -> Path:
        """Where an uploaded weight file lies, or would."""
        return self._storage / digest

    def change(self, repository: str, revision: str, operations: list[tuple[str, dict[str, str]]]) -> str:
        """A commit on top of another. Returns its name."""
        root = Path(tempfile.mkdtemp(dir=self._storage))
        shutil.copytree(self.root(repository, self._revisions[repository, revision]), root, dirs_exist_ok=True)
        for kind, value in operations:
            file = root / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                shutil.copyfile(self.stored(value["oid"]), file)
            elif kind == "deletedFile":
                file.unlink()
        return self.publish(repository, root, revision)

    def fail(self, where: str, kind: str, times: int = 1, method: str = "GET", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._failures.append(Failure(where, kind, times, method, named))

    def failure(self, request: Request) -> Failure | None:
        with self._lock:
            for failure in self._failures:
                where = request.path + " " + request.file
                if failure.times and request.method == failure.method and failure.where in where:
                    failure.times -= 1
                    return failure
        return None

    def sent(self, where: str) -> int:
        """Bytes of bodies sent of files whose name contains `where`."""
        return sum(request.nbytes for request in self.requests if where in request.file)

    def asked(self, where: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if where in r.file and r.method == method and r.nbytes]

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._storage, ignore_errors=True)

    def commit(self, repository: str, revision: str) -> str | None:
        return self._revisions.get((repository, revision))

    def knows(self, repository: str) -> bool:
        return any(name == repository for name, _ in self._revisions)

    def root(self, repository: str, commit: str) -> Path:
        return self._commits[repository, commit]

    def blob(self, digest: str) -> Path:
        return self._blobs[digest]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        self.request_ = Request(self.command, path, "", self.headers.get("Range", ""), "Authorization" in self.headers)
        hub.requests.append(self.request_)
        for where, trick in list(hub.tricks.items()):
            if where in path and trick(self):
                self.close_connection = True
                return None
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._listing(hub, match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self._tree(hub, *match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(hub, *match.groups())
        if match := re.fullmatch(r"/warehouse/([0-9a-f]{64})", path):
            file = hub.blob(match[1])
            self.request_.file = file.name
            return self._body(hub, file.read_bytes(), {"ETag": f'"{match[1]}"'})
        self._refuse(404)

    def _listing(self, hub: HubServer, repository: str, revision: str) -> None:
        commit = hub.commit(repository, revision)
        if commit is None:
            known = hub.knows(repository)
            return self._refuse(404 if known else 401, "RevisionNotFound" if known else "RepoNotFound")
        siblings = []
        root = hub.root(repository, commit)
        for file in sorted(root.rglob("*")):
            if file.is_file():
                entry = {"rfilename": str(file.relative_to(root)), "size": file.stat().st_size, "blobId": git_id(file)}
                if file.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": sha256(file), "size": file.stat().st_size, "pointerSize": 130}
                siblings.append(entry)
        private = hub.private[repository]
        listing = {"id": repository, "modelId": repository, "sha": commit, "private": private, "siblings": siblings}
        self._body(hub, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _tree(self, hub: HubServer, repository: str, revision: str) -> None:
        commit = hub.commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        root, entries = hub.root(repository, commit), []
        for file in sorted(file for file in root.rglob("*") if file.is_file()):
            size, name = file.stat().st_size, str(file.relative_to(root))
            entries.append({"type": "file", "path": name, "size": size, "oid": git_id(file)})
            if file.suffix == ".safetensors":
                entries[-1]["lfs"] = {"oid": sha256(file), "size": size, "pointerSize": 130}
        self._body(hub, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, hub: HubServer, repository: str, revision: str, name: str) -> None:
        commit = hub.commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        file = hub.root(repository, commit) / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        common = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.suffix != ".safetensors":
            self.request_.file = file.name
            return self._body(hub, file.read_bytes(), common | {"ETag": f'"{git_id(file)}"'})
        digest = sha256(file)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(file.stat().st_size)}
        if hub.has_xet:
            linked |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{hub.endpoint}/api/xet-read-token"}
        self._head(302, common | linked | {"Location": f"{hub.warehouse}/warehouse/{digest}", "Content-Length": "0"})

    def do_PUT(self) -> None:
        """A weight file, to an address that needs no token."""
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, "", "", "Authorization" in self.headers)
        hub.requests.append(request)
        failure = hub.failure(request)
        length = int(self.headers["Content-Length"])
        if failure and failure.kind == "stall":
            request.received = len(self.rfile.read(length // 2))
            hub.stopped.wait(600)
            return
        body = self.rfile.read(length)
        request.received = len(body)
        if failure:
            return self._refuse(int(failure.kind), headers=failure.headers)
        digest = path.removeprefix("/upload/")
        if hashlib.sha256(body).hexdigest() != digest:
            return self._refuse(400)
        hub.stored(digest).write_bytes(body)
        self._head(200, {"Content-Length": "0"})

    def do_POST(self) -> None:
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, "", "", "Authorization" in self.headers)
        hub.requests.append(request)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request.received = len(body)
        if failure := hub.failure(request):
            return self._refuse(int(failure.kind), headers=failure.headers)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._refuse(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            made = hub.create(name, asked.get("visibility") == "private" or asked.get("private", False))
            return self._json(hub, {"url": f"{hub.endpoint}/{name}"}, 200 if made else 409)
        if path == "/api/validate-yaml":
            return self._json(hub, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
            name, act, revision = match.groups()
            if not hub.knows(name):
                return self._refuse(404, "RepoNotFound")
            return {"branch": self._branch, "preupload": self._preupload, "commit": self._commit}[act](
                hub, name, revision, body
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(hub, json.loads(body))
        self._refuse(404)

    def _branch(self, hub: HubServer, name: str, branch: str, body: bytes) -> None:
        if hub.commit(name, branch):
            return self._refuse(409)
        hub.publish(name, hub.root(name, hub.commit(name, "main")), branch)
        self._json(hub, {})

    def _preupload(self, hub: HubServer, name: str, revision: str, body: bytes) -> None:
        root = hub.root(name, hub.commit(name, revision))
        files = []
        for file in json.loads(body)["files"]:
            weights, there = file["path"].endswith(".safetensors"), root / file["path"]
            entry = {"path": file["path"], "uploadMode": "lfs" if weights else "regular", "shouldIgnore": False}
            if there.is_file():
                entry["oid"] = sha256(there) if weights else git_id(there)
            files.append(entry)
        self._json(hub, {"files": files})

    def _batch(self, hub: HubServer, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if not hub.stored(one["oid"]).exists():
                entry["actions"] = {"upload": {"href": f"{hub.warehouse}/upload/{one['oid']}"}}
            objects.append(entry)
        self._json(hub, {"transfer": "basic", "objects": objects})

    def _commit(self, hub: HubServer, name: str, revision: str, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, hub.commit(name, revision)):
            return self._refuse(412)
        commit = hub.change(name, revision, [(one["key"], one["value"]) for one in operations])
        self._json(hub, {"success": True, "commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def _json(self, hub: HubServer, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _body(self, hub: HubServer, body: bytes, headers: dict[str, str]) -> None:
        status = 200
        failure = hub.failure(self.request_)
        kind = failure.kind if failure else ""
        if kind.isdigit():
            return self._refuse(int(kind), headers=failure.headers)
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range)) and kind != "whole":
            start, stop = int(asked[1]), int(asked[2] or len(body) - 1) + 1
            headers = headers | {"Content-Range": f"bytes {start}-{min(stop, len(body)) - 1}/{len(body)}"}
            body, status = body[start:stop], 206
        self._head(status, headers | {"Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        if kind in ("stall", "reset", "truncate"):
            body = body[: len(body) // 2]
            self.close_connection = True
        if kind == "pause":
            hub.stopped.wait(0.5)
        try:
            self.request_.nbytes = len(body)  # before the client can know
            self.wfile.write(body)
            self.wfile.flush()
            if kind == "stall":
                hub.stopped.wait(5)
            if kind == "reset":
                time.sleep(0.05)  # let what was sent arrive
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        except OSError:
            self.close_connection = True  # the client went away, as in a test of its patience it does

    def _refuse(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": "0", **({"X-Error-Code": code} if code else {}), **(headers or {})})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def git_id(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
