"""HMAC keys, against a signer of its own made of hmac and hashlib alone."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

import pytest
from django.test import Client

from django_meterly.ledger.authentication import create_api_key
from django_meterly.ledger.models import ApiKey
from django_meterly.wire import string_to_sign

pytestmark = pytest.mark.django_db

PATH = "/ledger/v1/grants"
BODY = json.dumps(
    {
        "externalCustomerId": "user_9",
        "creditAmount": 50,
        "creditUnit": "tokens",
        "reference": "order-1",
    }
).encode()


def sign(
    key: str,
    method: str,
    target: str,
    *,
    host: str = "testserver",
    idempotency_key: str = "",
    body: bytes = b"",
    timestamp: Any = None,
) -> str:
    """Return the Authorization header, as WIRE's "HMAC keys" describes it."""
    key_id, secret = key.removeprefix("mk_hmac_").split("_", 1)
    timestamp = str(int(time.time()) if timestamp is None else timestamp)
    text = "\n".join(
        [
            "v1",
            timestamp,
            method,
            target,
            host,
            idempotency_key,
            hashlib.sha256(body).hexdigest(),
        ]
    )
    signature = hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()
    return (
        f"METERLY-HMAC-SHA256 keyId={key_id}, timestamp={timestamp}, "
        f"signature={signature}"
    )


@pytest.fixture
def key(workspace) -> str:
    return create_api_key(workspace, "signer", scopes=["grant"], hmac=True)[1]


def post(authorization: str, *, path=PATH, body=BODY, key="k-1", **extra: Any) -> Any:
    client = Client(raise_request_exception=False)
    return client.generic(
        "POST",
        path,
        body,
        content_type="application/json",
        headers={"Authorization": authorization, "Idempotency-Key": key},
        **extra,
    )


def signed(key: str, **changes: Any) -> str:
    values = {"idempotency_key": "k-1", "body": BODY, **changes}
    return sign(key, "POST", values.pop("target", PATH), **values)


def is_refused(response: Any) -> None:
    assert response.status_code == 401, response.content
    error = response.json()["error"]
    # All alike: nothing is learnt from a refusal.
    assert error == {
        "code": "unauthenticated",
        "message": "A valid API key is required.",
    }


def test_the_pinned_vector():
    body = b'{"a":1}'
    text = string_to_sign(
        "1700000000", "POST", "/v1/reservations", "ledger.test", "reserve-1", body
    )
    assert text == (
        b"v1\n1700000000\nPOST\n/v1/reservations\nledger.test\nreserve-1\n"
        + hashlib.sha256(body).hexdigest().encode()
    )
    signature = hmac.new(b"s3cr3t", text, hashlib.sha256).hexdigest()
    assert (
        signature == "e0b04ec61c5ffa1fdef07bf54be3164f8ddc9b8f9a699bba9c0c180e6098dd84"
    )
    assert sign(
        "mk_hmac_k1_s3cr3t",
        "POST",
        "/v1/reservations",
        host="ledger.test",
        idempotency_key="reserve-1",
        body=body,
        timestamp=1700000000,
    ).endswith(f"keyId=k1, timestamp=1700000000, signature={signature}")


@pytest.mark.parametrize("place", range(5))
def test_a_line_feed_in_a_field_is_refused(place):
    fields = ["1700000000", "POST", "/v1", "host", "key"]
    fields[place] += "\nx"
    with pytest.raises(ValueError, match="line feed"):
        string_to_sign(*fields, b"")


def test_a_signed_request_is_let_in(key):
    assert post(signed(key)).status_code == 201
    query = "/ledger/v1/customers?externalId=user_9"
    response = Client().get(query, headers={"Authorization": sign(key, "GET", query)})
    assert len(response.json()["customers"]) == 1


@pytest.mark.parametrize("secret", ["_under_scored_", "a-b"])
def test_the_secret_may_hold_an_underscore(secret):
    assert sign(f"mk_hmac_k1_{secret}", "GET", "/") != sign("mk_hmac_k1_x", "GET", "/")


@pytest.mark.parametrize("skew", [-295, 295])
def test_a_clock_300_seconds_off_is_borne(key, skew):
    stamp = int(time.time()) + skew
    assert post(signed(key, timestamp=stamp)).status_code == 201


@pytest.mark.parametrize("skew", [-305, 305, 10**11])
def test_f45_a_stale_or_future_signature_is_401(key, skew):
    is_refused(post(signed(key, timestamp=int(time.time()) + skew)))


@pytest.mark.parametrize(
    "changes",
    [
        {"body": BODY + b" "},
        {"host": "elsewhere"},
        {"host": "testserver:8000"},
        {"target": "/v1/grants"},
        {"target": f"{PATH}?"},
        {"target": f"{PATH}?a=b"},
        {"idempotency_key": "k-2"},
        {"idempotency_key": ""},
    ],
    ids=str,
)
def test_f45_what_was_signed_otherwise_is_401(key, changes):
    is_refused(post(signed(key, **changes)))


def test_f45_a_tampered_body_host_path_key_or_time_is_401(key):
    good = signed(key)
    stamp = good.split("timestamp=")[1].split(",")[0]
    is_refused(post(good, body=BODY.replace(b"50", b"51")))
    is_refused(post(good, HTTP_HOST="evil.test"))
    is_refused(post(good, path="/ledger/v1/reservations"))
    is_refused(post(good, path=f"{PATH}?x=1"))
    is_refused(post(good, key="k-2"))
    is_refused(post(good.replace(stamp, str(int(stamp) - 1))))
    # The method: signed for a POST, sent as a GET.
    refused = Client().get(
        PATH, headers={"Authorization": good, "Idempotency-Key": "k-1"}
    )
    is_refused(refused)
    assert post(good).status_code == 201


@pytest.mark.parametrize(
    "change",
    [
        lambda good: good[:-1],
        lambda good: good + "0",
        lambda good: good[:-64] + good[-64:].upper(),
        lambda good: good[:-64] + "0" * 64,
        lambda good: good[:-64] + "é" * 64,
        lambda good: good[:-64] + "\u0661" * 64,
        lambda good: good[:-1] + "ÿ",
        lambda good: good.replace("keyId=", "keyId=é"),
        lambda good: good.replace("timestamp=", "timestamp=-"),
        lambda good: good.replace("timestamp=", "timestamp=" + "9" * 5000),
        lambda good: good.replace(", ", ","),
        lambda good: good.replace("METERLY-HMAC-SHA256", "Bearer"),
        lambda good: "METERLY-HMAC-SHA256",
        lambda good: "METERLY-HMAC-SHA256 ",
    ],
)
def test_f45_a_malformed_or_non_ascii_signature_is_401(key, change):
    good = signed(key)
    assert change(good) != good
    is_refused(post(change(good)))


def test_f45_an_unknown_key_is_refused_like_a_bad_signature(key):
    key_id = key.removeprefix("mk_hmac_").partition("_")[0]
    unknown = post(signed(key.replace(key_id, "nobody")))
    bad = post(signed(key[:-1] + ("A" if key[-1] != "A" else "B")))
    is_refused(unknown)
    is_refused(bad)


def test_the_secret_is_no_bearer_token(key):
    is_refused(post(f"Bearer {key}"))
    is_refused(post(f"Bearer {key.removeprefix('mk_hmac_').partition('_')[2]}"))


def test_a_revoked_key_is_401(key):
    ApiKey.objects.update(revoked_at="2026-01-01T00:00:00Z")
    is_refused(post(signed(key)))


def test_a_body_over_the_limit_is_400_before_it_is_hashed(key):
    body = b'{"a": "' + b"x" * 2**16 + b'"}'
    assert post(signed(key, body=body), body=body).status_code == 400


def test_a_body_over_the_projects_own_limit_is_400(key, settings):
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 10
    assert post(signed(key)).status_code == 400


# Which path and host


def test_the_target_is_the_one_that_was_sent(key):
    # Unquoted and quoted again, this one would come out shorter.
    sent = "/ledger/v1/gr%61nts"
    response = post(signed(key, target=sent), path=PATH, RAW_URI=sent)
    assert response.status_code == 201
    is_refused(post(signed(key, target=PATH), path=PATH, RAW_URI=sent))
    response = post(
        signed(key, target=sent, idempotency_key="k-2"),
        path=PATH,
        key="k-2",
        REQUEST_URI=sent,
    )
    assert response.status_code == 201


def test_the_mount_prefix_of_the_server_is_part_of_the_path(key):
    # A server that tells no raw target.
    response = post(signed(key, target=f"/credits{PATH}"), SCRIPT_NAME="/credits")
    assert response.status_code == 201
    is_refused(post(signed(key, target=PATH), SCRIPT_NAME="/credits"))


@pytest.mark.parametrize(
    ("sent", "secure", "host"),
    [
        ("Ledger.TEST", False, "ledger.test"),
        ("ledger.test:80", False, "ledger.test"),
        ("ledger.test:443", True, "ledger.test"),
        ("ledger.test:443", False, "ledger.test:443"),
        ("ledger.test:8000", False, "ledger.test:8000"),
    ],
)
def test_the_host_is_in_lower_case_without_a_default_port(key, sent, secure, host):
    extra = {"wsgi.url_scheme": "https"} if secure else {}
    response = post(signed(key, host=host), HTTP_HOST=sent, **extra)
    assert response.status_code == 201


# SECRET_KEY


def test_a_rotated_secret_key_keeps_hmac_keys_as_a_fallback_only(key, settings):
    former = settings.SECRET_KEY
    settings.SECRET_KEY = "another one"
    is_refused(post(signed(key)))
    settings.SECRET_KEY_FALLBACKS = ["an even older one", former]
    assert post(signed(key)).status_code == 201


def test_f46_the_secret_is_not_in_the_database(key):
    row = ApiKey.objects.values().get()
    secret = key.removeprefix("mk_hmac_").partition("_")[2]
    assert len(secret) == 43
    assert secret not in repr(row)
    assert secret[-4:] not in repr(row)
    assert (row["key_hash"], row["last4"]) == (None, "")
