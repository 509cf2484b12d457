"""A Hub of a test's own, on loopback, in a process of its own: what the Hub's library asks for pushes and pulls.

In: nothing, or a port. Out: a running server without data sets, the environment in which clients find it, and what it
was asked. Repositories have branches of commits, files are small ones or large ones by digest, and large ones are read
through a redirect. Requests may be made to fail or to hang, and stored bytes to change.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.processes import free_port

_START_S = 60.0


@dataclass(frozen=True)
class RunningHub:
    """A server that answers."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """What tells a process of its own of it."""
        off = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_test", **off}

    def tell(self, order: str, **facts: Any) -> Any:
        """Give the server an order of ``_Hub``; its answer."""
        data = json.dumps(facts).encode()
        with urllib.request.urlopen(f"{self.url}/-/{order}", data=data, timeout=_START_S) as answer:
            return json.load(answer)


@contextmanager
def running_hub() -> Iterator[RunningHub]:
    """A server; everything in it ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "tests.hubs", str(port)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the server did not start"
        yield RunningHub(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class _Repo:
    private: bool
    branches: dict[str, str]
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commit to path to the digest of each file."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    """Digests of what was sent as large files."""


@dataclass
class _Fault:
    pattern: str
    status: int | None
    """None: the request hangs until the fault is cleared."""
    skip: int
    times: int
    headers: dict[str, str]


class _Answer(Exception):
    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _json(value: object, status: int = 200) -> _Answer:
    return _Answer(status, json.dumps(value).encode(), Content_Type="application/json")


class _Hub:
    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, _Repo] = {}
        self.requests: list[str] = []
        self.faults: list[_Fault] = []
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)

    # Orders of a test.

    def order_requests(self) -> object:
        return self.requests

    def order_clear(self) -> object:
        """Forget faults and requests; what hangs is dropped."""
        self.requests.clear()
        self.faults.clear()
        self.changed.notify_all()
        return None

    def order_fail(
        self, pattern: str, status: int | None = None, skip: int = 0, times: int = 1, headers: Any = None
    ) -> object:
        """Answer the next requests like ``pattern``, after some, with a status, or let them hang."""
        self.faults.append(_Fault(pattern, status, skip, times, headers or {}))
        return None

    def order_files(self, repo: str, revision: str = "main") -> object:
        """Path to size of a revision's files."""
        stored = self.repos[repo]
        return {path: len(stored.blobs[digest]) for path, digest in self._files(stored, revision)[1].items()}

    def order_commits(self, repo: str) -> object:
        return list(self.repos[repo].commits)

    def order_change(self, repo: str, path: str, data: str | None) -> object:
        """Put other bytes (base64) in a file's place behind everybody's back, or take them away."""
        blobs, digest = self.repos[repo].blobs, self._files(self.repos[repo], "main")[1][path]
        if data is None:
            del blobs[digest]
        else:
            blobs[digest] = base64.b64decode(data)
        return None

    # What the library asks.

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> _Answer:
        parts = urlsplit(target)
        path = parts.path
        for pattern, serve in _ROUTES:
            if matched := re.fullmatch(pattern, f"{method} {path}"):
                named = {name: unquote(value) for name, value in matched.groupdict().items()}
                return serve(self, headers=headers, body=body, **named)
        return _Answer(404)

    def fault(self, request: str) -> _Answer | None:
        for fault in self.faults:
            if re.search(fault.pattern, request):
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    if fault.status is None:
                        self.requests.append(f"HANGS {request}")
                        while fault in self.faults:
                            self.changed.wait()
                        return _Answer(500)
                    return _Answer(fault.status, b"", **{k.replace("-", "_"): v for k, v in fault.headers.items()})
        return None

    def create(self, headers: dict[str, str], body: bytes) -> _Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return _json({"error": "there already", "url": f"{self.url}/datasets/{name}"}, 409)
        if headers.get("authorization") != "Bearer hf_test":
            return _json({"error": "Invalid username or password."}, 401)
        repo = self.repos[name] = _Repo(asked.get("visibility") == "private", {})
        repo.branches["main"] = self._add_commit(repo, {})
        return _json({"url": f"{self.url}/datasets/{name}"})

    def branch(self, repo: str, branch: str, **_: Any) -> _Answer:
        self.repos[repo].branches.setdefault(branch, self.repos[repo].branches["main"])
        return _json({})

    def info(self, repo: str, revision: str = "main", **_: Any) -> _Answer:
        if repo not in self.repos:
            return _Answer(404, X_Error_Code="RepoNotFound")
        commit, _files = self._files(self.repos[repo], revision)
        return _json({"id": repo, "sha": commit, "private": self.repos[repo].private})

    def validate(self, body: bytes, **_: Any) -> _Answer:
        content = json.loads(body)["content"]
        good = content.startswith("---\n") and "\n---\n" in content
        return _json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def preupload(self, repo: str, revision: str, body: bytes, **_: Any) -> _Answer:
        stored = self.repos[repo]
        files = self._files(stored, revision)[1]
        told = []
        for file in json.loads(body)["files"]:
            is_large = file["path"].endswith(".zip") or file["size"] > 10 << 20
            facts = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                facts["oid"] = _oid(stored, files[file["path"]])
            told.append(facts)
        return _json({"files": told})

    def batch(self, repo: str, body: bytes, **_: Any) -> _Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.repos[repo].blobs:
                told["actions"] = {"upload": {"href": f"{self.url}/upload/{repo}/{asked['oid']}"}}
            objects.append(told)
        return _json({"transfer": "basic", "objects": objects})

    def upload(self, repo: str, oid: str, body: bytes, **_: Any) -> _Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return _Answer(400)
        self.repos[repo].blobs[oid] = body
        self.repos[repo].large.add(oid)
        return _Answer(200)

    def commit(self, repo: str, revision: str, body: bytes, **_: Any) -> _Answer:
        stored = self.repos[repo]
        head, files = self._files(stored, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit", head) != head:
            return _json({"error": "the branch has moved"}, 412)
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if len(stored.blobs.get(value["oid"], b"")) != value["size"]:
                    return _json({"error": "the file was not sent"}, 400)
                files[value["path"]] = value["oid"]
            else:
                assert line["key"] == "file"
                data = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(data).hexdigest()
                stored.blobs[files[value["path"]]] = data
        stored.branches[revision] = self._add_commit(stored, files)
        url = f"{self.url}/datasets/{repo}/commit/{stored.branches[revision]}"
        return _json({"commitUrl": url, "commitOid": stored.branches[revision]})

    def paths_info(self, repo: str, revision: str, body: bytes, **_: Any) -> _Answer:
        stored = self.repos[repo]
        files = self._files(stored, revision)[1]
        told = []
        for path in parse_qs(body.decode())["paths"]:
            if path in files:
                digest = files[path]
                size = len(stored.blobs.get(digest, b""))
                facts = {"type": "file", "path": path, "size": size, "oid": _oid(stored, digest)}
                if digest in stored.large:
                    facts["lfs"] = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}
                told.append(facts)
        return _json(told)

    def resolve(self, repo: str, revision: str, path: str, headers: dict[str, str], **_: Any) -> _Answer:
        if repo not in self.repos:
            return _Answer(404, X_Error_Code="RepoNotFound")
        digest = self._files(self.repos[repo], revision)[1].get(path)
        if digest is None:
            return _Answer(404, X_Error_Code="EntryNotFound")
        if digest in self.repos[repo].large:
            return _Answer(302, Location=f"{self.url}/content/{repo}/{digest}")
        return _ranged(self.repos[repo].blobs[digest], headers)

    def content(self, repo: str, oid: str, headers: dict[str, str], **_: Any) -> _Answer:
        blobs = self.repos[repo].blobs
        return _ranged(blobs[oid], headers) if oid in blobs else _Answer(404, X_Error_Code="EntryNotFound")

    def _files(self, repo: _Repo, revision: str) -> tuple[str, dict[str, str]]:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Answer(404, X_Error_Code="RevisionNotFound")
        return commit, repo.commits[commit]

    def _add_commit(self, repo: _Repo, files: dict[str, str]) -> str:
        made = hashlib.sha1(f"{len(repo.commits)} {sorted(files.items())}".encode()).hexdigest()
        repo.commits[made] = files
        return made


def _oid(repo: _Repo, digest: str) -> str:
    """What tells the library that a file is as it was: a large one's digest, or else git's."""
    data = repo.blobs.get(digest, b"")
    return digest if digest in repo.large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _ranged(data: bytes, headers: dict[str, str]) -> _Answer:
    matched = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
    if matched is None:
        return _Answer(200, data)
    first, last = int(matched[1]), min(int(matched[2]), len(data) - 1)
    if first > last:
        return _Answer(416)
    return _Answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")


_API = r"/api/datasets/(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., _Answer]]] = [
    (r"POST /api/repos/create", _Hub.create),
    (r"POST /api/validate-yaml", _Hub.validate),
    (rf"GET {_API}", _Hub.info),
    (rf"GET {_API}/revision/(?P<revision>[^/]+)", _Hub.info),
    (rf"POST {_API}/branch/(?P<branch>[^/]+)", _Hub.branch),
    (rf"POST {_API}/preupload/(?P<revision>[^/]+)", _Hub.preupload),
    (rf"POST {_API}/commit/(?P<revision>[^/]+)", _Hub.commit),
    (rf"POST {_API}/paths-info/(?P<revision>[^/]+)", _Hub.paths_info),
    (r"POST /datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Hub.batch),
    (r"PUT /upload/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]+)", _Hub.upload),
    (r"GET /datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Hub.resolve),
    (r"GET /content/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]+)", _Hub.content),
]


def _serve(port: int) -> None:
    hub = _Hub(f"http://127.0.0.1:{port}")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = f"{self.command} {self.path}"
            with hub.lock:
                try:
                    if self.path.startswith("/-/"):
                        answer = _json(getattr(hub, f"order_{self.path[3:]}")(**json.loads(body)))
                    else:
                        hub.requests.append(request)
                        answer = hub.fault(request) or hub.answer(self.command, self.path, headers, body)
                except _Answer as told:
                    answer = told
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
