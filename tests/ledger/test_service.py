from __future__ import annotations

import datetime as dt
import re
from types import MappingProxyType

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, OperationalError, connection, transaction

from django_meterly import errors
from django_meterly.client import MeterlyClient
from django_meterly.ledger import customers, service
from django_meterly.ledger.checks import check_settings
from django_meterly.ledger.conf import ledger_settings
from django_meterly.ledger.models import Entry, Workspace
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.transports.base import Call
from django_meterly.wire import ROUTES, shown

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("any_path")]

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")

VALID = {
    "create_customer": {"customerExternalId": "user_1", "creditUnit": "credits"},
    "find_customer": {"externalId": "user_1"},
    "grant_credits": {
        "externalCustomerId": "user_1",
        "creditAmount": 10,
        "creditUnit": "credits",
        "reference": "invoice-1",
    },
    "get_balance": {"customerId": "cus_1"},
    "get_balances": {"customerId": "cus_1"},
    "add_credits": {"customerId": "cus_1", "amount": 10, "reference": "invoice-2"},
    "use_credits": {"customerId": "cus_1", "amount": 10, "reference": "page"},
    "reserve_credits": {"customerId": "cus_1", "amount": 10, "reference": "job"},
    "get_reservation": {"reservationId": "res_1"},
    "commit_reservation": {"reservationId": "res_1"},
    "release_reservation": {"reservationId": "res_1"},
    "extend_reservation": {"reservationId": "res_1", "ttlSeconds": 60},
    "list_entries": {"customerId": "cus_1"},
}


def perform(workspace, operation, key=None, **arguments):
    if key is None and ROUTES[operation][0] == "POST":
        key = operation
    return service.perform(workspace, operation, arguments, key)


def test_every_route_has_an_operation():
    assert set(VALID) == set(ROUTES)


# The shapes of the wire contract


def test_create_customer_answers_201_once_and_for_ever(workspace):
    first = perform(workspace, "create_customer", **VALID["create_customer"])
    again = perform(workspace, "create_customer", **VALID["create_customer"])

    assert (first.status, first.replayed) == (201, False)
    assert (again.status, again.replayed) == (201, True)
    assert again.body == first.body
    assert first.body.keys() == {
        "customerId",
        "customerExternalId",
        "creditUnit",
        "createdAt",
    }
    assert re.fullmatch(r"cus_[0-9a-f]{32}", first.body["customerId"])
    assert TIME.fullmatch(first.body["createdAt"])


def test_find_customer_answers_a_list(workspace, customer):
    (found,) = perform(workspace, "find_customer", externalId="user_1").body[
        "customers"
    ]
    assert found["customerId"] == customer
    assert perform(workspace, "find_customer", externalId="nobody").body == {
        "customers": []
    }


def test_grant_answers_the_grant_and_the_balance(workspace):
    arguments = {**VALID["grant_credits"], "description": "For Zoë ☃"}
    answer = perform(workspace, "grant_credits", **arguments)
    again = perform(workspace, "grant_credits", **arguments)

    grant, balance = answer.body["grant"], answer.body["balance"]
    assert answer.status == 201
    assert TIME.fullmatch(grant.pop("createdAt"))
    assert grant.pop("grantId") == Entry.objects.get().public_id
    assert grant == {
        "customerId": balance["customerId"],
        "creditAmount": 10,
        "creditUnit": "credits",
        "reference": "invoice-1",
        "description": "For Zoë ☃",
    }
    assert balance == {
        "customerId": balance["customerId"],
        "creditUnit": "credits",
        "balance": 10,
        "reserved": 0,
        "available": 10,
    }
    assert (again.status, again.replayed) == (201, True)


@pytest.mark.parametrize(
    ("operation", "kind", "delta"),
    [("add_credits", "credits_added", 10), ("use_credits", "credits_used", -10)],
)
def test_add_and_use_answer_the_entry_and_the_balance(
    workspace, customer, operation, kind, delta
):
    arguments = {**VALID[operation], "customerId": customer}
    answer = perform(workspace, operation, **arguments)
    again = perform(workspace, operation, **arguments)

    entry = dict(answer.body["entry"])
    assert TIME.fullmatch(entry.pop("createdAt"))
    assert re.fullmatch(r"ent_[0-9a-f]{32}", entry.pop("entryId"))
    assert entry == {
        "kind": kind,
        "amount": 10,
        "balanceDelta": delta,
        "reservedDelta": 0,
        "balanceAfter": 100 + delta,
        "reservedAfter": 0,
        "unit": "credits",
        "reference": arguments["reference"],
    }
    assert answer.body["balance"]["available"] == 100 + delta
    assert (answer.status, answer.replayed) == (201, False)
    assert again == service.Answer(answer.body, 201, replayed=True)


def test_a_reservation_has_one_shape_through_its_life(workspace, customer):
    arguments = {**VALID["reserve_credits"], "customerId": customer}
    reserved = perform(workspace, "reserve_credits", ttlSeconds=60, **arguments)
    reservation = reserved.body["reservationId"]
    read = perform(workspace, "get_reservation", reservationId=reservation)
    committed = perform(
        workspace, "commit_reservation", reservationId=reservation, amount=4
    )

    assert (reserved.status, read.status, committed.status) == (201, 200, 200)
    assert read.body == reserved.body
    assert TIME.fullmatch(reserved.body["expiresAt"])
    expected = {
        **reserved.body,
        "status": "committed",
        "balance": {
            "customerId": customer,
            "creditUnit": "credits",
            "balance": 96,
            "reserved": 0,
            "available": 96,
        },
    }
    assert committed.body == expected
    assert reserved.body == {
        "reservationId": reservation,
        "customerId": customer,
        "unit": "credits",
        "amount": 10,
        "status": "reserved",
        "reference": "job",
        "expiresAt": reserved.body["expiresAt"],
        "balance": {
            "customerId": customer,
            "creditUnit": "credits",
            "balance": 100,
            "reserved": 10,
            "available": 90,
        },
    }
    expires_at = dt.datetime.fromisoformat(reserved.body["expiresAt"])
    left = expires_at - dt.datetime.now(dt.UTC)
    assert dt.timedelta(seconds=50) < left <= dt.timedelta(seconds=60)


def test_entries_come_newest_first_in_pages(workspace, customer, monkeypatch):
    monkeypatch.setattr(customers, "PAGE_SIZE", 2)
    for number in range(4):
        perform(
            workspace,
            "use_credits",
            key=f"use-{number}",
            customerId=customer,
            amount=1,
            reference=f"page-{number}",
        )
    perform(
        workspace,
        "add_credits",
        customerId=customer,
        amount=1,
        unit="pages",
        reference="pages",
    )

    seen, cursor = [], {}
    while True:
        body = perform(
            workspace, "list_entries", customerId=customer, unit="credits", **cursor
        ).body
        seen += [entry["reference"] for entry in body["entries"]]
        if body["nextCursor"] is None:
            break
        cursor = {"cursor": body["nextCursor"]}
    assert seen == ["page-3", "page-2", "page-1", "page-0", "opening"]

    everything = perform(workspace, "list_entries", customerId=customer).body
    assert everything["entries"][0]["unit"] == "pages"


def test_the_cursor_of_another_customer_is_refused(workspace, customer):
    perform(
        workspace,
        "grant_credits",
        **{**VALID["grant_credits"]} | {"externalCustomerId": "user_2"},
    )
    foreign = Entry.objects.latest("pk").public_id
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        perform(workspace, "list_entries", customerId=customer, cursor=foreign)
    assert caught.value.fields.keys() == {"cursor"}


def test_a_balance_without_an_account_is_zero(workspace, customer):
    # As a crash between the two rows of a new customer would leave it.
    from django_meterly.ledger.models import Account, LedgerCustomer

    bare = LedgerCustomer.objects.create(
        workspace=workspace, external_id="user_2", credit_unit="credits"
    )
    assert not Account.objects.filter(customer=bare).exists()
    body = perform(workspace, "get_balance", customerId=bare.public_id).body
    assert (body["balance"], body["available"]) == (0, 0)


# What is refused


@pytest.mark.parametrize("operation", ROUTES)
def test_every_missing_field_is_named(workspace, operation):
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        perform(workspace, operation)
    assert caught.value.fields == {
        name: ["This field is required."] for name in VALID[operation]
    }


@pytest.mark.parametrize("operation", ROUTES)
def test_an_unknown_field_is_named(workspace, operation):
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        perform(workspace, operation, **VALID[operation], extra=1)
    assert caught.value.fields == {"extra": ["There is no such field."]}


@pytest.mark.parametrize(
    "operation", [name for name, (method, _) in ROUTES.items() if method == "POST"]
)
@pytest.mark.parametrize("key", [None, "", "with space", "kéy", "x" * 256])
def test_a_post_without_a_good_key_names_the_header(workspace, operation, key):
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        service.perform(workspace, operation, VALID[operation], key)
    assert caught.value.fields.keys() == {"Idempotency-Key"}


@pytest.mark.parametrize(
    ("operation", "name", "value"),
    [
        *(
            ("reserve_credits", "amount", value)
            for value in (True, 1.5, "10", None, 0, -1, 2**63)
        ),
        *(("reserve_credits", "ttlSeconds", value) for value in (0, 86401, "60", None)),
        ("reserve_credits", "unit", None),
        ("reserve_credits", "reference", " job"),
        ("reserve_credits", "reference", "jöb"),
        ("reserve_credits", "customerId", "../x"),
        ("commit_reservation", "amount", -1),
        ("add_credits", "description", "NUL \x00"),
        ("add_credits", "description", "half a pair \ud800"),
        ("add_credits", "description", "x" * 1001),
        ("grant_credits", "creditAmount", 1.0),
        ("create_customer", "customerExternalId", "x" * 256),
        ("create_customer", "creditUnit", "no spaces"),
    ],
)
def test_f11_a_wrong_value_is_named(workspace, operation, name, value):
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        perform(workspace, operation, **{**VALID[operation], name: value})
    assert caught.value.fields.keys() == {name}


@pytest.mark.parametrize("longest", [30, dt.timedelta(seconds=30)])
def test_a_hold_is_no_longer_than_the_settings_allow(
    workspace, customer, settings, longest
):
    settings.METERLY_LEDGER = {"MAX_TTL": longest}
    arguments = {**VALID["reserve_credits"], "customerId": customer}

    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        perform(workspace, "reserve_credits", ttlSeconds=31, **arguments)
    assert caught.value.fields.keys() == {"ttlSeconds"}

    answer = perform(workspace, "reserve_credits", **arguments)
    expires_at = dt.datetime.fromisoformat(answer.body["expiresAt"])
    assert expires_at - dt.datetime.now(dt.UTC) <= dt.timedelta(seconds=30)


# In process


@pytest.fixture
def client() -> MeterlyClient:
    return MeterlyClient(transport=LedgerTransport())


def test_the_client_works_in_process(client):
    customer = client.grant_credits("user_1", 50, "credits", "gift").grant.customer_id
    held = client.reserve_credits(customer, 20)
    assert client.commit_reservation(held.reservation_id).status == "committed"
    assert client.get_balance(customer).available == 30
    assert client.find_customer("user_1").customer_id == customer
    assert Workspace.objects.get().name == "default"


def test_the_workspace_is_the_one_of_the_settings(client, settings):
    settings.METERLY_LEDGER = {"WORKSPACE": "acme"}
    client.grant_credits("user_1", 50, "credits", "gift")
    assert Workspace.objects.get().name == "acme"


def test_an_error_tells_which_call_it_was(client):
    with pytest.raises(errors.MeterlyNotFoundError) as caught:
        client.get_balance("cus_nobody")
    error = caught.value
    assert (error.method, error.path) == ("GET", "/v1/customers/cus_nobody/balance")
    assert error.request_id


def test_a_failing_database_leaves_the_outcome_unknown(client):
    def fail(execute, sql, params, many, context):
        raise OperationalError("the server closed the connection")

    with (
        connection.execute_wrapper(fail),
        pytest.raises(errors.MeterlyUnknownOutcomeError) as caught,
    ):
        client.reserve_credits("cus_1", 1, idempotency_key="reserve")
    assert caught.value.idempotency_key == "reserve"
    assert isinstance(caught.value.__cause__, DatabaseError)


def test_the_transport_joins_the_database_of_its_tables():
    transport = LedgerTransport()
    assert transport.joins("default")
    assert not transport.joins("other")


def test_a_unit_of_work_undoes_the_movement_with_the_rest(client):
    customer = client.grant_credits("user_1", 50, "credits", "gift").grant.customer_id
    with client.transport.unit_of_work("default"):
        client.reserve_credits(customer, 20)
        transaction.set_rollback(True)
    assert client.get_balance(customer).available == 50


def test_a_unit_of_work_elsewhere_is_none(client):
    with client.transport.unit_of_work("other"):
        pass


def test_a_raw_call_is_checked_like_any_other():
    with pytest.raises(errors.MeterlyInvalidRequestError):
        LedgerTransport().send(Call("create_customer", {"creditUnit": 1}, "key"))


# Settings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"WORKSPCE": "x"}, "Did you mean 'WORKSPACE'"),
        ({"MAX_TTL": "60"}, "METERLY_LEDGER['MAX_TTL']"),
        ({"WORKSPACE": ""}, "METERLY_LEDGER['WORKSPACE']"),
        (["x"], "must be a dict"),
    ],
)
def test_a_wrong_setting_is_one_error_of_the_checks(settings, value, message):
    settings.METERLY_LEDGER = value
    (error,) = [e for e in run_checks() if e.id == "meterly_ledger.E001"]
    assert message in error.msg


WRONG = [
    *(None, "", " ", "x\n", "x" * 256, b"x", -1, 0, True, False, 1.5, 10**5000),
    *(float("nan"), float("inf"), [], (), set(), object(), object, len, {"x": 1}),
    *({1: 1}, {"read": 5}, {"read": "5/x"}, {"read": f"{10**30}/s"}, {"write": []}),
    *(dt.timedelta(0), dt.timedelta(seconds=-1), dt.timedelta.max, 2**63),
]
FINE = {
    "WORKSPACE": ["shop"],
    "MAX_TTL": [1, 86400, dt.timedelta(hours=1)],
    "RECORD_RETENTION": [1, 86400, dt.timedelta(days=36500)],
    "THROTTLE_RATES": [{}, {"read": None, "write": "5/s", "failed": "1/minute"}],
}


@pytest.mark.parametrize("name", list(FINE))
def test_a_wrong_value_is_an_error_that_names_the_setting(settings, name):
    for value in FINE[name]:
        settings.METERLY_LEDGER = {name: value}
        assert check_settings() == []
    for value in WRONG:
        settings.METERLY_LEDGER = {name: value}
        (error,) = check_settings()
        assert error.msg.startswith(f"METERLY_LEDGER['{name}'] must ")
        assert len(error.msg) < 300
        with pytest.raises(ImproperlyConfigured):
            getattr(ledger_settings, name)


@pytest.mark.parametrize("value", [None, [], "x", 5, object(), MappingProxyType({})])
def test_the_settings_must_be_a_dict(settings, value):
    settings.METERLY_LEDGER = value
    errors = run_checks(databases=["default"])
    (error,) = [each for each in errors if each.is_serious()]
    assert error.msg.startswith("METERLY_LEDGER must be a dict, not ")


@pytest.mark.parametrize("name", [1, None, (), "workspace", 10**5000], ids=shown)
def test_a_name_that_does_not_exist_is_an_error(settings, name):
    settings.METERLY_LEDGER = {name: "x"}
    (error,) = check_settings()
    assert error.msg.startswith(f"There is no setting METERLY_LEDGER[{shown(name)}].")


def test_the_default_settings_pass_the_checks():
    assert [e for e in run_checks() if e.id.startswith("meterly_ledger")] == []
