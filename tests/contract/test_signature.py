"""Signed requests on a real socket, byte for byte."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.ledger.test_signature import sign


def status(base_url: str, request: bytes) -> int:
    address = urlsplit(base_url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as sock:
        sock.sendall(request)
        return int(sock.recv(4096).split()[1])


@pytest.fixture
def get(live_ledger, hmac_key):
    host = urlsplit(live_ledger).netloc

    def get(target, *, signed=None, change=None):
        header = sign(hmac_key, "GET", signed or target, host=host)
        return status(
            live_ledger,
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Authorization: {change(header) if change else header}\r\n\r\n".encode(
                "latin-1"
            ),
        )

    return get


@pytest.mark.parametrize(
    "target",
    [
        "/ledger/v1/customers?externalId=user_1",
        "/ledger/v1/customers?externalId=us%65r+1%7e",
        "/ledger/v1/c%75stomers?externalId=a&&",
    ],
)
def test_the_path_is_signed_as_it_is_sent(get, target):
    assert get(target) == 200


def test_f45_the_same_path_written_otherwise_is_another(get):
    plain = "/ledger/v1/customers?externalId=a"
    assert get(plain.replace("externalId=a", "externalId=%61"), signed=plain) == 401
    assert get(plain.replace("/v1", "/%761"), signed=plain) == 401
    assert get(plain, signed=plain.removeprefix("/ledger")) == 401


def test_f45_non_ascii_on_the_wire_is_401(get):
    target = "/ledger/v1/customers?externalId=a"
    for change in (
        lambda header: header[:-64] + "\u00e9" * 64,
        lambda header: header.replace("keyId=", "keyId=\u00ff"),
        lambda header: "METERLY-HMAC-SHA256 \u00b2",
        lambda header: "Bearer \u00e9",
    ):
        assert get(target, change=change) == 401
