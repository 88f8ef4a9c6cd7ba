"""The line to a database server, which a test can cut."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Line:
    """Passes what comes on a port of 127.0.0.1 on to *host* and *port*."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._listen)]
        self._threads[0].start()

    def drop(self) -> None:
        """Break the connections that there are; new ones are welcome."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Let nobody through any more."""
        with suppress(OSError):
            # Wakes the thread that waits in accept(), as close() does not.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                self._ends += near, far
                for source, sink in ((near, far), (far, near)):
                    thread = threading.Thread(target=_pass_on, args=(source, sink))
                    self._threads.append(thread)
                    thread.start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
