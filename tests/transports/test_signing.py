from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
import pprint
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import requests

from django_meterly import MeterlyClient
from django_meterly.errors import MeterlyNotSentError
from django_meterly.transports import Call, HttpTransport
from django_meterly.transports.signing import BearerSigner, HmacSigner, Secret
from tests.transports.server import BALANCE, KEY, RESERVE, answer

if TYPE_CHECKING:
    from requests import PreparedRequest


HMAC_KEY = "mk_hmac_k1_s3cr3t"
AUTHORIZATION = re.compile(
    r"METERLY-HMAC-SHA256 keyId=(\w+), timestamp=(\d+), signature=([0-9a-f]{64})"
)


def prepared(method: str, url: str, **options: Any) -> PreparedRequest:
    return requests.Request(method, url, **options).prepare()


def signature(secret: str, *lines: str) -> str:
    """What the wire contract says, and nothing of ours."""
    text = "\n".join(lines).encode()
    return hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()


def test_signature_of_the_contracts_vector(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1700000000.9)
    request = prepared(
        "POST",
        "https://ledger.test/v1/reservations",
        data=b'{"a":1}',
        headers={"Idempotency-Key": "reserve-1"},
    )

    signed = HmacSigner(HMAC_KEY)(request)

    expected = signature(
        "s3cr3t",
        "v1",
        "1700000000",
        "POST",
        "/v1/reservations",
        "ledger.test",
        "reserve-1",
        hashlib.sha256(b'{"a":1}').hexdigest(),
    )
    assert expected == (
        "e0b04ec61c5ffa1fdef07bf54be3164f8ddc9b8f9a699bba9c0c180e6098dd84"
    )
    assert signed.headers["Authorization"] == (
        f"METERLY-HMAC-SHA256 keyId=k1, timestamp=1700000000, signature={expected}"
    )


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (RESERVE, "key-1"),
        (BALANCE, ""),
        (Call("find_customer", {"externalId": "a b&c=d/é%2f~"}), ""),
        (Call("list_entries", {"customerId": "c1", "unit": "tokens"}), ""),
    ],
    ids=lambda value: getattr(value, "operation", value),
)
@pytest.mark.parametrize("prefix", ["", "/ledger", "/caf\u00e9/%7Ex%c3/../y"])
def test_signature_is_over_what_arrives(serve, call, key, prefix):
    server = serve(answer({}))
    with_prefix = HttpTransport(
        "mk_hmac_Key7_se_cr-et_", base_url=f"{server.url}{prefix}"
    )
    before = int(time.time())
    with_prefix.send(call)
    with_prefix.close()

    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    method, target, _ = first.split(" ")
    key_id, timestamp, signed = AUTHORIZATION.fullmatch(
        headers["Authorization"]
    ).groups()
    assert key_id == "Key7"
    assert before <= int(timestamp) <= time.time()
    assert headers["Host"] == f"127.0.0.1:{server.port}"
    assert headers.get("Idempotency-Key", "") == key
    assert signed == signature(
        "se_cr-et_",
        "v1",
        timestamp,
        method,
        target,
        headers["Host"],
        key,
        hashlib.sha256(body).hexdigest(),
    )
    assert b"se_cr-et" not in server.requests[0]


def test_signature_through_a_proxy_is_over_the_path_and_host_of_the_ledger(serve):
    proxy = serve(answer({}))
    transport = HttpTransport(
        HMAC_KEY,
        base_url="http://Ledger.invalid:80/x",
        allow_insecure_http=True,
        proxies={"http": proxy.url},
    )
    transport.send(BALANCE)
    transport.close()
    head = proxy.requests[0].decode()
    assert "\r\nHost: ledger.invalid\r\n" in head
    _, timestamp, signed = AUTHORIZATION.search(head).groups()
    assert signed == signature(
        "s3cr3t",
        "v1",
        timestamp,
        "GET",
        "/x/v1/customers/c1/balance",
        "ledger.invalid",
        "",
        hashlib.sha256(b"").hexdigest(),
    )


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://LEDGER.Test/", "ledger.test"),
        ("https://ledger.test:443/", "ledger.test"),
        ("http://ledger.test:80/", "ledger.test"),
        ("https://ledger.test:80/", "ledger.test:80"),
        ("http://ledger.test:8000/", "ledger.test:8000"),
        ("https://[::1]:443/", "[::1]"),
        ("https://[2001:DB8::1]:8443/", "[2001:db8::1]:8443"),
        ("https://b\u00fccher.test/", "xn--bcher-kva.test"),
    ],
)
def test_signed_host_is_the_host_header(url, host):
    assert HmacSigner(HMAC_KEY)(prepared("GET", url)).headers["Host"] == host


def test_every_part_of_a_request_is_signed(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1700000000)
    sign = HmacSigner(HMAC_KEY)
    url, key = "https://ledger.test/v1/x", {"Idempotency-Key": "k"}
    requests_ = [
        prepared("POST", url, data=b"{}", headers=key),
        prepared("PUT", url, data=b"{}", headers=key),
        prepared("POST", f"{url}y", data=b"{}", headers=key),
        prepared("POST", f"{url}?a=1", data=b"{}", headers=key),
        prepared("POST", "https://other.test/v1/x", data=b"{}", headers=key),
        prepared("POST", url, data=b"{} ", headers=key),
        prepared("POST", url, data=b"{}", headers={"Idempotency-Key": "K"}),
        prepared("POST", url, data=b"{}"),
    ]
    signed = {sign(request).headers["Authorization"] for request in requests_}
    monkeypatch.setattr(time, "time", lambda: 1700000001)
    signed.add(sign(requests_[0]).headers["Authorization"])
    signed.add(HmacSigner("mk_hmac_k1_t")(requests_[0]).headers["Authorization"])
    assert len(signed) == len(requests_) + 2


def test_text_body_is_signed_as_the_bytes_it_is_sent_as(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1700000000)
    sign = HmacSigner(HMAC_KEY)
    text, data = (
        prepared("POST", "https://x.test/", data=d) for d in ("é", b"\xc3\xa9")
    )
    assert sign(text).headers["Authorization"] == sign(data).headers["Authorization"]


def test_line_break_in_a_field_is_refused_before_signing():
    request = prepared("POST", "https://ledger.test/", data=b"{}")
    request.headers["Idempotency-Key"] = "a\nb"
    with pytest.raises(ValueError, match="line feed"):
        HmacSigner(HMAC_KEY)(request)
    assert "Authorization" not in request.headers


def test_call_with_a_line_break_in_its_key_is_not_sent(serve):
    server = serve(answer({}), key=HMAC_KEY)
    with pytest.raises(MeterlyNotSentError):
        server.transport.send(Call("reserve_credits", {}, "a\nb"))
    assert server.requests == []


@pytest.mark.parametrize(
    "key",
    ["mk_hmac_", "mk_hmac_k1", "mk_hmac_k1_", "mk_hmac__s3cr3t", "mk_hmac_k-1_s3cr3t"],
)
def test_malformed_hmac_key_is_refused_and_never_sent_as_a_bearer_token(key):
    with pytest.raises(ValueError, match="mk_hmac_<keyId>_<secret>") as caught:
        HttpTransport(key)
    assert "s3cr3t" not in str(caught.value)


# A signer of one's own


class Stamp:
    """Sends the key in a header of another name."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["X-Stamp"] = f"{self.api_key}/{len(request.body or b'')}"
        return request


@pytest.mark.parametrize("key", [KEY, HMAC_KEY])
def test_signer_of_ones_own_gets_the_key_and_the_final_request(serve, key):
    server = serve(answer({}))
    with MeterlyClient(key, base_url=server.url, signer=Stamp) as meterly:
        meterly.transport.send(RESERVE)
    head = server.requests[0].partition(b"\r\n\r\n")[0].decode()
    assert f"X-Stamp: {key}/30" in head
    assert "Authorization" not in head


def test_settings_name_the_signer(serve, settings):
    from django_meterly.conf import meterly_settings

    server = serve(answer({}))
    settings.METERLY = {
        "API_KEY": KEY,
        "BASE_URL": server.url,
        "SIGNER": f"{__name__}.Stamp",
    }
    transport = HttpTransport.from_settings(meterly_settings)
    transport.send(RESERVE)
    transport.close()
    assert b"X-Stamp" in server.requests[0]


# Secrets


@pytest.mark.parametrize("signer", [BearerSigner, HmacSigner])
def test_f46_signer_shows_and_gives_away_nothing(signer):
    sign = signer(HMAC_KEY)
    assert "s3cr3t" not in f"{sign!r} {sign} {pprint.pformat(sign)}"
    assert not hasattr(sign, "__dict__")
    for give_away in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            give_away(sign)


def test_f46_hmac_secret_is_not_kept():
    sign = HmacSigner(HMAC_KEY)
    for name in sign.__slots__:
        assert "s3cr3t" not in repr(getattr(sign, name))
        assert getattr(sign, name) != "s3cr3t"


@pytest.mark.parametrize("signer", [BearerSigner, HmacSigner])
def test_f46_signed_request_does_not_show_its_authorization(signer):
    request = signer(HMAC_KEY)(prepared("GET", "https://ledger.test/"))
    shown = f"{request.headers!r} {request.headers} {pprint.pformat(vars(request))}"
    assert "********" in shown
    assert "s3cr3t" not in shown
    assert request.headers["Authorization"][-20:] not in shown


def test_secret_is_the_string_but_for_its_repr():
    secret = Secret("s3cr3t")
    assert secret == "s3cr3t"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps({"API_KEY": secret})
    assert copy.deepcopy({"API_KEY": secret}) == {"API_KEY": "s3cr3t"}
    assert "s3cr3t" not in f"{secret!r} {[secret]} {pprint.pformat({'x': secret})}"
