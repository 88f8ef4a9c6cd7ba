"""Granting: once for each reference, and never another amount without a word."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import AnonymousUser, Group, User
from django.db import connection, transaction

from django_meterly import get_client, grants
from django_meterly.errors import MeterlyReferenceConflictError
from django_meterly.ledger.models import Entry
from django_meterly.models import Customer, Grant
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund

if TYPE_CHECKING:
    from django_meterly.testing import faults

pytestmark = pytest.mark.django_db(transaction=True)

MEANT = {"reason": "Welcome", "reference": "welcome"}


def grant(customer: Customer, amount: int = 25, **values: Any) -> tuple[Grant, bool]:
    unit = values.pop("unit", "image_credits")
    return grants.grant(get_client(), customer, amount, unit, **{**MEANT, **values})


def test_the_same_grant_is_made_once(customer: Customer, user: User) -> None:
    first, created = grant(customer, actor=user)
    assert created
    for values in ({}, {"reason": "Another"}, {"actor": None}):
        again, created = grant(customer, **values)
        assert (again.pk, created) == (first.pk, False)
        assert (again.reason, again.actor) == ("Welcome", user)
    assert balance(customer) == (125, 0)


@pytest.mark.parametrize("amount", [1, 24, 26, 2**63 - 1])
def test_another_amount_under_the_reference_is_a_conflict(
    customer: Customer, amount: int
) -> None:
    grant(customer)
    with pytest.raises(MeterlyReferenceConflictError) as caught:
        grant(customer, amount)
    for fact in ("'welcome'", "25 image_credits", str(customer), "(granted)"):
        assert fact in str(caught.value)
    assert Grant.objects.get().amount == 25
    assert balance(customer) == (125, 0)
    assert_books_balance()


@pytest.mark.parametrize(
    "actor",
    [1, "alice", User, AnonymousUser(), Group(pk=1)],
    ids=lambda actor: type(actor).__name__,
)
def test_an_actor_that_is_no_user_is_refused_before_anything_is_written(
    actor: Any,
) -> None:
    for function in (grants.grant, async_to_sync(grants.agrant)):
        with pytest.raises(TypeError, match=r"actor must be the user .*auth\.User"):
            function(get_client(), "team_7", 5, "tokens", **MEANT, actor=actor)
    assert not Customer.objects.exists()
    assert get_client().find_customer("team_7") is None


def test_another_unit_customer_or_reference_is_another_grant(
    customer: Customer,
) -> None:
    grant(customer)
    other = fund("team_7", 1)
    assert grant(customer, 5, unit="gpu_seconds")[1]
    assert grant(other, 5)[1]
    assert grant(customer, 5, reference="Welcome")[1]
    assert balance(customer, "gpu_seconds") == (5, 0)
    assert (balance(other), balance(customer)) == ((6, 0), (130, 0))


def test_a_pending_grant_conflicts_too_and_is_settled_as_it_was(
    remote: faults,
) -> None:
    customer = fund("team_7")
    remote.meet("grant_credits", "lost")
    assert grant(customer)[0].state == Grant.State.PENDING
    with pytest.raises(MeterlyReferenceConflictError, match=r"\(pending: "):
        grant(customer, 26)
    assert not grant(customer)[1]
    assert grants.settle_due(get_client()) == 1
    assert Grant.objects.get().state == Grant.State.GRANTED
    assert balance(customer) == (125, 0)
    with pytest.raises(MeterlyReferenceConflictError, match=r"\(granted\)"):
        grant(customer, 26)


def test_a_reference_that_only_the_ledger_knows_is_refused_and_stays_so(
    customer: Customer,
) -> None:
    get_client().grant_credits(
        customer.external_id, 7, "image_credits", "welcome", "by hand"
    )
    refused, created = grant(customer)
    assert (refused.state, created) == (Grant.State.REFUSED, True)
    assert "reference_conflict" in refused.last_error
    # Nobody is to take a refused grant for one that was made.
    for amount in (25, 26):
        with pytest.raises(MeterlyReferenceConflictError) as caught:
            grant(customer, amount)
        assert "(refused: 409 reference_conflict" in str(caught.value)
    assert grants.settle_due(get_client()) == 0
    assert Grant.objects.get().last_error == refused.last_error
    assert balance(customer) == (107, 0)
    assert grant(customer, reference="welcome-2")[0].state == Grant.State.GRANTED


def test_a_pending_grant_that_the_ledger_refuses_is_refused_by_the_sweeper(
    remote: faults,
) -> None:
    customer = fund("team_7")
    remote.meet("grant_credits", "unsent")
    grant(customer)
    get_client().grant_credits(customer.external_id, 7, "image_credits", "welcome")
    assert grants.settle_due(get_client()) == 1
    assert Grant.objects.get().state == Grant.State.REFUSED
    with pytest.raises(MeterlyReferenceConflictError, match=r"\(refused: "):
        grant(customer)
    assert balance(customer) == (107, 0)


def test_a_conflict_leaves_the_callers_transaction_usable(customer: Customer) -> None:
    with transaction.atomic():
        grant(customer)
        with pytest.raises(MeterlyReferenceConflictError):
            grant(customer, 26)
        grant(customer, reference="welcome-2")
    assert balance(customer) == (150, 0)


@pytest.mark.database
@pytest.mark.parametrize("amounts", [(25, 25, 25, 25), (25, 26, 27, 28)])
def test_of_grants_at_once_one_is_made(
    customer: Customer, amounts: tuple[int, ...]
) -> None:
    start = threading.Barrier(len(amounts))
    outcomes: list[Any] = []

    def ask(amount: int) -> None:
        try:
            start.wait()
            outcomes.append(grant(customer, amount)[1])
        except MeterlyReferenceConflictError:
            outcomes.append("conflict")
        finally:
            connection.close()

    threads = [threading.Thread(target=ask, args=[amount]) for amount in amounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others = {False} if len(set(amounts)) == 1 else {"conflict"}
    assert outcomes.count(True) == 1
    assert set(outcomes) - {True} == others
    assert balance(customer) == (100 + Grant.objects.get().amount, 0)
    assert Entry.objects.filter(reference="welcome").count() == 1


def test_async_code_grants_by_the_twin(customer: Customer, user: User) -> None:
    agrant = async_to_sync(grants.agrant)
    arguments = (get_client(), customer, 25, "image_credits")
    first, created = agrant(*arguments, **MEANT, actor=user)
    assert (first.state, first.actor, created) == (Grant.State.GRANTED, user, True)
    assert agrant(*arguments, **MEANT)[1] is False
    with pytest.raises(MeterlyReferenceConflictError):
        agrant(get_client(), customer, 26, "image_credits", **MEANT)
    assert balance(customer) == (125, 0)


def test_the_twin_takes_what_grant_takes() -> None:
    assert inspect.signature(grants.agrant) == inspect.signature(grants.grant)
