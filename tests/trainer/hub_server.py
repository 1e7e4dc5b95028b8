"""The part of the Hub that an upload talks to, in memory, for the real client."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer(ThreadingHTTPServer):
    """`commits` holds, for each commit, the names it added; `files` name -> content, as pushed so far."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: list[set[str]] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.answer({}, 404, X_Error_Code="EntryNotFound")

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": names, "tags": [], "private": False})
        else:
            self.answer({}, 404, X_Error_Code="EntryNotFound")

    def do_PUT(self) -> None:
        content = self.body()
        name = hashlib.sha256(content).hexdigest()
        assert self.path.endswith(name)
        self.server.objects[name] = content
        self.answer({})

    def do_POST(self) -> None:
        sent = self.body()
        if "/commit/" in self.path:
            self.commit([json.loads(line) for line in sent.splitlines() if line.strip()])
            return
        given = json.loads(sent or b"{}")
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/me/model", "name": "me/model", "id": "me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            kinds = [
                {"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in given["files"]
            ]
            self.answer({"files": kinds})
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}} for o in given["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.answer({"error": self.path}, 404)

    def mode(self, path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".bin", ".pt", ".pth", ".png")) else "regular"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        added = set()
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
            else:
                continue
            added.add(value["path"])
        self.server.commits.append(added)
        url = f"{self.server.url}/me/model/commit/{'0' * 40}"
        self.answer({"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None})
