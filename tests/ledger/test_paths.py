"""Both ways to move credits answer every call alike.

They run side by side on PostgreSQL. What the one has moved is rolled back before it
is the other's turn.
"""

from __future__ import annotations

import datetime as dt
import inspect

import pytest
from django.db import transaction

from django_meterly import errors
from django_meterly.db import from_now
from django_meterly.ledger import expiry, portable, postgresql
from django_meterly.ledger.idempotency import Request
from django_meterly.ledger.models import Entry, Hold
from django_meterly.ledger.movements import Closing, Spending
from django_meterly.transports.base import Statement

# Where the database is another, conftest.py leaves this file out.
pytestmark = pytest.mark.django_db

RESERVE = {"hold_id": "res_new", "ttl_seconds": 60}


class Situation:
    """A customer with 100 credits, 30 of them held, and a *way* to move them."""

    def __init__(self, way, workspace, customer):
        self.way = way
        self.workspace = workspace.pk
        self.customer = customer
        self.spend("held", amount=30, hold_id="res_held", ttl_seconds=60)

    def spend(self, key="key", **changes):
        spending = Spending(
            workspace="acme",
            idempotency_key=key,
            fingerprint="same",
            customer_id=self.customer,
            unit=None,
            amount=40,
            reference="job",
            description="a job",
            entry_id=f"ent_{Entry.objects.count()}",
        )
        return self.way.spend("default", spending._replace(**changes))

    def close(self, status, charged=None, key="close", **changes):
        closing = Closing(
            workspace=self.workspace,
            idempotency_key=key,
            fingerprint="same",
            hold_id="res_held",
            status=status,
            charged=charged,
            entry_id=f"ent_{Entry.objects.count()}",
        )
        return self.way.close("default", closing._replace(**changes))

    def commit(self, charged=None, **changes):
        return self.close("committed", charged, **changes)

    def release(self, **changes):
        return self.close("released", 0, **changes)

    def let_expire(self):
        Hold.objects.update(expires_at=from_now(-1))

    def expire(self):
        self.let_expire()
        expiry.expire_due()

    def record(self, key):
        Request("default", self.workspace, key, "another call").record()


SPENDING = [
    # The code, what happens before, and the call.
    ("moved", [], lambda its: its.spend()),
    ("moved", [], lambda its: its.spend(workspace=its.workspace)),
    ("moved", [], lambda its: its.spend(unit="credits", amount=70)),
    ("moved", [], lambda its: its.spend(**RESERVE)),
    ("replayed", [lambda its: its.spend()], lambda its: its.spend()),
    (
        "replayed",
        [lambda its: its.spend(**RESERVE), lambda its: its.spend("other", amount=5)],
        lambda its: its.spend(hold_id="res_newer", ttl_seconds=60),
    ),
    (
        "replayed",
        [lambda its: its.spend(**RESERVE), lambda its: its.let_expire()],
        lambda its: its.spend(**RESERVE),
    ),
    (
        "replayed",
        [
            lambda its: its.spend(**RESERVE),
            lambda its: its.release(hold_id="res_new"),
        ],
        lambda its: its.spend(**RESERVE),
    ),
    (
        "mismatch",
        [lambda its: its.spend()],
        lambda its: its.spend(fingerprint="other"),
    ),
    ("mismatch", [lambda its: its.record("key")], lambda its: its.spend()),
    ("not_found", [], lambda its: its.spend(customer_id="cus_none")),
    ("not_found", [], lambda its: its.spend(workspace="none")),
    ("not_found", [], lambda its: its.spend(workspace=0)),
    ("insufficient", [], lambda its: its.spend(amount=71)),
    ("insufficient", [], lambda its: its.spend(amount=71, **RESERVE)),
    ("insufficient", [], lambda its: its.spend(unit="pages")),
    ("due", [lambda its: its.let_expire()], lambda its: its.spend(amount=71)),
    ("moved", [lambda its: its.let_expire()], lambda its: its.spend(amount=70)),
    ("moved", [lambda its: its.expire()], lambda its: its.spend(amount=100)),
]
CLOSING = [
    ("moved", [], lambda its: its.commit()),
    ("moved", [], lambda its: its.commit(0)),
    ("moved", [], lambda its: its.commit(10, workspace="acme")),
    ("moved", [], lambda its: its.release()),
    ("replayed", [lambda its: its.commit(10)], lambda its: its.commit(10)),
    (
        "replayed",
        [lambda its: its.commit(10), lambda its: its.spend()],
        lambda its: its.commit(10),
    ),
    (
        "already",
        [lambda its: its.commit(10), lambda its: its.spend()],
        lambda its: its.commit(key="other"),
    ),
    (
        "already",
        [
            lambda its: its.commit(10),
            lambda its: its.spend(**RESERVE),
            lambda its: its.let_expire(),
        ],
        lambda its: its.commit(key="other"),
    ),
    (
        "already",
        [lambda its: its.release()],
        lambda its: its.release(key="other"),
    ),
    (
        "mismatch",
        [lambda its: its.commit()],
        lambda its: its.commit(1, fingerprint="other"),
    ),
    ("mismatch", [lambda its: its.record("close")], lambda its: its.release()),
    ("not_found", [], lambda its: its.commit(hold_id="res_none")),
    ("not_found", [], lambda its: its.release(workspace="none")),
    ("not_found", [], lambda its: its.release(workspace=0)),
    ("too_much", [], lambda its: its.commit(31)),
    ("too_much", [lambda its: its.release()], lambda its: its.commit(31, key="other")),
    ("too_much", [lambda its: its.let_expire()], lambda its: its.commit(31)),
    ("due", [lambda its: its.let_expire()], lambda its: its.commit()),
    ("due", [lambda its: its.let_expire()], lambda its: its.release()),
    ("closed", [lambda its: its.expire()], lambda its: its.commit()),
    ("closed", [lambda its: its.commit()], lambda its: its.release(key="other")),
    ("closed", [lambda its: its.release()], lambda its: its.commit(key="other")),
]


def answered(way, workspace, customer, before, call):
    """Return the answer, and the books after it."""
    with transaction.atomic():
        situation = Situation(way, workspace, customer)
        for step in before:
            step(situation)
        answer = call(situation)
        books = [
            # An expiry takes no id of ours.
            *Entry.objects.exclude(kind="credits_expired")
            .order_by("pk")
            .values_list(
                *("public_id", "kind", "amount", "balance_delta", "reserved_delta"),
                *("balance_after", "reserved_after", "reference", "description"),
                *("idempotency_key", "fingerprint", "hold__public_id"),
            ),
            *Hold.objects.order_by("pk").values_list("public_id", "status", "amount"),
        ]
        transaction.set_rollback(True)
    return answer, books


def without_times(answer):
    return {
        name: value
        for name, value in answer._asdict().items()
        if not isinstance(value, dt.datetime)
    }


@pytest.mark.parametrize(("code", "before", "call"), SPENDING + CLOSING)
def test_both_ways_answer_alike(workspace, customer, code, before, call):
    (one, its_books), (other, other_books) = (
        answered(way, workspace, customer, before, call)
        for way in (portable, postgresql)
    )

    assert one.code == other.code == code
    assert type(one) is type(other)
    assert without_times(one) == without_times(other)
    for name in one._fields:
        if name not in without_times(one):
            # Two calls lie a moment apart.
            apart = getattr(one, name) - getattr(other, name)
            assert abs(apart) < dt.timedelta(seconds=20)
    assert its_books == other_books


@pytest.mark.parametrize("name", ["spend", "close"])
def test_both_ways_take_the_same_arguments(name):
    assert inspect.signature(getattr(portable, name)) == inspect.signature(
        getattr(postgresql, name)
    )


@pytest.mark.parametrize("call", [lambda its: its.spend(), lambda its: its.commit()])
def test_the_portable_way_refuses_a_statement(workspace, customer, call, monkeypatch):
    situation = Situation(portable, workspace, customer)
    for name in ("spend", "close"):
        move = getattr(portable, name)
        monkeypatch.setattr(
            portable,
            name,
            lambda *args, move=move: move(*args, Statement("SELECT 1", (), "SELECT 1")),
        )
    with pytest.raises(errors.MeterlyUsageError, match="PostgreSQL"):
        call(situation)
