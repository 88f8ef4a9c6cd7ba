"""What a whole client call over HTTP costs the caller's CPU.

Everybody talks to one stub server in another process, which answers at once; only
the client's own CPU time is counted.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import statistics
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BALANCE = {
    "customerId": "cus_1",
    "creditUnit": "credits",
    "balance": 100,
    "reserved": 1,
    "available": 99,
}
#: The answers, by what the path contains; all are about as long.
_ANSWERS: dict[bytes, dict[str, Any]] = {
    b"/meterly/": {
        "reservationId": "res_0123456789abcdef0123456789abcdef",
        "customerId": "cus_1",
        "unit": "credits",
        "amount": 1,
        "status": "reserved",
        "reference": "job",
        "expiresAt": "2030-01-01T00:00:00.000000Z",
        "balance": _BALANCE,
    },
    b"/cycles/": {
        "reservation_id": "res_0123456789abcdef0123456789abcdef",
        "decision": "ALLOW",
        "affected_scopes": ["tenant:acme"],
        "expires_at_ms": 1893456000000,
        "reserved": {"unit": "CREDITS", "amount": 1},
        "scope_path": "tenant:acme",
    },
    b"/v1/usage/reserve": {
        "allowed": True,
        "available": 99,
        "allow_overage": False,
        "rate_limits": [],
        "reservation_id": "0198c0de-0000-7000-8000-000000000000",
        "quantity": 1,
        "expires_at": "2030-01-01T00:00:00.000Z",
    },
    b"/v1/billing/meter_events": {
        "object": "billing.meter_event",
        "created": 1893456000,
        "event_name": "credits",
        "identifier": "0123456789abcdef0123456789abcdef",
        "livemode": False,
        "payload": {"stripe_customer_id": "cus_1", "value": "1"},
        "timestamp": 1893456000,
    },
}


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            if not (more := connection.recv(65536)):
                return
            data += more
        head, _, data = data.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        while len(data) < length:
            data += connection.recv(65536)
        data = data[length:]
        path = head.split(b" ", 2)[1]
        body = json.dumps(
            next((body for part, body in _ANSWERS.items() if part in path), {})
        ).encode()
        connection.sendall(
            b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n"
            b"X-Request-Id: req_1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )


@contextmanager
def _stub() -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_serve, args=(listener,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        process.terminate()
        process.join()
        listener.close()


def _meterly(url: str, api_key: str) -> Callable[[], Any]:
    from django_meterly.client import MeterlyClient

    client = MeterlyClient(api_key, base_url=f"{url}/meterly")
    return lambda: client.reserve_credits("cus_1", 1, reference="job")


def _session_post(url: str) -> Callable[[], Any]:
    import requests

    session = requests.Session()
    headers = {
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Authorization": f"Bearer {_BEARER}",
        "Content-Type": "application/json",
        "Idempotency-Key": "12345678-1234-1234-1234-123456789012",
        "User-Agent": "django-meterly/0.1.0",
        "X-Request-Id": "0123456789abcdef0123456789abcdef",
    }
    body = b'{"customerId":"cus_1","amount":1,"reference":"job"}'
    path = f"{url}/meterly/v1/reservations"
    return lambda: session.post(path, data=body, headers=headers)


def _httpx_post(url: str) -> Callable[[], Any]:
    import httpx

    client = httpx.Client()
    body = b'{"customerId":"cus_1","amount":1,"reference":"job"}'
    headers = {"Authorization": f"Bearer {_BEARER}", "Content-Type": "application/json"}
    path = f"{url}/meterly/v1/reservations"
    return lambda: client.post(path, content=body, headers=headers)


def _stripe(url: str) -> Callable[[], Any]:
    import stripe

    client = stripe.StripeClient(
        "sk_test_123",
        base_addresses={"api": url},
        http_client=stripe.RequestsClient(),
    )
    params: Any = {
        "event_name": "credits",
        "payload": {"stripe_customer_id": "cus_1", "value": "1"},
    }
    return lambda: client.v1.billing.meter_events.create(params)


def _meterbase(url: str) -> Callable[[], Any]:
    from meterbase import Meterbase

    client = Meterbase(api_key="mb_sk_test_123", base_url=url)
    return lambda: client.reserve(customer_id="acct_1", meter_id="credits", quantity=1)


def _runcycles(url: str) -> Callable[[], Any]:
    from runcycles import (
        Action,
        Amount,
        CyclesClient,
        CyclesConfig,
        ReservationCreateRequest,
        Subject,
        Unit,
    )

    client = CyclesClient(CyclesConfig(base_url=f"{url}/cycles", api_key="cyc_123"))
    number = iter(range(10**9))

    def run() -> Any:
        answer = client.create_reservation(
            ReservationCreateRequest(
                idempotency_key=f"job-{next(number)}",
                subject=Subject(tenant="acme"),
                action=Action(kind="job", name="render"),
                estimate=Amount(unit=Unit.CREDITS, amount=1),
                ttl_ms=30_000,
            )
        )
        if not answer.is_success:
            raise RuntimeError(f"runcycles: {answer}")
        return answer

    return run


_BEARER = "mk_test_0123456789abcdef0123456789abcdef"
_HMAC = "mk_hmac_k1_0123456789abcdef0123456789abcdef"

PLAIN = "requests.Session.post"
_CLIENTS: dict[str, Callable[[str], Callable[[], Any]]] = {
    PLAIN: _session_post,
    "django-meterly, bearer key": lambda url: _meterly(url, _BEARER),
    "django-meterly, HMAC key": lambda url: _meterly(url, _HMAC),
    "httpx.Client.post": _httpx_post,
    "stripe": _stripe,
    "meterbase": _meterbase,
    "runcycles": _runcycles,
}


def measure(rounds: int, calls: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return microseconds of CPU a call, by client and round; and who failed, why."""
    found: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    with _stub() as url:
        runs = {}
        for name, make in _CLIENTS.items():
            try:
                runs[name] = make(url)
                for _warm_up in range(50):
                    runs[name]()
            except Exception as exc:  # noqa: BLE001 (listed in the table)
                runs.pop(name, None)
                failed[name] = f"{type(exc).__name__}: {exc}".splitlines()[0]
        for number in range(rounds):
            # To and fro, so that nobody always comes after the same one.
            for name in list(runs)[:: -1 if number % 2 else 1]:
                run = runs[name]
                before = time.process_time()
                for _call in range(calls):
                    run()
                spent = time.process_time() - before
                found.setdefault(name, []).append(spent / calls * 1e6)
    return found, failed


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of the rounds' ratios to the plain post."""
    return {
        name: statistics.median(
            mine / plain for mine, plain in zip(values, found[PLAIN], strict=True)
        )
        for name, values in found.items()
    }
