"""Reads that decide something go to the database that is written to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from django_meterly import MeterlyDuplicateError, get_client, grants, guard, journal
from django_meterly.errors import MeterlyDebtError
from django_meterly.ledger import expiry
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from django.test import Client

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]


class Replica:
    """Sends reads to a replica that lags so far behind that it is not there yet."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "replica" if model._meta.app_label.startswith("meterly") else None

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


def test_f69_a_replica_that_lags_decides_nothing(
    client: Client, user: User, any_ledger: Any, settings: Any
) -> None:
    client.force_login(user)
    customer = fund(user)
    settings.DATABASE_ROUTERS = [Replica()]
    grants.grant(
        get_client(), customer, 10, "image_credits", reason="more", reference="more"
    )
    grants.grant(None, customer, 10, "image_credits", reason="later", reference="later")
    assert grants.settle_due(get_client()) == 1
    with guard(user, 10) as work:
        work.charge(200)
    with pytest.raises(MeterlyDebtError):
        guard(user, 4).lifecycle.reserve()
    # It pays the debt.
    customer.refresh_from_db(using="default")
    grants.grant(
        get_client(), customer, 200, "image_credits", reason="paid", reference="paid"
    )
    with guard(user, 4, idempotency_key="once"):
        pass
    with pytest.raises(MeterlyDuplicateError):
        guard(user, 4, idempotency_key="once").lifecycle.reserve()
    with pytest.raises(RuntimeError), guard(user, 1):
        raise RuntimeError
    assert client.post("/paid/").status_code == 200
    journal.sweep(get_client())
    expiry.expire_due()
    assert_books_balance()
    settings.DATABASE_ROUTERS = []
    assert states() == ["committed", "committed", "released", "committed"]
    assert balance(customer) == (320 - 200 - 4 - 25, 0)
    customer.refresh_from_db()
    assert not customer.owes


def test_f69_customers_and_users_who_come_from_a_replica_pay_and_grant(
    user: User, any_ledger: Any, settings: Any
) -> None:
    customer = fund(user)
    settings.DATABASE_ROUTERS = [Replica()]
    # As if they had been read there. The router says nothing about relations.
    customer._state.db = user._state.db = "replica"
    with guard(customer, 10):
        pass
    with guard(user, 10):
        pass
    grant, created = grants.grant(
        get_client(),
        customer,
        5,
        "image_credits",
        reason="more",
        reference="more",
        actor=user,
    )
    assert created
    assert grant.actor_id == user.pk
    settings.DATABASE_ROUTERS = []
    assert states() == ["committed", "committed"]
    assert balance(customer) == (85, 0)
