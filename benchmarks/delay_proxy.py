"""A slow link on one machine: every byte that passes arrives a fixed time later, and only so many pass in a second.

Like `tc qdisc add dev lo root netem delay 20ms rate 1gbit`, without root. All connections through one proxy share
its rate, for each direction apart, as connections share a line. TCP itself ends at the proxy, so its windows and
losses are not imitated; the flow control of HTTP/2, which runs from end to end, is.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType

CHUNK = 128 << 10


class DelayProxy:
    """Forwards loopback connections with ``delay_s`` in each direction; runs in a thread of its own.

    Args:
        delay_s: of every byte, each way.
        bytes_per_s: of all connections together, each way; None: no limit.

    Attributes:
        passed: bytes so far, from those who dial to those who listen, and back.
    """

    def __init__(self, delay_s: float, bytes_per_s: float | None = None) -> None:
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._free_at = [0.0, 0.0]
        self.passed = [0, 0]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="delay-proxy", daemon=True)
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> DelayProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def forward(self, listen_port: int, target_port: int) -> None:
        """Listen on ``127.0.0.1:listen_port`` for connections meant for ``target_port``."""

        async def serve() -> None:
            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                try:
                    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target_port)
                except OSError:
                    writer.close()
                    return
                await asyncio.gather(self._pipe(reader, far_writer, 0), self._pipe(far_reader, writer, 1))

            self._servers.append(await asyncio.start_server(accept, "127.0.0.1", listen_port))

        asyncio.run_coroutine_threadsafe(serve(), self._loop).result(5)

    def _due(self, direction: int, size: int) -> float:
        """When the last of these bytes arrives, if they are given to the line now."""
        now = self._loop.time()
        if self._bytes_per_s is not None:
            self._free_at[direction] = max(now, self._free_at[direction]) + size / self._bytes_per_s
            now = self._free_at[direction]
        self.passed[direction] += size
        return now + self._delay_s

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: int) -> None:
        """What is read now is written ``delay_s`` later; reading goes on meanwhile."""
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def write() -> None:
            while True:
                due, data = await late.get()
                await asyncio.sleep(due - self._loop.time())
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        writing = asyncio.create_task(write())
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                late.put_nowait((self._due(direction, len(data)), data))
                if self._bytes_per_s is not None:  # what the line has not taken yet waits at the sender
                    await asyncio.sleep(self._free_at[direction] - self._loop.time() - self._delay_s)
        late.put_nowait((self._due(direction, 0), b""))
        with contextlib.suppress(OSError):
            await writing
