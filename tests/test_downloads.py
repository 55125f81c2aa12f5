"""Files that are fetched and written: checked before use, whole or not there, whenever a process is killed."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from loopback import serving

from seqdisent import _downloads, _files

CONTENT = {"one.bin": b"1" * 4000, "two.bin": bytes(range(256)) * 400}
FILES = {name: (f"path/{name}", hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()}


@pytest.fixture
def server():
    """A server of CONTENT; `held` names a file of which it sends half, and then nothing until `released`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/path/")
            self.server.asked.append(name)
            content = self.server.content[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if name in self.server.cut:
                self.wfile.write(content[: len(content) // 2])
                return
            self.wfile.write(content[: len(content) // 2])
            if name == self.server.held:
                self.server.sending.set()
                self.server.released.wait(60)
                return
            self.wfile.write(content[len(content) // 2 :])

        def log_message(self, *_):
            pass

    with serving(Handler) as server:
        server.content, server.asked, server.held, server.cut = dict(CONTENT), [], None, set()
        server.sending = threading.Event()
        yield server


def find(root, server, **options):
    options = {"what": "the files", "remedy": "fetch them", "download": True, "timeout": 10.0, **options}
    return _downloads.find_files(root, "made-up", FILES, base_url=server.url, **options)


def test_what_was_cut_off_is_not_kept_and_the_next_try_starts_with_it(server, tmp_path):
    server.cut = {"two.bin"}
    with pytest.raises(ConnectionError, match=r"two\.bin: "):
        find(tmp_path, server)
    assert [path.name for path in tmp_path.iterdir()] == ["one.bin"]
    server.cut = set()
    assert find(tmp_path, server) == tmp_path
    assert server.asked == ["one.bin", "two.bin", "two.bin"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == CONTENT


def test_the_checksum_comes_before_the_file(server, tmp_path):
    server.content["one.bin"] = b"2" * 4000
    with pytest.raises(ValueError, match=r"one\.bin: "):
        find(tmp_path, server)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_but_not_right_is_never_replaced_in_silence(server, tmp_path):
    (tmp_path / "one.bin").write_bytes(b"the user's own")
    with pytest.raises(ValueError, match=r"one\.bin: "):
        find(tmp_path, server)
    assert (tmp_path / "one.bin").read_bytes() == b"the user's own"
    assert server.asked == []


def test_a_packed_file_is_checked_by_what_it_holds(server, tmp_path):
    server.content = {name: gzip.compress(content, 1) for name, content in CONTENT.items()}
    assert find(tmp_path, server, gzipped=True) == tmp_path
    (tmp_path / "one.bin").write_bytes(server.content["one.bin"][:-4])
    with pytest.raises(ValueError, match=r"one\.bin: "):
        find(tmp_path, server, gzipped=True)


CHILD = f"""
import importlib.util, json, os, sys, types
from pathlib import Path
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["seqdisent"] = types.ModuleType("seqdisent")
sys.modules["seqdisent"].__path__ = [{str(Path(_files.__file__).parent)!r}]
from seqdisent import _files
spec = importlib.util.spec_from_file_location("downloads", {_downloads.__file__!r})  # without torch: it starts at once
downloads = importlib.util.module_from_spec(spec)
spec.loader.exec_module(downloads)
"""
FETCHING = f"""{CHILD}
files = {FILES!r}
downloads.find_files(sys.argv[1], "made-up", files, what="", remedy="", download=True, base_url=sys.argv[2], timeout=60)
"""
WRITING = f"""{CHILD}
path, content = Path(sys.argv[1]), b"x" * 10_000_000
while True:
    _files.write(path, content, several_writers=True)
    os.unlink(path)
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl, to make a certificate")
def test_an_address_of_https_does_not_lead_elsewhere(server, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", self.server.to + self.path)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serving(Redirect) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        address = secure.url.replace("http:", "https:")
        secure.to = server.url
        with pytest.raises(
            ConnectionError, match=f"{address}/path/one.bin: .*it leads to {server.url}/path/one.bin, exp"
        ):
            _downloads.fetch(f"{address}/path/one.bin", 5.0)
        assert server.asked == []  # not even on the way


def test_a_process_that_is_killed_while_it_fetches_leaves_nothing_that_counts(server, tmp_path):
    server.held = "two.bin"
    process = subprocess.Popen([sys.executable, "-c", FETCHING, str(tmp_path), server.url])
    assert server.sending.wait(60)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["one.bin"]
    server.held = None
    find(tmp_path, server)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == CONTENT


def is_writing(folder):
    try:
        return any(found.stat().st_size for found in folder.glob(".*"))
    except FileNotFoundError:  # moved to its place in between
        return False


def test_a_process_that_is_killed_while_it_writes_leaves_no_file_that_is_not_whole(tmp_path):
    path, left = tmp_path / "frames.bin", []
    for _ in range(20):  # until a kill has hit a write
        process = subprocess.Popen([sys.executable, "-c", WRITING, str(path)])
        while not is_writing(tmp_path):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        assert not path.exists() or path.stat().st_size == 10_000_000
        left = list(tmp_path.glob(".frames.bin.*"))
        if left:
            break
    assert len(left) == 1
    _files.write(path, b"ab", several_writers=True)
    assert path.read_bytes() == b"ab"
    assert left[0].exists()  # it might belong to a process that is still writing
    os.utime(left[0], times=(time.time() - 25 * 3600,) * 2)
    _files.write(path, b"c", several_writers=True)
    assert [found.name for found in tmp_path.iterdir()] == ["frames.bin"]
