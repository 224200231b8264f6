"""A server that costs as little as Python lets it: every request is answered at once with the same bytes.

    python tests/bench/floor_server.py [--port 0] [--host 127.0.0.1]

Prints its port on a line of its own, then serves until it is killed. The answer is that of the null model to one row.
"""

import argparse
import asyncio
from typing import Any

import uvloop

BODY = b'{"model_name":"null","outputs":[{"name":"rows","datatype":"INT64","shape":[1],"data":[1]}]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Floor(asyncio.Protocol):
    """Requests come one at a time per connection; each ends where its Content-Length says."""

    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._data = self._data + data
        head = data.find(b"\r\n\r\n") + 4
        if head < 4:
            return
        at = data.lower().find(b"content-length:", 0, head)
        size = int(data[at + 15 : data.find(b"\r", at)]) if at >= 0 else 0
        if len(data) >= head + size:
            self._data = b""
            self._transport.write(ANSWER)


async def serve(host: str, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Floor, host, port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    uvloop.run(serve(given.host, given.port))
