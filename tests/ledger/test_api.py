from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import pytest
from django.core.cache import cache
from django.core.checks import run_checks
from django.db import InterfaceError, OperationalError, connection, transaction
from django.test import Client, override_settings
from django.urls import resolve, reverse

from django_meterly.db import from_now
from django_meterly.ledger import customers
from django_meterly.ledger.api import views
from django_meterly.ledger.api.throttling import KeyThrottle
from django_meterly.ledger.authentication import SCOPES, create_api_key
from django_meterly.ledger.models import ApiKey, Entry
from django_meterly.wire import ROUTES
from tests.ledger.test_signature import sign

if TYPE_CHECKING:
    from django_meterly.ledger.models import Workspace

pytestmark = pytest.mark.django_db


class Api:
    """A client of the ledger's API, with a key of one workspace."""

    def __init__(self, workspace: Workspace, *scopes: str) -> None:
        scopes = scopes or ("spend", "grant")
        self.row, self.key = create_api_key(workspace, "test", scopes=scopes)
        # What a test client hides by default, a server would do.
        self.client = Client(raise_request_exception=False, enforce_csrf_checks=True)

    def get(self, path: str, query: Any = None, **headers: str) -> Any:
        return self.client.get(f"/ledger{path}", query, headers=self.headers(headers))

    def post(self, path: str, body: Any, key: str | None = "key-1", **headers: str):
        if key is not None:
            headers["Idempotency-Key"] = key
        return self.client.post(
            f"/ledger{path}",
            body if isinstance(body, bytes) else json.dumps(body),
            content_type=headers.pop("content_type", "application/json"),
            headers=self.headers(headers),
        )

    def headers(self, more: dict[str, str]) -> dict[str, str]:
        given = {name.replace("_", "-"): value for name, value in more.items()}
        return {"Authorization": f"Bearer {self.key}", **given}


@pytest.fixture
def api(workspace) -> Api:
    return Api(workspace)


def is_error(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.content
    assert response["Content-Type"] == "application/json"
    body = response.json()
    assert set(body) == {"error", "requestId"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert body["requestId"] == response["X-Request-Id"]
    return body["error"]


def grant(**changes: Any) -> dict[str, Any]:
    return {
        "externalCustomerId": "user_9",
        "creditAmount": 50,
        "creditUnit": "tokens",
        "reference": "order-1",
        **changes,
    }


# Answers


def test_every_route_resolves_to_its_operation():
    for operation, (method, path) in ROUTES.items():
        match = resolve(f"/ledger{path.format(customerId='a-B_1', reservationId='r')}")
        assert match.func.view_initkwargs["operations"][method] == operation
    url = reverse("meterly_ledger:get_balance", kwargs={"customerId": "c1"})
    assert url == "/ledger/v1/customers/c1/balance"


def test_grant_is_201_with_the_contracts_body(api):
    response = api.post("/v1/grants", grant(description="Willkommen é"))
    assert response.status_code == 201
    body = response.json()
    assert set(body) == {"grant", "balance"}
    assert body["grant"]["description"] == "Willkommen é"
    assert body["balance"] == {
        "customerId": body["grant"]["customerId"],
        "creditUnit": "tokens",
        "balance": 50,
        "reserved": 0,
        "available": 50,
    }
    assert "Idempotency-Replayed" not in response


def test_replay_is_the_same_answer_and_says_so(api):
    first = api.post("/v1/grants", grant())
    second = api.post("/v1/grants", grant())
    assert (second.status_code, second.json()) == (201, first.json())
    assert second["Idempotency-Replayed"] == "true"
    assert Entry.objects.count() == 1


def test_reserve_commit_and_reads(api, customer):
    held = api.post(
        "/v1/reservations",
        {"customerId": customer, "amount": 30, "reference": "job", "ttlSeconds": 60},
    )
    assert (held.status_code, held.json()["status"]) == (201, "reserved")
    path = f"/v1/reservations/{held.json()['reservationId']}"
    done = api.post(f"{path}/commit", {"amount": 10}, "key-2")
    assert (done.status_code, done.json()["status"]) == (200, "committed")
    assert api.get(path).json()["status"] == "committed"
    balance = api.get(f"/v1/customers/{customer}/balance").json()
    assert (balance["balance"], balance["reserved"]) == (90, 0)
    entries = api.get(f"/v1/customers/{customer}/entries", {"unit": "credits"}).json()
    assert len(entries["entries"]) == 3
    found = api.get("/v1/customers", {"externalId": "user_1"}).json()["customers"]
    assert [item["customerId"] for item in found] == [customer]


def test_release_needs_no_body(api, customer):
    held = api.post(
        "/v1/reservations", {"customerId": customer, "amount": 1, "reference": "job"}
    ).json()
    path = f"/v1/reservations/{held['reservationId']}/release"
    released = api.client.generic(
        "POST",
        f"/ledger{path}",
        headers={"Authorization": f"Bearer {api.key}", "Idempotency-Key": "key-2"},
    )
    assert released.json()["status"] == "released"


def test_extend_answers_the_reservation_and_its_replay_says_so(api, customer):
    held = api.post(
        "/v1/reservations",
        {"customerId": customer, "amount": 30, "reference": "job", "ttlSeconds": 60},
    ).json()
    path = f"/v1/reservations/{held['reservationId']}/extend"
    extended = api.post(path, {"ttlSeconds": 600}, "key-2")
    assert extended.status_code == 200
    assert extended.json()["expiresAt"] > held["expiresAt"]
    assert {**extended.json(), "expiresAt": ""} == {**held, "expiresAt": ""}
    again = api.post(path, {"ttlSeconds": 600}, "key-2")
    assert (again.json(), again["Idempotency-Replayed"]) == (extended.json(), "true")
    is_error(api.post(path, {"ttlSeconds": 601}, "key-2"), 422, "idempotency_mismatch")
    error = is_error(api.post(path, {}, "key-3"), 400, "invalid_request")
    assert list(error["fields"]) == ["ttlSeconds"]


@pytest.mark.parametrize("given", ["a", "A-1_b.c", "x" * 64])
def test_sane_request_id_comes_back(api, given):
    assert api.get("/v1/customers", X_Request_Id=given)["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>", "é"])
def test_other_request_id_is_replaced(api, given):
    response = api.get("/v1/customers", {"externalId": "u"}, X_Request_Id=given)
    assert response.status_code == 200
    assert response["X-Request-Id"].startswith("req_")


# Refusals


def test_insufficient_credits_is_402_with_details(api, customer):
    error = is_error(
        api.post(
            f"/v1/customers/{customer}/credits/use", {"amount": 101, "reference": "r"}
        ),
        402,
        "insufficient_credits",
    )
    assert (error["required"], error["available"]) == (101, 100)
    assert (error["reserved"], error["unit"]) == (0, "credits")


def test_other_conditions_have_the_contracts_status_and_code(api, customer):
    api.post("/v1/grants", grant())
    mismatch = api.post("/v1/grants", grant(creditAmount=51))
    is_error(mismatch, 422, "idempotency_mismatch")
    conflict = api.post("/v1/grants", grant(creditAmount=51), "key-2")
    is_error(conflict, 409, "reference_conflict")
    missing = api.get("/v1/reservations/res_none")
    is_error(missing, 404, "not_found")


@pytest.mark.parametrize(
    "change",
    [
        {"creditAmount": 1.0},
        {"creditAmount": True},
        {"creditAmount": "5"},
        {"creditAmount": 0},
        {"creditAmount": 2**63},
        {"creditAmount": None},
        {"reference": "é"},
        {"reference": ["a"]},
        {"surprise": 1},
    ],
)
def test_wrong_field_is_400_and_named(api, change):
    error = is_error(api.post("/v1/grants", grant(**change)), 400, "invalid_request")
    assert list(error["fields"]) == list(change)
    assert Entry.objects.count() == 0


def test_path_parameter_in_the_body_is_an_unknown_field(api, customer):
    response = api.post(
        f"/v1/customers/{customer}/credits/add",
        {"customerId": customer, "amount": 1, "reference": "r"},
    )
    assert "customerId" in is_error(response, 400, "invalid_request")["fields"]


def test_query_field_that_comes_twice_is_400(api):
    response = api.get("/v1/customers?externalId=a&externalId=b")
    assert "externalId" in is_error(response, 400, "invalid_request")["fields"]


@pytest.mark.parametrize("key", [None, "", "a b", "é", "x" * 256])
def test_post_without_a_sane_idempotency_key_is_400(api, key):
    error = is_error(api.post("/v1/grants", grant(), key), 400, "invalid_request")
    assert list(error["fields"]) == ["Idempotency-Key"]


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'"text"',
        b"null",
        b'{"a": ',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"\xef\xbb\xbf{}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 60_000,
        b'{"a": "' + b"x" * 65536 + b'"}',
    ],
)
def test_body_that_is_not_one_strict_json_object_is_400(api, body):
    is_error(api.post("/v1/grants", body), 400, "invalid_request")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('"creditAmount": 50, "creditAmount": 51', "creditAmount"),
        ('"creditAmount": NaN', "creditAmount"),
        ('"creditAmount": -Infinity', "creditAmount"),
        ('"creditAmount": 5e1', "creditAmount"),
        ('"description": {"b": 1, "b": 2}', "b"),
        ('"description": NaN', "description"),
        ('"nothing": NaN', "nothing"),
        (r'"\ud800": 1, "\ud800": 2', "?"),
    ],
)
def test_what_json_readers_disagree_about_is_400_and_named(api, text, field):
    body = json.dumps(grant(creditAmount=1))
    if '"creditAmount"' in text:
        body = body.replace('"creditAmount": 1, ', "")
    response = api.post("/v1/grants", f"{body[:-1]}, {text}}}".encode())
    assert list(is_error(response, 400, "invalid_request")["fields"]) == [field]
    assert not Entry.objects.exists()


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense"]
)
def test_other_media_types_are_refused(api, content_type):
    response = api.post("/v1/grants", grant(), content_type=content_type)
    is_error(response, 415, "invalid_request")


def test_other_methods_are_refused(api):
    for method in ("put", "patch", "delete", "options", "head", "trace"):
        response = getattr(api.client, method)(
            "/ledger/v1/grants", headers=api.headers({})
        )
        assert response.status_code == 405, method
        assert response["Allow"] == "POST"
    is_error(api.get("/v1/grants"), 405, "invalid_request")


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/nothing", "/v1/customers/", "/v1/customers/a.b/balance"],
)
@pytest.mark.parametrize("method", ["get", "put"])
def test_unknown_path_is_a_json_404(api, path, method):
    response = getattr(api.client, method)(f"/ledger{path}")
    is_error(response, 404, "unknown_path")


# Who is let in


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer é",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer  {key}",
    ],
)
def test_without_a_valid_key_it_is_401(api, header):
    headers = (
        {} if header is None else {"Authorization": header.replace("{key}", api.key)}
    )
    response = api.client.get("/ledger/v1/customers", headers=headers)
    is_error(response, 401, "unauthenticated")
    assert response["WWW-Authenticate"] == "Bearer"


def test_revoked_key_is_401(api):
    ApiKey.objects.update(revoked_at="2026-01-01T00:00:00Z")
    is_error(api.get("/v1/customers"), 401, "unauthenticated")


#: The scope that each call of the contract needs: the contract, said twice.
NEEDED = {
    "spend": {
        "create_customer",
        "reserve_credits",
        "commit_reservation",
        "release_reservation",
        "extend_reservation",
        "use_credits",
    },
    "grant": {"grant_credits", "add_credits"},
    "read": {
        "find_customer",
        "get_balance",
        "get_balances",
        "get_reservation",
        "list_entries",
    },
}


def test_f56_every_call_of_the_contract_has_a_scope():
    assert set().union(*NEEDED.values()) == set(ROUTES) == set(SCOPES)


@pytest.mark.parametrize("scope", ["read", "spend", "grant"])
@pytest.mark.parametrize("kind", ["bearer", "hmac"])
def test_f56_a_key_does_what_its_scope_names_and_reads(
    workspace, api, customer, scope, kind
):
    key = create_api_key(workspace, "x", scopes=[scope], hmac=kind == "hmac")[1]
    held = api.post(
        "/v1/reservations", {"customerId": customer, "amount": 5, "reference": "job"}
    ).json()["reservationId"]
    ids = {"customerId": customer, "reservationId": held}
    for operation, (method, path) in ROUTES.items():
        path = f"/ledger{path.format_map(ids)}"
        if operation == "find_customer":
            path += "?externalId=x"
        body = b"{}" if method == "POST" else b""
        authorization = f"Bearer {key}"
        if kind == "hmac":
            authorization = sign(key, method, path, body=body, idempotency_key=path)
        headers = {"Authorization": authorization, "Idempotency-Key": path}
        response = api.client.generic(
            method, path, body, content_type="application/json", headers=headers
        )
        needed = next(name for name in NEEDED if operation in NEEDED[name])
        if needed in ("read", scope):
            # Let in: what is wrong is at most the body, or that it was done before.
            assert response.status_code in (200, 400, 409), operation
        else:
            error = is_error(response, 403, "forbidden")
            assert f'"{needed}"' in error["message"]
    # An empty commit takes all of it.
    expected = "committed" if scope == "spend" else "reserved"
    assert api.get(f"/v1/reservations/{held}").json()["status"] == expected


def test_f56_scopes_can_be_had_in_any_set(workspace):
    for scopes in ({"read"}, {"spend"}, {"grant"}, {"spend", "grant"}):
        row = create_api_key(workspace, "x", scopes=scopes)[0]
        assert set(row.scopes) == scopes | {"read"}
    for wrong in (["write"], [], [""]):
        with pytest.raises(ValueError, match=r"scope|Scope"):
            create_api_key(workspace, "x", scopes=wrong)


@pytest.mark.parametrize("kind", ["bearer", "hmac"])
def test_f56_a_key_ends_when_it_expires(workspace, kind):
    row, key = create_api_key(
        workspace, "x", expires_in=dt.timedelta(hours=1), hmac=kind == "hmac"
    )

    def status():
        path = "/ledger/v1/customers?externalId=a"
        authorization = sign(key, "GET", path) if row.key_id else f"Bearer {key}"
        return Client().get(path, headers={"Authorization": authorization}).status_code

    assert status() == 200
    ApiKey.objects.update(expires_at=from_now(2))
    assert status() == 200
    ApiKey.objects.update(expires_at=from_now(-0.001))
    assert status() == 401


@pytest.mark.parametrize("kind", ["bearer", "hmac"])
@pytest.mark.parametrize("is_test", [True, False])
def test_f56_a_key_works_in_a_workspace_of_its_own_kind_only(kind, is_test):
    workspace = customers.ensure_workspace("sandbox", is_test=is_test)
    row, key = create_api_key(workspace, "x", hmac=kind == "hmac")
    assert row.is_test is is_test
    if kind == "bearer":
        assert key.startswith("mk_test_" if is_test else "mk_live_")
    else:
        assert key.startswith("mk_hmac_test") is is_test

    def status():
        path = "/ledger/v1/customers?externalId=a"
        authorization = sign(key, "GET", path) if row.key_id else f"Bearer {key}"
        return Client().get(path, headers={"Authorization": authorization}).status_code

    assert status() == 200
    type(workspace).objects.update(is_test=not is_test)
    assert status() == 401


def test_the_use_of_a_key_is_noted_once_a_minute(
    api, customer, django_assert_num_queries
):
    def used_at():
        api.get(f"/v1/customers/{customer}/balance")
        api.row.refresh_from_db()
        return api.row.last_used_at

    first = used_at()
    assert abs(first - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    assert used_at() == first
    with django_assert_num_queries(3) as queries:
        api.get(f"/v1/customers/{customer}/balance")
    assert not any("UPDATE" in query["sql"] for query in queries.captured_queries)
    ApiKey.objects.update(last_used_at=from_now(-61))
    api.row.refresh_from_db()
    assert used_at() > api.row.created_at


@pytest.mark.django_db(transaction=True)
def test_a_use_that_cannot_be_noted_is_served(api, customer, caplog):
    def locked(execute, sql, params, many, context):
        if sql.startswith("UPDATE"):
            raise OperationalError("database is locked")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(locked):
        response = api.get(f"/v1/customers/{customer}/balance")
    assert response.status_code == 200
    assert "was not noted" in caplog.text


# Too many


@pytest.fixture
def rates(settings):
    settings.METERLY_LEDGER = {"THROTTLE_RATES": {"read": "3/min", "write": "1/h"}}
    cache.clear()
    yield
    cache.clear()


def test_a_key_above_its_rate_is_429_with_a_time_to_wait(rates, workspace, api):
    for number in range(3):
        found = api.get("/v1/customers", {"externalId": f"user_{number}"})
        assert found.status_code == 200
    refused = api.get("/v1/customers", {"externalId": "user_3"})
    is_error(refused, 429, "rate_limited")
    assert 1 <= int(refused["Retry-After"]) <= 60
    # Writes are counted apart, and so is every other key.
    assert api.post("/v1/grants", grant()).status_code == 201
    again = api.post("/v1/grants", grant())
    is_error(again, 429, "rate_limited")
    assert 60 < int(again["Retry-After"]) <= 3600
    assert Api(workspace).get("/v1/customers", {"externalId": "a"}).status_code == 200


def test_nothing_is_counted_by_default(api, monkeypatch):
    monkeypatch.setattr(KeyThrottle, "cache", None)
    for _ in range(30):
        assert api.get("/v1/customers", {"externalId": "a"}).status_code == 200


@pytest.mark.parametrize(
    "rates", ["5/s", {"reads": "5/s"}, {"read": "5"}, {"read": "0/s"}, {"write": 5}]
)
def test_rates_that_cannot_be_are_an_error_of_the_checks(settings, rates):
    settings.METERLY_LEDGER = {"THROTTLE_RATES": rates}
    (error,) = [e for e in run_checks() if e.id == "meterly_ledger.E001"]
    assert "THROTTLE_RATES" in error.msg


@pytest.fixture
def failed_rate(settings):
    settings.METERLY_LEDGER = {"THROTTLE_RATES": {"failed": "3/min"}}


def unknown(**extra: str) -> Any:
    headers = {"Authorization": "Bearer mk_live_unknown"}
    return Client().get("/ledger/v1/customers?externalId=a", headers=headers, **extra)


def test_f59_failures_above_the_rate_are_429_with_a_time_to_wait(failed_rate, api):
    for _ in range(3):
        is_error(unknown(), 401, "unauthenticated")
    refused = unknown()
    is_error(refused, 429, "rate_limited")
    assert 1 <= int(refused["Retry-After"]) <= 60
    # Another address is counted apart, whatever it says that it forwards.
    assert unknown(REMOTE_ADDR="192.0.2.7").status_code == 401
    assert unknown(HTTP_X_FORWARDED_FOR="192.0.2.8").status_code == 429


@pytest.mark.parametrize("kind", ["bearer", "hmac"])
def test_f59_nobody_else_is_locked_out(failed_rate, workspace, kind):
    row, key = create_api_key(workspace, "x", hmac=kind == "hmac")
    path = "/ledger/v1/customers?externalId=a"

    def use(key: str) -> int:
        authorization = sign(key, "GET", path) if row.key_id else f"Bearer {key}"
        return Client().get(path, headers={"Authorization": authorization}).status_code

    # From the same address, with the same key id: that of an HMAC key is no secret.
    wrong = f"{key[:-1]}{'a' if key[-1] != 'a' else 'b'}"
    assert [use(wrong) for _ in range(5)] == [401, 401, 401, 429, 429]
    assert [use(key) for _ in range(5)] == [200] * 5


def test_f59_failures_are_throttled_by_default(settings):
    assert [unknown().status_code for _ in range(62)] == [401] * 60 + [429] * 2
    settings.METERLY_LEDGER = {"THROTTLE_RATES": {"read": "5/s"}}
    assert unknown().status_code == 429


def test_f59_success_is_not_counted_as_a_failure(failed_rate, api):
    for _ in range(5):
        assert api.get("/v1/customers", {"externalId": "a"}).status_code == 200
    assert unknown().status_code == 401


# Caches


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("get", "/health", 200),
        ("get", "/openapi.json", 200),
        ("get", "/v1/customers?externalId=a", 200),
        ("get", "/v1/customers", 400),
        ("post", "/v1/grants", 415),
        ("get", "/v1/customers/nobody/balance", 404),
        ("get", "/v1/nothing", 404),
        ("put", "/v1/grants", 405),
        ("get", "/v1/grants", 405),
        ("post", "/health", 405),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["key", "no key"])
def test_f55_no_answer_is_stored(api, method, path, status, known):
    headers = api.headers({}) if known else {}
    response = getattr(api.client, method)(f"/ledger{path}", headers=headers)
    assert response.status_code in ({status} if known else {status, 401})
    assert response["Cache-Control"] == "no-store, private"


def test_f55_nor_is_a_failure(api, monkeypatch, settings):
    def fail(*args: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(views, "perform", fail)
    response = api.get("/v1/customers", {"externalId": "a"})
    assert (response.status_code, response["Cache-Control"]) == (
        500,
        "no-store, private",
    )


def test_f55_djangos_own_cache_stores_nothing(api, customer, settings):
    settings.MIDDLEWARE = [
        "django.middleware.cache.UpdateCacheMiddleware",
        *settings.MIDDLEWARE,
        "django.middleware.cache.FetchFromCacheMiddleware",
    ]
    path = f"/v1/customers/{customer}/balance"
    assert api.get(path).status_code == 200
    assert Client().get(f"/ledger{path}").status_code == 401


# Health


def test_health_needs_no_key_and_tells_nothing(client):
    response = client.get("/ledger/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert response["X-Request-Id"]


def test_health_is_503_when_the_database_does_not_answer(caplog):
    def fail(execute, sql, params, many, context):
        raise OperationalError("the host is db.internal")

    with connection.execute_wrapper(fail):
        response = Client().get("/ledger/health")
    is_error(response, 503, "unavailable")
    assert b"internal" not in response.content


def test_session_lets_nobody_in(api, admin_client):
    response = admin_client.get("/ledger/v1/customers", {"externalId": "a"})
    is_error(response, 401, "unauthenticated")


def test_f45_objects_of_another_workspace_are_404(api, customer):
    stranger = Api(customers.ensure_workspace("other"))
    held = api.post(
        "/v1/reservations", {"customerId": customer, "amount": 5, "reference": "job"}
    ).json()["reservationId"]
    for response in (
        stranger.get(f"/v1/customers/{customer}/balance"),
        stranger.get(f"/v1/customers/{customer}/balances"),
        stranger.get(f"/v1/customers/{customer}/entries"),
        stranger.get(f"/v1/reservations/{held}"),
        stranger.post(f"/v1/reservations/{held}/commit", {}, "s-1"),
        stranger.post(f"/v1/reservations/{held}/release", {}, "s-2"),
        stranger.post(
            "/v1/reservations",
            {"customerId": customer, "amount": 5, "reference": "job"},
            "s-3",
        ),
        stranger.post(
            f"/v1/customers/{customer}/credits/add", {"amount": 5, "reference": "r"}
        ),
    ):
        is_error(response, 404, "not_found")
    assert stranger.get("/v1/customers", {"externalId": "user_1"}).json() == {
        "customers": []
    }


# The project around it


@override_settings(
    REST_FRAMEWORK={
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAdminUser"],
        "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.AdminRenderer"],
        "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.FormParser"],
        "DEFAULT_VERSIONING_CLASS": "rest_framework.versioning.URLPathVersioning",
        "EXCEPTION_HANDLER": "no.such.handler",
        "URL_FORMAT_OVERRIDE": "unit",
        "UNICODE_JSON": False,
    }
)
def test_rest_framework_settings_of_the_project_do_not_matter(api, customer):
    response = api.get(
        f"/v1/customers/{customer}/entries", {"unit": "credits"}, Accept="text/html"
    )
    assert response.status_code == 200
    assert len(response.json()["entries"]) == 1
    is_error(api.get("/v1/reservations/none"), 404, "not_found")


@pytest.mark.django_db(transaction=True)
def test_views_are_not_atomic_under_atomic_requests(
    api, customer, atomic_requests, monkeypatch
):
    inside = []
    perform = views.perform

    def watched(*args: Any) -> Any:
        inside.append(transaction.get_connection().in_atomic_block)
        return perform(*args)

    monkeypatch.setattr(views, "perform", watched)
    assert api.get(f"/v1/customers/{customer}/balance").status_code == 200
    assert inside == [False]


@pytest.mark.parametrize(
    ("exception", "status", "code"),
    [
        (OperationalError("the host is db.internal"), 503, "unavailable"),
        (InterfaceError("connection already closed"), 503, "unavailable"),
        (RuntimeError("secret insides"), 500, "internal_error"),
    ],
)
def test_failure_inside_is_logged_and_not_shown(
    api, monkeypatch, caplog, exception, status, code
):
    def fail(*args: Any) -> None:
        raise exception

    monkeypatch.setattr(views, "perform", fail)
    response = api.post("/v1/grants", grant())
    is_error(response, status, code)
    assert str(exception) not in response.content.decode()
    assert str(exception) in caplog.text
    assert api.key not in caplog.text
