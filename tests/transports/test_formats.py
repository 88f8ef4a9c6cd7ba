"""Another wire format: the transport of docs/client.md, over a real socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from django_meterly import MeterlyClient
from django_meterly.errors import (
    MeterlyApiError,
    MeterlyInsufficientCreditsError,
    MeterlyNotFoundError,
    MeterlyNotSentError,
    MeterlyRateLimitedError,
    MeterlyReservationExpiredError,
    MeterlyServerError,
    MeterlyUnknownOutcomeError,
    api_error,
)
from django_meterly.transports import HttpTransport, Request
from tests.pages import DOCS, blocks
from tests.transports.server import (
    KEY,
    RESERVE,
    Server,
    answer,
    close,
    drip,
    hang,
    reset,
    within,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator


def shown() -> dict[str, Any]:
    """Return the names that the page's blocks define."""
    names: dict[str, Any] = {"__name__": "docs_client"}
    for block in blocks(DOCS / "client.md"):
        if block.source.startswith("class HeaderSigner") or "Acme" in block.source:
            exec(block.source, names)
    return names


AcmeTransport: type[HttpTransport] = shown()["AcmeTransport"]

HELD = {
    "reservation_id": "res_1",
    "customer_id": "cus_1",
    "unit": "tokens",
    "amount": "25.00",
    "status": "reserved",
    "reference": "render-42",
    "expires_at": "2030-01-01T00:00:00Z",
    "balance": {
        "customer_id": "cus_1",
        "credit_unit": "tokens",
        "balance": "100.00",
        "reserved": "25.00",
        "available": "75.00",
    },
}
COMMITTED = {**HELD, "status": "committed", "amount": "20.00"}


def good(data: Any, status: str = "200 OK") -> bytes:
    return answer({"data": data}, status)


def bad(status: str, kind: str, headers: str = "", **details: Any) -> bytes:
    error = {"type": kind, "text": "No.", "details": details}
    return answer({"error": error}, status, headers)


def in_turn(*answers: bytes) -> Callable[[socket.socket], None]:
    left = iter(answers)
    return lambda connection: connection.sendall(next(left))


@pytest.fixture
def acme() -> Iterator[Callable[..., Any]]:
    opened: list[Any] = []

    def start(behave: Any, transport: Any = AcmeTransport, **options: Any) -> Any:
        if isinstance(behave, bytes):
            behave = in_turn(*[behave] * 9)
        server: Any = Server(behave)
        options.setdefault("max_attempts", 1)
        server.client = MeterlyClient(
            transport=transport(KEY, base_url=f"{server.url}/acme", **options)
        )
        opened.append(server)
        return server

    yield start
    for server in opened:
        server.client.close()
        server.stop()


def request(server: Server, number: int = 0) -> tuple[str, dict[str, str], Any]:
    head, _, body = server.requests[number].decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return first, headers, json.loads(body) if body else None


def reserve(server: Any) -> Any:
    return server.client.reserve_credits(
        "cus_1", 25, unit="tokens", reference="render-42", idempotency_key="once"
    )


def test_a_call_is_sent_as_the_vendor_wants_it(acme):
    server = acme(good(HELD, "201 Created"))
    reserve(server)
    first, headers, body = request(server)
    assert first == "POST /acme/api/reservations HTTP/1.1"
    assert headers["x-api-key"] == KEY
    assert headers["x-once"] == "once"
    assert "authorization" not in headers
    assert "idempotency-key" not in headers
    assert body == {
        "customer_id": "cus_1",
        "amount": "25.00",
        "unit": "tokens",
        "reference": "render-42",
    }


def test_an_answer_is_read_as_the_vendor_means_it(acme):
    held = reserve(acme(good(HELD, "201 Created")))
    assert (held.reservation_id, held.amount, held.status) == ("res_1", 25, "reserved")
    assert held.balance.available == 75


def test_a_guard_speaks_the_format_from_end_to_end(acme):
    server = acme(in_turn(good(HELD), good({**COMMITTED, "amount": "25.00"})))
    with server.client.guard("cus_1", 25, "tokens", "render-42"):
        pass
    assert request(server, 1)[0].startswith("POST /acme/api/reservations/res_1/commit ")


def test_a_query_is_sent(acme):
    server = acme(good({"entries": [], "next_cursor": None}))
    assert server.client.list_entries("cus_1", "tokens").entries == ()
    first, _, body = request(server)
    assert first == "GET /acme/api/customers/cus_1/entries?unit=tokens HTTP/1.1"
    assert body is None


def test_every_attempt_has_the_same_key_and_bytes(acme):
    server = acme(
        in_turn(bad("503 Down", "?"), good(HELD, "201 Created")), max_attempts=2
    )
    assert reserve(server).amount == 25
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            bad("402 No", "no_funds", required="25.00", available="5.00"),
            MeterlyInsufficientCreditsError,
        ),
        (bad("404 No", "unknown_id"), MeterlyNotFoundError),
        (bad("410 Gone", "hold_over"), MeterlyReservationExpiredError),
    ],
)
def test_a_refusal_is_the_contracts(acme, said, expected):
    with pytest.raises(expected) as caught:
        reserve(acme(said))
    error = caught.value
    assert (error.method, error.path) == ("POST", "/api/reservations")
    assert error.request_id
    assert error.message == "No."
    if expected is MeterlyInsufficientCreditsError:
        assert (error.required, error.available) == (25, 5)


HTML = b"<html>Please log in</html>"
UNUSABLE = {
    "redirect": answer(b"", "302 Found", "Location: /login\r\n"),
    "redirect with a success": answer({"data": HELD}, "302 Found"),
    "redirect with a refusal": bad("302 Found", "no_funds"),
    "page": answer(HTML),
    "page of a 404": answer(HTML, "404 Not Found"),
    "page of a 402": answer(HTML, "402 Payment Required"),
    "page of a 403": answer(HTML, "403 Forbidden"),
    "nothing": answer(b""),
    "another envelope": answer(HELD),
    "another error": answer({"error": "no"}, "404 Not Found"),
    "another code": bad("404 Not Found", "no_page"),
    "list": answer([HELD]),
    "text of data": good("res_1"),
    "number of data": good(1),
    "success of a 404": good(HELD, "404 Not Found"),
    "part of a credit": good({**HELD, "amount": "25.50"}),
    "number of credits": good({**HELD, "amount": 25}),
    "not a number": good({**HELD, "amount": "NaN"}),
    "another customer": good({**HELD, "customer_id": "cus_2"}),
    "another amount": good({**HELD, "amount": "24.00"}),
    "not UTF-8": answer(b"\xff\xfe"),
    "too deep": answer(b"[" * 100_000),
    "half an answer": answer({"data": HELD}, length=10_000) + b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "too long": answer(b" " * (2**20 + 1)),
    "strange status": good(HELD, "600 Odd"),
    "reset": reset,
    "close": close,
    "silence": hang,
    "drip": drip(b"x" * 100, b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_answer_is_unknown_and_never_no(acme, name):
    said = UNUSABLE[name]
    if isinstance(said, bytes):

        def behave(connection: socket.socket, said: bytes = said) -> object:
            connection.sendall(said)
            return "close"
    else:
        behave = said
    server = acme(behave, read_timeout=0.3, deadline=1)
    with within(3), pytest.raises(MeterlyUnknownOutcomeError) as caught:
        reserve(server)
    assert not isinstance(caught.value, MeterlyApiError)
    assert caught.value.idempotency_key == "once"
    assert KEY not in str(caught.value)


def test_the_message_says_why_an_answer_is_unusable(acme):
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        reserve(acme(answer(HELD)))
    assert "/acme/api/reservations (request" in str(caught.value)
    assert "not a ledger's (KeyError: 'data')" in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        bad("500 Down", "no_funds"),
        bad("503 Down", "unknown_id"),
        answer(HTML, "502 Bad Gateway"),
        good(HELD, "500 Down"),
    ],
)
def test_a_5xx_is_unknown_whatever_is_decoded(acme, said):
    with pytest.raises(MeterlyServerError):
        reserve(acme(said))


@pytest.mark.parametrize("said", [answer(HTML, "429 Busy"), good(HELD, "429 Busy")])
def test_a_429_is_one_whatever_is_decoded(acme, said):
    with pytest.raises(MeterlyRateLimitedError):
        reserve(acme(said))


def test_a_404_of_a_call_that_names_nothing_is_unknown(acme):
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        acme(bad("404 No", "unknown_id")).client.grant_credits("u", 5, "tokens", "r")
    assert not isinstance(caught.value, MeterlyApiError)


class Careless(HttpTransport):
    """A decode that looks at nothing."""

    def decode(self, call, status, headers, body):
        if status >= 500:
            raise api_error(402, "insufficient_credits")
        return {}


@pytest.mark.parametrize("status", ["302 Found", "404 Not Found", "500 Down"])
def test_a_careless_decode_makes_no_success_and_no_refusal(acme, status):
    with pytest.raises(MeterlyUnknownOutcomeError):
        acme(answer(HTML, status), Careless).client.release_reservation("res_1")


class Interrupted(BaseException):
    pass


class TimeLimit(Exception):
    """As Celery's, which may come at any moment."""


@pytest.mark.parametrize("cls", [Interrupted, TimeLimit, MemoryError])
def test_an_interrupt_in_decode_leaves_as_itself(acme, monkeypatch, cls):
    def decode(*args: Any) -> Any:
        raise cls

    monkeypatch.setattr(AcmeTransport, "decode", decode)
    with pytest.raises(cls):
        reserve(acme(good(HELD)))


@pytest.mark.parametrize(
    "request_",
    [
        lambda: Request("POST", "reservations"),
        lambda: Request("POST", "/a b"),
        lambda: Request("POST", "/caf\u00e9"),
        lambda: Request("POST", "/a\r\nX: 1"),
        lambda: Request("POST", "/a#b"),
        lambda: Request("POST", "/a", {"X-Once": "a\r\nX: 1"}),
        lambda: Request("POST", "/a", {"X-Once": ""}),
    ],
)
def test_a_request_that_cannot_be_sent_is_not_sent(acme, monkeypatch, request_):
    with pytest.raises(ValueError, match="must be"):
        request_()
    monkeypatch.setattr(AcmeTransport, "encode", lambda *args: request_())
    server = acme(good(HELD), max_attempts=3)
    with pytest.raises(MeterlyNotSentError, match="reserve_credits was not sent"):
        server.client.transport.send(RESERVE)
    assert server.connections == 0


def test_a_refusal_of_encode_is_raised_as_it_is(acme, monkeypatch):
    refusal = api_error(400, "invalid_request", "Acme has no entries.")

    def encode(*args: Any) -> Any:
        raise refusal

    monkeypatch.setattr(AcmeTransport, "encode", encode)
    with pytest.raises(MeterlyApiError) as caught:
        acme(good(HELD)).client.transport.send(RESERVE)
    assert caught.value is refusal


def test_the_signer_of_a_class_gives_way_to_that_of_the_settings(acme):
    def signer(key: str) -> Any:
        def sign(request: Any) -> Any:
            request.headers["X-Other"] = "signed"
            return request

        return sign

    server = acme(good(HELD), signer=signer)
    reserve(server)
    assert request(server)[1]["x-other"] == "signed"
    assert "x-api-key" not in request(server)[1]
