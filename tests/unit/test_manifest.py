"""The manifest on this machine, and by files of machines that this one is not."""

import hashlib
import json
import os
import platform
from pathlib import Path

import pytest

from images.store import Images
from loadtest import _manifest

CPUINFO = """processor\t: 0
model name\t: {model}
microcode\t: 0x2b
flags\t\t: fpu vme {flag}

processor\t: 1
model name\t: another
"""
CPU = "sys/devices/system/cpu"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_this_machines_manifest_is_json_and_every_null_has_a_reason() -> None:
    found = _manifest.begin(command=["isolatency", "run"], seed=7, images=None, client_cores=[0])
    found |= _manifest.end()
    found = json.loads(json.dumps(found))
    assert (found["schema"], found["seed"], found["command"]) == (1, 7, ["isolatency", "run"])
    assert found["started"] <= found["ended"] and found["started"].endswith("+00:00")
    assert found["machine"]["usable_cores"] == sorted(os.sched_getaffinity(0))
    assert found["machine"]["memory_mib"] > 0 and found["machine"]["kernel"] == platform.release()
    assert len(found["load_before"]) == len(found["load_after"]) == 3
    assert 0 <= found["cpu_time_before"]["stolen_s"] < found["cpu_time_before"]["total_s"]
    assert found["cpu_time_before"]["total_s"] <= found["cpu_time_after"]["total_s"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["numpy"] and found["versions"]["isolatency"] and found["versions"]["gevent"]
    nulls = {f"{part}.{key}" for part in ("machine", "versions") for key, value in found[part].items() if value is None}
    assert nulls == set(found["unread"])
    assert all(why and "\n" not in why for why in found["unread"].values())


def test_a_bare_machine_is_read(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": CPUINFO.format(model="Intel(R) Xeon(R) @ 2.50GHz", flag="vmx"),
        f"{CPU}/cpu0/cpufreq/scaling_governor": "performance\n",
        f"{CPU}/cpu1/cpufreq/scaling_governor": "performance\n",
        f"{CPU}/intel_pstate/no_turbo": "1\n",
        f"{CPU}/smt/active": "1\n",
        f"{CPU}/isolated": "1\n",
        f"{CPU}/vulnerabilities/meltdown": "Mitigation: PTI\n",
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n',
    }
    found, unread = _manifest.machine(tree(tmp_path, files))
    wanted = {
        "cpu_model": "Intel(R) Xeon(R) @ 2.50GHz", "microcode": "0x2b", "governor": "performance", "turbo": False,
        "smt": True, "isolated_cores": "1", "mitigations": {"meltdown": "Mitigation: PTI"}, "nested": False,
        "hypervisor": "none", "clocksource": "tsc", "huge_pages": "madvise", "system": "Debian GNU/Linux 13 (trixie)",
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert not unread


def test_a_guest_names_its_hypervisor_and_governors_that_differ_are_all_named(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": CPUINFO.format(model="AMD EPYC", flag="hypervisor"),
        f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave\n",
        f"{CPU}/cpu1/cpufreq/scaling_governor": "performance\n",
        f"{CPU}/cpufreq/boost": "1\n",
        "sys/class/dmi/id/sys_vendor": "Amazon EC2\n",
        "sys/class/dmi/id/product_name": "m5.large\n",
    }
    found, _ = _manifest.machine(tree(tmp_path, files))
    assert (found["nested"], found["hypervisor"]) == (True, "Amazon EC2 m5.large")
    assert (found["governor"], found["turbo"]) == ("performance, powersave", True)
    found, _ = _manifest.machine(tree(tmp_path, {"sys/hypervisor/type": "xen\n"}))
    assert found["hypervisor"] == "xen"


def test_what_a_machine_does_not_show_is_null_with_its_file_named(tmp_path: Path) -> None:
    found, unread = _manifest.machine(tmp_path)
    for field, file in (("cpu_model", "cpuinfo"), ("governor", "scaling_governor"), ("turbo", "boost"), ("smt", "active"),
                        ("mitigations", "vulnerabilities"), ("nested", "cpuinfo"), ("system", "os-release")):  # fmt: skip
        assert found[field] is None and file in unread[field]
    found, unread = _manifest.machine(tree(tmp_path, {"proc/cpuinfo": "processor : 0\n", "etc/os-release": "ID=x\n"}))
    assert "has no 'model name'" in unread["cpu_model"] and "has no PRETTY_NAME" in unread["system"]


def test_a_program_that_is_missing_fails_or_is_silent_is_null_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, script in (
        ("dockerd", "echo broken >&2; exit 3"),
        ("runc", "exit 0"),
        ("ip", "echo ip utility, 6.1 >&2"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("hostsetup.machine.ADMIN", "")
    found, unread = _manifest.versions()
    assert found["qemu"] is None and "qemu-system-x86_64 is not installed" in unread["qemu"]
    assert found["dockerd"] is None and "ended with 3: broken" in unread["dockerd"]
    assert found["runc"] is None and "said nothing" in unread["runc"]
    assert found["iproute2"] == "ip utility, 6.1"


def test_the_images_and_their_digests_are_named(tmp_path: Path) -> None:
    images = Images(tmp_path, "key1", "ab" * 32, True, {"vmlinux": "cd" * 32})
    found = _manifest.begin(command=[], seed=1, images=images, client_cores=[0])["images"]
    assert found == {"tree_sha256": "ab" * 32, "key": "key1", "loaded": True, "digests": {"vmlinux": "cd" * 32}}


def test_the_parts_that_a_target_names_have_their_digests(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(b"a kernel")
    options = {"kernel": str(tmp_path / "vmlinux"), "binary": str(tmp_path / "gone"), "boot_args": "quiet"}
    found = _manifest.own_parts(options)
    assert found["kernel"] == {"given": options["kernel"], "sha256": hashlib.sha256(b"a kernel").hexdigest()}
    assert found["binary"]["sha256"] is None and "No such file" in str(found["binary"]["unread"])
    assert set(found) == {"kernel", "binary"} and _manifest.own_parts({}) == {}


def test_an_image_that_no_engine_tells_of_has_no_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    found = _manifest.own_parts({"image": "mine"})["image"]
    assert (
        found["given"] == "mine"
        and found["sha256"] is None
        and "does not tell of the image mine" in str(found["unread"])
    )
