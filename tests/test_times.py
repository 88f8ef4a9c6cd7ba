"""Times are right on every database, whatever the settings say of time zones."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import override_settings
from django.utils import timezone

from django_meterly import get_client, guard, journal
from django_meterly.db import DatabaseNow, in_utc
from django_meterly.ledger.models import Entry, Hold
from django_meterly.models import Customer, Reservation
from django_meterly.testing import assert_books_balance
from tests.books import fund, states

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

ZONES = ["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Auckland"]


@pytest.fixture(params=["project", "connection"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=ZONES)
def zone(request: pytest.FixtureRequest, kind: str) -> Iterator[str]:
    """``USE_TZ = False`` and a ``TIME_ZONE``, or one of the connection."""
    zone: str = request.param
    before = connection.settings_dict["TIME_ZONE"]
    aware = kind == "connection"
    connection.close()
    with override_settings(USE_TZ=aware, TIME_ZONE="UTC" if aware else zone):
        connection.settings_dict["TIME_ZONE"] = zone if aware else None
        for name in ("timezone", "timezone_name"):
            connection.__dict__.pop(name, None)
        yield zone
        connection.close()
    connection.settings_dict["TIME_ZONE"] = before
    for name in ("timezone", "timezone_name"):
        connection.__dict__.pop(name, None)


def is_now(moment: Any) -> bool:
    if isinstance(moment, str):
        assert moment.endswith("Z")
        moment = dt.datetime.fromisoformat(moment)
    return abs(in_utc(moment) - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


def test_f69_every_time_is_right(zone: str) -> None:
    user = User.objects.create_user("alice")
    customer = fund(user)
    with guard(user, 10):
        [row] = Reservation.objects.annotate(now=DatabaseNow())
        assert is_now(row.now)
        assert is_now(row.created_at)
        lease = row.ttl_seconds + 60
        assert is_now(row.lease_until - dt.timedelta(seconds=lease))
        [hold] = Hold.objects.all()
        assert is_now(hold.expires_at - dt.timedelta(seconds=row.ttl_seconds))
    row.refresh_from_db()
    assert is_now(row.decided_at)
    assert is_now(row.settled_at)
    for model in (Customer, Reservation, Entry, Hold):
        assert is_now(model._default_manager.latest("pk").created_at)
    # What Python writes is found by what the database's clock says, and back.
    now = timezone.now()
    Reservation.objects.update(settled_at=now)
    assert is_now(Reservation.objects.get().settled_at)
    minute = dt.timedelta(minutes=1)
    assert Reservation.objects.filter(
        settled_at__gt=now - minute, created_at__lt=DatabaseNow() + minute
    ).exists()
    assert not Reservation.objects.settled(60).exists()
    for entry in get_client().list_entries(str(customer.customer_id)).entries:
        assert is_now(entry.created_at)
    assert_books_balance()


def test_f69_the_wire_has_utc(zone: str) -> None:
    customer = fund(User.objects.create_user("alice"))
    client = get_client()
    held = client.reserve_credits(
        str(customer.customer_id), 5, reference="r", ttl_seconds=600
    )
    assert is_now(held.expires_at - dt.timedelta(seconds=600))
    known = client.get_reservation(held.reservation_id)
    assert is_now(known.expires_at - dt.timedelta(seconds=600))
    assert known.is_held
    granted = client.grant_credits(customer.external_id, 5, "image_credits", "g")
    assert is_now(granted.grant.created_at)


def test_f69_leases_end_when_they_should(zone: str) -> None:
    user = User.objects.create_user("alice")
    fund(user)
    guard(user, 10).lifecycle.reserve()
    assert journal.sweep(get_client()) == (0, 0)
    assert states() == ["reserved"]
    past = timezone.now() - dt.timedelta(seconds=5)
    Reservation.objects.update(lease_until=past)
    assert journal.sweep(get_client()) == (1, 1)
    assert states() == ["released"]
    assert journal.prune() == 0


# PostgreSQL's driver and Django see to it.
if not connection.features.supports_timezones:

    @pytest.mark.parametrize("fold", [0, 1])
    def test_f69_an_hour_that_is_there_twice_is_kept_apart(fold: int) -> None:
        """1:30 in New York on 2026-11-01, for example."""
        user = User.objects.create_user("alice")
        before = connection.__dict__.pop("timezone", None)
        with override_settings(USE_TZ=False, TIME_ZONE="America/New_York"):
            local = dt.datetime(2026, 11, 1, 1, 30, fold=fold)
            row = Customer.objects.resolve(user)
            Customer.objects.update(created_at=local)
            row.refresh_from_db()
            assert in_utc(row.created_at).hour == 5 + fold
            assert (row.created_at, row.created_at.fold) == (local, fold)
        connection.__dict__["timezone"] = before
