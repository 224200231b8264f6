"""How the server starts and ends, what it imports, what it says, and that it needs nothing of its surroundings."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.unit.own_models import RAISE
from tests.unit.serving import ALL, DATA, ROOT, START_S, STOP_S, command, serving, wait_for
from tests.unit.test_server_batching import own

# What the server may import from outside the standard library: five packages, and what those bring.
OURS = {"server", "numpy", "aiohttp", "orjson", "uvloop", "threadpoolctl"}
THEIRS = {
    "aiohappyeyeballs", "aiosignal", "attr", "attrs", "frozenlist", "idna", "multidict", "propcache",
    "typing_extensions", "yarl",
    "brotli",  # aiohttp takes it where something else has brought it
    "cython_runtime",  # no package: compiled modules enter it
}  # fmt: skip


def ends(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=START_S, cwd=ROOT, env=env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_though_connections_are_open(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "--model", "null") as running, contextlib.ExitStack() as kept:
        for _ in range(20):
            connection = kept.enter_context(contextlib.closing(running.connect()))
            connection.request("GET", "/v2/health/ready")
            connection.getresponse().read()
        half = kept.enter_context(socket.create_connection(running.address))
        half.sendall(b"POST /v2/models/null/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        running.process.send_signal(number)
        assert running.process.wait(STOP_S) == 0
        lines = running.log().splitlines()
        assert 2 <= len(lines) <= 3  # one when it listens, one or two at its end
        assert "listening on http://127.0.0.1:" in lines[0]
        assert not any("Traceback" in line for line in lines)


def test_requests_under_way_are_answered_at_the_end(tmp_path: Path) -> None:
    rows = np.tile(np.load(DATA / "knn.npz")["rows"], (8, 1))
    with serving(tmp_path, "--model", "knn") as running:
        found: list[int] = []
        asking = threading.Thread(target=lambda: found.append(running.infer("knn", rows).status))
        asking.start()
        wait_for(lambda: _has_connection(running.process.pid), "the request to arrive")
        running.process.terminate()
        asking.join(STOP_S)
        assert running.process.wait(STOP_S) == 0
    assert found in ([200], [])  # either it was answered, or its connection closed before it was read


def _has_connection(pid: int) -> bool:
    files = list(Path(f"/proc/{pid}/fd").iterdir())
    return sum(file.is_socket() for file in files) >= 4  # two of the event loop, one that listens


def test_the_log_has_a_line_for_start_error_and_stop_as_text_or_json_and_one_for_each_request_if_asked_for(
    tmp_path: Path,
) -> None:
    def lines(*arguments: str) -> list[str]:
        folder = tmp_path / "-".join(arguments).strip("-")
        with serving(folder, "--model", "null", *own("Fails"), *arguments) as running:
            assert running.infer("null", np.ones((1, 2))).status == 200
            assert running.infer("fails", np.full((1, 2), RAISE)).status == 500
            assert running.call("GET", "/nowhere").status == 404
        return running.log().splitlines()

    words = ["listening on http://", "error ", "stopping", "stopped"]
    for line, word in zip(lines("--log-format", "text"), words, strict=True):
        assert line.startswith(f"server: {word}")
    told = [json.loads(line) for line in lines("--log-format", "json")]
    for one, word in zip(told, words, strict=True):
        assert one.keys() == {"time", "level", "message"} and one["message"].startswith(word)
    assert [one["level"] for one in told] == ["info", "error", "info", "info"]
    asked = re.findall(r'"(\w+ \S+) HTTP/1.1" (\d+)', "\n".join(lines("--access-log")))
    assert asked == [
        ("POST /v2/models/null/infer", "200"), ("POST /v2/models/fails/infer", "500"), ("GET /nowhere", "404"),
    ]  # fmt: skip


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "null") as running:
        done = ends("--model", "null", "--port", str(running.address[1]))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(running.address[1]) in done.stderr
    assert "in use" in done.stderr


def test_an_address_that_is_not_ours_is_one_line() -> None:
    done = ends("--model", "null", "--host", "192.0.2.1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "192.0.2.1" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--model", "ghost"], ["--model", "null", "--threads", "0"], ["--model", "null", "--threads", "-1"],
        ["--model", "null", "--threads", "many"], ["--model", "null", "--port", "70000"],
        ["--model", "null", "--port", "-1"], ["--model", "null", "--unknown"],
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used(arguments: list[str]) -> None:
    done = ends(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr.splitlines()[-1]


def test_a_tree_label_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = ends("--model", "null", "--tree-label", str(tmp_path / "missing"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "missing") in done.stderr.splitlines()[-1]


def test_it_serves_over_ipv6(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback; enable it (net.ipv6.conf.lo.disable_ipv6=0)")
    with serving(tmp_path, "--model", "null", "--host", "::1") as running:
        assert running.url.startswith("http://[::1]:")
        assert running.call("GET", "/v2/health/ready").status == 200


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_the_threads_that_were_asked_for(tmp_path: Path, threads: int) -> None:
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"OpenBLAS takes no more threads than there are cores; needs {threads}")
    env = os.environ | {"OPENBLAS_NUM_THREADS": "7", "OMP_NUM_THREADS": "7"}
    with serving(tmp_path, "--model", "dnn", "--threads", str(threads), env=env) as running:
        assert running.call("GET", "/identity").json["blas_threads"] == threads


def test_a_model_named_twice_is_served_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "null", "--model", "null") as running:
        assert running.call("GET", "/v2/models/null/ready").status == 200


def test_it_imports_no_other_package() -> None:
    code = (
        "import sys, pkgutil, importlib, server\n"
        "for one in pkgutil.walk_packages(server.__path__, 'server.'):\n"
        "    if one.name not in ('server.__main__', 'server.models.make_data'): importlib.import_module(one.name)\n"
        "import numpy, orjson, uvloop, aiohttp, threadpoolctl\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules if not name.startswith('_')}\n"
        "              - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", _with_site(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= OURS | THEIRS


def _with_site(code: str) -> str:
    """The site's folder without its .pth files, which import what they like."""
    import numpy

    return f"import sys; sys.path.append({str(Path(numpy.__file__).parents[1])!r})\n{code}"


def test_the_shared_modules_are_light() -> None:
    code = "import sys, server.identity; sys.exit('numpy' in sys.modules or 'aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_it_runs_with_an_empty_environment_in_another_folder_as_another_user(tmp_path: Path) -> None:
    """As a target runs it: exactly its own environment, no home, nothing that it may write to but its /tmp."""
    site = Path(np.__file__).parents[1]
    env = {"PYTHONPATH": f"{ROOT}:{site}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp", "LANG": "C.UTF-8"}
    prefix = []
    if os.getuid() == 0:
        code = f"import os, sys; os.access({str(ROOT)!r}, os.R_OK | os.X_OK) or sys.exit(1)"
        switch = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
        if subprocess.run([*switch, sys.executable, "-c", code], capture_output=True).returncode:
            pytest.skip(f"user 1000 cannot read {ROOT}; clone to a folder that everybody may read")
        tmp_path.chmod(0o755)
        (tmp_path / "tmp").mkdir()
        (tmp_path / "tmp").chmod(0o777)
        prefix = switch
    with serving(tmp_path, *ALL, "--jobs", env=env, prefix=prefix) as running:
        rows = np.load(DATA / "dnn.npz")["rows"][:2]
        assert running.infer("dnn", rows).status == 200
        assert running.call("GET", "/identity").json["schema"] == 1
