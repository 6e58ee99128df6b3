"""A Hub on loopback: as much of its interface as downloading from it and uploading to it takes, in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by name, each a list of commits, oldest first; a commit is its files by path."""

    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def commit(self, repository: str, files: dict[str, bytes], removed: set[str] = frozenset()) -> str:
        history = self.repositories.setdefault(repository, [])
        kept = {path: content for path, content in (history[-1] if history else {}).items() if path not in removed}
        history.append(kept | files)
        return self.sha(repository)

    def sha(self, repository: str, index: int = -1) -> str:
        index %= len(self.repositories[repository]) or 1
        return hashlib.sha1(f"{repository}@{index}".encode()).hexdigest()

    def find(self, repository: str, revision: str) -> dict[str, bytes] | None:
        for index, files in enumerate(self.repositories[repository]):
            if revision == self.sha(repository, index):
                return files
        return self.repositories[repository][-1] if revision == "main" else None

    def downloads(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET") and "/resolve/" in request]

    def start(self) -> str:
        """Serves until `stop`; returns the address."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, content=b"", status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what):
        self.reply({"error": what}, 404, X_Error_Code=what, X_Error_Message=f"{what}: {self.path}")

    def handle_request(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("api/"):
            self.api(path.removeprefix("api/"), body)
        elif "/resolve/" in path:
            repository, _, rest = path.removeprefix("datasets/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.resolve(repository, revision, name)
        else:
            self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = handle_request

    def resolve(self, repository, revision, name):
        if repository not in self.hub.repositories:
            return self.missing("RepoNotFound")
        files = self.hub.find(repository, revision)
        if files is None:
            return self.missing("RevisionNotFound")
        index = next(i for i, commit in enumerate(self.hub.repositories[repository]) if commit is files)
        sha = self.hub.sha(repository, index)
        if name not in files:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = files[name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": sha, "Content_Type": "application/octet-stream"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.reply(content[start : end + 1], 206, **headers)
        self.reply(content, **headers)

    def api(self, path, body):
        parts = path.split("/")
        if path == "repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            status = 409 if repository in self.hub.repositories else 200
            self.hub.repositories.setdefault(repository, [{}])
            return self.reply({"url": f"http://{self.headers['Host']}/{repository}", "name": repository}, status)
        if path == "validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "whoami-v2":
            return self.reply({"name": "someone", "type": "user"})
        if parts[0] in ("models", "datasets") and len(parts) >= 3:
            repository, action, folder = "/".join(parts[1:3]), parts[3:4], parts[5:]
            revision = parts[4] if len(parts) > 4 else "main"
            if repository not in self.hub.repositories:
                return self.missing("RepoNotFound")
            files = self.hub.find(repository, revision)
            if files is None:
                return self.missing("RevisionNotFound")
            if action == ["preupload"]:
                asked = json.loads(body)["files"]
                return self.reply(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            if action == ["commit"]:
                lines = [json.loads(line) for line in body.splitlines()]
                new = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                removed = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
                sha = self.hub.commit(repository, new, removed)
                url = f"http://{self.headers['Host']}/{repository}/commit/{sha}"
                return self.reply({"success": True, "commitOid": sha, "commitUrl": url})
            if action == ["tree"]:
                inside = {p: c for p, c in files.items() if p.startswith("/".join([*folder, ""]))}
                if folder and not inside:
                    return self.missing("EntryNotFound")
                entries = [{"type": "file", "path": p, "oid": "0" * 40, "size": len(c)} for p, c in inside.items()]
                if not folder:
                    tops = {path.partition("/")[0] for path in files if "/" in path}
                    entries += [{"type": "directory", "path": top, "oid": "0" * 40} for top in sorted(tops)]
                return self.reply(entries)
            siblings = [{"rfilename": name} for name in files]
            sha = revision if revision != "main" else self.hub.sha(repository)
            return self.reply({"id": repository, "modelId": repository, "sha": sha, "siblings": siblings})
        self.missing("EntryNotFound")
