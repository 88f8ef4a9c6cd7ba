"""What a call comes to when it takes several attempts."""

from __future__ import annotations

import json
import socket
import threading
import time
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from django_meterly.errors import (
    MeterlyApiError,
    MeterlyAuthenticationError,
    MeterlyError,
    MeterlyForbiddenError,
    MeterlyIdempotencyInProgressError,
    MeterlyInsufficientCreditsError,
    MeterlyNotFoundError,
    MeterlyNotSentError,
    MeterlyRateLimitedError,
    MeterlyServerError,
    MeterlyUnknownOutcomeError,
)
from django_meterly.transports import Call, HttpTransport, retries
from django_meterly.transports.retries import BUDGET_SIZE, RetryBudget
from tests.transports.server import (
    BALANCE,
    KEY,
    RESERVE,
    answer,
    close,
    hang,
    reset,
    within,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def error(status: str, code: str = "", headers: str = "") -> bytes:
    body = {"error": {"code": code, "message": "no"}} if code else {}
    return answer(body, status, headers)


OK = answer({"ok": True})
BUSY = error("429 Too Many Requests", "rate_limited")
DOWN = error("503 Service Unavailable", "unavailable")
IN_PROGRESS = error("409 Conflict", "idempotency_in_progress")
POOR = error("402 Payment Required", "insufficient_credits")
UNKNOWN_KEY = error("401 Unauthorized", "unauthenticated")
FORBIDDEN = error("403 Forbidden", "forbidden")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_FIRST", 0.01)


def in_turn(*steps: Any) -> Callable[[socket.socket], object]:
    """Do one of *steps* for each request: bytes are sent, functions called."""
    waiting = list(steps)

    def behave(connection: socket.socket) -> object:
        step = waiting.pop(0)
        if isinstance(step, bytes):
            connection.sendall(step)
            return None
        return step(connection)

    return behave


# F06: the same call each time


@pytest.mark.parametrize("key", [KEY, "mk_hmac_k1_s3cr3t"], ids=["bearer", "hmac"])
@pytest.mark.parametrize(
    "failure", [reset, close, hang, DOWN, BUSY, IN_PROGRESS, error("500 No")]
)
def test_f06_every_attempt_carries_the_same_key_and_bytes(
    serve, monkeypatch, key, failure
):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    server = serve(
        in_turn(failure, failure, OK), key=key, max_attempts=3, read_timeout=0.2
    )

    assert server.transport.send(RESERVE) == {"ok": True}

    assert len(server.requests) == 3
    assert len(set(server.requests)) == 1
    assert b"idempotency-key: key-1\r\n" in server.requests[0].lower()


def test_f06_no_attempt_is_made_below_the_loop(serve):
    server = serve(reset, max_attempts=2)
    with pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(BALANCE)
    assert len(server.requests) == 2


def test_signature_is_as_old_as_its_attempt(serve, monkeypatch):
    server = serve(in_turn(DOWN, OK), key="mk_hmac_k1_s3cr3t", max_attempts=3)
    monkeypatch.setattr(time, "time", lambda: 1700000000 + 400 * len(server.requests))
    server.transport.send(RESERVE)
    first, second = server.requests
    assert b"timestamp=1700000000" in first
    assert b"timestamp=1700000400" in second


def test_first_attempt_that_could_not_connect_is_followed_by_another(free_port):
    transport = HttpTransport(KEY, base_url=f"http://127.0.0.1:{free_port}")

    def begin() -> None:
        time.sleep(0.15)
        listener = socket.create_server(("127.0.0.1", free_port))
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(OK)
        connection.close()
        listener.close()

    thread = threading.Thread(target=begin)
    thread.start()
    transport.max_attempts = 200
    transport._budget._tokens = 200
    assert transport.send(RESERVE) == {"ok": True}
    thread.join()
    transport.close()


# F07: what is asked again, and when


@pytest.mark.parametrize(
    "verdict",
    [
        error("400 Bad Request", "invalid_request"),
        UNKNOWN_KEY,
        POOR,
        FORBIDDEN,
        error("404 Not Found", "not_found"),
        error("409 Conflict", "customer_exists"),
        error("409 Conflict", "reservation_expired"),
        error("409 Conflict", "something_new"),
        error("422 Unprocessable", "idempotency_mismatch"),
        error("418 Teapot", "teapot"),
    ],
)
def test_f07_verdict_is_not_asked_for_again(serve, verdict):
    server = serve(verdict, max_attempts=3)
    with pytest.raises(MeterlyApiError):
        server.transport.send(RESERVE)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (BUSY, MeterlyRateLimitedError),
        (IN_PROGRESS, MeterlyIdempotencyInProgressError),
        (error("500 No"), MeterlyServerError),
        (error("502 No"), MeterlyServerError),
        (DOWN, MeterlyServerError),
        (error("504 No"), MeterlyServerError),
        (error("401 No"), MeterlyUnknownOutcomeError),
        (error("404 No"), MeterlyUnknownOutcomeError),
        (error("409 No"), MeterlyUnknownOutcomeError),
        (reset, MeterlyUnknownOutcomeError),
        (answer(b"<h1>Hello</h1>"), MeterlyUnknownOutcomeError),
    ],
)
def test_f07_what_is_no_verdict_is_asked_again_as_often_as_allowed(
    serve, failure, expected
):
    server = serve(
        failure if callable(failure) else in_turn(*[failure] * 9), max_attempts=3
    )
    with pytest.raises(expected):
        server.transport.send(RESERVE)
    assert len(server.requests) == 3


def test_call_says_how_often_it_is_sent(serve):
    server = serve(DOWN, max_attempts=3)
    once = Call("reserve_credits", RESERVE.arguments, "key-1", attempts=1)
    with pytest.raises(MeterlyServerError):
        server.transport.send(once)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "status", ["429 Too Many Requests", "503 Service Unavailable", "409 Conflict"]
)
def test_f07_retry_after_is_waited_for(serve, status):
    code = "idempotency_in_progress" if status.startswith("409") else ""
    server = serve(
        in_turn(error(status, code, "Retry-After: 1\r\n"), OK), max_attempts=3
    )
    started = time.monotonic()
    assert server.transport.send(RESERVE) == {"ok": True}
    assert 1 <= time.monotonic() - started < 4


@pytest.mark.parametrize(
    "value",
    ["-5", "1.5", "abc", "1e9", "", "9" * 5000, "Fri, 31 Dec 1999 23:59:59 GMT"],
)
def test_f07_strange_retry_after_neither_crashes_nor_waits(serve, value):
    server = serve(
        in_turn(error("429 Busy", headers=f"Retry-After: {value}\r\n"), OK),
        max_attempts=3,
    )
    with within(1.4):
        assert server.transport.send(RESERVE) == {"ok": True}


@pytest.mark.parametrize("value", [8, 60, 99999])
def test_f07_retry_after_beyond_the_deadline_ends_the_call_at_once(serve, value):
    server = serve(
        error("429 Busy", headers=f"Retry-After: {value}\r\n"), max_attempts=3
    )
    with within(4), pytest.raises(MeterlyRateLimitedError) as caught:
        server.transport.send(RESERVE)
    assert caught.value.details == {"retryAfter": value}
    assert len(server.requests) == 1


@pytest.mark.parametrize("behave", [hang, DOWN, BUSY], ids=["silence", "503", "429"])
def test_f06_all_attempts_share_one_deadline(serve, monkeypatch, behave):
    monkeypatch.setattr(retries, "BACKOFF_FIRST", 0.3)
    server = serve(behave, max_attempts=1000, read_timeout=0.3, deadline=1)
    server.transport._budget._tokens = 1000
    with within(2), pytest.raises(MeterlyError):
        server.transport.send(RESERVE)
    assert len(server.requests) > 1


def test_f06_deadline_holds_for_a_host_of_many_dead_addresses(monkeypatch):
    listeners: list[socket.socket] = []
    waiting: list[socket.socket] = []
    port = 0
    for number in range(2, 8):
        listener = socket.socket()
        listener.bind((f"127.0.0.{number}", port))
        port = listener.getsockname()[1]
        listener.listen(0)
        listeners.append(listener)
        # A full backlog leaves the next connection hanging.
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            waiting.append(client)
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "ledger.invalid":
            return real(host, *args, **kwargs)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", listener.getsockname())
            for listener in listeners
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    transport = HttpTransport(
        KEY,
        base_url=f"http://ledger.invalid:{port}",
        allow_insecure_http=True,
        connect_timeout=0.4,
        deadline=1,
    )
    with within(2), pytest.raises(MeterlyNotSentError):
        transport.send(RESERVE)
    for sock in (*listeners, *waiting):
        sock.close()


def test_second_address_of_a_host_is_tried(serve, monkeypatch):
    server = serve(OK)
    real = socket.getaddrinfo
    addresses = [("127.0.0.1", 1), ("127.0.0.1", server.port)]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kwargs: (
            [(socket.AF_INET, socket.SOCK_STREAM, 6, "", a) for a in addresses]
            if host == "ledger.invalid"
            else real(host, *args, **kwargs)
        ),
    )
    transport = HttpTransport(
        KEY, base_url="http://ledger.invalid", allow_insecure_http=True
    )
    assert transport.send(RESERVE) == {"ok": True}
    transport.close()


# F02: the outcome is the operation's


class Ledger:
    """A server that can also not be there: its steps may be ``"refused"``."""

    def __init__(self, steps: tuple[Any, ...], port: int) -> None:
        self.steps = list(steps)
        self.port = port
        self.listener: socket.socket | None = None

    def prepare(self) -> None:
        """Get ready for the next attempt, before it is made."""
        step = self.steps.pop(0)
        if step == "refused":
            return
        self.listener = listener = socket.create_server(("127.0.0.1", self.port))
        self.thread = threading.Thread(target=self.serve, args=(listener, step))
        self.thread.start()

    def serve(self, listener: socket.socket, step: Any) -> None:
        connection, _ = listener.accept()
        listener.close()
        connection.recv(65536)
        if isinstance(step, bytes):
            connection.sendall(step.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        else:
            step(connection)
        connection.close()


@pytest.fixture
def meet(free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Send a reserve whose attempts meet, in turn, what is given."""
    transport = HttpTransport(KEY, base_url=f"http://127.0.0.1:{free_port}")

    exchange = transport._exchange

    def send(*steps: Any) -> dict[str, Any]:
        ledger = Ledger(steps, free_port)

        def prepared(sending: Any) -> dict[str, Any]:
            ledger.prepare()
            try:
                return exchange(sending)
            finally:
                if ledger.listener:
                    ledger.thread.join()

        monkeypatch.setattr(transport, "_exchange", prepared)
        transport.max_attempts = len(steps)
        transport._budget = RetryBudget()
        try:
            return transport.send(RESERVE)
        finally:
            assert ledger.steps == []

    yield send
    transport.close()


def test_f02_not_sent_only_if_no_attempt_was(meet):
    with pytest.raises(MeterlyNotSentError):
        meet("refused", "refused", "refused")


@pytest.mark.parametrize(
    ("later", "cause"),
    [
        ("refused", MeterlyNotSentError),
        (BUSY, MeterlyRateLimitedError),
        (IN_PROGRESS, MeterlyIdempotencyInProgressError),
        (UNKNOWN_KEY, MeterlyAuthenticationError),
        (FORBIDDEN, MeterlyForbiddenError),
    ],
    ids=["refused", "429", "in progress", "401", "403"],
)
@pytest.mark.parametrize("unknown", [reset, DOWN], ids=["reset", "503"])
@pytest.mark.parametrize("before", [(), ("refused",), (BUSY,)])
def test_f02_attempt_that_may_have_arrived_leaves_the_call_unknown(
    meet, before, unknown, later, cause
):
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        meet(*before, unknown, later)
    assert type(caught.value) is MeterlyUnknownOutcomeError
    assert type(caught.value.__cause__) is cause


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (POOR, MeterlyInsufficientCreditsError),
        (error("404 No", "not_found"), MeterlyNotFoundError),
    ],
    ids=["402", "404"],
)
def test_f02_verdict_on_the_same_key_is_an_answer(meet, verdict, expected):
    with pytest.raises(expected):
        meet(reset, DOWN, "refused", BUSY, verdict)


def test_f02_success_on_the_same_key_is_an_answer(meet):
    assert meet(reset, DOWN, "refused", BUSY, OK) == {"ok": True}


@pytest.mark.parametrize("steps", [("refused", BUSY), (BUSY, "refused")])
def test_f02_ledger_that_refused_was_reached(meet, steps):
    with pytest.raises(MeterlyRateLimitedError):
        meet(*steps)


@pytest.mark.parametrize("steps", [("refused", UNKNOWN_KEY), (BUSY, UNKNOWN_KEY)])
def test_f02_refusal_without_an_unknown_attempt_is_a_refusal(meet, steps):
    with pytest.raises(MeterlyAuthenticationError):
        meet(*steps)


def test_f02_last_unknown_attempt_is_the_one_reported(meet):
    with pytest.raises(MeterlyServerError):
        meet(reset, DOWN)


STEPS = {
    "no": "refused",
    "unknown": reset,
    "503": DOWN,
    "429": BUSY,
    "402": POOR,
    "401": UNKNOWN_KEY,
    "yes": OK,
}


def test_f02_any_three_attempts_come_to_what_the_contract_says(meet):
    ends = {"402", "401", "yes"}
    for names in product(STEPS, repeat=3):
        if ends & set(names[:-1]):
            continue
        try:
            meet(*(STEPS[name] for name in names))
        except MeterlyUnknownOutcomeError:
            came_to = "unknown"
        except MeterlyNotSentError:
            came_to = "not sent"
        except MeterlyInsufficientCreditsError:
            came_to = "402"
        except MeterlyApiError:
            came_to = "refused"
        else:
            came_to = "yes"
        if names[-1] in ("yes", "402"):
            expected = names[-1]
        elif {"unknown", "503"} & set(names):
            expected = "unknown"
        elif set(names) == {"no"}:
            expected = "not sent"
        else:
            expected = "refused"
        assert came_to == expected, names


# The retry budget


def test_retries_are_a_small_share_when_everything_fails(serve):
    server = serve(DOWN, max_attempts=3)
    for _ in range(100):
        with pytest.raises(MeterlyServerError):
            server.transport.send(RESERVE)
    # 100 calls, what they paid in, and what was there.
    assert 100 < len(server.requests) <= 100 + 10 + BUDGET_SIZE


def test_calls_that_succeed_fill_the_budget_again(serve):
    server = serve(OK, max_attempts=3)
    server.transport._budget._tokens = 0
    for _ in range(12):
        server.transport.send(RESERVE)
    server.requests.clear()
    server.behave = in_turn(DOWN, OK)
    assert server.transport.send(RESERVE) == {"ok": True}
    assert len(server.requests) == 2


def test_budget_is_never_overdrawn_by_threads():
    budget = RetryBudget()
    granted: list[bool] = []

    def spend() -> None:
        granted.extend(budget.withdraw() for _ in range(100))

    threads = [threading.Thread(target=spend) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == BUDGET_SIZE


def test_body_is_json_once_and_for_all(serve):
    """The arguments are a mapping somebody else may hold on to."""
    arguments = {"customerId": "c1", "amount": 5}

    def change(connection: socket.socket) -> None:
        arguments["amount"] = 6
        connection.sendall(DOWN)

    server = serve(in_turn(change, OK), max_attempts=3)
    server.transport.send(Call("reserve_credits", arguments, "key-1"))
    bodies = [json.loads(r.partition(b"\r\n\r\n")[2]) for r in server.requests]
    assert [body["amount"] for body in bodies] == [5, 5]
