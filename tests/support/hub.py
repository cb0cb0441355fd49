"""A stand-in for the Hugging Face hub: makes repositories, takes commits and large files, remembers them."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """What was uploaded."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": "Invalid credentials"}, 401)
            name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
            if name not in hub.private:
                return self._answer({"error": "Repository not found"}, 404)
            return self._answer({"id": name, "sha": "0" * 40, "siblings": []})

        do_HEAD = do_GET

        def do_PUT(self):
            hub.blobs[self.path.rsplit("/", 1)[-1]] = self._body()
            self._answer({})

        def do_POST(self):
            body = self._body()
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": "Invalid credentials"}, 401)
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
                hub.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
                return self._answer({"url": f"{hub.url}/{name}"})
            if "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._answer({"files": files})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                return self._answer({"transfer": "basic", "objects": objects})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        hub.messages.append(value["summary"])
                    elif line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.blobs[value["oid"]]
                repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
                sha = "1" * 40
                return self._answer({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"})
            return self._answer({})

        @staticmethod
        def _mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".gguf", ".png")) else "regular"

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("content-length") or 0))

        def _answer(self, value, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
