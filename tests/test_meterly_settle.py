"""``manage.py meterly_settle``: what the Celery tasks do, without Celery."""

from __future__ import annotations

import re
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction

from django_meterly import get_client, grants, guard
from django_meterly.ledger.models import Entry
from django_meterly.models import Grant, Reservation
from django_meterly.testing import assert_books_balance, lapse_leases
from tests.backlog import settled_by_two
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from pathlib import Path

    from django_meterly.models import Customer

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def customer(any_ledger: Any) -> Customer:
    return fund("user_1", 1000)


def meterly_settle(**options: Any) -> str:
    call_command("meterly_settle", stdout=(out := StringIO()), **options)
    return out.getvalue()


def leave_behind(customer: Customer, count: int) -> None:
    """Reserve as somebody does who is never heard of again."""
    for _ in range(count):
        guard(customer, 1).lifecycle.reserve()


def test_f31_a_lapsed_reservation_is_released(customer: Customer) -> None:
    leave_behind(customer, 1)
    assert meterly_settle() == "0 lapsed, 0 tried, 0 pending grants asked again.\n"
    assert states() == ["reserved"]

    lapse_leases()
    assert meterly_settle() == "1 lapsed, 1 tried, 0 pending grants asked again.\n"
    assert states() == ["released"]
    assert movements() == ["reserved", "released"]
    assert balance(customer) == (1000, 0)
    assert_books_balance()


def test_a_limit_leaves_the_rest_for_the_next_time(customer: Customer) -> None:
    leave_behind(customer, 3)
    lapse_leases()
    assert meterly_settle(limit=2).startswith("3 lapsed, 2 tried")
    assert sorted(states()) == ["release_pending", "released", "released"]
    assert meterly_settle(limit=2).startswith("0 lapsed, 1 tried")
    assert states() == ["released"] * 3
    assert balance(customer) == (1000, 0)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--limit=0", "--limit: must be at least 1"),
        ("--limit=-1", "--limit: must be at least 1"),
        ("--limit=many", "--limit: must be a whole number, not 'many'"),
        ("--older-than=-1", "--older-than: must be a number of seconds from 0"),
        ("--older-than=nan", "--older-than: must be a number of seconds from 0"),
        ("--older-than=inf", "--older-than: must be a number of seconds from 0"),
        ("--older-than=soon", "--older-than: must be a number of seconds from 0"),
    ],
)
def test_a_bad_value_is_refused(option: str, complaint: str) -> None:
    with pytest.raises(CommandError, match=complaint):
        call_command("meterly_settle", option)


def test_an_outage_leaves_the_decisions_for_the_next_time(remote: Any) -> None:
    customer = fund("user_1", 1000)
    leave_behind(customer, 3)
    lapse_leases()
    remote.meet("release_reservation", "lost", "unsent", "unanswered")
    assert meterly_settle().startswith("3 lapsed, 3 tried")
    assert states() == ["release_pending"] * 3
    assert meterly_settle().startswith("0 lapsed, 0 tried")

    lapse_leases()
    assert meterly_settle().startswith("0 lapsed, 3 tried")
    assert states() == ["released"] * 3
    assert movements() == ["reserved"] * 3 + ["released"] * 3
    assert balance(customer) == (1000, 0)
    assert_books_balance()


@pytest.mark.parametrize("fault", ["lost", "unsent", "unanswered"])
def test_a_pending_grant_is_granted_once(remote: Any, fault: str) -> None:
    customer = fund("user_1", 1000)
    remote.meet("grant_credits", fault, fault)
    granted, _ = grants.grant(
        get_client(), customer, 50, "image_credits", reason="r", reference="welcome"
    )
    assert granted.state == Grant.State.PENDING
    # Still no answer: it stays pending, and says why.
    assert meterly_settle().endswith("1 pending grants asked again.\n")
    granted.refresh_from_db()
    assert granted.state == Grant.State.PENDING
    assert granted.last_error

    assert meterly_settle().endswith("1 pending grants asked again.\n")
    assert meterly_settle().endswith("0 pending grants asked again.\n")
    granted.refresh_from_db()
    assert (granted.state, granted.last_error) == (Grant.State.GRANTED, "")
    assert Entry.objects.filter(reference="welcome").count() == 1
    assert balance(customer) == (1050, 0)
    assert_books_balance()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "rows", [80, pytest.param(200, marks=pytest.mark.slow("two sweepers and 200 rows"))]
)
@pytest.mark.database
def test_f38_two_sweepers_settle_each_row_once(
    customer: Customer, tmp_path: Path, rows: int
) -> None:
    leave_behind(customer, rows)
    lapse_leases()
    said = settled_by_two(tmp_path / "log")

    counts = [
        [int(count) for count in found]
        for found in re.findall(r"(\d+) lapsed, (\d+) tried", said)
    ]
    times = re.findall(r"from ([\d.]+) until ([\d.]+)", said)
    begun, ended = zip(*(map(float, pair) for pair in times), strict=True)
    assert max(begun) < min(ended)
    assert [sum(column) for column in zip(*counts, strict=True)] == [rows, rows]
    assert states() == ["released"] * rows
    assert movements() == ["reserved"] * rows + ["released"] * rows
    released = Entry.objects.filter(kind="credits_released")
    assert released.values("hold").distinct().count() == rows
    assert set(Reservation.objects.values_list("settle_attempts", flat=True)) == {1}
    assert balance(customer) == (1000, 0)
    assert_books_balance()


def test_a_grant_in_a_transaction_is_asked_for_after_its_commit(remote: Any) -> None:
    customer = fund("user_1", 100)
    remote.calls.clear()
    for keep in (False, True):
        with transaction.atomic():
            _row, created = grants.grant(
                get_client(),
                customer,
                50 + keep,
                "image_credits",
                reason="r",
                reference=f"welcome-{keep}",
            )
            assert created
            assert remote.operations() == []
            transaction.set_rollback(not keep)
    assert remote.operations() == ["grant_credits"]
    assert Grant.objects.get(reference="welcome-True").state == Grant.State.GRANTED
    assert balance(customer) == (151, 0)
