"""Requests that no client of ours would send, byte by byte, to real servers."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest

from django_meterly.ledger import customers, grants, spending
from django_meterly.ledger.authentication import create_api_key
from tests.ledger.test_signature import sign
from tests.servers.serving import Site, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(3)]

#: One worker each: the first slow connection could be one too many. httptools cuts
#: the host off an absolute target, and tells nobody.
SERVERS = {
    "sync": ["--workers=1"],
    "gthread": ["--workers=1"],
    "uvicorn": ["--http=h11"],
}
CHUNKED = "Transfer-Encoding: chunked"
MADE_UP = {
    "bearer": "Bearer mk_live_" + "x" * 43,
    "hmac": "METERLY-HMAC-SHA256 keyId=nobody, timestamp={now}, signature=" + "0" * 64,
    "nothing": "",
}


@pytest.fixture(scope="module")
def servers(django_db_setup: None, tmp_path_factory: Any) -> Iterator[Any]:
    sites: dict[str, Site] = {}
    with ExitStack() as stack:

        def find(kind: str) -> Site:
            if kind not in sites:
                folder = tmp_path_factory.mktemp(kind) / "site"
                served = serving(kind, folder, *SERVERS[kind])
                sites[kind] = stack.enter_context(served)
            return sites[kind]

        yield find


@pytest.fixture(params=SERVERS)
def site(request: Any, servers: Callable[[str], Site]) -> Site:
    return servers(request.param)


@pytest.fixture
def key(transactional_db: None) -> str:
    workspace = customers.ensure_workspace("default")
    return create_api_key(workspace, "x", scopes=["spend", "grant"])[1]


@pytest.fixture
def hold(key: str) -> str:
    """The id of a reservation of 10 credits."""
    workspace = customers.ensure_workspace("default")
    customer = grants.grant(
        workspace.pk,
        external_id="user_1",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening",
    ).account.customer_id
    return spending.reserve(
        workspace.pk, customer, amount=10, reference="job", idempotency_key="job"
    ).reservation_id


def connect(site: Site, request: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", site.port), timeout=30)
    connection.sendall(request.replace("\n", "\r\n").encode() + b"\r\n" + body)
    return connection


def answer(connection: socket.socket) -> bytes:
    """Return all that comes, or what came before the server reset the connection."""
    received = b""
    with connection:
        try:
            while data := connection.recv(65536):
                received += data
                head, _, body = received.partition(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2]
                if length and len(body) >= int(length.split(b"\r\n")[0]):
                    break
        except ConnectionResetError:
            pass
    return received


def status(connection: socket.socket) -> int:
    received = answer(connection)
    return int(received.split(b" ", 2)[1]) if received else 0


def post(path: str, authorization: str, *headers: str) -> str:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: ledger.test",
        f"Authorization: {authorization}",
        "Content-Type: application/json",
        "Idempotency-Key: k-1",
        *headers,
    ]
    return "".join(f"{line}\n" for line in lines)


def chunked(*chunks: bytes) -> bytes:
    framed = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
    return b"".join([*framed, b"0\r\n\r\n"])


@pytest.mark.parametrize(
    ("kind", "path", "code"),
    [
        *[(kind, "/ledger/v1/grants", 401) for kind in MADE_UP],
        ("bearer", "/ledger/v1/nothing", 404),
        ("bearer", "/ledger/health", 405),
        ("bearer", "http://x/ledger/v1/grants", 400),
    ],
)
@pytest.mark.parametrize("length", ["Content-Length: 60000", CHUNKED])
def test_f55_slow_bodies_with_made_up_keys_silence_nobody(
    site: Site, transactional_db: None, kind: str, path: str, code: int, length: str
) -> None:
    authorization = MADE_UP[kind].format(now=int(time.time()))
    request = post(path, authorization, length)
    first = b"1\r\n{" if length == CHUNKED else b"{"
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(site, request, first)) for _ in range(4)]
        begun = time.monotonic()
        assert status(connect(site, "GET /ledger/health HTTP/1.1\nHost: x\n")) == 200
        if "gunicorn" in site.process.args:
            # Refused already, though 59,999 bytes are still to come.
            assert [status(connection) for connection in slow] == [code] * 4
        assert time.monotonic() - begun < 4


@pytest.mark.parametrize("kind", ["sync", "gthread"])
@pytest.mark.parametrize("code", [401, 404, 405])
def test_f55_a_body_that_comes_late_is_no_request(
    servers: Any, transactional_db: None, kind: str, code: int
) -> None:
    path = {401: "/v1/grants", 404: "/v1/nothing", 405: "/health"}[code]
    late = b"GET /ledger/health HTTP/1.1\r\nHost: ledger.test\r\n\r\n"
    request = post(f"/ledger{path}", MADE_UP["bearer"], f"Content-Length: {len(late)}")
    site = servers(kind)
    for delay in [0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032] * 4:
        received = b""
        with connect(site, request) as connection, suppress(OSError):
            time.sleep(delay)
            connection.sendall(late)
            while data := connection.recv(65536):
                received += data
        # One answer, or none where the reset was faster.
        assert received.count(b"HTTP/1.1 ") <= 1, received


@pytest.mark.parametrize("chunk", [b'{"amount": 4}', b""], ids=["some", "all"])
def test_f55_a_chunked_body_is_read(
    site: Site, key: str, hold: str, chunk: bytes
) -> None:
    # Django takes it for empty under WSGI: an empty commit would charge all of it.
    path = f"/ledger/v1/reservations/{hold}/commit"
    request = post(path, f"Bearer {key}", CHUNKED)
    body = chunked(chunk[:5], chunk[5:]) if chunk else chunked()
    received = answer(connect(site, request, body))
    assert received.split(b" ", 2)[1] == b"200", received
    balance = json.loads(received.partition(b"\r\n\r\n")[2])["balance"]
    assert balance["balance"] == (96 if chunk else 90)


def signature_of(path: str, body: bytes) -> str:
    """Sign a POST to *path* with a new HMAC key that may grant."""
    workspace = customers.ensure_workspace("default")
    hmac_key = create_api_key(workspace, "x", hmac=True, scopes=["grant"])[1]
    return sign(
        hmac_key, "POST", path, host="ledger.test", idempotency_key="k-1", body=body
    )


@pytest.mark.parametrize("kind", ["bearer", "hmac"])
def test_f55_a_chunked_body_is_counted(site: Site, key: str, kind: str) -> None:
    body = b'{"a": "' + b"x" * 65536 + b'"}'
    path, authorization = "/ledger/v1/grants", f"Bearer {key}"
    if kind == "hmac":
        authorization = signature_of(path, body)
    request = post(path, authorization, CHUNKED)
    received = answer(connect(site, request, chunked(*[body[:30000], body[30000:]])))
    assert received.split(b" ", 2)[1] == b"400", received
    assert b"longer than 65536 bytes" in received
    assert b"cache-control: no-store" in received.lower()


@pytest.mark.parametrize(
    ("path", "length", "expected", "says"),
    [
        ("/ledger/v1/grants", 65536, b"400", b"externalCustomerId"),
        ("/ledger/v1/grants", 65537, b"400", b"longer than 65536 bytes"),
        # Not the ledger's: whoever has this path may take large files.
        ("/nothing/", 200_000, b"404", b""),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_f55_the_limit_is_exact_and_the_ledgers_own(
    site: Site,
    key: str,
    path: str,
    length: int,
    expected: bytes,
    says: bytes,
    framing: str,
) -> None:
    body = b'{"a": "' + b"x" * (length - 9) + b'"}'
    assert len(body) == length
    header = f"Content-Length: {length}" if framing == "length" else CHUNKED
    sent = body if framing == "length" else chunked(body[:30000], body[30000:])
    received = answer(connect(site, post(path, f"Bearer {key}", header), sent))
    assert received.split(b" ", 2)[1] == expected, received
    assert says in received


@pytest.mark.parametrize("sent", [b"", b'{"amount": 4'])
def test_f55_a_body_that_is_cut_off_does_nothing(
    site: Site, key: str, hold: str, sent: bytes
) -> None:
    path = f"/ledger/v1/reservations/{hold}/commit"
    request = post(path, f"Bearer {key}", "Content-Length: 13")
    connection = connect(site, request, sent)
    connection.shutdown(socket.SHUT_WR)
    assert status(connection) in (0, 400)
    workspace = customers.ensure_workspace("default")
    assert spending.get_reservation(workspace.pk, hold).status == "reserved"


@pytest.mark.parametrize("body", [b"zz\r\n{}\r\n0\r\n\r\n", b"5\r\n{}\r\n0\r\n\r\n"])
def test_f55_malformed_chunks_do_nothing(
    site: Site, key: str, hold: str, body: bytes
) -> None:
    path = f"/ledger/v1/reservations/{hold}/commit"
    connection = connect(site, post(path, f"Bearer {key}", CHUNKED), body)
    connection.shutdown(socket.SHUT_WR)
    assert status(connection) in (0, 400)
    workspace = customers.ensure_workspace("default")
    assert spending.get_reservation(workspace.pk, hold).status == "reserved"


@pytest.mark.parametrize("kind", ["bearer", "hmac"])
@pytest.mark.parametrize(
    "form", ["http://other.test{path}", "http://ledger.test{path}"]
)
def test_an_absolute_target_is_refused_before_the_signature(
    site: Site, key: str, kind: str, form: str
) -> None:
    path = "/ledger/v1/grants"
    target = form.format(path=path)
    body = json.dumps(
        {
            "externalCustomerId": "user_9",
            "creditAmount": 50,
            "creditUnit": "tokens",
            "reference": "order-1",
        }
    ).encode()
    authorization = f"Bearer {key}"
    if kind == "hmac":
        authorization = signature_of(path, body)
    length = f"Content-Length: {len(body)}"
    assert status(connect(site, post(target, authorization, length), body)) in (
        400,
        404,
    )
    # The same request with its path alone is let in.
    assert status(connect(site, post(path, authorization, length), body)) == 201
