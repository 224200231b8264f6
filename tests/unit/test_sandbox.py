"""The sandbox: its own network, its own processes, and an end to all of it."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostsetup import ledger as books
from hostsetup.sandbox import VARIABLE
from images.errors import UsageError

ISOLATENCY = str(Path(sys.executable).parent / "isolatency")
pytestmark = pytest.mark.skipif(
    VARIABLE in os.environ, reason="a sandbox cannot be tested inside of one; run it outside"
)


def sandbox(*command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    argv = [ISOLATENCY, "sandbox", "--", *command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def test_it_has_loopback_and_nothing_else() -> None:
    done = sandbox("ip", "-brief", "link")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["lo"]


def test_the_exit_code_and_the_streams_are_the_commands() -> None:
    done = sandbox("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert sandbox("sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_one_line() -> None:
    done = sandbox("no-such-command-anywhere")
    assert done.returncode == 1
    assert "no-such-command-anywhere" in done.stderr and "Traceback" not in done.stderr


def test_a_sandbox_in_a_sandbox_is_refused() -> None:
    done = sandbox(ISOLATENCY, "sandbox", "--", "true")
    assert done.returncode == UsageError.exit_code
    assert "this is a sandbox already" in done.stderr


def test_what_was_left_running_ends_with_it() -> None:
    done = sandbox("sh", "-c", "sleep 54321 >/dev/null 2>&1 & echo started")
    assert done.stdout == "started\n"
    assert subprocess.run(["pgrep", "-f", "sleep 54321"], capture_output=True).stdout == b""


def test_killing_it_ends_all_of_it_and_clean_removes_the_rest(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    argv = [
        ISOLATENCY,
        "sandbox",
        "--",
        "sh",
        "-c",
        f"sleep 65432 & docker version >/dev/null 2>&1; touch {ready}; sleep 65432",
    ]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    owner = next(owner for owner in books.owners() if owner.what == "sandbox" and owner.pid == process.pid)
    folders = [Path(entry["path"]) for entry in owner.entries.values() if entry["kind"] == "dir"]
    assert folders and all(folder.exists() for folder in folders)
    process.kill()
    process.wait()
    while subprocess.run(["pgrep", "-f", "sleep 65432"], capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.05)
    subprocess.run([ISOLATENCY, "clean"], check=True, capture_output=True)
    assert not any(folder.exists() for folder in folders)
    assert not owner.path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="the engine needs root; run the tests as root")
def test_the_docker_engine_is_its_own_and_starts_when_first_needed() -> None:
    script = (
        "import docker; print(docker.from_env().info()['ServerVersion'], docker.from_env().containers.list(all=True))"
    )
    assert "dockerd" not in sandbox("ps", "axo", "comm").stdout
    done = sandbox(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_sigterm_ends_it(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = subprocess.Popen([ISOLATENCY, "sandbox", "--", "sh", "-c", f"touch {ready}; exec sleep 76543"])
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


TRAPS = """
trap "echo int" INT
trap "echo term; exit 4" TERM
echo ready
for i in 1 2 3 4 5 6 7 8; do sleep 0.5; done
exit 5
"""


@pytest.mark.parametrize(
    ("send", "said", "code"),
    [
        (lambda process: process.send_signal(signal.SIGINT), "int", 5),
        (lambda process: os.killpg(process.pid, signal.SIGINT), "int", 5),
        (lambda process: process.send_signal(signal.SIGTERM), "term", 4),
        (lambda process: process.send_signal(signal.SIGHUP), "term", 4),
    ],
    ids=["SIGINT", "SIGINT to the group", "SIGTERM", "SIGHUP"],
)
def test_a_signal_reaches_the_command_once(send: Callable[[subprocess.Popen[str]], None], said: str, code: int) -> None:
    argv = [ISOLATENCY, "sandbox", "--", "sh", "-c", TRAPS]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    send(process)
    out, _ = process.communicate(timeout=120)
    assert out.split() == [said]
    assert process.returncode == code


def test_no_moment_is_too_early_for_a_sigterm() -> None:
    """Process 1 of a PID namespace loses signals that come before it handles them, unless they wait."""
    for delay_s in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        process = subprocess.Popen([ISOLATENCY, "sandbox", "--", "sleep", "98765"])
        time.sleep(delay_s)
        process.terminate()
        assert process.wait(timeout=60) in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGKILL)
        assert subprocess.run(["pgrep", "-f", "sleep 98765"], capture_output=True).stdout == b""
    subprocess.run([ISOLATENCY, "clean"], check=True, capture_output=True)


@pytest.mark.parametrize("hangup", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_commands_signals_are_as_they_were(hangup: signal.Handlers) -> None:
    """Nothing that the sandbox blocks or ignores for itself is inherited; what nohup ignores is."""
    look = ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]
    before = signal.signal(signal.SIGHUP, hangup)
    try:
        assert sandbox(*look).stdout == subprocess.run(look, capture_output=True, text=True).stdout
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_the_terminal_ends_nothing_that_nohup_began() -> None:
    script = "trap '' HUP; exec \"$@\""
    argv = ["sh", "-c", script, "sh", ISOLATENCY, "sandbox", "--", "sh", "-c", "echo ready; read line; echo $line"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGHUP)
    out, _ = process.communicate("still here\n", timeout=120)
    assert (process.returncode, out) == (0, "still here\n")


def test_a_terminals_ctrl_c_reaches_the_command() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(ISOLATENCY, [ISOLATENCY, "sandbox", "--", "sh", "-c", TRAPS])
    seen = b""
    sent = False
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 4096)
        except OSError:
            break  # the last one who had the terminal open has gone
        if b"ready" in seen and not sent:
            os.write(terminal, b"\x03")
            sent = True
    assert seen.count(b"int") == 1
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_what_ended_in_it_is_removed_with_it(tmp_path: Path) -> None:
    """A target that is kept in it, and an owner that was killed in it: their folders lie outside of its namespaces."""
    made = tmp_path / "made"
    script = f"""
import os, signal
from pathlib import Path
from hostsetup.ledger import Ledger
ledger = Ledger.open("run", "victim")
path = Path({str(tmp_path)!r}) / f"x-{{ledger.id}}"
ledger.add("dir", path=str(path))
path.mkdir()
Path({str(made)!r}).write_text(str(path))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert sandbox(sys.executable, "-c", script).returncode == 128 + signal.SIGKILL
    path = Path(made.read_text())
    assert path.parent == tmp_path and not path.exists()
    assert not [owner for owner in books.owners() if owner.name == "victim"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user; run the tests as root")
def test_without_root_it_is_a_user_namespace_with_its_own_ledger(tmp_path: Path) -> None:
    nobody = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    home = Path("/tmp") / f"isolatency-test-{os.getpid()}"  # tmp_path is closed to others
    home.mkdir()
    os.chown(home, 12345, 12345)
    cache = home / "cache"  # of another user, from which one may read
    (cache / "tmp").mkdir(parents=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    environment |= {"ISOLATENCY_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        # By way of a shell: setpriv's own exec still has root's rights.
        python = ["sh", "-c", 'exec "$@"', "sh", sys.executable, "-c", "import hostsetup"]
        for need in (["unshare", "--user", "--map-root-user", "true"], python):
            if subprocess.run([*nobody, *need], capture_output=True, env=environment).returncode:
                pytest.skip(f"another user may not do this here: {' '.join(need)}")
        script = (
            "import json, os; from hostsetup import ledger as l\n"
            "print(json.dumps([os.geteuid(), str(l.folder()), [o.what for o in l.owners()], sorted(os.listdir('/sys/class/net'))]))"
        )
        done = subprocess.run(
            [*nobody, ISOLATENCY, "sandbox", "--", sys.executable, "-c", f"import subprocess; {script}"],
            capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        uid, place, owners, _ = json.loads(done.stdout)
        assert (uid, place, owners) == (0, f"{home}/isolatency", ["sandbox"])
        clean = subprocess.run(
            [*nobody, ISOLATENCY, "clean"], capture_output=True, text=True, env=environment, timeout=60
        )
        assert (clean.returncode, clean.stdout) == (0, "nothing to remove\n"), clean.stderr
        assert list((home / "isolatency").glob("sandbox-*")) == [] == list((home / "isolatency").glob("*.jsonl"))
    finally:
        shutil.rmtree(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="the engine needs root; run the tests as root")
def test_an_engine_that_ends_says_why() -> None:
    script = """
import docker, os, signal, time
from pathlib import Path
engine = docker.from_env()
engine.ping()
for path in Path("/proc").glob("[0-9]*/comm"):
    if path.read_text().strip() == "dockerd":
        os.kill(int(path.parts[2]), signal.SIGKILL)
        break
time.sleep(1)
try:
    docker.from_env().ping()
except docker.errors.DockerException:
    print("refused")
"""
    done = sandbox(sys.executable, "-c", script)
    assert done.stdout == "refused\n", done.stderr
    assert "the sandbox's Docker engine has ended" in done.stderr


def test_a_file_of_the_users_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("raise SystemExit('imported from the current folder')")
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", "pwd"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n"), done.stderr


def with_dockerd(script: str, place: str) -> str:
    """What a script says in a mount namespace where that place is empty, so that nothing of the machine's is touched."""
    if shutil.which("dockerd", path=os.environ["PATH"] + ":/usr/sbin") is None:
        pytest.skip("no dockerd; isolatency setup installs it")
    empty = f'mkdir -p {place} && mount -t tmpfs tmpfs {place} && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", empty, "sh"]
    done = subprocess.run([*inside, sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="the engine needs root; run the tests as root")
def test_the_machines_own_containerd_is_out_of_reach() -> None:
    """dockerd takes a containerd that it finds in /run, and that one would start containers outside of the sandbox."""
    script = f"""
import os, socket, subprocess
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/containerd/isolatency-test.sock")
subprocess.run([{ISOLATENCY!r}, "sandbox", "--", "ls", "-A", "/run/containerd"])
"""
    assert with_dockerd(script, "/run/containerd") == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="the engine needs root; run the tests as root")
def test_the_machines_docker_settings_are_not_the_sandboxs_but_for_its_runtimes() -> None:
    """A key that stands in daemon.json and is given as a flag too makes dockerd refuse to start."""
    settings = {"data-root": "/nowhere", "exec-opts": ["native.cgroupdriver=systemd"], "mtu": 1234}
    settings["runtimes"] = {"another": {"path": "/bin/true"}}
    ask = "import docker; print(*docker.from_env().info()['Runtimes'])"
    script = f"""
import subprocess, sys
open("/etc/docker/daemon.json", "w").write({json.dumps(settings)!r})
subprocess.run([{ISOLATENCY!r}, "sandbox", "--", sys.executable, "-c", {ask!r}])
"""
    assert "another" in with_dockerd(script, "/etc/docker").split()


@pytest.mark.skipif(os.geteuid() != 0, reason="the engine needs root; run the tests as root")
def test_an_engine_leaves_no_folder_on_the_machine_and_has_the_first_core(tmp_path: Path) -> None:
    if shutil.which("dockerd", path=os.environ["PATH"] + ":/usr/sbin") is None:
        pytest.skip("no dockerd; isolatency setup installs it")
    look = """
import docker, os, sys
from pathlib import Path
docker.from_env().ping()
cores = {path.read_text().strip(): sorted(os.sched_getaffinity(int(path.parts[2]))) for path in Path("/proc").glob("[0-9]*/comm")}
print(cores["dockerd"], cores["containerd"], *(Path(place).is_mount() for place in sys.argv[1:]))
"""
    places = [str(tmp_path / "new"), str(tmp_path / "old")]
    script = f"""
import sys
from pathlib import Path
from hostsetup import engine, sandbox
engine.HIDDEN += tuple(map(Path, {places!r}))
sys.exit(sandbox.run([sys.executable, "-c", {look!r}, *{places!r}]))
"""
    (tmp_path / "old").mkdir()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    own = sorted(os.sched_getaffinity(0))[:1]
    assert done.stdout == f"{own} {own} True True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
