"""A server on a real socket, which does to each request what a test says."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django_meterly.transports import Call

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

KEY = "mk_test_0123456789abcdefghijklmnopqrstuv"
RESERVE = Call("reserve_credits", {"customerId": "c1", "amount": 5}, "key-1")
BALANCE = Call("get_balance", {"customerId": "c1"})


def answer(
    body: Any, status: str = "200 OK", headers: str = "", *, length: int | None = None
) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(data) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{headers}\r\n".encode() + (
        data
    )


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            while len(body) < int(line.partition(b":")[2]):
                body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class Server:
    """A server on 127.0.0.1 that does to each request what *behave* says."""

    def __init__(
        self,
        behave: Callable[[socket.socket], object],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.behave = behave
        self.context = context
        self.requests: list[bytes] = []
        self.connections = 0
        self.stopping = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            if self.stopping.is_set():
                connection.close()
                return
            self.connections += 1
            thread = threading.Thread(target=self.serve, args=(connection,))
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        try:
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            while request := read_request(connection):
                self.requests.append(request)
                if self.behave(connection) is not None:
                    return
        except OSError:
            pass
        finally:
            connection.close()

    def stop(self) -> None:
        self.stopping.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()


def hang(connection: socket.socket) -> object:
    """Say nothing until the client has hung up."""
    connection.recv(1)
    return "close"


def reset(connection: socket.socket) -> object:
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    return "close"


def close(connection: socket.socket) -> object:
    return "close"


def say(data: bytes) -> Callable[[socket.socket], object]:
    def behave(connection: socket.socket) -> object:
        connection.sendall(data)
        return "close"

    return behave


def drip(data: bytes, head: bytes = b"") -> Callable[[socket.socket], object]:
    """Send *data* byte by byte, each well within any read time-out."""

    def behave(connection: socket.socket) -> object:
        connection.sendall(head)
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        return "close"

    return behave


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds
