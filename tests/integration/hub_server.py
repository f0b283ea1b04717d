"""A stand-in for the Hugging Face hub: the few endpoints with which a repository is created, written in one commit, and read."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """Repositories by name, other branches as name@branch, each a mapping of paths to bytes; and what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, list[str]]] = []  # repository, message, paths

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format, *args) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(unquote(self.path)).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.reply({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.reply({"files": files})
        elif "/branch/" in path:
            name, branch = "/".join(path.split("/")[3:5]), path.split("/")[6]
            self.server.repositories.setdefault(f"{name}@{branch}", dict(self.server.repositories[name]))
            self.reply({})
        elif "/commit/" in path:
            name = self.at("/".join(path.split("/")[3:5]), path.split("/")[6])
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            self.server.repositories[name] |= files
            self.server.commits.append((name, lines[0]["value"]["summary"], sorted(files)))
            self.reply(
                {"success": True, "commitOid": self.oid(name), "commitUrl": f"{self.server.endpoint}/{name}/commit/{self.oid(name)}"}
            )
        else:
            self.refuse()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(unquote(self.path)).path
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        revision = parts[5] if api and len(parts) > 5 else parts[3] if not api and len(parts) > 3 else "main"
        name = self.at(name, revision)
        files = self.server.repositories.get(name)
        if files is None:
            self.refuse("RepoNotFound")
        elif api and (len(parts) == 4 or parts[4] == "revision"):
            siblings = [{"rfilename": file} for file in files]
            self.reply({"id": name, "sha": self.oid(name), "private": False, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
        elif api and parts[4] == "tree":
            folder = "/".join(parts[6:])
            inside = [file for file in files if file.startswith(f"{folder}/" if folder else "")]
            listed = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in inside]
            self.reply(listed) if listed else self.refuse("EntryNotFound")
        elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[4:]) in files:
            content = files["/".join(parts[4:])]
            self.send(content, {"X-Repo-Commit": self.oid(name), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        else:
            self.refuse("EntryNotFound")

    def at(self, name: str, revision: str) -> str:
        branch = f"{name}@{revision}"
        return branch if branch in self.server.repositories else name

    def oid(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.server.repositories[name].items())).encode()).hexdigest()

    def reply(self, value) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str = "NotFound") -> None:
        self.send(b"{}", {"X-Error-Code": code, "Content-Type": "application/json"}, 404)

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
