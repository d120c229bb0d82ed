"""Downloads from a server on the loopback."""

import hashlib
import os
import socket
import threading
import time

import numpy as np
import pytest
from filelock import FileLock

from densenet_jax.weights import download
from tests.file_server import serving

CONTENT = np.random.default_rng(0).bytes(3_000_000)
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()[:8]
NAMED = f"/models/net-{CHECKSUM}.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSENET_JAX_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server():
    with serving() as state:
        state.files[NAMED] = CONTENT
        state.files["/net.pth"] = CONTENT
        yield state


def _ranges(server):
    return [asked for _, _, asked in server.requests]


def test_a_file_is_downloaded_once_and_then_read_offline(cache):
    with serving() as server:
        server.files[NAMED] = CONTENT
        path = download.fetch(server.address + NAMED)
        assert path.read_bytes() == CONTENT
        assert path.parent == cache
        assert download.fetch(server.address + NAMED) == path
        assert len(server.requests) == 1
        address = server.address

    assert download.fetch(address + NAMED) == path


@pytest.mark.parametrize("name", [NAMED, "/net.pth"])
def test_a_cut_download_goes_on_where_it_stopped(server, name):
    server.cuts[name] = [1_000_000, 500_000]

    path = download.fetch(server.address + name)

    assert path.read_bytes() == CONTENT
    assert _ranges(server) == [None, "bytes=1000000-", "bytes=1500000-"]


def test_the_bar_counts_all_bytes(server, monkeypatch):
    bars = []

    class Bar(download.tqdm):
        def __init__(self, **options):
            bars.append(self)
            super().__init__(**options | {"disable": False, "delay": 0})

    monkeypatch.setattr(download, "tqdm", Bar)
    server.cuts[NAMED] = [1_000_000]

    download.fetch(server.address + NAMED)

    counted = [(bar.initial, bar.n, bar.total) for bar in bars]
    total = len(CONTENT)
    assert counted == [(0, 1_000_000, total), (1_000_000, total, total)]


@pytest.mark.parametrize("options", [dict(ranges=False), dict(tagged=False)])
def test_it_starts_anew_where_it_cannot_go_on(server, options):
    vars(server).update(options)
    server.cuts["/net.pth"] = [1_000_000]

    assert download.fetch(server.address + "/net.pth").read_bytes() == CONTENT

    # Without an ETag nothing says that the rest is of the same file.
    assert _ranges(server)[-1] == (
        None if "tagged" in options else "bytes=1000000-"
    )


def test_a_file_that_changes_meanwhile_is_not_mixed(server):
    server.cuts["/net.pth"] = [1_000_000]
    other = CONTENT[::-1]
    send = server.files.__getitem__

    class Changing(dict):
        def __getitem__(self, path):
            content = send(path)
            server.files = {path: other}
            return content

    server.files = Changing(server.files)

    assert download.fetch(server.address + "/net.pth").read_bytes() == other


@pytest.mark.parametrize("name", [NAMED, "/net.pth"])
def test_a_later_call_goes_on_where_the_checksum_will_tell(server, name):
    # The server ends each answer at once after the first part.
    server.cuts[name] = [1_000_000, 0]
    with pytest.raises(OSError, match="ended after 1,000,000 of 3,000,000"):
        download.fetch(server.address + name)

    assert download.fetch(server.address + name).read_bytes() == CONTENT

    assert _ranges(server)[-1] == ("bytes=1000000-" if name == NAMED else None)


def test_a_part_longer_than_the_file_is_dropped(server, cache):
    cache.mkdir()
    place = download._place(server.address + NAMED)
    place.with_name(f".{place.name}.part").write_bytes(CONTENT + b"more")

    assert download.fetch(server.address + NAMED).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "address", ["/net-01234567.pth", "/net.pth#sha256=0123456789"]
)
def test_a_wrong_checksum_leaves_nothing(server, cache, address):
    server.files["/net-01234567.pth"] = CONTENT

    with pytest.raises(ValueError, match=f"SHA-256 {CHECKSUM}.*expected 0123"):
        download.fetch(server.address + address)

    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_damaged_file_in_the_cache_is_found(server):
    path = download.fetch(server.address + NAMED)
    path.write_bytes(CONTENT[:-1])

    with pytest.raises(ValueError, match=f"Remove {path}"):
        download.fetch(server.address + NAMED)


@pytest.mark.parametrize(
    ("name", "checksum"),
    [
        ("densenet121-a639ec97.pth", "a639ec97"),
        ("densenet_4xb256_in1k_20220426-07450f99.pth", "07450f99"),
        ("epoch-12345678.pth.tar", "12345678"),
        ("net-20230101.pth", ""),  # a date
        ("net-seed0-best.pt", ""),
        ("net-a639ec9.pth", ""),
        ("net-a639ec97.pth#sha256=0123456789", "0123456789"),
    ],
)
def test_what_is_a_checksum(name, checksum):
    address = f"https://example.org/{name}"

    assert download._split_checksum(address)[1] == checksum


def test_a_fragment_that_is_no_checksum_is_refused():
    with pytest.raises(ValueError, match="expected #sha256="):
        download.fetch("https://example.org/net.pth#md5=0123")


def test_a_missing_file_says_where_to_put_it(server, cache):
    with pytest.raises(OSError, match="404") as caught:
        download.fetch(server.address + "/none.pth")

    message = str(caught.value)
    assert "\n" not in message
    place = message.partition("put the file at ")[2].partition(" by hand")[0]
    # What is put there is taken.
    with open(place, "wb") as file:
        file.write(b"by hand")
    path = download.fetch(server.address + "/none.pth")
    assert path.read_bytes() == b"by hand"


def test_no_network(cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/net.pth"
        with pytest.raises(OSError, match=r"refused.*by hand") as caught:
            download.fetch(address)

    assert "\n" not in str(caught.value)
    assert str(cache) in str(caught.value)


def test_a_web_page_is_no_file_of_weights(server):
    server.content_type = "text/html; charset=utf-8"

    with pytest.raises(OSError, match="web page"):
        download.fetch(server.address + "/net.pth")


def test_concurrent_downloads_of_one_file(server):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(download.fetch(server.address + NAMED))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1
    assert found[0].read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_download_elsewhere_is_waited_for(server, cache, capsys):
    cache.mkdir()
    place = download._place(server.address + NAMED)
    held = threading.Event()

    def hold():
        with FileLock(place.with_name(f".{place.name}.lock")):
            held.set()
            time.sleep(1.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert download.fetch(server.address + NAMED).read_bytes() == CONTENT
    thread.join()

    assert f"Another process downloads {place}" in capsys.readouterr().err


def test_addresses_are_escaped(server):
    server.files["/a%20net/%C3%A9.pth"] = CONTENT

    address = f"{server.address}/a net/é.pth"

    assert download.fetch(address).read_bytes() == CONTENT
    assert download.fetch(f"{server.address}/a%20net/%C3%A9.pth")


def test_names_that_agree_are_files_apart(server):
    server.files["/a/net.pth"], server.files["/b/net.pth"] = b"a", b"b"

    found = [
        download.fetch(f"{server.address}/{directory}/net.pth").read_bytes()
        for directory in "ab"
    ]

    assert found == [b"a", b"b"]


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DENSENET_JAX_HOME", str(tmp_path / "file" / "cache"))

    with pytest.raises(OSError, match="set DENSENET_JAX_HOME") as caught:
        download.fetch(server.address + "/net.pth")

    assert "\n" not in str(caught.value)
    assert not server.requests


def test_a_read_only_cache_is_read(server, cache):
    path = download.fetch(server.address + NAMED)
    before = sorted(os.listdir(cache))
    cache.chmod(0o500)
    try:
        assert download.fetch(server.address + NAMED) == path
        if os.geteuid():  # root may write everywhere
            with pytest.raises(OSError, match="set DENSENET_JAX_HOME"):
                download.fetch(server.address + "/net.pth")
    finally:
        cache.chmod(0o700)
    assert sorted(os.listdir(cache)) == before


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DENSENET_JAX_HOME", "~/weights")
    assert str(download.cache_directory()) == "/home/someone/weights"
    monkeypatch.delenv("DENSENET_JAX_HOME")
    assert download.cache_directory() == tmp_path / "densenet_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    found = str(download.cache_directory())
    assert found == "/home/someone/.cache/densenet_jax"
