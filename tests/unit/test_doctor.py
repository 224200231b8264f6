"""The doctor on this machine, and on one that lacks things."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostsetup import doctor
from hostsetup.doctor import Findings
from hostsetup.kinds import KINDS
from hostsetup.sandbox import inside
from images import store

MADE = os.geteuid() == 0 and not inside()


@pytest.fixture(scope="module")
def found() -> Findings:
    return doctor.examine()


def elsewhere(*argv: str, **environment: str) -> dict[str, dict[str, dict[str, object]]]:
    """What the doctor finds with another environment, or as somebody else: checks and kinds by name."""
    script = "from hostsetup import doctor; print(doctor.examine().json())"
    done = subprocess.run(
        [*argv, sys.executable, "-c", script],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {"checks": {check.pop("name"): check for check in said["checks"]}, "kinds": said["kinds"]}


def test_every_check_says_what_was_found_and_every_kind_has_a_verdict(found: Findings) -> None:
    assert all(check.found for check in found.checks)
    assert found.kinds.keys() == KINDS.keys()
    for verdict in found.kinds.values():
        assert verdict.why
        assert verdict.ok is not None or verdict.fix, "what was not tried names the command that tries"


def test_text_and_json_say_the_same(found: Findings) -> None:
    said = json.loads(found.json())
    assert said["schema"] == 1
    text = found.text()
    for check in said["checks"]:
        assert f"{check['name']}: {check['found']}" in text
        assert check["fix"] in text
    for kind, verdict in said["kinds"].items():
        assert f"{kind}: {verdict['why']}" in text


def test_without_images_no_kind_but_a_server_elsewhere_can_run(tmp_path: Path) -> None:
    said = elsewhere(ISOLATENCY_CACHE=str(tmp_path / "none"))
    assert said["checks"]["images"]["ok"] is False
    for kind, verdict in said["kinds"].items():
        assert verdict["ok"] is (kind == "url")
        assert kind == "url" or "images" in str(verdict["why"])
    assert not (tmp_path / "none").exists()  # looking makes nothing


def test_a_program_that_is_missing_is_named_with_what_brings_it() -> None:
    said = elsewhere(PATH="/nonexistent")
    assert said["checks"]["qemu-system-x86_64"]["ok"] is False
    assert "qemu-system-x86" in str(said["checks"]["qemu-system-x86_64"]["found"])
    assert said["checks"]["qemu-system-x86_64"]["fix"] == "isolatency setup"
    assert said["checks"]["rights"]["ok"] is False  # without unshare there are no namespaces
    assert said["kinds"]["qemu"]["ok"] is False


def test_administrators_programs_are_found_without_their_folders_in_path() -> None:
    said = elsewhere(PATH="/usr/bin:/bin")
    assert said["checks"]["mkfs.ext4"] == elsewhere()["checks"]["mkfs.ext4"]


@pytest.mark.skipif(not MADE, reason="becomes another user; run the tests as root, outside of a sandbox")
def test_without_root_docker_is_left_out_with_its_reason() -> None:
    nobody = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    if subprocess.run([*nobody, sys.executable, "-c", "import hostsetup.doctor"], capture_output=True).returncode:
        pytest.skip("other users may not read this checkout; run the tests from one that they may")
    said = elsewhere(*nobody, ISOLATENCY_CACHE="/nonexistent/cache", HOME="/")
    assert said["kinds"]["docker"]["ok"] is False
    assert said["checks"]["dockerd"]["fix"] in ("run as root", "isolatency setup")
    assert "memory unlimited" in str(said["checks"]["cgroups"]["found"])
    assert "an ordinary user" in str(said["checks"]["rights"]["found"])


@pytest.mark.skipif(not MADE, reason="becomes another user; run the tests as root, outside of a sandbox")
def test_a_cache_that_may_not_be_read_is_a_finding(tmp_path: Path) -> None:
    nobody = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    if subprocess.run([*nobody, sys.executable, "-c", "import hostsetup.doctor"], capture_output=True).returncode:
        pytest.skip("other users may not read this checkout; run the tests from one that they may")
    tmp_path.chmod(0o700)
    said = elsewhere(*nobody, ISOLATENCY_CACHE=str(tmp_path / "cache"), HOME="/")
    assert "Permission denied" in str(said["checks"]["images"]["found"])


def test_what_can_run_right_here_is_no_more_than_what_the_machine_can(found: Findings) -> None:
    here = doctor.able_kinds()
    assert list(here) == ["process", "docker", "firecracker", "qemu", "uml"]
    for kind, verdict in here.items():
        assert verdict.ok is False or verdict == found.kinds[kind]
    if found.kinds["docker"].ok and not inside() and not doctor.engine_answers():
        assert here["docker"].ok is False and "isolatency sandbox" in here["docker"].fix


def test_kvm_is_believed_only_when_a_guest_has_booted(found: Findings) -> None:
    """Neither the device nor a version number proves anything; without images nothing can be tried."""
    check = next(check for check in found.checks if check.name == "kvm")
    if not Path("/dev/kvm").exists():
        assert check.ok is False and "emulated" in check.found
    elif check.ok is None:
        assert check.fix in ("isolatency doctor --try", "isolatency images build")
    else:
        assert list(store.cache_dir().glob("kvm-*.json"))


def test_where_apparmor_forbids_user_namespaces_the_switch_is_named(tmp_path: Path) -> None:
    switch = tmp_path / "apparmor_restrict_unprivileged_userns"
    assert doctor.allow_namespaces(switch) == "run as root"
    switch.write_text("1\n")
    assert doctor.allow_namespaces(switch).endswith("sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0")
    switch.write_text("0\n")
    assert doctor.allow_namespaces(switch) == "run as root"
