"""Which packages are missing and how they would be installed; apt and dpkg are replaced by programs that only say so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostsetup import machine, setup
from images import shell
from images.errors import IsolatencyError

SIMULATED = "Inst libfoo (1.2 Debian:12 [amd64])\nInst mmdebstrap (1.3 Debian:12 [all])\nConf mmdebstrap (1.3)\n"
UPGRADES = "Inst libc6 [2.35] (2.36 Debian:12 [amd64])\nRemv oldthing [1.0]\nInst mmdebstrap (1.3 Debian:12 [all])\n"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `apt-get` writes down how it was called; `simulated` is what it says that it would do."""
    programs = {
        "dpkg-query": "for p in e2fsprogs iproute2 iptables util-linux; do echo $p installed; done; exit 1",
        "dockerd": "exit 0",
        "apt-get": f"""case "$*" in
*--simulate*) cat {tmp_path}/simulated ;;
*) echo "$*" "[$SYSTEMD_OFFLINE $RUNLEVEL $DEBIAN_FRONTEND]" >> {tmp_path}/calls ;;
esac""",
        "sudo": 'exec "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "simulated").write_text(SIMULATED)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(setup, "_firecracker", lambda *_: None)
    return tmp_path


def call(yes: bool, answer: bool | None) -> list[str]:
    said: list[str] = []
    setup.setup(yes=yes, ask=lambda _: answer, say=said.append)
    return said


def calls(apt: Path) -> list[str]:
    return (apt / "calls").read_text().splitlines() if (apt / "calls").exists() else []


def test_apparmor_is_wanted_only_where_the_kernel_has_it_on(
    apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker's engine then refuses containers without its parser, which the package of the engine only recommends."""
    monkeypatch.setattr(machine, "APPARMOR", tmp_path / "enabled")
    monkeypatch.setattr(machine, "ADMIN", "/nonexistent")
    monkeypatch.setenv("PATH", str(apt) + ":/bin")
    for text, wanted in (("", False), ("N\n", False), ("Y\n", True)):
        (tmp_path / "enabled").write_text(text)
        assert ("apparmor" in setup.missing()) == wanted
    (apt / "apparmor_parser").write_text("#!/bin/sh\n")
    (apt / "apparmor_parser").chmod(0o755)
    assert "apparmor" not in setup.missing()


def test_what_is_missing_is_named_with_its_purpose(apt: Path) -> None:
    assert setup.missing().keys() == {"debian-archive-keyring", "mmdebstrap", "qemu-system-x86"}
    assert any(line.startswith("missing: mmdebstrap (") for line in call(False, False))


def test_an_engine_is_wanted_only_where_there_is_none(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "docker.io" not in setup.missing()
    (apt / "dockerd").unlink()
    monkeypatch.setattr(setup.machine, "ADMIN", "/nonexistent")
    assert "docker.io" in setup.missing()
    assert "systemctl disable docker.service docker.socket" in call(True, None)[-1]


def test_with_yes_it_installs_without_starting_services(apt: Path) -> None:
    assert call(True, None)[-1] == "installed"
    last = calls(apt)[-1]
    assert last.startswith("install -y --no-install-recommends --no-remove --no-upgrade ")
    assert last.endswith("[1 1 noninteractive]")
    assert "mmdebstrap" in last and "iproute2" not in last


@pytest.mark.parametrize(("answer", "words"), [(None, "no terminal"), (False, "left out")])
def test_without_a_yes_it_prints_the_command_and_goes_on(apt: Path, answer: bool | None, words: str) -> None:
    said = call(False, answer)[-1]
    assert words in said and "apt-get install -y --no-install-recommends --no-remove --no-upgrade" in said
    assert calls(apt) == []


def test_an_upgrade_or_a_removal_is_refused(apt: Path) -> None:
    (apt / "simulated").write_text(UPGRADES)
    with pytest.raises(IsolatencyError, match="upgrade or remove libc6, oldthing"):
        call(True, None)
    assert not [line for line in calls(apt) if line.startswith("install")]


def test_a_dry_run_prints_the_command(apt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell.set_dry_run(True)
    try:
        call(False, None)
    finally:
        shell.set_dry_run(False)
    assert "would run: " in capsys.readouterr().out
    assert calls(apt) == []


def test_elsewhere_than_on_debian_it_says_what_is_needed(tmp_path: Path) -> None:
    script = """
from hostsetup import machine, setup
machine.ADMIN = "/nonexistent"
try: setup.missing()
except Exception as error: print(error)
"""
    environment = os.environ | {"PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert "Debian and Ubuntu only" in done.stdout and "qemu-system-x86" in done.stdout, done.stderr
