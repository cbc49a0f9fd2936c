"""A hub on this machine: the requests that huggingface_hub makes, answered from folders."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["Hub", "serve"]

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories by name and revision, and what was asked for."""

    revisions: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    broken: bool = False
    cut: str = ""  # files whose name ends so break off halfway
    ranges: bool = True
    changed: str = ""  # files whose name ends so come with other bytes than were added
    after_cut: Callable[[], None] | None = None  # what happens then
    stall: str = ""  # files whose name ends so stop halfway until `go_on`
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def add(self, name: str, folder: Path, revision: str = "main", inside: str = "") -> None:
        """Offer a folder's files as a revision of a repository, under a folder inside of it."""
        files = self.revisions.setdefault(name, {}).setdefault(revision, {})
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[inside + path.relative_to(folder).as_posix()] = path.read_bytes()

    def commit_of(self, name: str, revision: str) -> str | None:
        """Return the commit of a branch or a commit itself."""
        for known in self.revisions.get(name, {}):
            commit = hashlib.sha1(f"{name}@{known}".encode()).hexdigest()
            if revision in (known, commit):
                return commit
        return None

    def files(self, name: str, revision: str) -> Files:
        """Return the files of a revision, by branch or commit."""
        for known, files in self.revisions[name].items():
            if revision in (known, hashlib.sha1(f"{name}@{known}".encode()).hexdigest()):
                return files
        raise KeyError(revision)

    def fetched(self, ending: str) -> list[str]:
        """Return the requests for the content of files whose name ends so."""
        return [line for line in self.asked if line.startswith("GET") and line.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.broken:
            self._send(
                200, b"<html>Please log in to the network</html>", {"Content-Type": "text/html"}
            )
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "repos"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "models"] and "preupload" in parts:
            files = json.loads(body)["files"]
            found = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self._json({"files": [{**f, "shouldIgnore": False} for f in found]})
        elif parts[:2] == ["api", "models"] and "commit" in parts:
            self._commit("/".join(parts[2 : parts.index("commit")]), parts[-1], body)
        elif parts[:2] == ["api", "models"] and "tree" in parts:
            at = parts.index("tree")
            self._tree("/".join(parts[2:at]), parts[at + 1])
        elif parts[:2] == ["api", "models"]:
            at = parts.index("revision") if "revision" in parts else len(parts)
            self._info("/".join(parts[2:at]), (parts[at + 1 :] or ["main"])[0])
        elif parts[:1] == ["api"]:
            self._json({"name": "tester", "type": "user", "errors": [], "warnings": []})
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._file("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        else:
            self._error(404, "EntryNotFound")

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        self.hub.revisions.setdefault(name, {}).setdefault("main", {})
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        if name in self.hub.gated:
            self._error(403, "GatedRepo")
            return
        files = self.hub.files(name, revision)
        for line in filter(None, body.decode().splitlines()):
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = self.hub.commit_of(name, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _info(self, name: str, revision: str) -> None:
        if self._refused(name, revision):
            return
        siblings = [{"rfilename": file} for file in self.hub.files(name, revision)]
        commit = self.hub.commit_of(name, revision)
        self._json(
            {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False}
        )

    def _tree(self, name: str, revision: str) -> None:
        if self._refused(name, revision):
            return
        entries = []
        for path, content in self.hub.files(name, revision).items():
            size, (oid, is_large) = len(content), _hash(path, content)
            entry = {"type": "file", "path": path, "size": size, "oid": oid[:40]}
            large = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if is_large else {}
            entries.append({**entry, **large})
        self._json(entries)

    def _file(self, name: str, revision: str, file: str) -> None:
        if self._refused(name, revision):
            return
        files = self.hub.files(name, revision)
        commit = self.hub.commit_of(name, revision) or ""
        if file not in files:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        content = files[file]
        oid, is_large = _hash(file, content)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{oid}"',
            **(
                {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
                if is_large
                else {}
            ),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if is_large:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        asked = self.headers.get("Range", "")
        if self.hub.changed and file.endswith(self.hub.changed):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if asked.startswith("bytes=") and self.hub.ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            if int(start) >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            last = min(int(end) if end else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            self._send(206, content[int(start) : last + 1], headers)
        elif self.hub.cut and file.endswith(self.hub.cut) and self.command != "HEAD":
            self._send(200, content[: len(content) // 2], headers, length=len(content))
            self.close_connection = True
            if self.hub.after_cut is not None:
                self.hub.after_cut()
        elif self.hub.stall and file.endswith(self.hub.stall) and self.command != "HEAD":
            half = len(content) // 2
            self._send(200, content[:half], headers, length=len(content))
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.go_on.wait()
            with suppress(OSError):  # whoever asked may be gone
                self.wfile.write(content[half:])
        else:
            self._send(200, content, headers)

    def _refused(self, name: str, revision: str) -> bool:
        if name not in self.hub.revisions:
            self._error(404, "RepoNotFound")
        elif name in self.hub.gated:
            self._error(403, "GatedRepo")
        elif self.hub.commit_of(name, revision) is None:
            self._error(404, "RevisionNotFound")
        else:
            return False
        return True

    def _error(self, code: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self._send(code, b"{}", {"X-Error-Code": kind, **(headers or {})})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, code: int, content: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(code)
        told = len(content) if length is None else length
        for key, value in {"Content-Length": str(told), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(path: str, content: bytes) -> tuple[str, bool]:
    """Return what the hub knows a file by, and whether it is one of the large ones."""
    digest = hashlib.sha256(content).hexdigest()
    large = path.endswith((".safetensors", ".bin"))
    return (digest if large else digest[:40]), large


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
