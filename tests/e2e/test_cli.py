"""The commands as a user meets them: what they print, their exit codes, errors of one line."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ISOLATENCY, Command


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error, which must be one line that begins with the program's name."""
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("isolatency: "), done.stderr
    return lines[-1]


def test_help_names_every_command_and_the_exit_codes(isolatency: Command) -> None:
    said = isolatency("--help").stdout
    for command in ("doctor", "setup", "images", "up", "ps", "down", "run", "report", "sandbox", "clean"):
        assert re.search(rf"^  {command} ", said, re.MULTILINE), command
        assert isolatency(command, "--help").returncode == 0
    assert "130 interrupted" in said


@pytest.mark.parametrize(
    ("words", "code", "found"),
    [
        (["run", "--target", "dokcer"], 2, "nearest known one is 'docker'"),
        (["run", "--target", "process:cpus=999"], 2, "CPUs; this machine gives"),
        (["run", "--target", "process:mem_mib=99999999"], 2, "the largest that fits is"),
        (["run", "--target", "uml:cpus=2"], 2, "one CPU"),
        (["run", "--target", "process", "--target", "b=process:mem_mib=256"], 2, "--allow-difference"),
        (["run", "no-such-plan.toml"], 2, "could not be read"),
        (["report", "no-such-folder"], 2, "is no run folder"),
        (["run", "--target", "process", "--seconds", "0"], 2, "seconds is 0; wanted 0.05"),
        (["run", "--target", "process", "--seed", "-1"], 2, "seed is -1; wanted"),
        (["down", "nobody"], 2, "no target 'nobody'"),
        (["images", "load", "/etc/hostname"], 2, "is no bundle of images"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(isolatency: Command, words: list[str], code: int, found: str) -> None:
    done = isolatency(*words)
    assert done.returncode == code, done.stderr
    assert found in one_line(done)


def test_locusts_options_for_several_processes_are_refused_by_a_run(isolatency: Command) -> None:
    for words in (["--processes", "4"], ["--master"], ["--worker"]):
        done = isolatency("run", *words)
        assert done.returncode == 2
        assert f"driven by one Locust process; {words[0]} is for `locust -f loadtest/` on one target" in done.stderr


def test_an_unknown_key_of_a_plan_is_named_with_its_line(isolatency: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('seed = 1\n\n[[targets]]\nkind = "docker"\nmem_mb = 512\n')
    done = isolatency("run", plan)
    assert done.returncode == 2
    assert f"{plan}:5" in one_line(done) and "'mem_mib'" in one_line(done)


def test_a_run_folder_of_another_schema_is_refused(isolatency: Command, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 99}')
    (tmp_path / "targets.json").write_text("[]")
    (tmp_path / "plan.toml").write_text("schema = 1\n")
    done = isolatency("report", tmp_path)
    assert done.returncode == 2 and "99" in one_line(done)


def test_without_images_the_command_that_builds_them_is_named(tmp_path: Path) -> None:
    environment = os.environ | {"ISOLATENCY_CACHE": str(tmp_path)}
    for words in (["run", "--target", "process"], ["run"]):
        done = subprocess.run([ISOLATENCY, *words], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 1
        assert "isolatency images build" in done.stderr or "isolatency doctor" in one_line(done)
    done = subprocess.run([ISOLATENCY, "doctor"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and "isolatency images build" in done.stdout


def test_doctor_says_for_each_kind_what_and_why(isolatency: Command) -> None:
    found = json.loads(isolatency("doctor", "--json").stdout)
    assert {"process", "docker", "uml", "qemu", "firecracker", "url"} == set(found["kinds"])
    for verdict in found["kinds"].values():
        assert verdict["why"]
        assert verdict["ok"] is not None or verdict["fix"]
    for check in found["checks"]:
        assert check["found"], check


def test_setup_dry_run_installs_nothing_and_removes_nothing(isolatency: Command) -> None:
    done = isolatency("setup", "--dry-run")
    assert done.returncode == 0
    for line in done.stdout.splitlines():
        if "apt-get install" in line:
            assert "--no-remove" in line and "--no-upgrade" in line


UP = """
set -e
url=$({i} up process)
echo "url $url"
{i} ps
{i} up process && exit 1 || echo "again $?"
curl -sf "$url/v2/health/ready" && echo ready
{i} down process
{i} ps
curl -s -o /dev/null "$url/v2/health/ready" || echo gone
"""


def test_up_prints_the_url_returns_and_down_ends_it(isolatency: Command) -> None:
    """`$(…)` only returns when nobody holds the pipe any longer: no descendant keeps the caller's stdout."""
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", "sh", "-c", UP.format(i=ISOLATENCY)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^url http://127\.0\.0\.1:\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"process +process +1 +512 +http://127", done.stdout)
    assert "again 2" in done.stdout and "kept already" in done.stderr
    assert done.stdout.splitlines()[-1] == "gone"
    assert "ready" in done.stdout and "stopped process" in done.stdout
    assert not isolatency("clean").stdout.startswith("removed")


FULL = """
set -e
mkdir -p {place}
mount -t tmpfs -o size={size}k tmpfs {place}
{fill}
{i} run {words} --target process --out {place} || echo "code $?"
cp -r {place} {kept}
"""
FILLER = "(until {}; do sleep 0.02; done; dd if=/dev/zero of={{place}}/filler bs=4k 2>/dev/null || true) &"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system; run the tests as root")


def on_a_small_disk(tmp_path: Path, size: int, *words: str, fill: str = "") -> tuple[str, Path]:
    """What a run said whose --out has `size` KiB, and what it left there. `fill` is shell that may run beside it."""
    places = {"place": tmp_path / "small", "kept": tmp_path / "kept"}
    script = FULL.format(i=ISOLATENCY, size=size, words=" ".join(words), fill=fill.format(**places), **places)
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", "sh", "-c", script], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0 and "code 1" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr, tmp_path / "kept"


@as_root
def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    said, kept = on_a_small_disk(tmp_path, 300, "--quick", "--only", "load")
    assert re.search("isolatency: the run folder .*: No space left on device; free some space, or choose ", said)
    assert list(kept.iterdir()) == []


def reported(kept: Path) -> dict[str, Any]:
    """The summary of the one run in `kept`, which must be marked partial everywhere and name the full disk."""
    found: dict[str, Any] = json.loads((kept / "latest" / "summary.json").read_text())
    assert found["partial"] and any("No space left on device" in error for error in found["errors"]), found["errors"]
    assert (kept / "latest" / "report.md").read_text().count("PARTIAL") == 1
    assert not list(kept.glob("*/.reserve")) and not list(kept.glob("*/*.part"))
    return found


@as_root
def test_a_disk_that_fills_up_under_load_keeps_what_was_measured(tmp_path: Path) -> None:
    """A filler takes all space once some blocks are written: the next one finds too little."""
    fill = FILLER.format("[ $(cat {place}/2*/samples-*/*.parquet 2>/dev/null | wc -c) -gt 1000000 ]")
    said, kept = on_a_small_disk(tmp_path, 16 * 1024, "--quick", "--only", "load", "--seconds", "20", fill=fill)
    assert "error: the load ended with exit code 1" in said and "No space left on device" in said
    assert sum(cell["requests"] for cell in reported(kept)["cells"]) > 10_000


MANY = """
only = "batch"
[[jobs]]
job = "knn"
repeats = 40
rows = 40
"""


@as_root
def test_a_disk_that_fills_up_under_the_batch_jobs_keeps_their_repeats(tmp_path: Path) -> None:
    """All space goes to a filler once batch.csv is there, which has some more lines in the block that it has."""
    (tmp_path / "plan.toml").write_text(MANY)
    fill = FILLER.format("[ -e {place}/2*/batch.csv ]")
    said, kept = on_a_small_disk(tmp_path, 8 * 1024, str(tmp_path / "plan.toml"), fill=fill)
    assert re.search(r"^error: could not write .*: No space left on device; free some space, then", said, re.MULTILINE)
    [row] = reported(kept)["batch"]
    assert 1 <= row["n"] < 40


def on_a_terminal(argv: list[str]) -> tuple[int, list[str]]:
    """The exit code of a command on a terminal 400 columns wide, and the lines that stand there when it has ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 400, 0, 0))
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the last process that had the terminal has ended
        while piece := os.read(ours, 65536):
            said += piece
    os.close(ours)
    lines, row, column = [""], 0, 0
    for control, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", said.decode(errors="replace")):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control.endswith("A"):
            row = max(0, row - int(control[2:-1] or 1))
        elif control == "\x1b[2K":
            lines[row] = ""
    return process.wait(timeout=60), lines


def test_on_a_terminal_the_estimate_and_every_error_stay(tmp_path: Path) -> None:
    """Two targets that do not answer, so that nothing is measured and no report says it again."""
    plan = tmp_path / "plan.toml"
    plan.write_text('boot_timeout_s = 1.0\nonly = "load"\n')
    urls = ["a=url:http://127.0.0.1:9", "b=url:http://127.0.0.1:9"]
    words = ["run", plan, *(word for url in urls for word in ("--target", url)), "--out", tmp_path / "o[/]ut"]
    code, lines = on_a_terminal([ISOLATENCY, "sandbox", "--", ISOLATENCY, *map(str, words)])
    assert code == 1
    assert any(re.match("2 targets, about [0-9]+ (seconds|minutes)", line) for line in lines), lines
    for name in "ab":
        assert any(line.startswith(f"error: {name} did not answer at http://127.0.0.1:9") for line in lines), lines
    assert any(line.startswith(f"run folder: {tmp_path}/o[/]ut/") for line in lines), lines
    assert not any("starting" in line for line in lines), "a step is of the moment, and does not stay"


def test_clean_twice_is_fine(isolatency: Command) -> None:
    isolatency("clean")
    again = isolatency("clean")
    assert again.returncode == 0 and "removed" not in again.stdout


def test_a_port_in_use_is_said(isolatency: Command) -> None:
    script = (
        f"{sys.executable} -c 'import socket,time; s=socket.socket(); s.bind((\"127.0.0.1\",8765)); s.listen(); time.sleep(60)' & "
        f"sleep 1; {ISOLATENCY} up process:port=8765; echo code $?"
    )
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", "sh", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert "code 1" in done.stdout
    assert "address already in use" in done.stderr.lower()
