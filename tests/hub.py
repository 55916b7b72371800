"""A Hub of our own, on 127.0.0.1 and in memory: as much of it as pushing and loading models and recipes needs.

What it does not know is answered with 404 and noted in `unknown`, so that a new version of the client shows what it asks for.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_of_the_tests"
_FILE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<verb>\w+)(?:/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?)?"
)
_LFS = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")


@dataclass
class Repo:
    """Commits are whole trees: `{path: content}`, by hash."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[branch] = digest
        return digest

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class Hub:
    """The server's state. `lfs`: how names of files end that are uploaded apart from the commit."""

    def __init__(self, lfs: tuple[str, ...] = (".safetensors",)):
        self.lfs = lfs
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.faults: dict[str, int] = {}
        hub = self

        class Bound(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def drop(self, request: str, times: int = 1) -> None:
        """Cut the connection in the middle of the next requests that look like `request`, such as `"GET .*safetensors"`."""
        self.faults[request] = times

    def cuts(self, request: str) -> bool:
        for pattern, times in self.faults.items():
            if times and re.search(pattern, request):
                self.faults[pattern] -= 1
                return True
        return False


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        request = f"{self.command} {self.path}"
        self.state.requests.append(request)
        self._cut = self.state.cuts(request)
        size = int(self.headers.get("Content-Length") or 0)
        if self._cut and self.command in ("POST", "PUT"):
            self.rfile.read(size // 2)
            self._hang_up()
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self._chunk, b""))
        else:
            self.body = self.rfile.read(size)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        if path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/whoami-v2":
            self._json({"type": "user", "name": "tester", "orgs": []})
        elif path.startswith("/lfs/"):
            self._blob(path.removeprefix("/lfs/"))
        elif match := _LFS.fullmatch(path):
            self._batch(**match.groupdict())
        elif match := _FILE.fullmatch(path):
            self._file(**match.groupdict())
        elif match := _API.fullmatch(path):
            self._api(**match.groupdict())
        else:
            self.state.unknown.append(request)
            self._error(404, "EntryNotFound")

    # --- answers ---------------------------------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._cut:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self._hang_up()
            return
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, **headers: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code} | headers)

    def _visible(self, name: str) -> Repo | None:
        """The repository, unless it is private and no token was sent: then it is not there, as on the Hub."""
        repo = self.state.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            self._error(404 if allowed else 401, "RepoNotFound")
            return None
        return repo

    # --- requests --------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        given = json.loads(self.body)
        name = f"{given.get('organization') or 'tester'}/{given['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "Unauthorized")
            return
        there = name in self.state.repos
        if not there:
            self.state.repos[name] = Repo(private=bool(given.get("private") or given.get("visibility") == "private"))
            self.state.repos[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.state.url}/{name}", "name": name, "id": name}, 409 if there else 200)

    def _blob(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "BadBlob")
            return
        self.state.blobs[oid] = self.body
        self._send(200, b"", {})

    def _batch(self, repo: str) -> None:
        actions = {
            o["oid"]: {"upload": {"href": f"{self.state.url}/lfs/{o['oid']}"}}
            for o in json.loads(self.body)["objects"]
        }
        objects = [
            {**o, "actions": actions[o["oid"]]} if o["oid"] not in self.state.blobs else o
            for o in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _file(self, repo: str, revision: str, path: str) -> None:
        found = self._visible(repo)
        if found is None:
            return
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            self._error(404, "RevisionNotFound")
            return
        content = found.commits[commit].get(path)
        if content is None:
            self._error(404, "EntryNotFound", **{"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if path.endswith(self.state.lfs):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        if self.command == "HEAD":
            self._send(200, b"", headers | {"Content-Length": str(len(content))})
        elif start := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, content[first:], headers)
        else:
            self._send(200, content, headers)

    def _api(self, repo: str, verb: str | None, revision: str | None, path: str | None) -> None:
        found = self._visible(repo)
        if found is None:
            return
        commit = found.refs.get(revision or "main", revision or "main")
        if verb == "preupload":
            mode = {
                f["path"]: "lfs" if f["path"].endswith(self.state.lfs) else "regular"
                for f in json.loads(self.body)["files"]
            }
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]})
        elif verb == "commit":
            self._commit(found, repo, revision or "main")
        elif commit not in found.commits:
            self._error(404, "RevisionNotFound")
        elif verb == "tree":
            self._tree(found.commits[commit], path or "")
        else:
            siblings = [{"rfilename": name} for name in found.commits[commit]]
            self._json(
                {
                    "_id": repo,
                    "id": repo,
                    "modelId": repo,
                    "sha": commit,
                    "private": found.private,
                    "siblings": siblings,
                    "tags": [],
                }
            )

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/") or not folder}
        if not inside and folder:
            self._error(404, "EntryNotFound")
            return
        entries = []
        for name, content in inside.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if name.endswith(self.state.lfs):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _commit(self, repo: Repo, name: str, branch: str) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "Unauthorized")
            return
        files = dict(repo.files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        digest = repo.commit(files, branch)
        self._json({"success": True, "commitOid": digest, "commitUrl": f"{self.state.url}/{name}/commit/{digest}"})
