"""No exception of a library or of the database leaves a transport."""

from __future__ import annotations

import builtins
import http.client
import json
import socket
import ssl
from typing import TYPE_CHECKING, Any

import django.db
import django.db.transaction
import pytest
import requests
import requests.exceptions
import urllib3.exceptions

from django_meterly.errors import (
    MeterlyError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
)
from django_meterly.ledger import service
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.transports import HttpTransport, connections, retries
from tests.transports.server import BALANCE, KEY, RESERVE

if TYPE_CHECKING:
    from collections.abc import Iterator


POOL = urllib3.HTTPConnectionPool("ledger.test")

#: For those that cannot be made from a message.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ConnectTimeoutError": (None, "x"),
    "HostChangedError": (POOL, "/", 0),
    "http.client.IncompleteRead": (b"", 5),
    "IncompleteRead": (0, 5),
    "InvalidChunkLength": (urllib3.HTTPResponse(b""), b"zz"),
    "JSONDecodeError": ("x", "{", 0),
    "LocationParseError": ("x",),
    "MaxRetryError": (POOL, "/", None),
    "NameResolutionError": ("ledger.test", None, socket.gaierror("x")),
    "NewConnectionError": (None, "x"),
    "PoolError": (POOL, "x"),
    "ProxyError": ("x", OSError()),
    "ReadTimeoutError": (POOL, "/", "x"),
    "RequestError": (POOL, "/", "x"),
    "UnicodeDecodeError": ("utf-8", b"\xff", 0, 1, "x"),
    "UnicodeEncodeError": ("utf-8", "\ud800", 0, 1, "x"),
    "UnicodeTranslateError": ("x", 0, 1, "x"),
}


def exceptions(*modules: Any) -> Iterator[type[Exception]]:
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
        and not value.__name__.startswith("_")
    }
    return iter(sorted(found, key=lambda cls: f"{cls.__name__} {cls.__module__}"))


def make(cls: type[Exception]) -> Exception:
    name = f"{cls.__module__}.{cls.__name__}"
    arguments = ARGUMENTS.get(name) or ARGUMENTS.get(cls.__name__, ("x",))
    try:
        return cls(*arguments)
    except TypeError:
        return cls(POOL, *arguments)  # type: ignore[arg-type]


FOREIGN = [
    *exceptions(
        requests.exceptions, urllib3.exceptions, http.client, json, ssl, socket
    ),
    *(cls for cls in exceptions(builtins) if issubclass(cls, OSError | ValueError)),
]


@pytest.mark.parametrize(
    "cls", FOREIGN, ids=lambda cls: f"{cls.__module__}.{cls.__name__}"
)
@pytest.mark.parametrize("sent", [False, True], ids=["unsent", "sent"])
def test_f02_nothing_foreign_leaves_the_http_transport(monkeypatch, cls, sent):
    transport = HttpTransport(KEY, base_url="http://127.0.0.1:1", max_attempts=2)
    raised = []

    def fail(*args: Any, **kwargs: Any) -> None:
        connections.current.get().sent = sent
        raised.append(make(cls))
        raise raised[-1]

    monkeypatch.setattr(transport._adapter, "send", fail)
    monkeypatch.setattr(retries, "BACKOFF_FIRST", 0)
    expected = MeterlyUnknownOutcomeError if sent else MeterlyNotSentError
    with pytest.raises(MeterlyError, match=cls.__name__) as caught:
        transport.send(RESERVE)
    assert type(caught.value) is expected
    assert len(raised) == 2
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_f02_the_exceptions_of_every_library_are_tried():
    names = {cls.__module__.partition(".")[0] for cls in FOREIGN}
    assert names >= {"requests", "urllib3", "http", "json", "ssl", "socket", "builtins"}
    assert len(FOREIGN) > 90


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupt_leaves_as_itself(monkeypatch, interrupt):
    transport = HttpTransport(KEY, base_url="http://127.0.0.1:1")
    error = interrupt()
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(transport._adapter, "send", fail)
    with pytest.raises(interrupt) as caught:
        transport.send(RESERVE)
    assert caught.value is error
    assert calls == [1]


def test_error_that_the_caller_handles_is_not_taken_for_the_cause(free_port):
    transport = HttpTransport(KEY, base_url=f"http://127.0.0.1:{free_port}")
    work = KeyError("the work's own")
    try:
        raise work
    except KeyError:
        with pytest.raises(
            MeterlyNotSentError, match="ConnectionRefusedError"
        ) as caught:
            transport.send(RESERVE)
    assert "own" not in str(caught.value)
    assert work.__traceback__ is not None


DATABASE = list(exceptions(django.db, django.db.transaction))


@pytest.mark.parametrize("cls", DATABASE, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("call", [RESERVE, BALANCE], ids=["reserve", "balance"])
def test_nothing_foreign_leaves_the_ledger_transport(monkeypatch, cls, call):
    error = cls("x")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(service, "perform", fail)
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        LedgerTransport().send(call)
    assert caught.value.__cause__ is error


def test_the_exceptions_of_the_database_are_tried():
    assert {cls.__name__ for cls in DATABASE} >= {
        "Error",
        "DatabaseError",
        "DataError",
        "IntegrityError",
        "InterfaceError",
        "InternalError",
        "NotSupportedError",
        "OperationalError",
        "ProgrammingError",
        "TransactionManagementError",
    }
