"""The statement that reserves finds the customer: the same as if it were looked up.

Each story is told twice, by one statement and by the several that a transaction of the
caller's, an idempotency key or another ledger needs. The two must not differ.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import AnonymousUser, Group, User
from django.db import IntegrityError, connection, connections
from django.http import HttpResponse
from django.test import RequestFactory
from django.test.utils import CaptureQueriesContext
from django.utils.functional import SimpleLazyObject

from django_meterly import get_client, guard, journal, meterly_guard, signals
from django_meterly.errors import (
    MeterlyError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidRequestError,
    MeterlyNotSentError,
    MeterlyUnavailableError,
)
from django_meterly.journal import opening, statements
from django_meterly.ledger.models import LedgerCustomer
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.models import Customer, Reservation, wire_scope_sql
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Where the database is another, conftest.py leaves this file out.
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.database,
    pytest.mark.usefixtures("joined"),
]


@pytest.fixture(params=[True, False], ids=["one", "several"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether reserving may be one statement."""
    if not request.param:
        monkeypatch.setattr(statements, "fits_one_statement", lambda *args: False)
    return bool(request.param)


@pytest.fixture
def owner() -> User:
    return User.objects.create_user("alice")


def read(customer: Customer) -> dict[str, Any]:
    """Return the columns of *customer*, all of which are loaded."""
    assert not customer.get_deferred_fields()
    assert customer._state.db == "default"
    assert not customer._state.adding
    return {f.attname: getattr(customer, f.attname) for f in Customer._meta.fields}


@contextmanager
def heard() -> Iterator[list[tuple[str, Any]]]:
    """Yield the customers that receivers of the signals are given."""
    found: list[tuple[str, Any]] = []
    with ExitStack() as stack:
        for name in (
            *("credits_reserved", "credits_committed", "credits_released"),
            *("credits_denied", "would_deny", "low_balance"),
        ):
            signal = getattr(signals, name)

            def hear(name: str = name, **facts: Any) -> None:
                row = facts.get("reservation")
                found.append((name, row.customer if row else facts["customer"]))

            signal.connect(hear, weak=False)
            stack.callback(signal.disconnect, hear)
        yield found


@contextmanager
def counted(most: int, way: bool) -> Iterator[None]:
    with CaptureQueriesContext(connection) as log:
        yield
    if way:
        assert len(log) == most, [query["sql"] for query in log]


NAMES: dict[str, Callable[[User], Any]] = {
    "owner": lambda owner: owner,
    "lazy owner": lambda owner: SimpleLazyObject(lambda: owner),
    "owner of another database": lambda owner: _from_elsewhere(owner),
    "external id": lambda owner: f"user_{owner.pk}",
    "customer": lambda owner: Customer.objects.get(owner=owner),
    "customer of another database": lambda owner: _from_elsewhere(
        Customer.objects.get(owner=owner)
    ),
}


def _from_elsewhere(instance: Any) -> Any:
    instance._state.db = "replica"
    return instance


@pytest.mark.parametrize("named", NAMES)
def test_whoever_is_named_is_found(way: bool, owner: User, named: str) -> None:
    customer = fund(owner)
    payer = NAMES[named](owner)
    with heard() as found, counted(2, way), guard(payer, 25) as work:
        assert work.available == 75
        row = work.reservation
        assert row is not None
        assert row.customer_id == customer.pk
        assert row.wire_key("commit").startswith(f"{customer.wire_scope}:")
    stored = read(Customer.objects.get())
    assert [name for name, _ in found] == ["credits_reserved", "credits_committed"]
    for _, each in found:
        assert read(each) == stored
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.mark.parametrize("named", NAMES)
def test_the_server_may_bind_who_is_named(
    prepared: None, owner: User, named: str
) -> None:
    customer = fund(owner)
    payer = NAMES[named](owner)
    with counted(2, way=True), guard(payer, 25):
        pass
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("external_id", ["a", "team 7 'x' \\ %s {} \" *", "~" * 255])
def test_the_database_makes_the_scope_of_a_key_as_python_does(external_id: str) -> None:
    customer = fund(external_id)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {wire_scope_sql('%s')}", [external_id])
        assert cursor.fetchone()[0] == customer.wire_scope
    with guard(external_id, 25, reference='r * " \\ *'):
        pass
    # The fingerprint of each entry is the one of the call, key and customer.
    assert_books_balance()


def test_the_row_is_the_same_in_memory_and_in_the_database(
    way: bool, owner: User
) -> None:
    fund(owner)
    work = guard(owner, 25, reference="r", ttl_seconds=60)
    work.lifecycle.reserve()
    row = work.reservation
    assert row is not None
    given = [f.attname for f in Reservation._meta.fields if f.name != "lease_until"]
    [stored] = Reservation.objects.values(*given)
    assert {name: getattr(row, name) for name in given} == stored


# Where something has to be done first


def test_an_unknown_external_id_becomes_a_customer(way: bool) -> None:
    with pytest.raises(MeterlyError, match="are required, 0 are available"):
        guard("team_7", 25, "image_credits").lifecycle.reserve()
    customer = Customer.objects.get()
    assert (customer.external_id, customer.owner_id) == ("team_7", None)
    assert customer.customer_id == LedgerCustomer.objects.get().public_id
    assert states() == ["denied"]


def test_an_owner_without_a_row_becomes_a_customer(way: bool, owner: User) -> None:
    get_client().grant_credits(f"user_{owner.pk}", 100, "image_credits", "gift")
    with guard(owner, 25):
        pass
    customer = Customer.objects.get()
    assert (customer.owner_id, customer.had_owner) == (owner.pk, True)
    assert balance(customer) == (75, 0)
    with counted(2, way), guard(owner, 25):
        pass


def test_an_owner_gets_the_row_that_has_no_owner(way: bool, owner: User) -> None:
    customer = fund(f"user_{owner.pk}")
    with guard(owner, 25):
        pass
    assert Customer.objects.get().owner_id == owner.pk
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("named", ["owner", "customer"])
@pytest.mark.parametrize("customer_id", [None, ""])
def test_a_customer_that_is_not_registered_is_registered(
    way: bool, owner: User, named: str, customer_id: str | None
) -> None:
    customer = fund(owner)
    Customer.objects.update(customer_id=customer_id)
    with guard(NAMES[named](owner), 25) as work:
        assert work.reservation is not None
        assert work.reservation.customer.customer_id == customer.customer_id
    assert Customer.objects.get().customer_id == customer.customer_id
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("named", ["owner", "external id", "customer"])
@pytest.mark.parametrize("pays", [True, False])
def test_what_is_owed_is_collected_first(
    way: bool, owner: User, named: str, pays: bool
) -> None:
    customer = fund(owner, 10)
    with guard(owner, 10) as work:
        work.charge(30)
    assert states() == ["unbilled"]
    if pays:
        fund(owner, 100)
    with heard() as found:
        if pays:
            with guard(NAMES[named](owner), 25):
                pass
        else:
            with pytest.raises(MeterlyError, match="owes 20 credits"):
                guard(NAMES[named](owner), 25).lifecycle.reserve()
    if pays:
        assert states() == ["committed", "committed"]
        assert balance(customer) == (55, 0)
    else:
        assert states() == ["unbilled"]
        assert [(name, each.pk) for name, each in found] == [
            ("credits_denied", customer.pk)
        ]
    assert Customer.objects.get().owes is not pays
    assert_books_balance()


def test_debts_that_may_be_kept_are_in_nobodys_way(
    way: bool, owner: User, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "ON_DEBT": "allow"}
    customer = fund(owner, 10)
    with guard(owner, 10) as work:
        work.charge(30)
    # A debt that is to stay: the grant would pay it.
    fund(owner, 100)
    with counted(2, way), guard(owner, 25):
        pass
    assert states() == ["unbilled", "committed"]
    assert balance(customer)[0] == 75


@pytest.mark.parametrize("stale", [True, False])
def test_an_instance_that_is_stale_is_believed_no_more_than_before(
    way: bool, owner: User, stale: bool
) -> None:
    fund(owner)
    customer = Customer.objects.get()
    Customer.objects.update(owes=stale)
    customer.owes = not stale
    with guard(customer, 25) as work:
        assert work.reservation is not None
        assert work.reservation.customer is customer
    assert states() == ["committed"]


# Where nobody pays


STRANGERS: dict[str, tuple[Callable[[User], Any], type[Exception], str]] = {
    "anonymous": (lambda owner: AnonymousUser(), TypeError, "not <django"),
    "nobody": (lambda owner: None, TypeError, "not None"),
    "a number": (lambda owner: owner.pk, TypeError, "external id, not"),
    "another model": (lambda owner: Group(pk=owner.pk), TypeError, "auth.Group"),
    "not saved": (lambda owner: User(pk=owner.pk), ValueError, "save it"),
    "no external id": (lambda owner: " x", ValueError, "external_id must be"),
}


@pytest.mark.parametrize("named", STRANGERS)
def test_what_is_no_customer_is_refused_before_anything(
    way: bool, owner: User, named: str
) -> None:
    fund(owner)
    stranger, error, message = STRANGERS[named]
    with counted(0, True), pytest.raises(error, match=message):
        guard(stranger(owner), 25).lifecycle.reserve()
    assert states() == []


def test_f66_a_deleted_owners_wallet_is_nobodys(way: bool, owner: User) -> None:
    customer = fund(owner)
    key = owner.pk
    User.objects.filter(pk=key).delete()
    heir = User.objects.create_user("heir", pk=key)
    with pytest.raises(MeterlyError, match="0 are available"):
        guard(heir, 25).lifecycle.reserve()
    assert Customer.objects.get(owner=heir).external_id == f"user_{key}~2"
    # By its name it can still be asked for.
    with guard(customer.external_id, 25):
        pass
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("named", ["customer", "customer of another database"])
def test_a_customer_that_was_deleted_meanwhile_is_missed(
    way: bool, owner: User, named: str
) -> None:
    fund(owner)
    payer = NAMES[named](owner)
    Customer.objects.all().delete()
    missing = (Customer.DoesNotExist, IntegrityError)
    with pytest.raises(missing, match=r"Customer matching|foreign key"):
        guard(payer, 25).lifecycle.reserve()
    assert states() == []
    assert movements() == []


def test_a_customer_that_the_ledger_does_not_know_is_registered_again(
    way: bool, owner: User
) -> None:
    customer = fund(owner)
    Customer.objects.update(customer_id="cus_of_another_ledger")
    with (
        heard() as found,
        pytest.raises(MeterlyUnavailableError, match="customer 'cus_of_another"),
    ):
        guard(owner, 25).lifecycle.reserve()
    assert [(name, each.pk) for name, each in found] == [
        ("credits_denied", customer.pk)
    ]
    [row] = Reservation.objects.all()
    assert row.state == "failed"
    assert "cus_of_another_ledger" in row.last_error
    assert Customer.objects.get().customer_id == customer.customer_id
    with guard(owner, 25):
        pass


# What becomes of it


@pytest.mark.parametrize("named", ["owner", "external id", "customer"])
@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
def test_a_refusal_names_the_whole_customer(
    way: bool, owner: User, named: str, enforcement: str
) -> None:
    fund(owner)
    work = guard(NAMES[named](owner), 101, enforcement=enforcement)
    with heard() as found, counted(2, way):
        if enforcement == "shadow":
            work.lifecycle.reserve()
        else:
            with pytest.raises(MeterlyError, match="101 credits"):
                work.lifecycle.reserve()
    signal = "would_deny" if enforcement == "shadow" else "credits_denied"
    [(name, customer)] = found
    assert name == signal
    assert read(customer) == read(Customer.objects.get())
    [row] = Reservation.objects.all()
    assert (row.state, row.customer_id) == ("denied", customer.pk)
    assert movements() == []


@pytest.mark.parametrize("known", [True, False])
def test_a_call_is_refused_before_its_statement(
    way: bool, owner: User, settings: Any, known: bool
) -> None:
    settings.METERLY_LEDGER = {"MAX_TTL": 60}
    if known:
        fund(owner)
    with pytest.raises(MeterlyInvalidRequestError, match="at most 60 here"):
        guard(owner, 25, "image_credits", ttl_seconds=61).lifecycle.reserve()
    [row] = Reservation.objects.all()
    assert (row.state, row.customer) == ("failed", Customer.objects.get())
    assert "at most 60 here" in row.last_error


@contextmanager
def refusing(
    monkeypatch: pytest.MonkeyPatch, error: MeterlyError, times: int
) -> Iterator[None]:
    """Let a project's transport raise *error* for the next reserves."""
    send = LedgerTransport.send
    left = [error] * times

    def refuse(self: LedgerTransport, call: Any) -> dict[str, Any]:
        if call.operation == "reserve_credits" and left:
            raise left.pop()
        return send(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(LedgerTransport, "send", refuse)
        yield


def test_a_transport_refuses_without_the_statement(
    way: bool, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = fund(owner)
    refusal = MeterlyInsufficientCreditsError("No more today.")
    with (
        refusing(monkeypatch, refusal, 2),
        heard() as found,
        pytest.raises(MeterlyInsufficientCreditsError, match="No more today"),
    ):
        guard(owner, 25).lifecycle.reserve()
    assert [(name, each.pk) for name, each in found] == [
        ("credits_denied", customer.pk)
    ]
    assert states() == ["denied"]


@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
def test_an_outage_names_the_whole_customer(
    way: bool, owner: User, monkeypatch: pytest.MonkeyPatch, enforcement: str
) -> None:
    fund(owner)
    work = guard(owner, 25, enforcement=enforcement)
    with refusing(monkeypatch, MeterlyNotSentError("down"), 9), heard() as found:
        if enforcement == "shadow":
            work.lifecycle.reserve()
        else:
            with pytest.raises(MeterlyUnavailableError, match="down"):
                work.lifecycle.reserve()
    [(name, customer)] = found
    assert name == ("would_deny" if enforcement == "shadow" else "credits_denied")
    assert read(customer) == read(Customer.objects.get())


@pytest.mark.parametrize("owes", [True, False])
def test_in_an_outage_work_is_on_trust_but_a_debtors_is_not(
    way: bool,
    owner: User,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    owes: bool,
) -> None:
    settings.METERLY = {**settings.METERLY, "UNAVAILABLE_CAP": 50}
    customer = fund(owner, 10)
    with guard(owner, 10) as work:
        work.charge(30 if owes else 10)
    work = guard(owner, 25, on_unavailable="allow")
    with refusing(monkeypatch, MeterlyNotSentError("down"), 9):
        if owes:
            with pytest.raises(MeterlyError, match="owes 20 credits"):
                work.lifecycle.reserve()
        else:
            work.lifecycle.reserve()
    assert states() == (["unbilled"] if owes else ["committed", "reserved"])
    if not owes:
        assert work.reservation is not None
        assert work.reservation.customer_id == customer.pk
        assert not work.reservation.reservation_id


def test_low_balance_names_the_whole_customer(
    way: bool, owner: User, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "LOW_BALANCE": {"image_credits": 80}}
    fund(owner)
    with heard() as found, guard(owner, 25):
        pass
    [customer] = [each for name, each in found if name == "low_balance"]
    assert read(customer) == read(Customer.objects.get())


def test_a_key_of_the_callers_takes_the_other_way(owner: User) -> None:
    fund(owner)
    with CaptureQueriesContext(connection) as log:
        guard(owner, 25, idempotency_key="order-1").lifecycle.reserve()
    assert len(log) > 2
    with pytest.raises(MeterlyError, match="in use right now"):
        guard(owner, 25, idempotency_key="order-1").lifecycle.reserve()
    assert states() == ["reserved"]


@pytest.mark.parametrize("named", ["owner", "customer of another database"])
def test_f29_a_connection_that_died_long_ago_is_replaced(
    way: bool, owner: User, named: str
) -> None:
    customer = fund(owner)
    payer = NAMES[named](owner)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        [pid] = cursor.fetchone()
    other = connections.create_connection("default")
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    other.close()
    with guard(payer, 25):
        pass
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_f29_a_statement_that_is_sent_again_may_find_nobody(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = fund(owner)

    def lose_the_answer(using: str, query: Callable[[], Any]) -> Any:
        query()
        Customer.objects.update(owes=True)
        return query()

    monkeypatch.setattr(statements, "on_live_connection", lose_the_answer)
    with guard(owner, 25):
        pass
    assert sorted(states()) == ["committed", "reserved"]
    assert balance(customer) == (75, 25)


def test_a_view_takes_two_round_trips(way: bool, owner: User) -> None:
    fund(owner)
    request = RequestFactory().post("/")
    request.user = owner
    view = meterly_guard("image_credits", 25)(lambda request: HttpResponse())
    with counted(2, way):
        assert view(request).status_code == 200
    assert states() == ["committed"]


def test_both_ways_are_what_they_are_called(way: bool, owner: User) -> None:
    fund(owner)
    with CaptureQueriesContext(connection) as log:
        guard(owner, 25).lifecycle.reserve()
    assert (len(log) == 1) == way
    assert opening.statements is statements
    assert journal.Payer(owner).resolve() == Customer.objects.get()
