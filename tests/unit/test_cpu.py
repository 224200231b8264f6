"""CPU time of a process tree: threads and children that come and go are part of it."""

import os
import subprocess
import sys
import time

from loadtest import _cpu

CHILD = """
import subprocess, sys, threading, time
def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end: pass
input()
thread = threading.Thread(target=burn, args=(0.2,)); thread.start()
code = "import time\\nwhile time.process_time() < 0.3: pass\\nprint(1, flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline(); burn(0.1); print(1, flush=True)
child.communicate()
"""


def test_threads_and_children_count() -> None:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None
        before = _cpu.read([process.pid])
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = _cpu.read([process.pid])
        spent_us = _cpu.between_us(before, after)
        # The child's 0.3 s and this thread's 0.1 s are certain; the other thread may have ended, and is lost then.
        assert spent_us is not None and 380_000 < spent_us < 1_500_000
        assert len(_cpu.tree([process.pid])) == 2
    finally:
        process.kill()
        process.wait()


def test_an_idle_process_spends_nothing_to_speak_of() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        before = _cpu.read([process.pid])
        time.sleep(0.2)
        spent_us = _cpu.between_us(before, _cpu.read([process.pid]))
        assert spent_us is not None and 0 <= spent_us < 50_000
    finally:
        process.kill()
        process.wait()


def test_what_is_gone_is_unknown() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert _cpu.read([process.pid]) == {}
    assert _cpu.between_us({}, _cpu.read([os.getpid()])) is None
    assert _cpu.between_us(_cpu.read([os.getpid()]), {}) is None
    assert _cpu.read([]) == {}


def test_a_thread_number_used_again_is_a_new_thread() -> None:
    assert _cpu.between_us({(1, 1): 5_000, (1, 2): 9_000_000}, {(1, 1): 6_000, (1, 2): 3_000}) == 4
