"""Targets that are kept running, by the process that holds them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostsetup import ledger as books
from hostsetup import supervisor
from hostsetup.ledger import Owner
from hostsetup.target import Spec
from images import store
from images.errors import MissingError, TargetError, UsageError
from tests.unit.serving import Running, serving

NAME = f"t{os.getpid()}"
BOUND_S = 60.0


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    ours = [owner.name for owner in books.owners() if owner.what == "kept" and owner.name.startswith(NAME)]
    if ours:
        supervisor.stop(ours)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), "--model", "null") as running:
        yield running


def keep(url: str, name: str = NAME, bound_s: float = 30.0) -> Owner:
    spec = Spec(name, "url", options={"url": url})
    return supervisor.start(spec, cores=(0,), server_args=("--model", "null"), internet=False, boot_timeout_s=bound_s)


def until(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + BOUND_S
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def ended(name: str) -> list[str]:
    return [reason for owner, reason in supervisor.ended() if owner.name == name]


def test_it_is_listed_with_its_url_until_it_is_stopped(server: Running) -> None:
    owner = keep(server.url)
    assert owner.notes["url"] == server.url and owner.notes["label"] == NAME
    assert [one.id for one in supervisor.kept() if one.name == NAME] == [owner.id]
    logs = Path(owner.notes["logs"])
    assert logs.is_dir()
    assert supervisor.stop([NAME]) == [NAME]
    assert not owner.path.exists() and not logs.exists()
    assert not [one for one in supervisor.kept() if one.name == NAME]


def test_a_name_is_taken_once(server: Running) -> None:
    keep(server.url)
    with pytest.raises(UsageError, match="kept already"):
        keep(server.url)
    assert len([one for one in supervisor.kept() if one.name == NAME]) == 1


def test_two_that_start_at_once_do_not_both_get_the_name(server: Running) -> None:
    script = (
        "import sys; from tests.unit import test_supervisor as t\n"
        "from images.errors import UsageError\n"
        "try: t.keep(sys.argv[1], sys.argv[2]); print('kept')\n"
        "except UsageError: print('refused')"
    )
    argv = [sys.executable, "-c", script, server.url, NAME]
    root = Path(__file__).parents[2]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)]
    # This ends only when nobody holds the callers' standard output any longer: the supervisor does not.
    assert sorted(one.communicate(timeout=BOUND_S)[0] for one in both) == ["kept\n", "refused\n"]


def test_a_name_that_is_not_kept_is_refused() -> None:
    with pytest.raises(UsageError, match="no target 'nobody-of-that-name' is kept here"):
        supervisor.stop(["nobody-of-that-name"])


def test_one_that_does_not_come_up_says_why_and_is_listed_as_ended(server: Running) -> None:
    with pytest.raises(TargetError, match=r"did not answer at http://127\.0\.0\.1:9 within 0\.5 s"):
        keep("http://127.0.0.1:9", bound_s=0.5)
    (reason,) = ended(NAME)
    assert "did not answer" in reason
    assert keep(server.url).notes["url"] == server.url  # and makes room for the next of its name
    assert ended(NAME) == []


@pytest.fixture
def at_python_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every Python that is started from now on run this code first."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    return lambda code: (tmp_path / "sitecustomize.py").write_text(code) and None


def test_what_others_say_is_no_answer(server: Running, at_python_start: Callable[[str], None]) -> None:
    at_python_start("print('a warning', flush=True); print('[1]\\n{\"a\": 1}', flush=True)")
    assert keep(server.url).notes["url"] == server.url
    supervisor.stop([NAME])
    with pytest.raises(TargetError, match="did not answer") as caught:
        keep("http://127.0.0.1:9", bound_s=0.5)
    assert caught.value.detail.startswith("a warning\n[1]\n")


def test_a_death_without_an_answer_gives_the_last_words(at_python_start: Callable[[str], None]) -> None:
    at_python_start("import os; print('why', flush=True); os._exit(3)")
    with pytest.raises(TargetError, match="ended with exit code 3; the last that it said: why"):
        keep("http://127.0.0.1:9")


def test_a_supervisor_that_was_killed_is_said_and_removed(server: Running) -> None:
    owner = keep(server.url)
    os.kill(owner.pid, signal.SIGKILL)
    (reason,) = until(lambda: ended(NAME))
    assert "killed" in reason
    supervisor.stop([NAME])
    assert not owner.path.exists() and not Path(owner.notes["logs"]).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="ends the target's processes as root; run the tests as root")
def test_a_target_that_dies_is_noticed_and_leaves_its_reason_and_console() -> None:
    try:
        store.current()
    except MissingError as error:
        pytest.skip(str(error))
    cores = (max(os.sched_getaffinity(0)),)
    owner = supervisor.start(
        Spec(NAME, "process"), cores=cores, server_args=("--model", "null"), internet=False, boot_timeout_s=120.0
    )
    mark = next(entry["mark"] for entry in owner.entries.values() if entry["kind"] == "process")
    for pid in books.processes(mark):
        os.kill(pid, signal.SIGKILL)
    (reason,) = until(lambda: ended(NAME))
    assert f"{NAME} was ended by signal 9" in reason
    dead = next(one for one, _ in supervisor.ended() if one.name == NAME)
    assert [entry["kind"] for entry in dead.entries.values()] == ["dir"]
    assert "listening on" in (Path(dead.notes["logs"]) / f"{NAME}.console").read_text()
    supervisor.stop([NAME])
    assert not dead.path.exists()
