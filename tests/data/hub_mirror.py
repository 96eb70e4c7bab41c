"""A small mirror of the Hugging Face hub on this machine: the part of its API that `prepare --fetch` uses."""

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Mirror(ThreadingHTTPServer):
    """Serves {repository: {file: bytes}}; use as a context.

    Attributes:
        asked: (method, file, first byte) of every request for a file. stall_after: bytes of an answer that are sent before it stops for ever.
        revision, gated: of every repository. wrong: files whose listed hash is not theirs.
    """

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.asked, self.stall_after, self.wrong = repositories, [], 1 << 60, set()
        self.revision, self.gated, self.token = "a" * 40, False, None
        self.stop = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(*found.groups())
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._answer(404, b"", {})

    def do_HEAD(self):
        self.do_GET()

    def _info(self, repository, revision):
        files = self.server.repositories.get(repository)
        if files is None or revision not in (None, self.server.revision):
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        siblings = []
        for name, data in files.items():
            entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if len(data) > 100:
                wrong = b"other" if name in self.server.wrong else b""
                sha256 = hashlib.sha256(data + wrong).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 130}
            siblings.append(entry)
        tree = {
            "id": repository, "sha": self.server.revision, "gated": self.server.gated, "siblings": siblings,
            "cardData": {"license": "cc-by-sa-3.0"}, "private": False, "tags": [],
        }  # fmt: skip
        self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _file(self, repository, revision, name):
        data = self.server.repositories[repository][name]
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "agree first"})
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        self.server.asked.append((self.command, name, begin))
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._answer(206 if asked else 200, data[begin:], headers)

    def _answer(self, status, body, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(0, len(body), 1 << 16):
            if at >= self.server.stall_after:
                self.server.stop.wait()
                return
            self.wfile.write(body[at : at + (1 << 16)])
