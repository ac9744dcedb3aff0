"""A proxy in front of the store that makes every PUT take longer and notes how long each took.

Plain HTTP on loopback towards the client, TLS towards the store; heads are read as far as needed to know where bodies end.
"""

import asyncio
import ssl
import threading
import time
from urllib.parse import urlsplit

PIECE = 1 << 16


class SlowPuts:
    """Runs on a thread of its own from `start` to `stop`."""

    def __init__(self, endpoint, ca, delay_ms):
        self.to, self.delay = urlsplit(endpoint), delay_ms / 1e3
        self.tls = ssl.create_default_context(cafile=ca)
        self.puts = []          # (bytes, seconds, from the end of the request to the end of the answer)
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()

    def start(self):
        """Returns the endpoint to use instead of the store's."""
        threading.Thread(target=self._serve, daemon=True).start()
        if not self.ready.wait(10):
            raise OSError("the proxy did not start")
        return f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _serve(self):
        async def listen():
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20)
            self.port = server.sockets[0].getsockname()[1]
            self.ready.set()
        self.loop.run_until_complete(listen())
        self.loop.run_forever()

    async def _connection(self, reader, writer):
        up = None
        try:
            up_reader, up = await asyncio.open_connection(self.to.hostname, self.to.port, ssl=self.tls, limit=1 << 20)
            while await self._exchange(reader, writer, up_reader, up):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass        # either side hung up
        finally:
            writer.close()
            if up:
                up.close()

    async def _exchange(self, reader, writer, up_reader, up):
        head = await reader.readuntil(b"\r\n\r\n")
        method = head.split(b" ", 1)[0]
        size = await forward(head, reader, up)
        begin = time.monotonic()
        if method == b"PUT" and self.delay:
            await asyncio.sleep(self.delay)
        answer = await up_reader.readuntil(b"\r\n\r\n")
        status = int(answer.split(b" ", 2)[1])
        await forward(answer, up_reader, writer, empty=method == b"HEAD" or status in (204, 304))
        if method == b"PUT":
            self.puts.append((size, time.monotonic() - begin))
        return b"connection: close" not in (head + answer).lower()


async def forward(head, reader, writer, empty=False):
    """Passes a head and the body that belongs to it on; returns the body's length."""
    writer.write(head)
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if not empty and b"chunked" in fields.get(b"transfer-encoding", b""):
        size = await chunks(reader, writer)
    else:
        size = 0 if empty else int(fields.get(b"content-length", 0))
        left = size
        while left:
            piece = await reader.read(min(left, PIECE))
            if not piece:
                raise OSError("the body was cut")
            left -= len(piece)
            writer.write(piece)
            await writer.drain()
    await writer.drain()
    return size


async def chunks(reader, writer):
    size = 0
    while True:
        line = await reader.readuntil(b"\r\n")
        length = int(line.split(b";")[0], 16)
        writer.write(line + await reader.readexactly(length + 2))
        await writer.drain()
        size += length
        if not length:
            return size
