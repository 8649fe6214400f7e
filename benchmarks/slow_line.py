"""A line with latency and a limited rate, for benchmarks: a TCP proxy in a process of its own that counts what passes."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

CHUNK = 64 * 1024
#: How far behind its schedule the line may be and still catch up: a busy machine wakes it late.
CATCH_UP_S = 0.1
METHODS = (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE")


class Count(NamedTuple):
    """bytes: of both directions. requests: of HTTP."""

    bytes: int
    requests: int


class Line(NamedTuple):
    url: str
    counters: Any  # shared between the processes: bytes, requests

    def count(self) -> Count:
        return Count(*(int(value) for value in self.counters))

    def since(self, before: Count) -> Count:
        now = self.count()
        return Count(now.bytes - before.bytes, now.requests - before.requests)


class Direction:
    """One direction of the line; all connections share its rate (bytes per second)."""

    def __init__(self, rate: float, latency_s: float, counters: Any) -> None:
        self.rate, self.latency_s, self.counters = rate, latency_s, counters
        self.free_at = 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK):
                self.counters[0] += len(data)
                if data.split(b" ", 1)[0] in METHODS:
                    self.counters[1] += 1
                    await asyncio.sleep(self.latency_s)
                self.free_at = max(self.free_at, time.monotonic() - CATCH_UP_S) + len(data) / self.rate
                await asyncio.sleep(self.free_at - time.monotonic())
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            writer.close()


def serve(port: int, rate: float, latency_s: float, counters: Any, ports: Any) -> None:
    up, down = (Direction(rate, latency_s, counters) for _ in range(2))

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(up.carry(reader, to_server), down.carry(from_server, writer))

    async def run() -> None:
        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with contextlib.suppress(OSError):
        os.nice(-5)  # where that is allowed: a line does not depend on how busy the machine is
    asyncio.run(run())


@contextmanager
def slow_line(port: int, rate: float, latency_s: float) -> Iterator[Line]:
    """A line to the server at this port: `rate` bytes per second in each direction, `latency_s` before each request."""
    context = multiprocessing.get_context("spawn")
    counters, ports = context.Array("d", 2), context.Queue()
    process = context.Process(target=serve, args=(port, rate, latency_s, counters, ports), daemon=True)
    process.start()
    try:
        yield Line(f"http://127.0.0.1:{ports.get(timeout=120)}", counters)
    finally:
        process.terminate()
        process.join()
