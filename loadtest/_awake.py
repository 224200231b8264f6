"""Processors that stay awake between requests.

An idle processor sleeps, and to wake it takes microseconds; in a virtual machine it halts, and the hypervisor has to
bring it back, which may take longer than the request that it is woken for, and varies. While the kernel is asked for a
latency of 0 µs, an idle processor polls instead: https://docs.kernel.org/power/pm_qos_interface.html.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images import shell
from images.errors import IsolatencyError

LATENCY = Path("/dev/cpu_dma_latency")
DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
CAVEAT = "all figures: idle processors were kept awake; what it costs to wake them is in no figure"
INSTEAD = "leave keep_awake out"


@contextmanager
def awake(latency: Path = LATENCY, driver: Path = DRIVER) -> Iterator[None]:
    """For as long as this lasts; the kernel's wish ends with the file. Raises IsolatencyError where that has no effect:
    without the right to it, or without a driver that can do so."""
    if shell.dry_run():
        shell.say(f"hold {latency} at 0 µs")
        yield
        return
    try:
        found = driver.read_text().strip()
    except OSError:
        found = "none"
    if found == "none":
        raise IsolatencyError(f"keep_awake wants a cpuidle driver; found none in {driver}; {INSTEAD}, or load one "
                              "(in a guest: modprobe cpuidle_haltpoll force=1)")  # fmt: skip
    try:
        wish = latency.open("r+b", buffering=0)
    except OSError as error:
        raise IsolatencyError(
            f"keep_awake wants to write to {latency}: {error.strerror}; run it as root, or {INSTEAD}"
        ) from error
    with wish:
        wish.write(bytes(4))  # a C int
        yield
