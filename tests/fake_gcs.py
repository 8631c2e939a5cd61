"""A Google Cloud Storage of one process: the part of its JSON API that a run's clients use.

gcsfs, TensorStore's driver and google-cloud-storage each reach it on 127.0.0.1 by a variable of
the environment, so nothing of them is replaced.
"""

import contextlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

BUCKET = "bucket"


class FakeGcs:
    """One bucket: the objects by name, each with its generation, and what was written so far."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.written: list[str] = []
        self.refuse = ""  # requests whose "METHOD name" match this pattern are forbidden
        self.uploads: dict[str, bytes] = {}  # what came so far of objects sent in pieces
        self._generations = itertools.count(1)
        self._lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """The variables that lead the three clients here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask by gRPC
        }

    def put(self, name: str, content: bytes, generation: str | None) -> dict[str, str] | None:
        """Write an object if it has the generation asked for; return what is known of it."""
        with self._lock:
            if generation is not None and int(generation) != self.objects.get(name, (0, b""))[0]:
                return None
            self.objects[name] = (next(self._generations), content)
            self.written.append(name)
        return self.describe(name)

    def describe(self, name: str) -> dict[str, str]:
        generation, content = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def listing(self, prefix: str, delimiter: str, start: str, end: str) -> dict[str, object]:
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FakeGcs

    def do_GET(self) -> None:
        store, name, query = self._request()
        if name is None:
            return
        if name == "" and not self._path.endswith("/o"):
            self._answer(200, {"kind": "storage#bucket", "name": BUCKET})
        elif name == "":
            bounds = (query.get(key, "") for key in ("startOffset", "endOffset"))
            found = store.listing(query.get("prefix", ""), query.get("delimiter", ""), *bounds)
            self._answer(200, found)
        elif name not in store.objects:
            self._answer(404, {"error": {"code": 404, "message": "no such object"}})
        elif query.get("alt") != "media":
            self._answer(200, store.describe(name))
        else:
            self._send_content(*store.objects[name], query)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        store, name, query = self._request(body)
        if name is None:
            return
        if query["uploadType"] == "resumable":
            self._receive(name, body)
            return
        if query["uploadType"] == "multipart":
            body = _parts(self.headers["Content-Type"], body)[1]
        known = store.put(name, body, query.get("ifGenerationMatch"))
        self._answer(200, known) if known else self._answer(412, {})

    def do_DELETE(self) -> None:
        store, name, _ = self._request()
        if name is not None:
            known = store.objects.pop(name, None)
            self._answer(204 if known else 404, None if known else {})

    def _request(self, body: bytes = b"") -> tuple[FakeGcs, str | None, dict[str, str]]:
        """Return store, name of the object ("": of none, None: answered already) and query."""
        url = urllib.parse.urlsplit(self.path)
        self._path, query = url.path, dict(urllib.parse.parse_qsl(url.query))
        found = re.fullmatch(
            r"/(?:upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path
        )
        if not found or urllib.parse.unquote(found[1]) != BUCKET:
            self._answer(404, {"error": {"code": 404, "message": "no such bucket"}})
            return self.store, None, query
        name = urllib.parse.unquote(found[2] or "")
        if self.command == "POST":
            if query["uploadType"] == "multipart":
                name = json.loads(_parts(self.headers["Content-Type"], body)[0])["name"]
            else:
                name = query["name"]
        request = f"{self.command} {name or query.get('prefix', '')}"
        if self.store.refuse and re.search(self.store.refuse, request):
            self._answer(403, {"error": {"code": 403, "message": "you may not"}})
            return self.store, None, query
        return self.store, name, query

    def _receive(self, name: str, body: bytes) -> None:
        """Begin an upload, or take its next piece; the object is there after the last."""
        content_range = self.headers.get("Content-Range")
        if content_range is None:
            self.store.uploads[name] = b""
            there = urllib.parse.urlencode({"uploadType": "resumable", "name": name})
            location = f"{self.store.address}/upload/storage/v1/b/{BUCKET}/o?{there}"
            self._send(200, b"{}", {"Location": location})
            return
        self.store.uploads[name] += body
        if content_range.endswith("/*"):
            self._send(308, b"", {"Range": f"bytes=0-{len(self.store.uploads[name]) - 1}"})
        else:
            self._answer(200, self.store.put(name, self.store.uploads.pop(name), None))

    def _send_content(self, generation: int, content: bytes, query: dict[str, str]) -> None:
        if query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304, None)
            return
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            self._answer(412, {})
            return
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        code, total = 200, len(content)
        if asked:
            first = int(asked[1]) if asked[1] else max(total - int(asked[2]), 0)
            last = min(int(asked[2]), total - 1) if asked[1] and asked[2] else total - 1
            if first > last:
                self._answer(416, None)
                return
            code, content = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        self._send(code, content, headers)

    def _answer(self, code: int, value: object) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self._send(code, content, {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        if code != 304:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report nothing of clients that hung up: killed runs, and requests given up half-way."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _parts(content_type: str, body: bytes) -> list[bytes]:
    """The contents of a multipart body."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    assert boundary, content_type
    parts = body.split(b"--" + boundary[1].encode())[1:-1]
    contents = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts]
    return [content.removesuffix(b"\n").removesuffix(b"\r") for content in contents]


@contextlib.contextmanager
def fake_gcs() -> Iterator[FakeGcs]:
    """Serve an empty bucket named BUCKET until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    store = FakeGcs(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"store": store})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
