from __future__ import annotations

import datetime as dt

import pytest
from django.core.management import call_command

from django_meterly import errors
from django_meterly.db import from_now
from django_meterly.ledger import customers, expiry, spending
from django_meterly.ledger.models import Entry, Hold, Record
from django_meterly.ledger.tasks import expire_holds

pytestmark = [pytest.mark.django_db, pytest.mark.database]


@pytest.fixture
def held(workspace, customer):
    return spending.reserve(
        workspace.pk,
        customer,
        amount=40,
        reference="job",
        ttl_seconds=60,
        idempotency_key="reserve",
    )


def extend(workspace, held, seconds=600, key="extend"):
    return spending.extend(
        workspace.pk, held.reservation_id, ttl_seconds=seconds, idempotency_key=key
    )


def left(reservation):
    return (reservation.expires_at - dt.datetime.now(dt.UTC)).total_seconds()


@pytest.mark.parametrize("seconds", [600, 5])
def test_the_time_is_set_not_added_and_moves_nothing(workspace, held, seconds):
    extended = extend(workspace, held, seconds)

    assert seconds - 5 < left(extended) <= seconds
    assert (extended.status, extended.replayed) == ("reserved", False)
    assert extended.account == held.account
    assert Entry.objects.filter(kind="credits_reserved").count() == 1
    assert Entry.objects.count() == 2


def test_f42_a_replay_sets_nothing_and_shows_the_present_time(workspace, held):
    extend(workspace, held, 600, "first")
    extend(workspace, held, 1200, "second")

    again = extend(workspace, held, 600, "first")

    assert again.replayed
    assert left(again) > 1100


def test_f42_the_key_with_another_time_is_a_mismatch(workspace, held):
    extend(workspace, held, 600)
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        extend(workspace, held, 601)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (spending.commit, errors.MeterlyReservationCommittedError),
        (spending.release, errors.MeterlyReservationReleasedError),
    ],
)
def test_a_closed_hold_is_not_extended_and_the_key_not_kept(
    workspace, held, end, expected
):
    end(workspace.pk, held.reservation_id, idempotency_key="end")
    with pytest.raises(expected):
        extend(workspace, held)
    assert not Record.objects.exists()


def test_a_replay_of_a_hold_closed_since_shows_that(workspace, held):
    extend(workspace, held)
    spending.commit(workspace.pk, held.reservation_id, idempotency_key="end")
    assert extend(workspace, held).status == "committed"


def test_a_hold_past_its_time_is_not_extended_but_expired(workspace, customer, held):
    Hold.objects.update(expires_at=from_now(-1))
    with pytest.raises(errors.MeterlyReservationExpiredError):
        extend(workspace, held)
    assert Hold.objects.get().status == "expired"
    assert customers.default_balance(workspace.pk, customer).reserved == 0


@pytest.mark.parametrize("key", ["extend", "another"])
def test_f76_a_hold_extended_by_another_call_at_its_very_end_is_extended(
    workspace, held, monkeypatch, key
):
    Hold.objects.update(expires_at=from_now(-1))
    expire = expiry.expire_matching
    others = []

    def outrun(**lookup):
        # The other call's clock was a moment behind.
        if not others:
            Hold.objects.update(expires_at=from_now(60))
            others.append(extend(workspace, held, 900, key="another"))
        return expire(**lookup)

    monkeypatch.setattr(expiry, "expire_matching", outrun)

    extended = extend(workspace, held, 900, key)

    assert (extended.status, extended.replayed) == ("reserved", key == "another")
    assert left(extended) > 890
    assert Hold.objects.get().status == "reserved"


def test_f76_a_hold_that_nobody_expires_is_not_tried_for_ever(
    workspace, held, monkeypatch
):
    # As it may look in a transaction with an old snapshot.
    monkeypatch.setattr(expiry, "expire_matching", lambda **lookup: 0)
    Hold.objects.update(expires_at=from_now(-1))
    with pytest.raises(errors.MeterlyReservationExpiredError):
        extend(workspace, held)


def test_a_hold_of_another_workspace_is_not_found(held):
    with pytest.raises(errors.MeterlyNotFoundError):
        extend(customers.ensure_workspace("other"), held)


def test_a_hold_extended_after_the_sweep_has_read_it_is_left(workspace, held):
    Hold.objects.update(expires_at=from_now(-1))
    read = list(Hold.objects.due())
    Hold.objects.update(expires_at=from_now(60))

    assert expiry._expire(read[0].account_id, read) == 0
    assert Hold.objects.get().status == "reserved"


@pytest.mark.parametrize("sweep", [expire_holds, "command"])
def test_records_are_forgotten_after_their_retention(workspace, held, settings, sweep):
    settings.METERLY_LEDGER = {"RECORD_RETENTION": dt.timedelta(hours=1)}
    extend(workspace, held, key="old")
    Record.objects.update(created_at=from_now(-3601))
    extend(workspace, held, key="young")

    if sweep == "command":
        call_command("meterly_ledger_expire")
    else:
        sweep()

    assert list(Record.objects.values_list("idempotency_key", flat=True)) == ["young"]
    # The keys of movements are in their entries, for ever.
    assert Entry.objects.filter(idempotency_key="reserve").exists()
