"""In the nested host: a TCP port that leads to Firecracker's API socket, byte for byte.

    relay.py ADDRESS PORT SOCKET

A connection made before Firecracker listens waits for it, for 10 s. Standard library only; site is not imported.
"""

import asyncio
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end of the stream, then close the other side's writing half: HTTP may go on the other way."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def connect(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(200):
        try:
            return await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(0.05)
    return await asyncio.open_unix_connection(path)


async def main(address: str, port: int, path: str) -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            api_reader, api_writer = await connect(path)
        except OSError as error:
            print(f"relay: {path} does not answer: {error}", flush=True)
            writer.close()
            return
        await asyncio.gather(pump(reader, api_writer), pump(api_reader, writer))
        api_writer.close()
        writer.close()

    async with await asyncio.start_server(relay, address, port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
