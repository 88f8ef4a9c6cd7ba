from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from django_meterly.transports import HttpTransport
from tests.transports.server import KEY, Server

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []
    transports: list[HttpTransport] = []

    def start(behave: Callable[[socket.socket], object] | bytes, **options: Any) -> Any:
        options.setdefault("max_attempts", 1)
        if isinstance(behave, bytes):
            data = behave

            def behave(connection: socket.socket) -> None:
                connection.sendall(data)

        server: Any = Server(behave, options.pop("context", None))
        server.transport = HttpTransport(
            options.pop("key", KEY), base_url=server.url, **options
        )
        servers.append(server)
        transports.append(server.transport)
        return server

    yield start
    for transport in transports:
        transport.close()
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def certificate() -> SimpleNamespace:
    """A self-signed certificate of 127.0.0.1, and a context that serves it.

    Its key protects nothing: it is in every checkout.
    """
    file = Path(__file__).with_name("localhost.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return SimpleNamespace(file=str(file), context=context)
