from __future__ import annotations

import copy
import gzip
import multiprocessing
import pickle
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.utils.functional import SimpleLazyObject
from django.utils.translation import gettext_lazy

from django_meterly import MeterlyClient, __version__
from django_meterly.errors import (
    MeterlyApiError,
    MeterlyError,
    MeterlyInsufficientCreditsError,
    MeterlyNotFoundError,
    MeterlyNotSentError,
    MeterlyRateLimitedError,
    MeterlyServerError,
    MeterlyUnknownOutcomeError,
)
from django_meterly.transports import Call, HttpTransport
from django_meterly.wire import ROUTES
from tests.transports.server import (
    BALANCE,
    KEY,
    RESERVE,
    answer,
    close,
    drip,
    hang,
    reset,
    say,
    within,
)

SETTINGS = {
    "API_KEY": KEY,
    "BASE_URL": "http://ledger.test/x",
    "CONNECT_TIMEOUT": 1,
    "READ_TIMEOUT": 2,
    "DEADLINE": 3,
    "MAX_ATTEMPTS": 4,
    "SIGNER": None,
    "ALLOW_INSECURE_HTTP": True,
}


# What goes out


def test_post_carries_key_identity_and_compact_json(serve):
    server = serve(answer({"ok": True}))

    assert server.transport.send(RESERVE) == {"ok": True}

    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert lines[0] == "POST /v1/reservations HTTP/1.1"
    assert body == b'{"customerId":"c1","amount":5}'
    assert headers["authorization"] == f"bearer {KEY}"
    assert headers["idempotency-key"] == "key-1"
    assert headers["user-agent"] == f"django-meterly/{__version__}"
    assert headers["accept"] == headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert len(headers["x-request-id"]) == 32
    assert "cookie" not in headers


def test_get_puts_arguments_in_the_query_and_has_no_idempotency_key(serve):
    server = serve(answer({}))

    server.transport.send(Call("find_customer", {"externalId": "a b&c=d/é"}))

    head = server.requests[0]
    assert head.startswith(b"GET /v1/customers?externalId=a+b%26c%3Dd%2F%C3%A9 HTTP")
    assert b"idempotency-key" not in head.lower()


def test_path_prefix_of_the_base_url_is_kept(serve):
    server = serve(answer({}))
    transport = HttpTransport(KEY, base_url=f"{server.url}/ledger/")
    transport.send(BALANCE)
    transport.close()
    assert server.requests[0].startswith(b"GET /ledger/v1/customers/c1/balance HTTP")


def test_base_url_goes_over_the_wire_in_ascii_and_quoted(serve):
    server = serve(answer({}))
    prefix = f"{server.url}/caf\u00e9 x"
    transport = HttpTransport(KEY, base_url=prefix)
    transport.send(BALANCE)
    transport.close()
    head = b"GET /caf%C3%A9%20x/v1/customers/c1/balance HTTP"
    assert server.requests[0].startswith(head)
    assert (
        HttpTransport(KEY, base_url="https://b\u00fccher.test")._prepared_url
        == "https://xn--bcher-kva.test"
    )


def test_base_url_that_no_host_can_have_is_refused():
    with pytest.raises(ValueError, match="label"):
        HttpTransport(KEY, base_url=f"https://b\u00fc{'c' * 99}.test")


def test_closed_transport_opens_again(serve):
    server = serve(answer({}))
    server.transport.send(RESERVE)
    server.transport.close()
    server.transport.send(RESERVE)
    assert server.connections == 2


def test_connection_is_reused(serve):
    server = serve(answer({}))
    for _ in range(5):
        server.transport.send(RESERVE)
    assert (len(server.requests), server.connections) == (5, 1)


# What provably never arrived


def test_f02_refused_connection_is_not_sent(free_port):
    transport = HttpTransport(KEY, base_url=f"http://127.0.0.1:{free_port}")
    with pytest.raises(MeterlyNotSentError, match="ConnectionRefusedError"):
        transport.send(RESERVE)


def test_f02_unknown_host_is_not_sent():
    transport = HttpTransport(
        KEY, base_url="http://no-such-host.invalid", allow_insecure_http=True
    )
    with pytest.raises(MeterlyNotSentError, match="gaierror"):
        transport.send(RESERVE)


def test_f02_connect_timeout_is_not_sent():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        # Nobody accepts: a full backlog leaves the next connection hanging.
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        transport = HttpTransport(
            KEY, base_url=f"http://127.0.0.1:{address[1]}", connect_timeout=0.3
        )
        with within(2), pytest.raises(MeterlyNotSentError, match="TimeoutError"):
            transport.send(RESERVE)
        for client in waiting:
            client.close()


def test_f02_untrusted_certificate_is_not_sent(serve, certificate):
    server = serve(answer({}), context=certificate.context)
    with pytest.raises(MeterlyNotSentError, match="CERTIFICATE_VERIFY_FAILED"):
        server.transport.send(RESERVE)
    assert server.requests == []


def test_f02_tls_that_hangs_in_the_handshake_is_not_sent(serve):
    server = serve(hang)
    transport = HttpTransport(
        KEY, base_url=server.url.replace("http", "https"), connect_timeout=0.3
    )
    with within(2), pytest.raises(MeterlyNotSentError):
        transport.send(RESERVE)


def test_call_without_time_left_is_not_sent(serve):
    server = serve(answer({}))
    late = Call("reserve_credits", RESERVE.arguments, "key-1", timeout=0)
    with pytest.raises(MeterlyNotSentError, match="deadline"):
        server.transport.send(late)
    assert server.connections == 0


# What may have arrived


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNUSABLE = {
    "silence": hang,
    "reset": reset,
    "closed without a byte": close,
    "truncated status line": say(b"HTTP/1.1 20"),
    "truncated headers": say(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "not HTTP": say(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "truncated body": say(answer(b'{"a": 1}', length=100)),
    "truncated error": say(answer(b'{"a": 1}', "402 Payment Required", length=100)),
    "silence in the body": lambda c: c.sendall(answer(b"{", length=2)) or hang(c),
    "truncated chunks": say(CHUNKED + b'8\r\n{"a": 1}\r\n'),
    "garbled chunks": say(CHUNKED + b'zz\r\n{"a": 1}\r\n'),
    "broken JSON": say(answer(b'{"a": ')),
    "deep JSON": say(answer(b"[" * 100_000)),
    "not UTF-8": say(answer(b'{"a": "\xff"}')),
    "JSON, but no object": say(answer([1])),
    "empty body": say(answer(b"")),
    "no content": say(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "HTML": say(answer(b"<h1>Welcome to nginx!</h1>")),
    "gzip": say(answer(gzip.compress(b"{}"), headers="Content-Encoding: gzip\r\n")),
    "two lengths": say(answer(b"{}", headers="Content-Length: 7\r\n")),
    "strange status": say(answer({}, "600 What")),
    "endless header": say(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_f01_unusable_answer_is_unknown(serve, name):
    server = serve(UNUSABLE[name], read_timeout=0.3)
    with within(2), pytest.raises(MeterlyUnknownOutcomeError) as caught:
        server.transport.send(RESERVE)
    assert not isinstance(caught.value, MeterlyApiError)
    assert len(server.requests) == 1


def test_f01_connection_that_dies_in_the_pool_under_a_request_is_unknown(serve):
    server = serve(answer({}))
    server.transport.send(RESERVE)
    server.behave = reset
    with pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)


def test_unusable_answer_does_not_spoil_the_next_call(serve):
    server = serve(say(answer(b'{"a": 1}', length=100)))
    with pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)
    server.behave = lambda connection: connection.sendall(answer({"ok": 1}))
    assert server.transport.send(RESERVE) == {"ok": 1}


@pytest.mark.parametrize(
    "behave",
    [
        drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 5),
        drip(
            b'{"a": "' + b"x" * 100, b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n"
        ),
        drip(b"1\r\n \r\n" * 20, CHUNKED),
    ],
    ids=["headers", "100 Continue", "body", "chunks"],
)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.sample(3)
def test_f06_drip_feeding_server_cannot_hold_a_call_past_its_deadline(
    serve, certificate, behave, tls
):
    server = serve(
        behave,
        deadline=0.6,
        read_timeout=0.5,
        **({"context": certificate.context, "verify": certificate.file} if tls else {}),
    )
    with within(3), pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)


def test_f06_timeout_of_the_call_shortens_the_deadline(serve):
    server = serve(hang)
    call = Call("reserve_credits", RESERVE.arguments, "key-1", timeout=0.2)
    with within(2), pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(call)


def test_slow_server_within_the_deadline_is_waited_for(serve):
    server = serve(drip(answer({"a": 1})[-12:], answer({"a": 1})[:-12]))
    assert server.transport.send(RESERVE) == {"a": 1}


def test_f08_compressed_answer_is_never_unpacked(serve):
    bomb = gzip.compress(b'{"a": "' + b"x" * 2**26 + b'"}')
    server = serve(answer(bomb, headers="Content-Encoding: gzip\r\n"))
    with within(1), pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        CHUNKED + b"FFFFFFF\r\n",
        CHUNKED + b"1;",
    ],
    ids=["body", "chunk", "chunk extension"],
)
def test_f08_endless_answer_is_cut_off(serve, head):
    sent = []

    def pour(connection: socket.socket) -> object:
        connection.sendall(head)
        for _ in range(64):
            sent.append(connection.send(b"x" * 2**20))
        return "close"

    server = serve(pour)
    with pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)
    server.stop()
    server.stop = lambda: None
    assert sum(sent) < 32 * 2**20


# What the ledger says


def test_success_is_the_json_object(serve):
    body = {"reservationId": "r1", "reference": "é"}
    server = serve(answer(body, "201 Created"))
    assert server.transport.send(RESERVE) == body


def test_error_carries_status_code_details_and_call(serve):
    body = {
        "error": {
            "code": "insufficient_credits",
            "message": "Too few.",
            "required": 5,
            "available": 2,
            "reserved": 1,
            "unit": "tokens",
        },
        "requestId": "req-1",
    }
    server = serve(
        answer(body, "402 Payment Required", headers="X-Request-Id: req-1\r\n")
    )
    with pytest.raises(MeterlyInsufficientCreditsError) as caught:
        server.transport.send(RESERVE)
    error = caught.value
    assert (error.required, error.available, error.reserved) == (5, 2, 1)
    assert error.unit == "tokens"
    assert (error.status, error.message) == (402, "Too few.")
    assert (error.request_id, error.method) == ("req-1", "POST")
    assert error.path == "/v1/reservations"
    assert set(error.details) == {"required", "available", "reserved", "unit"}


NO_LEDGERS = [
    b"<h1>No</h1>",
    b"",
    b'"x"',
    b"[]",
    b'{"message": "no route"}',
    b'{"error": 1}',
    b'{"error": {"code": 5, "message": "no"}}',
]


@pytest.mark.parametrize("body", NO_LEDGERS)
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("429 Too Many Requests", MeterlyRateLimitedError),
        ("503 Service Unavailable", MeterlyServerError),
    ],
)
def test_f08_error_without_json_is_classed_by_its_status(serve, status, expected, body):
    server = serve(answer(body, status, headers="Content-Type: text/html\r\n"))
    with pytest.raises(MeterlyApiError) as caught:
        server.transport.send(RESERVE)
    assert type(caught.value) is expected
    assert caught.value.status == int(status[:3])


@pytest.mark.parametrize("body", NO_LEDGERS)
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 407, 409, 410, 418, 422])
def test_f67_error_that_is_no_ledgers_is_an_outage_and_names_url_and_setting(
    serve, status, body
):
    server = serve(answer(body, f"{status} No"))
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        server.transport.send(RESERVE)
    assert type(caught.value) is MeterlyUnknownOutcomeError
    assert f"{server.url}/v1/reservations" in str(caught.value)
    assert str(status) in str(caught.value)
    assert 'METERLY["BASE_URL"]' in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": "resource_missing", "message": "no such route"}},
        {"error": {"code": "NOT_FOUND", "message": "no"}},
        {"error": {"code": "route_not_found"}},
        {"error": {"code": 404, "status": "NOT_FOUND"}},
        {"error": "not_found"},
        {"code": "not_found", "message": "no"},
        {"detail": "Not found."},
    ],
)
@pytest.mark.parametrize("status", [401, 403, 404])
def test_f67_code_of_another_api_is_an_outage(serve, body, status):
    server = serve(answer(body, f"{status} No"))
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        server.transport.send(RESERVE)
    assert type(caught.value) is MeterlyUnknownOutcomeError
    assert f"{server.url}/v1/reservations" in str(caught.value)
    assert 'METERLY["BASE_URL"]' in str(caught.value)


@pytest.mark.parametrize("operation", list(ROUTES))
def test_f67_404_of_a_call_that_names_nothing_is_an_outage(serve, operation):
    body = {"error": {"code": "not_found", "message": "no"}, "requestId": "r1"}
    server = serve(answer(body, "404 Not Found"))
    ids = {"customerId": "c1", "reservationId": "r1"}
    with pytest.raises(MeterlyError) as caught:
        server.transport.send(Call(operation, ids, "key-1"))
    names_nothing = ("create_customer", "find_customer", "grant_credits")
    if operation in names_nothing:
        assert type(caught.value) is MeterlyUnknownOutcomeError
        assert 'METERLY["BASE_URL"]' in str(caught.value)
    else:
        assert type(caught.value) is MeterlyNotFoundError


@pytest.mark.parametrize("path", ["", "/v1", "/v1/", "/wrong"])
@pytest.mark.parametrize(
    "said",
    [
        answer(b"<html>Log in</html>", headers="Content-Type: text/html\r\n"),
        answer({"status": "ok"}),
        answer({"customers": "all"}),
        answer([]),
        answer(b"", "204 No Content"),
        answer(b"", "301 Moved", "Location: /login\r\n"),
        answer(b"", "302 Found", "Location: https://login.test/\r\n"),
        answer(b"", "307 Temporary", "Location: /login\r\n"),
        answer(b"", "401 No", 'WWW-Authenticate: Basic realm="x"\r\n'),
        answer(b"<html>Forbidden</html>", "403 Forbidden"),
        answer(b"<html>Not Found</html>", "404 Not Found"),
    ],
)
def test_f67_wrong_base_url_is_an_outage_that_names_it(serve, path, said):
    server = serve(said)
    url = f"{server.url}{path}"
    with (
        MeterlyClient(KEY, base_url=url, max_attempts=1) as meterly,
        pytest.raises(MeterlyUnknownOutcomeError) as caught,
    ):
        meterly.create_customer("user_1", "image_credits")
    assert type(caught.value) is MeterlyUnknownOutcomeError
    assert f"POST {url.rstrip('/')}/v1/customers" in str(caught.value)
    assert 'METERLY["BASE_URL"]' in str(caught.value)
    assert len(server.requests) == 1


INTERIM = [
    "100 Continue\r\n",
    "102 Processing\r\n",
    "103 Early Hints\r\nLink: </a.css>\r\n",
]


@pytest.mark.parametrize("interim", INTERIM, ids=lambda text: text[:3])
@pytest.mark.parametrize("times", [1, 3])
def test_f67_interim_answers_are_skipped(serve, interim, times):
    server = serve(f"HTTP/1.1 {interim}\r\n".encode() * times + answer({"ok": 1}))
    for _ in range(2):
        assert server.transport.send(RESERVE) == {"ok": 1}
    assert server.connections == 1


@pytest.mark.parametrize("interim", INTERIM[1:], ids=lambda text: text[:3])
def test_f67_interim_answers_without_an_end_are_cut_off(serve, interim):
    server = serve(say(f"HTTP/1.1 {interim}\r\n".encode() * 100_000))
    with within(3), pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)


@pytest.mark.parametrize("body", [*NO_LEDGERS[:4], b'{"amount": NaN}', b"-Infinity"])
def test_f67_success_that_is_no_ledgers_names_url_and_setting(serve, body):
    server = serve(answer(body))
    with pytest.raises(MeterlyUnknownOutcomeError) as caught:
        server.transport.send(RESERVE)
    assert f"{server.url}/v1/reservations" in str(caught.value)
    assert 'METERLY["BASE_URL"]' in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": [{"b": NaN}]}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        '{"a": 1}'.encode("utf-16"),
        b'{"a": 1} {}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_f57_json_that_is_not_json_is_unknown(serve, body):
    server = serve(answer(body))
    with pytest.raises(MeterlyUnknownOutcomeError):
        server.transport.send(RESERVE)


def test_f07_sane_retry_after_is_a_detail(serve):
    server = serve(answer({}, "429 Too Many Requests", headers="Retry-After: 7\r\n"))
    with pytest.raises(MeterlyRateLimitedError) as caught:
        server.transport.send(RESERVE)
    assert caught.value.details == {"retryAfter": 7}


@pytest.mark.parametrize("value", ["-5", "1.5", "abc", "1e9", "9" * 5000, ""])
def test_f07_other_retry_after_is_ignored(serve, value):
    server = serve(
        answer({}, "429 Too Many Requests", headers=f"Retry-After: {value}\r\n")
    )
    with pytest.raises(MeterlyRateLimitedError) as caught:
        server.transport.send(RESERVE)
    assert caught.value.details == {}


# Redirects, cookies, environment, processes, threads


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 T", "308 P"])
def test_f09_redirect_is_not_followed(serve, status):
    second = serve(answer({}))
    first = serve(answer({}, status, headers=f"Location: {second.url}/v1\r\n"))
    for call in (RESERVE, BALANCE):
        with pytest.raises(MeterlyUnknownOutcomeError, match=status[:3]):
            first.transport.send(call)
    assert second.connections == 0


def test_f09_environment_changes_nothing(serve, monkeypatch, tmp_path):
    other = serve(answer({}))
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login thief password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing"))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path / "missing"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, other.url)
    server = serve(answer({"ok": 1}))

    assert server.transport.send(RESERVE) == {"ok": 1}

    assert f"Authorization: Bearer {KEY}".encode() in server.requests[0]
    assert other.connections == 0


def test_f09_ca_bundle_in_the_environment_is_not_trusted(
    serve, certificate, monkeypatch
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificate.file)
    monkeypatch.setenv("SSL_CERT_FILE", certificate.file)
    server = serve(answer({}), context=certificate.context)
    with pytest.raises(MeterlyNotSentError, match="CERTIFICATE_VERIFY_FAILED"):
        server.transport.send(RESERVE)


def test_explicit_ca_bundle_is_trusted(serve, certificate):
    server = serve(
        answer({"ok": 1}), context=certificate.context, verify=certificate.file
    )
    assert server.transport.send(RESERVE) == {"ok": 1}


@pytest.mark.parametrize("kind", [str, Path])
def test_ca_bundle_may_be_any_path(certificate, kind):
    transport = HttpTransport(KEY, verify=kind(certificate.file))
    transport.close()


@pytest.mark.parametrize(
    "verify",
    [
        None,
        False,
        0,
        0.0,
        1,
        "",
        " ",
        (),
        [],
        {},
        b"",
        b"/etc",
        "/no/such",
        Path("/no/such"),
    ],
    ids=repr,
)
def test_tls_that_is_not_verified_is_refused(verify):
    with pytest.raises(ValueError, match=r"always verified.*ledger-ca\.pem"):
        HttpTransport(KEY, verify=verify)


def test_explicit_proxy_is_used(serve):
    proxy = serve(answer({"ok": 1}))
    transport = HttpTransport(
        KEY,
        base_url="http://ledger.invalid",
        allow_insecure_http=True,
        proxies={"http": proxy.url},
    )
    assert transport.send(RESERVE) == {"ok": 1}
    transport.close()
    assert proxy.requests[0].startswith(b"POST http://ledger.invalid/v1/reservations")


def test_socks_proxy_is_refused():
    with pytest.raises(ValueError, match="SOCKS"):
        HttpTransport(KEY, proxies={"https": "socks5://127.0.0.1:1"})


def test_f10_cookies_are_ignored(serve):
    server = serve(answer({}, headers="Set-Cookie: session=1; Path=/\r\n"))
    for _ in range(2):
        server.transport.send(RESERVE)
    assert b"cookie" not in b"".join(server.requests).lower()


def test_f10_threads_share_one_transport(serve):
    def behave(connection: socket.socket) -> None:
        time.sleep(0.02)
        connection.sendall(answer({"port": connection.getpeername()[1]}))

    server = serve(behave)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: server.transport.send(RESERVE), range(256)))
    assert len(answers) == len(server.requests) == 256
    assert server.connections <= 64


def test_f10_threads_share_one_client(serve):
    together = threading.Barrier(64, timeout=60)

    def behave(connection: socket.socket) -> None:
        # Nobody is answered until all 64 have asked.
        together.wait()
        balance = {"creditUnit": "x", "balance": connection.getpeername()[1]}
        connection.sendall(answer({**balance, "reserved": 0, "available": 0}))

    server = serve(behave, read_timeout=60, deadline=60)
    meterly = MeterlyClient(transport=server.transport)
    with ThreadPoolExecutor(64) as pool:
        balances = list(pool.map(lambda _: meterly.get_balance("c1"), range(128)))
    assert len({balance.balance for balance in balances}) == 64
    assert server.connections == 64


def _send_in_child(transport: HttpTransport, results: Any) -> None:
    results.put(transport.send(RESERVE)["port"])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_f10_forked_process_does_not_use_its_parents_sockets(serve):
    def behave(connection: socket.socket) -> None:
        connection.sendall(answer({"port": connection.getpeername()[1]}))

    server = serve(behave)
    own = server.transport.send(RESERVE)["port"]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_send_in_child, args=(server.transport, results))
    child.start()
    assert results.get(timeout=60) != own
    child.join()
    assert server.transport.send(RESERVE)["port"] == own


# Secrets and configuration


def test_f46_key_is_in_no_repr_and_no_pickle():
    transport = HttpTransport(KEY)
    shown = [repr(transport), str(transport), repr(vars(transport))]
    assert KEY not in "".join(shown)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(transport)
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.deepcopy(transport)


@pytest.mark.parametrize(
    "behave",
    [hang, reset, close, say(answer({}, "401 No")), say(answer({}, "302 Found"))],
    ids=["silence", "reset", "closed", "401", "302"],
)
def test_f46_key_is_not_in_an_exception_or_its_traceback(serve, caplog, behave):
    caplog.set_level("DEBUG")
    server = serve(behave, read_timeout=0.3)
    with pytest.raises(MeterlyError) as caught:
        server.transport.send(RESERVE)
    error: BaseException | None = caught.value
    rendered = traceback.TracebackException.from_exception(
        caught.value, capture_locals=True
    )
    assert KEY not in "".join(rendered.format())
    assert KEY not in caplog.text
    while error is not None:
        assert KEY not in repr(vars(error))
        assert not hasattr(error, "request")
        error = error.__cause__ or error.__context__


def test_f46_key_is_not_in_the_traceback_of_a_refused_connection(free_port):
    transport = HttpTransport(KEY, base_url=f"http://127.0.0.1:{free_port}")
    with pytest.raises(MeterlyNotSentError) as caught:
        transport.send(RESERVE)
    assert caught.value.__context__ is None
    rendered = traceback.TracebackException.from_exception(
        caught.value, capture_locals=True
    )
    assert KEY not in "".join(rendered.format())


@pytest.mark.parametrize("key", [None, ""])
def test_missing_key_names_the_setting(key):
    with pytest.raises(ValueError, match=r'METERLY\["API_KEY"\]'):
        HttpTransport(key)


@pytest.mark.parametrize("key", [b"mk_test_x", 5, ["mk_test_x"], {"mk_test_x"}])
def test_key_of_another_type_is_refused_without_being_shown(key):
    with pytest.raises(ValueError, match="api_key must be a str, not ") as caught:
        HttpTransport(key)
    assert "mk_test_x" not in str(caught.value)


@pytest.mark.parametrize("before", ["", " ", "\n", "\t"])
@pytest.mark.parametrize("after", ["", " ", "\n", "\r\n", "\n\n"])
def test_white_space_around_key_and_url_is_dropped(serve, before, after):
    server = serve(answer({}), key=f"{before}{KEY}{after}")
    server.transport.send(BALANCE)
    url = f"{before}{server.url}/x/{after}"
    transport = HttpTransport(KEY, base_url=url)
    transport.send(BALANCE)
    transport.close()
    assert transport.base_url == f"{server.url}/x"
    first, second = server.requests
    assert f"\r\nauthorization: bearer {KEY}\r\n".lower().encode() in first.lower()
    assert second.startswith(b"GET /x/v1/customers/c1/balance HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "key",
    ["mk_live_a b", "mk_live_ä", "a\x00", "a\nX-Evil: 1", "a\r\n\r\nb", "\x1fa\x7f"],
)
def test_malformed_key_is_refused_without_being_shown(key):
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        HttpTransport(key)
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"API_KEY": f"{KEY}\nX: 1"},
        {"API_KEY": f"mk_hmac_k1-{KEY}"},
        {"BASE_URL": "ftp://x"},
    ],
)
def test_f46_key_is_not_in_the_traceback_of_wrong_settings(wrong):
    with pytest.raises(ValueError, match=r"key|base_url") as caught:
        HttpTransport.from_settings(SimpleNamespace(**{**SETTINGS, **wrong}))
    frame = caught.value.__traceback__
    while frame := frame.tb_next:
        shown = {**frame.tb_frame.f_locals, "settings": None}
        assert KEY not in repr(shown)


@pytest.mark.parametrize(
    "url",
    [
        "http://api.getmeterly.dev",
        "http://10.0.0.5:8000",
        "http://localhost.evil.test",
        "http://127.0.0.1.evil.test",
        "HTTP://example.test",
    ],
)
def test_plain_http_beyond_loopback_is_refused_unless_allowed(url):
    with pytest.raises(ValueError, match="in the clear"):
        HttpTransport(KEY, base_url=url)
    HttpTransport(KEY, base_url=url, allow_insecure_http=True)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost", "https://x.test/a"],
)
def test_loopback_and_https_are_accepted(url):
    HttpTransport(KEY, base_url=url)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x.test",
        "x.test",
        "https://",
        "https://u:p4ss@x.test",
        "https://u@x.test",
        "u:p4ss@x.test",
        "u:p4ss@x.test:99999",
        "https://u:p4ss@x.test:99999",
        "https://x.test?a=1",
        "https://x.test/?",
        "https://x.test#a",
        "https://x.test/#",
        "",
        " ",
        "localhost:8000",
        "127.0.0.1:8000",
        "//x.test",
        "https:x.test",
        "https:/x.test",
        "https:\\\\x.test",
        "https://x.test\\evil.test",
        "https://x.te\nst",
        "https://x.test/a\r\nX-Evil: 1",
        "https://x.te st",
        "https://x.test/\x00",
        "https://x.test:port",
        "https://x.test:0",
        "https://x.test:65536",
        "https://x.test:-1",
        "https://[::1",
        "unix:///run/ledger.sock",
        b"https://x.test",
        Path("https://x.test"),
        gettext_lazy("https://x.test"),
        None,
        5,
        ["https://x.test"],
    ],
    ids=repr,
)
def test_other_base_urls_are_refused(url):
    with pytest.raises(ValueError, match=r"^base_url ") as caught:
        HttpTransport(KEY, base_url=url)
    assert "p4ss" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "prepared"),
    [
        ("HTTPS://X.test", "https://x.test"),
        ("https://x.test///", "https://x.test"),
        ("https://x.test:443/v1", "https://x.test:443/v1"),
        ("https://b\u00fccher.test", "https://xn--bcher-kva.test"),
        (SimpleLazyObject(lambda: "https://x.test"), "https://x.test"),
    ],
)
def test_base_urls_are_read_as_they_are_meant(url, prepared):
    assert HttpTransport(KEY, base_url=url)._prepared_url == prepared


def test_from_settings_reads_what_concerns_it():
    transport = HttpTransport.from_settings(SimpleNamespace(**SETTINGS))
    assert transport.base_url == "http://ledger.test/x"
    assert transport.connect_timeout == 1
    assert transport.read_timeout == 2
    assert transport.deadline == 3
    assert transport.max_attempts == 4
