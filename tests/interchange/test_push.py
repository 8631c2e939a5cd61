"""Uploads, to a hub of our own on 127.0.0.1."""

import base64
import http.server
import json
import threading

import pytest

from gidd_jax.errors import InputError
from gidd_jax.interchange.push import push


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks of a hub to make a repository and commit files to it."""

    files: dict[str, bytes]
    repositories: set[str]
    fails: bool

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return self._answer(409, {"error": "You already created this model repo"})
            self.repositories.add(name)
            return self._answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if self.path.endswith("/validate-yaml"):
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                f | {"uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path and not self.fails:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/a/b/commit/" + "0" * 40
            return self._answer(200, {"commitOid": "0" * 40, "commitUrl": url})
        return self._answer(403, {"error": "not allowed"})

    def do_GET(self) -> None:
        self._answer(200, {"id": "a/b", "sha": "0" * 40, "siblings": []})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    Hub.files, Hub.repositories, Hub.fails = {}, set(), False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path


def test_every_file_arrives(hub, folder):
    assert push(folder, "a/b", endpoint=hub) == f"{hub}/a/b"
    assert Hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_nothing_is_overwritten(hub, folder):
    push(folder, "a/b", endpoint=hub)
    with pytest.raises(InputError, match="--push=a/b: it exists, and nothing is overwritten"):
        push(folder, "a/b", endpoint=hub)


def test_an_upload_that_fails_says_how_to_go_on(hub, folder):
    Hub.fails = True
    with pytest.raises(InputError, match=r"the upload failed .*: go on with hf upload a/b"):
        push(folder, "a/b", endpoint=hub)


@pytest.mark.parametrize("name", ["a", "a/b/c", "", "/b"])
def test_names_of_repositories(name, folder):
    with pytest.raises(InputError, match="must be OWNER/NAME of a repository"):
        push(folder, name)
