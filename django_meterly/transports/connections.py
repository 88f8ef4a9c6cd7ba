"""Connections that keep a call's deadline and bound its answer.

urllib3 makes and pools the connections. They find the call that they work for in
``current``, because urllib3 hands nothing down.
"""

from __future__ import annotations

import io
import socket
import time
from contextvars import ContextVar
from http.client import HTTPException, HTTPResponse, parse_headers
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

MAX_ANSWER_BYTES = 2**20
POOL_SIZE = 64

#: The exceptions of requests, urllib3, json and the standard library on the way to a
#: ledger. Also their warnings, which a program may have turned into errors.
FOREIGN = (
    requests.RequestException,
    requests.exceptions.RequestsWarning,
    urllib3.exceptions.HTTPError,
    urllib3.exceptions.HTTPWarning,
    HTTPException,
    OSError,
    ValueError,
)


class Exchange:
    """The time that a call has left, and how far its present attempt has come.

    *seconds* is for the whole call, *read_timeout* for each silence of the ledger.
    """

    __slots__ = ("ends_at", "read_timeout", "received", "sent")

    def __init__(self, seconds: float, read_timeout: float) -> None:
        self.ends_at = time.monotonic() + seconds
        self.read_timeout = read_timeout
        #: Whether the attempt may have reached the ledger.
        self.sent = False
        #: The bytes of its answer so far.
        self.received = 0

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left, or raise ``TimeoutError``."""
        left = self.seconds_left
        if left <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left


current: ContextVar[Exchange] = ContextVar("meterly_exchange")


class _Reader(io.RawIOBase):
    """A socket's bytes, for as long and as many as the call allows.

    A socket's own time-out begins again with every byte. Without this class, a server
    that sends one byte now and then would keep the call waiting for ever.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._exchange = current.get()
        self._exchange.received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        exchange = self._exchange
        self._sock.settimeout(min(exchange.read_timeout, exchange.left()))
        count = self._raw.readinto(buffer)
        exchange.received += count or 0
        if exchange.received > MAX_ANSWER_BYTES:
            raise OSError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        buffered: Any = self.fp
        self.fp = io.BufferedReader(_Reader(buffered.detach(), sock))

    def _read_status(self) -> Any:
        # http.client skips the interim answer 100, but no other.
        parent: Any = super()
        while True:
            version, status, reason = parent._read_status()
            if not 102 <= status < 200:
                return version, status, reason
            parse_headers(self.fp)


class Connection(HTTPConnection):
    response_class = _Response

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.is_closed:
            self.connect()
        exchange = current.get()
        self.timeout = exchange.left()
        # From here on nothing can prove that the ledger did not get the call.
        exchange.sent = True
        super().request(*args, **kwargs)

    def _new_conn(self) -> socket.socket:
        # urllib3 would give the whole time-out to each address of a host, and again
        # to TLS.
        exchange = current.get()
        patience: Any = self.timeout
        failure = OSError("the host has no address")
        addresses: Any = socket.getaddrinfo(
            self._dns_host, self.port, type=socket.SOCK_STREAM
        )
        for *_, address in addresses:
            try:
                sock = socket.create_connection(
                    address[:2], min(patience, exchange.left())
                )
            except OSError as exc:
                failure = exc
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(max(min(patience, exchange.seconds_left), 0.001))
                return sock
        raise failure


class _TlsConnection(Connection, HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = Connection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Adapter(HTTPAdapter):
    """An adapter of requests without retries, whose connections keep the deadline."""

    _pool: Any = None

    def __init__(self) -> None:
        super().__init__(pool_connections=1, pool_maxsize=POOL_SIZE)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _use_pools(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return _use_pools(super().proxy_manager_for(*args, **kwargs))

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        # Every call goes to one host, with one proxy and one trust.
        if self._pool is None:
            self._pool = super().get_connection_with_tls_context(*args, **kwargs)
        return self._pool

    def build_response(self, req: Any, resp: Any) -> Any:
        """Return urllib3's own response: it keeps no cookies and unpacks nothing."""
        return resp

    def close(self) -> None:
        self._pool = None
        # urllib3 by itself closes its sockets only when they are collected.
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 (not iterable)
                manager.pools[key].close()
        super().close()


def _use_pools(manager: Any) -> Any:
    manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return manager
