"""Clocks of the engine: a timer to the nanosecond, and the kernel's time stamps on the monotonic clock.

The kernel stamps packets by CLOCK_REALTIME; samples are in CLOCK_MONOTONIC. The two differ by a number that changes
only when somebody sets the clock, so it is measured once, looked at again and again, and measured anew after a step.
"""

import ctypes
import os
import socket
import struct
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from images.errors import IsolatencyError

SO_TIMESTAMPNS = 35  # Python's socket module has no name for it
STAMP_SPACE = socket.CMSG_SPACE(16)
NO_STAMP = bytes(16)
_STEP_NS = 5_000  # a step is more than this, and more than what reading two clocks leaves open
_ABSOLUTE = 1
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC


class _Spec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "s", "ns")]


class Timer:
    """A timerfd on CLOCK_MONOTONIC: `fd` is readable from the moment it was armed for, until it is armed again."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
        if self.fd < 0:
            raise IsolatencyError(f"no timer: {os.strerror(ctypes.get_errno())}; raise the limit of open files")
        self._spec = _Spec()
        self._set = libc.timerfd_settime
        self._set.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._at = ctypes.addressof(self._spec)

    def arm(self, at_ns: int) -> None:
        """To a moment of `time.monotonic_ns`; one that is over fires at once, 0 never."""
        self._spec.s, self._spec.ns = divmod(at_ns, 1_000_000_000)
        self._set(self.fd, _ABSOLUTE, self._at, None)

    def close(self) -> None:
        os.close(self.fd)


class Stamps:
    """Turns the kernel's stamps into monotonic ns. `steps`: how often the wall clock was set meanwhile."""

    def __init__(self) -> None:
        offset_ns, self._error_ns = _offset()
        self._offsets = [offset_ns]  # CLOCK_REALTIME - CLOCK_MONOTONIC, oldest first
        self.steps = 0
        # The kernel begins to stamp a moment after the first socket asked for it: this one asks early.
        self._asking = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._asking.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def look(self) -> None:
        """Compare the clocks again."""
        if abs(time.time_ns() - time.monotonic_ns() - self._offsets[-1]) > _STEP_NS:
            new, error_ns = _offset()
            if abs(new - self._offsets[-1]) > _STEP_NS + error_ns + self._error_ns:
                self.steps += 1
                self._offsets, self._error_ns = [*self._offsets[-8:], new], error_ns

    def monotonic(
        self, stamps: Sequence[bytes], sent_ns: NDArray[np.int64], received_ns: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Stamps (struct timespec, NO_STAMP for none) of n answers, 0 where there is none.

        A stamp that lies between the sending and user space's receipt by no known offset was made across a step of
        the clock, and counts as none.
        """
        self.look()
        spec = np.frombuffer(b"".join(stamps), dtype=np.int64).reshape(-1, 2)
        real = spec[:, 0] * 1_000_000_000 + spec[:, 1]
        found = np.zeros(len(real), dtype=np.int64)
        for offset in self._offsets:
            at = real - offset
            found = np.where((real != 0) & (sent_ns <= at) & (at <= received_ns), at, found)
        return found

    def close(self) -> None:
        self._asking.close()


def _offset() -> tuple[int, int]:
    """The reading of three in a row that took the shortest, of twenty; and by how much it may be off."""
    best, found = 1 << 62, 0
    for _ in range(20):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        if after - before < best:
            best, found = after - before, real - (before + after) // 2
    return found, best // 2 + 1


def pack(stamp_ns: int) -> bytes:
    """A stamp as the kernel hands it over."""
    return struct.pack("qq", *divmod(stamp_ns, 1_000_000_000))
