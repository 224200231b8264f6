"""CPU time of a target's process tree, and of this process, in nanoseconds.

Read per thread from /proc/PID/task/TID/schedstat (first field: time on CPU in ns), since the figures per process
count in ticks of 10 ms. A thread that starts between two readings is counted in full; of one that ends between them,
what it used after the first reading is lost: worker threads of a VMM that come and go are short of CPU by that.
"""

from collections.abc import Iterable
from pathlib import Path

Spent = dict[tuple[int, int], int]  # (pid, tid) -> ns


def tree(pids: Iterable[int]) -> set[int]:
    """`pids` and all their descendants that live now."""
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid in found:
            continue
        found.add(pid)
        for task in _tasks(pid):
            waiting += _children(task)
    return found


def read(pids: Iterable[int]) -> Spent:
    """CPU time per thread of `pids` and their descendants; empty where none of them lives."""
    spent: Spent = {}
    for pid in tree(pids):
        for task in _tasks(pid):
            try:
                spent[pid, int(task.name)] = int((task / "schedstat").read_text().split()[0])
            except (OSError, IndexError):  # the thread has just ended, or the kernel has no CONFIG_SCHED_INFO
                continue
    return spent


def between_us(before: Spent, after: Spent) -> int | None:
    """CPU time in µs spent between two readings; None (unknown) where one of them found nothing."""
    if not before or not after:
        return None
    # A thread number that was used again has a smaller figure than before: then it is another, new thread.
    total = sum(ns - before.get(key, 0) if ns >= before.get(key, 0) else ns for key, ns in after.items())
    return round(total / 1000)


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def _children(task: Path) -> list[int]:
    try:
        return [int(word) for word in (task / "children").read_text().split()]
    except OSError:
        return []
