"""A stand-in of the Hugging Face hub's API on 127.0.0.1: repositories, commits, large files.

What ``huggingface_hub`` asks when models are pushed and downloaded, as the hub answers it: no more.
All that was asked, sent and fetched is noted, so that a test can say what went over the wire.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"


def blob_id(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """commits: by id, all files of each. branches: name -> commit. large: paths kept as LFS."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = json.dumps([self.branches[branch], {n: blob_id(d) for n, d in files.items()}])
        identifier = hashlib.sha1(text.encode()).hexdigest()
        self.commits[identifier], self.branches[branch] = files, identifier
        return identifier

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    """repositories: by "OWNER/NAME". requests: (method, path) of all. uploads: the bytes of large
    files that came, by SHA-256. fetched: the paths whose bytes went out."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.fetched: list[str] = []
        self.committed: list[list[str]] = []
        self.large: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {}))
        self.server.RequestHandlerClass.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Closing waits for the next poll, half a second apart by default.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, name: str, files: dict[str, bytes], **kind: bool) -> Repository:
        repository = self.repositories[name] = Repository(**kind)
        repository.commit(files)
        return repository

    def add_folder(self, name: str, folder: Path, **kind: bool) -> Repository:
        files = {
            str(p.relative_to(folder).as_posix()): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        return self.add(name, files, **kind)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.body = self._body()
        for pattern, method, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return getattr(self, handler)(**match.groupdict())
        return self._error(404, None, "no such page")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, values: Any, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, text: str) -> None:
        headers = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": text}).encode(), headers)

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, writing: bool = False) -> Repository | None:
        """None: the refusal is sent."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known):
            self._error(404 if self._known else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated and not writing:
            self._error(403, "GatedRepo", "Access to this model is restricted")
            return None
        if writing and not self._known:
            self._error(403, None, "You have no right to write")
            return None
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.find(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        return commit

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if not self._known:
            return self._error(403, None, "You have no right to create a repository")
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self._json({**url, "error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        return self._json(url)

    def branch(self, name: str, revision: str) -> None:
        if repository := self._repository(name, writing=True):
            if revision in repository.branches:
                return self._error(409, None, "Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            self._json({})
        return None

    def yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self._repository(name)
        if repository and (commit := self._commit_of(repository, revision or "main")):
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            told = {"id": name, "sha": commit, "private": repository.private}
            self._json({**told, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository and (commit := self._commit_of(repository, revision)):
            self._json([_entry(p, d) for p, d in repository.commits[commit].items()])

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name, writing=True)
        if repository and (commit := self._commit_of(repository, revision)):
            held = repository.commits[commit]
            asked = [file["path"] for file in json.loads(self.body)["files"]]
            self._json({"files": [_mode(path, held.get(path)) for path in asked]})

    def batch(self, name: str) -> None:
        if self._repository(name, writing=True):
            objects = []
            for asked in json.loads(self.body)["objects"]:
                there = asked["oid"] in self.hub.large
                place = {"upload": {"href": f"{self.hub.endpoint}/large/{asked['oid']}"}}
                objects.append({**asked, **({} if there else {"actions": place})})
            self._json({"transfer": "basic", "objects": objects})

    def large(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.large[digest] = self.body
        self.hub.uploads.append(digest)
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, writing=True)
        if not repository or not self._commit_of(repository, revision):
            return
        files, changed = dict(repository.files(revision)), []
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            if kind != "header":
                changed.append(f"{'-' * (kind == 'deletedFile')}{value['path']}")
        commit = repository.commit(files, revision)
        self.hub.committed.append(sorted(changed))
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if not repository or not (commit := self._commit_of(repository, revision)):
            return
        data = repository.commits[commit].get(path)
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        if self.command == "GET":
            self.hub.fetched.append(path)
        entry = _entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if _is_large(path):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry


def _mode(path: str, held: bytes | None) -> dict[str, Any]:
    mode: dict[str, Any] = {"path": path, "shouldIgnore": False, "uploadMode": "regular"}
    digest = None if held is None else blob_id(held)
    if _is_large(path):
        mode["uploadMode"] = "lfs"
        digest = None if held is None else hashlib.sha256(held).hexdigest()
    return {**mode, "oid": digest}


NAME = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/models/{NAME}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    ("/api/repos/create", "POST", "create"),
    ("/api/validate-yaml", "POST", "yaml"),
    (API, "GET", "info"),
    (rf"{API}/revision/{REVISION}", "GET", "info"),
    (rf"{API}/tree/{REVISION}", "GET", "tree"),
    (rf"{API}/branch/{REVISION}", "POST", "branch"),
    (rf"{API}/preupload/{REVISION}", "POST", "preupload"),
    (rf"{API}/commit/{REVISION}", "POST", "commit"),
    (rf"/{NAME}\.git/info/lfs/objects/batch", "POST", "batch"),
    (r"/large/(?P<digest>[0-9a-f]{64})", "PUT", "large"),
    (rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "GET", "resolve"),
)


@contextlib.contextmanager
def hub_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in as the hub of this process, with an empty cache and the right to write; any
    other address is refused, and fails the test even where the refusal is caught."""
    from huggingface_hub import constants

    hub, elsewhere = HubServer(), []
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(address)
            raise OSError(f"{address} is not of this machine")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    changed = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    try:
        yield hub
    finally:
        hub.close()
    assert not elsewhere, f"something went to {elsewhere}"
