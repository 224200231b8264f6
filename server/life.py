"""The life of the server: it listens, serves, and ends in order."""

import asyncio
import logging
import select
import signal
import socket
import time

from aiohttp import web

from server.app import Service
from server.connection import Connection
from server.log import log

BACKLOG = 1024
QUIET_S = 1.0
LOOK_S = 0.02
LAST_S = 0.5
AT_ONCE_S = 0.001  # to aiohttp 0 is no bound


async def serve(service: Service, host: str, port: int, access_log: logging.Logger | None) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError when the address cannot be listened on.

    At the first signal the server is not ready, nobody new is let in, and every open connection gets its next answer
    with `Connection: close`, for `grace` seconds at most, or until nothing is under way and no byte has come for a
    second. A second signal ends it at once.
    """
    loop = asyncio.get_running_loop()
    book = service.connections
    grace_s = book.limits.grace
    server = web.Server(service.handle)
    first, second = asyncio.Event(), asyncio.Event()

    def end() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    listener = await loop.create_server(lambda: Connection(book, server, access_log), host, port, backlog=BACKLOG)
    for one in listener.sockets:  # whose connections have it, too: the kernel ends those that take nothing for so long
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(book.limits.send_timeout * 1000))
    sweeping = asyncio.create_task(book.sweep())
    try:
        bound = listener.sockets[0].getsockname()
        log(f"listening on http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}")
        await first.wait()
        log("stopping")
        book.stopping = True
        for one in listener.sockets:
            await _let_in(one.fileno())
        listener.close()
        over = time.monotonic() + grace_s
        await service.stop_jobs()
        while book.open and time.monotonic() < over and not second.is_set():
            quiet = time.monotonic_ns() - book.last_byte_ns > QUIET_S * 1e9
            if quiet and not any(one.under_way for one in book.open):
                break
            await asyncio.sleep(LOOK_S)
    finally:
        sweeping.cancel()
        listener.close()
        await server.shutdown(AT_ONCE_S if second.is_set() else LAST_S)
        service.stop()
    log("stopped")


async def _let_in(listening: int) -> None:
    """Accept who is in the kernel's queue, since their connections exist already."""
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    for _ in range(BACKLOG):
        if not waiting.poll(0):
            break
        await asyncio.sleep(0)
