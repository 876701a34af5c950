"""A TCP link to a real server that is slow, or over which nothing comes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator


class SlowLink:
    """Passes on what a server and its clients say.

    Attributes:
        url: Where it listens.
        delay: Seconds until a client gets each piece of an answer.
        silent: Whether clients get nothing for now, though they are connected.
    """

    def __init__(self, port: int) -> None:
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay, self.silent = 0.0, False
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                for ends in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError), one, other:
            while piece := one.recv(1 << 16):
                if answers:
                    time.sleep(self.delay)
                    while self.silent:
                        time.sleep(0.05)
                other.sendall(piece)


@contextlib.contextmanager
def slow_link(url: str) -> Iterator[SlowLink]:
    """Open a link to the server of an address."""
    link = SlowLink(int(url.rpartition(":")[2]))
    try:
        yield link
    finally:
        link.silent = False
        link.close()
