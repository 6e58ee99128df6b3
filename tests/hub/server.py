"""A Hub on loopback: as much of its interface as downloading from it and uploading to it takes, in memory."""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


# What goes by Git LFS.
LARGE = (".safetensors", ".bin", ".pth")


@dataclass
class Hub:
    """Repositories by name, each a list of commits, oldest first; a commit is its files by path."""

    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    # Access tokens that may write; all may where there are none.
    writers: set[str] = field(default_factory=set)
    # Answers to requests whose "METHOD path" begins so, in turn, before the real ones: a status, or "drop" to close the
    # connection in the middle of the request's body.
    failures: dict[str, list[int | str]] = field(default_factory=dict)
    # Large files by their SHA-256, whether or not a commit has them.
    storage: dict[str, bytes] = field(default_factory=dict)
    # Branches beside main: commits each, as in `repositories`.
    branches: dict[tuple[str, str], list[dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def commit(
        self, repository: str, files: dict[str, bytes], removed: set[str] = frozenset(), branch: str = "main"
    ) -> str:
        if branch != "main":
            history = self.branches[repository, branch]
            kept = {path: content for path, content in history[-1].items() if path not in removed}
            history.append(kept | files)
            return hashlib.sha1(f"{repository}/{branch}@{len(history)}".encode()).hexdigest()
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
        if (repository, revision) in self.branches:
            return self.branches[repository, revision][-1]
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
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        for start, answers in self.hub.failures.items():
            if request.startswith(start) and answers and (answer := answers.pop(0)) is not None:
                if answer == "drop":
                    self.rfile.read(min(16, int(self.headers.get("Content-Length") or 0)))
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return self.reply({"error": "as asked for"}, answer)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.command in ("POST", "PUT") and not path.startswith("storage/"):
            if self.hub.writers and token not in self.hub.writers:
                return self.reply({"error": "Invalid username or password."}, 401)
        if path.startswith("api/"):
            self.api(path.removeprefix("api/"), body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch(json.loads(body))
        elif path.startswith("storage/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("storage/"):
                return self.reply({"error": "incomplete"}, 400)
            self.hub.storage[path.removeprefix("storage/")] = body
            self.reply()
        elif "/resolve/" in path:
            repository, _, rest = path.removeprefix("datasets/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.resolve(repository, revision, name)
        else:
            self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def lfs_batch(self, asked):
        """Git LFS's batch interface: where to put what isn't there yet."""
        objects = []
        for entry in asked["objects"]:
            href = f"http://{self.headers['Host']}/storage/{entry['oid']}"
            there = entry["oid"] in self.hub.storage
            objects.append(entry if there else entry | {"actions": {"upload": {"href": href}}})
        self.reply({"transfer": "basic", "objects": objects})

    def resolve(self, repository, revision, name):
        if repository not in self.hub.repositories:
            return self.missing("RepoNotFound")
        files = self.hub.find(repository, revision)
        if files is None:
            return self.missing("RevisionNotFound")
        commits = self.hub.repositories[repository]
        index = next((i for i, commit in enumerate(commits) if commit is files), None)
        sha = hashlib.sha1(revision.encode()).hexdigest() if index is None else self.hub.sha(repository, index)
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

    def describe(self, path, content):
        entry = {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def api(self, path, body):
        parts = path.split("/")
        if path == "repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            status = 409 if repository in self.hub.repositories else 200
            if repository not in self.hub.repositories:
                self.hub.repositories[repository] = [{}]
                self.hub.private[repository] = asked.get("private") or asked.get("visibility") == "private"
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
            if action == ["branch"]:
                new = (repository, revision)
                status = 409 if new in self.hub.branches or revision == "main" else 200
                self.hub.branches.setdefault(new, [self.hub.repositories[repository][-1]])
                return self.reply({}, status)
            files = self.hub.find(repository, revision)
            if files is None:
                return self.missing("RevisionNotFound")
            if action == ["preupload"]:
                modes = {True: "lfs", False: "regular"}
                asked = [f["path"] for f in json.loads(body)["files"]]
                return self.reply(
                    {
                        "files": [
                            {"path": p, "uploadMode": modes[p.endswith(LARGE)], "shouldIgnore": False} for p in asked
                        ]
                    }
                )
            if action == ["commit"]:
                lines = [json.loads(line) for line in body.splitlines()]
                new = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                new |= {
                    line["value"]["path"]: self.hub.storage[line["value"]["oid"]]
                    for line in lines
                    if line["key"] == "lfsFile"
                }
                removed = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
                sha = self.hub.commit(repository, new, removed, revision)
                url = f"http://{self.headers['Host']}/{repository}/commit/{sha}"
                return self.reply({"success": True, "commitOid": sha, "commitUrl": url})
            if action == ["tree"]:
                inside = {p: c for p, c in files.items() if p.startswith("/".join([*folder, ""]))}
                if folder and not inside:
                    return self.missing("EntryNotFound")
                entries = [self.describe(path, content) for path, content in inside.items()]
                if not folder:
                    tops = {path.partition("/")[0] for path in files if "/" in path}
                    entries += [{"type": "directory", "path": top, "oid": "0" * 40} for top in sorted(tops)]
                return self.reply(entries)
            siblings = [{"rfilename": name} for name in files]
            sha = revision if revision != "main" else self.hub.sha(repository)
            return self.reply({"id": repository, "modelId": repository, "sha": sha, "siblings": siblings})
        self.missing("EntryNotFound")
