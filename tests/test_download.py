"""Downloads of published files: cut, killed, damaged, or out of disk, against a server on this machine."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from llamagen_unitok.published import download
from llamagen_unitok.published.presets import HubFile

HUB_BYTES = np.random.default_rng(0).bytes(3_000_000)


class FileServer(ThreadingHTTPServer):
    """One file, with ranges; `cuts`: after how many bytes it breaks off, answer by answer. It notes what was asked."""

    def __init__(self, ranges: bool = True, cuts: tuple[int, ...] = ()):
        super().__init__(("127.0.0.1", 0), FileServer.Handler)
        self.ranges, self.cuts, self.asked = ranges, list(cuts), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            self.server.asked.append(wanted)
            start = int(wanted[len("bytes=") : -1]) if wanted and self.server.ranges else 0
            body = HUB_BYTES[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

        def log_message(self, *_args) -> None:
            pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(download, "WAIT_SEC", 0)
    servers = []

    def start(**options) -> FileServer:
        servers.append(FileServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def told(url: str, etag: str):
    """What the hub says about the file at `url`."""
    return {"hf_hub_url": lambda *_: url, "get_hf_file_metadata": lambda _: SimpleNamespace(size=3_000_000, etag=etag)}


FILE = HubFile("user/repository", "file.pt", "mit")


def test_a_download_goes_on_where_it_was_cut_and_where_a_kill_left_it(serve, tmp_path, monkeypatch):
    server = serve(cuts=(1_000_000, 500_000))
    path = tmp_path / "folder" / "file.pt"
    path.parent.mkdir()
    (path.parent / "file.pt.part").write_bytes(HUB_BYTES[:200_000])  # what an earlier process got
    for name, function in told(server.url, hashlib.sha256(HUB_BYTES).hexdigest()).items():
        monkeypatch.setattr(f"huggingface_hub.{name}", function)
    download.download_from_hub(FILE, path)
    assert path.read_bytes() == HUB_BYTES and [p.name for p in path.parent.iterdir()] == ["file.pt"]
    assert server.asked == ["bytes=200000-", "bytes=1200000-", "bytes=1700000-"]


def test_a_server_without_ranges_sends_it_all_again(serve, tmp_path):
    server = serve(ranges=False)
    (tmp_path / "file.pt.part").write_bytes(b"other bytes")
    assert download.download(server.url, tmp_path / "file.pt", len(HUB_BYTES)).read_bytes() == HUB_BYTES


def test_a_damaged_download_a_full_disk_and_a_dead_server_are_told_apart(serve, tmp_path, monkeypatch):
    server = serve(cuts=(0,) * 99)
    with pytest.raises(ConnectionError, match="broke off 5 times at 0 bytes"):
        download.download(server.url, tmp_path / "file.pt", len(HUB_BYTES))
    for name, function in told(serve().url, "0" * 64).items():
        monkeypatch.setattr(f"huggingface_hub.{name}", function)
    with pytest.raises(ValueError, match="arrived damaged"):
        download.download_from_hub(FILE, tmp_path / "file.pt")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OSError, match=r"GB are needed for file\.pt") as error:
        download.download_from_hub(FILE, tmp_path / "file.pt")
    assert error.value.errno in download.LOCAL_FAILURES
