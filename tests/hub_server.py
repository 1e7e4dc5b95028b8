"""The part of the Hub that uploads and downloads talk to, in memory, for the real client.

One version of each repository is kept; a commit's id is a hash of what it made of the files.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".npy", ".parquet", ".bin", ".pt", ".pth", ".png")


@dataclass
class Repository:
    """`commits` holds, for each commit, the names it added; `files` name -> content, as pushed so far."""

    commits: list[set[str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        listed = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in self.files.items())
        return hashlib.sha1(json.dumps(listed).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Repositories by id; `asked` lists what was downloaded.

    Args:
        token: demanded of whoever writes, if given.
        dropped_uploads: how many uploads of large files end in a closed connection before one succeeds.
    """

    def __init__(self, token: str | None = None, dropped_uploads: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.dropped_uploads = token, dropped_uploads
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, header in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer({"error": what}, 404, X_Error_Code=what)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def place(self) -> str:
        return unquote(urlsplit(self.path).path)

    def do_HEAD(self) -> None:
        self.resolve()

    def do_GET(self) -> None:
        found = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", self.place
        )
        if not found:
            self.resolve()
            return
        name, kind, _ = found.groups()
        repository = self.server.repositories.get(name)
        if repository is None:
            self.missing("RepoNotFound")
        elif kind == "tree":
            self.answer([self.entry(path, content) for path, content in sorted(repository.files.items())])
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            self.answer({"id": name, "sha": repository.sha, "siblings": siblings, "tags": [], "private": False})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 100}
        return entry

    def resolve(self) -> None:
        found = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.place)
        repository = self.server.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            self.missing("RepoNotFound")
        elif found[2] not in ("main", repository.sha):
            self.missing("RevisionNotFound")
        elif found[3] not in repository.files:
            self.missing("EntryNotFound")
        else:
            if self.command == "GET":
                self.server.asked.append(found[3])
            content = repository.files[found[3]]
            large = found[3].endswith(LARGE)
            tag = hashlib.sha256(content).hexdigest() if large else git_hash(content)
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": repository.sha}
            if large:
                headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
            self.send(content, 200, headers)

    def do_PUT(self) -> None:
        content = self.body()
        if self.server.dropped_uploads:
            self.server.dropped_uploads -= 1
            self.close_connection = True
            return
        name = hashlib.sha256(content).hexdigest()
        assert self.path.endswith(name)
        self.server.objects[name] = content
        self.answer({})

    def do_POST(self) -> None:
        sent = self.body()
        wanted = self.server.token
        if wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        if "/commit/" in self.place:
            self.commit([json.loads(line) for line in sent.splitlines() if line.strip()])
            return
        given = json.loads(sent or b"{}")
        if self.place == "/api/repos/create":
            name = f"{given.get('organization') or 'me'}/{given['name'].rpartition('/')[2]}"
            self.server.repositories.setdefault(name, Repository())
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif self.place == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.place:
            kinds = [
                {"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in given["files"]
            ]
            self.answer({"files": kinds})
        elif self.place.endswith("/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.large(o) for o in given["objects"]]})
        else:
            self.answer({"error": self.place}, 404)

    def large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.objects:  # no actions: it is there
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/put/{wanted['oid']}"}}}

    def mode(self, path: str) -> str:
        return "lfs" if path.endswith(LARGE) else "regular"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        found = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/commit/.+", self.place)
        assert found is not None
        repository, added = self.server.repositories[found[1]], set()
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
            else:
                continue
            if repository.files.get(value["path"]) != content:
                added.add(value["path"])
            repository.files[value["path"]] = content
        repository.commits.append(added)
        url = f"{self.server.url}/{found[1]}/commit/{repository.sha}"
        self.answer({"commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": None})


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
