"""Processors are kept awake exactly as long as a run lasts, and where that cannot be it is said."""

from pathlib import Path

import pytest

from images import shell
from images.errors import IsolatencyError
from loadtest._awake import awake


def _driver(folder: Path, text: str) -> Path:
    path = folder / "current_driver"
    path.write_text(text + "\n")
    return path


def test_the_kernel_is_asked_for_zero_microseconds_as_a_c_int(tmp_path: Path) -> None:
    latency = tmp_path / "latency"
    latency.write_bytes(b"\xff" * 8)
    with awake(latency, _driver(tmp_path, "haltpoll")):
        assert latency.read_bytes() == bytes(4) + b"\xff" * 4


def test_the_wish_ends_with_the_block(tmp_path: Path) -> None:
    latency = tmp_path / "latency"
    latency.write_bytes(b"")

    def held() -> bool:
        return any(link.resolve() == latency for link in Path("/proc/self/fd").iterdir() if link.exists())

    with awake(latency, _driver(tmp_path, "intel_idle")):
        assert held()
    assert not held()


@pytest.mark.parametrize("driver", ["none", None])
def test_without_a_cpuidle_driver_it_would_have_no_effect(tmp_path: Path, driver: str | None) -> None:
    path = tmp_path / "absent" if driver is None else _driver(tmp_path, driver)
    with pytest.raises(IsolatencyError, match="wants a cpuidle driver; found none"), awake(tmp_path / "latency", path):
        pass


def test_without_the_right_to_ask_it_says_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(IsolatencyError, match="run it as root, or leave keep_awake out"),
        awake(tmp_path / "absent", _driver(tmp_path, "haltpoll")),
    ):
        pass


def test_a_dry_run_says_it_and_holds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "_dry", True)
    with awake(tmp_path / "absent", tmp_path / "absent"):
        pass
    assert "would hold" in capsys.readouterr().out
