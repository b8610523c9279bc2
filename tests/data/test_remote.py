"""A root behind a web server on this machine."""

import functools
import http.server
import threading

import pytest

from medseg_ssl.config import UserError
from medseg_ssl.data.remote import is_remote, mirror
from pretrain.prepare import main
from tests.data.scans import folder_tree


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 -- shared by the requests of one test, cleared by its fixture

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    root = tmp_path / "served"
    folder_tree(root / "set", subjects=2)
    Handler.asked.clear()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(root))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", root
    server.shutdown()


def fetched():
    return [path for path in Handler.asked if path.endswith(".nii.gz")]


def test_a_mirror_holds_the_files_and_is_not_fetched_twice(served, tmp_path):
    address, root = served
    seen = []
    local = mirror(
        f"{address}/set/", tmp_path / "cache", on_progress=lambda done, total: seen.append((done, total))
    )
    there = {p.relative_to(root / "set"): p.read_bytes() for p in (root / "set").rglob("*") if p.is_file()}
    here = {
        p.relative_to(local): p.read_bytes() for p in local.rglob("*") if p.is_file() and p.name[0] != "."
    }
    assert here == there
    assert seen[-1] == (len(there), len(there))
    count = len(fetched())
    lost = sorted(local.rglob("*.nii.gz"))[0]
    lost.unlink()
    assert mirror(f"{address}/set/", tmp_path / "cache") == local
    assert len(fetched()) == count + 1
    assert lost.is_file()


def test_what_the_server_withdrew_goes_from_the_mirror(served, tmp_path, caplog):
    address, root = served
    local = mirror(f"{address}/set/", tmp_path / "cache")
    (root / "set" / "sub_1_CT.nii.gz").unlink()
    assert mirror(f"{address}/set/", tmp_path / "cache") == local
    assert not (local / "sub_1_CT.nii.gz").exists()
    assert (local / "sub_0_CT.nii.gz").exists()
    assert "1 files are no longer at the address" in caplog.text


def test_prepare_takes_an_address(served, tmp_path, capsys):
    from tests.data.scans import FOLDER

    address, _ = served
    words = [
        "--source",
        "folder",
        "--root",
        f"{address}/set/",
        "--cache",
        str(tmp_path / "cache"),
        "--workers",
        "1",
    ]
    out = main([*words, "--out", str(tmp_path / "archive"), "--pattern", FOLDER["pattern"], "split.test=0"])
    assert (out / "archive.json").is_file()
    for path in out.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            assert address.encode() not in path.read_bytes()


def test_what_goes_wrong_is_one_line(served, tmp_path):
    address, _ = served
    with pytest.raises(UserError, match=r"holds no files|cannot list"):
        mirror(f"{address}/nothing/", tmp_path)
    with pytest.raises(UserError, match=r"cannot list http://127\.0\.0\.1:9|holds no files"):
        mirror("http://127.0.0.1:9/x/", tmp_path)
    with pytest.raises(UserError, match="nosuch"):
        mirror("nosuch://bucket/x", tmp_path)


def test_addresses():
    assert is_remote("s3://bucket/x")
    assert not is_remote("/data/x")
