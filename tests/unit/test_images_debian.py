"""Debian's part: which of the host's sources are used, what a lock says, how two of them differ."""

from pathlib import Path

import pytest

from images import debian
from images.errors import IsolatencyError
from images.pins import pins

PINNED = pins().debian
NEW = "$(ORIGIN)"  # apt prints a field that it does not know as it was asked for


def sources(*targets: str) -> list[str]:
    found = debian.host_sources("\n".join(targets), PINNED)
    return [line.replace(f"deb [signed-by={debian.KEYRING}] ", "") for line in found]


def test_only_debians_sources_are_used() -> None:
    assert sources(
        "http://mirror.example/debian/|bookworm|bookworm|main|Debian",
        "http://mirror.example/debian/|bookworm-updates|bookworm-updates|main|Debian",
        "http://security.example/debian-security/|bookworm-security|bookworm-security|main|Debian",
        "http://mirror.example/debian/|bookworm|bookworm|contrib|Debian",
        "http://mirror.example/debian/|bookworm-backports|bookworm-backports|main|Debian Backports",
        "https://sdk.example/apt/|cloud-sdk-bookworm|cloud-sdk-bookworm|main|cloud-sdk",
        "https://node.example/|nodistro|nodistro|main|. nodistro",
        "https://vendor.example/debian/|bookworm|bookworm|main|Vendor",
    ) == [
        "http://mirror.example/debian/ bookworm main",
        "http://mirror.example/debian/ bookworm-updates main",
        "http://security.example/debian-security/ bookworm-security main",
    ]


def test_before_the_first_update_the_address_must_name_debian() -> None:
    assert sources(
        f"http://mirror.example/debian/|bookworm|$(CODENAME)|main|{NEW}",
        f"https://vendor.example/linux/|bookworm|$(CODENAME)|main|{NEW}",
    ) == ["http://mirror.example/debian/ bookworm main"]


def test_a_suite_named_by_its_class_is_known_by_its_codename() -> None:
    assert sources("http://mirror.example/debian/|oldstable|bookworm|main|Debian") == [
        "http://mirror.example/debian/ bookworm main"
    ]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    files = [tmp_path / "zlib1g_1%3a1.2.13_amd64.deb", tmp_path / "base-files_12.4_amd64.deb"]
    for file in files:
        file.write_text(file.name)
    path = tmp_path / "packages.lock"
    path.write_text(debian.lock_text("bookworm", files))
    return path


def test_a_lock_names_version_architecture_and_digest(lock: Path) -> None:
    head, first, second = lock.read_text().splitlines()
    assert head.startswith("# Debian bookworm")
    assert first.startswith("base-files 12.4 amd64 ")
    assert second.startswith("zlib1g 1:1.2.13 amd64 ")
    assert len(second.split()[-1]) == 64


def test_a_lock_equals_itself(lock: Path) -> None:
    debian.check_lock(lock, lock)


def test_a_difference_is_named_with_the_way_back(lock: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.lock"
    lines = lock.read_text().replace("zlib1g 1:1.2.13 ", "zlib1g 1:1.3 ").splitlines()
    lines[1] = lines[1][:-1] + "g"  # the same version, other bytes
    other.write_text("\n".join([*lines, "tar 1.34 amd64 00"]))
    with pytest.raises(IsolatencyError, match="`isolatency images load`") as raised:
        debian.check_lock(lock, other)
    assert "base-files 12.4 → 12.4 (other bytes), tar absent → 1.34, zlib1g 1:1.2.13 → 1:1.3" in str(raised.value)


def test_pins_are_whole() -> None:
    assert len({one.file for one in pins().wheels}) == len(pins().wheels) >= 14
    for one in pins().wheels:
        assert len(one.sha256) == 64 and int(one.sha256, 16)
        assert one.file.endswith(("-none-any.whl", "x86_64.whl"))
    versions = {one.requirement for one in pins().wheels}
    assert {"numpy==2.4.6", "aiohttp==3.14.5", "orjson==3.13.0", "uvloop==0.23.0", "threadpoolctl==3.8.0"} <= versions
