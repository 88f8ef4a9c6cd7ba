"""Several attempts at one key: it is charged once, whichever of them succeeds."""

from __future__ import annotations

import datetime as dt
import threading
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection, connections
from django.db.models import F
from django.utils import timezone

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyNotSentError,
    get_client,
    guard,
    journal,
)
from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance, lapse_leases, sweep
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from collections.abc import Callable

    from django_meterly.guards import Guard
    from django_meterly.models import Customer

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def customer(any_ledger: Any) -> Customer:
    return fund("user_1")


def attempt(amount: int = 25, **options: Any) -> Guard:
    return guard("user_1", amount, idempotency_key="k", **options)


def taken_for_dead() -> Guard:
    """Return work that goes on although its lease has lapsed."""
    work = attempt()
    work.lifecycle.reserve()
    sweep()
    assert states()[-1] == "released"
    return work


def free(customer: Customer) -> int:
    return balance(customer)[0]


# How a later attempt ends, without being charged.


def fails(work: Guard) -> None:
    work.lifecycle.fail()


def lapses(work: Guard) -> None:
    sweep()


def is_free(work: Guard) -> None:
    work.release()
    work.lifecycle.succeed()


ENDS: list[Callable[[Guard], None]] = [fails, lapses, is_free]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("comes", ["meanwhile", "afterwards"])
def test_f72_a_success_is_charged_when_a_later_attempt_comes_to_nothing(
    end: Callable[[Guard], None], comes: str, customer: Customer
) -> None:
    early = taken_for_dead()
    late = attempt()
    late.lifecycle.reserve()
    if comes == "meanwhile":
        early.lifecycle.succeed()
    end(late)
    if comes == "afterwards":
        early.lifecycle.succeed()
    else:
        with pytest.raises(MeterlyDuplicateError):
            attempt().lifecycle.reserve()
        sweep()
    assert states() == ["committed", "released"]
    assert balance(customer) == (75, 0)
    with pytest.raises(MeterlyDuplicateError):
        attempt().lifecycle.reserve()
    assert_books_balance()


def test_f72_a_success_is_charged_when_the_later_attempt_was_denied(
    customer: Customer,
) -> None:
    early = taken_for_dead()
    with pytest.raises(MeterlyInsufficientCreditsError):
        attempt(101).lifecycle.reserve()
    early.lifecycle.succeed()
    assert states() == ["committed", "denied"]
    assert balance(customer) == (75, 0)


def test_f72_a_success_is_charged_when_the_later_attempt_never_reached_the_ledger(
    remote: Any,
) -> None:
    customer = fund("user_1")
    early = taken_for_dead()
    remote.meet("reserve_credits", *["unsent"] * 3)
    with pytest.raises(MeterlyError):
        attempt().lifecycle.reserve()
    early.lifecycle.succeed()
    assert states() == ["committed", "failed"]
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("comes", ["meanwhile", "afterwards"])
def test_f72_a_success_is_dropped_when_a_later_attempt_is_charged(
    comes: str, customer: Customer
) -> None:
    early = taken_for_dead()
    late = attempt()
    late.lifecycle.reserve()
    early.charge(3)
    if comes == "meanwhile":
        early.lifecycle.succeed()
    late.lifecycle.succeed()
    if comes == "afterwards":
        early.lifecycle.succeed()
    for _ in range(2):
        sweep()
    assert states() == ["released", "committed"]
    assert Reservation.objects.filter(charge=None).count() == 1
    assert not Reservation.objects.due().exists()
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_f72_of_three_successes_one_is_charged(customer: Customer) -> None:
    first, second = taken_for_dead(), taken_for_dead()
    third = attempt()
    third.lifecycle.reserve()
    for work in first, second:
        work.lifecycle.succeed()
    third.lifecycle.fail()
    for _ in range(3):
        sweep()
    assert sorted(states()) == ["committed", "released", "released"]
    assert balance(customer) == (75, 0)
    with pytest.raises(MeterlyDuplicateError):
        attempt().lifecycle.reserve()


def test_f72_a_success_waits_while_a_later_attempt_is_at_work(
    customer: Customer,
) -> None:
    early = taken_for_dead()
    late = attempt()
    late.lifecycle.reserve()
    early.lifecycle.succeed()
    Reservation.objects.filter(state="released").update(next_attempt_at=timezone.now())
    backlog = journal.backlog()
    assert (backlog.due, backlog.by_state) == (1, {"released": 1})
    for _ in range(2):
        journal.settle_due(get_client())
    assert states() == ["released", "reserved"]
    assert free(customer) == 100
    # Looked at again, but not at once.
    assert not Reservation.objects.due().exists()
    late.lifecycle.succeed()
    sweep()
    assert states() == ["released", "committed"]
    assert balance(customer) == (75, 0)


def test_f72_a_later_attempt_that_succeeds_late_is_not_charged_as_well(
    customer: Customer,
) -> None:
    early, late = taken_for_dead(), taken_for_dead()
    early.lifecycle.succeed()
    late.lifecycle.succeed()
    sweep()
    assert states() == ["committed", "released"]
    assert balance(customer) == (75, 0)


def test_f72_a_success_before_the_release_is_carried_out_is_noted_too(
    remote: Any,
) -> None:
    customer = fund("user_1")
    early, late = taken_for_dead(), attempt()
    late.lifecycle.reserve()
    remote.meet("release_reservation", "unsent")
    lapse_leases()
    journal.record_lapsed()
    assert states() == ["released", "release_pending"]
    early.lifecycle.succeed()
    # The row of the later attempt may still turn out to be committed at the ledger.
    assert states() == ["released", "release_pending"]
    for _ in range(3):
        sweep()
    assert states() == ["committed", "released"]
    assert balance(customer) == (75, 0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("turn", range(6))
def test_f72_a_success_and_the_next_attempt_at_the_same_moment_are_one_charge(
    turn: int, any_ledger: Any
) -> None:
    customer = fund("user_1")
    early = taken_for_dead()
    barrier = threading.Barrier(3)
    began = []

    def succeed() -> None:
        barrier.wait(10)
        early.lifecycle.succeed()

    def again() -> None:
        barrier.wait(10)
        work = attempt()
        try:
            work.lifecycle.reserve()
        except MeterlyDuplicateError:
            return
        began.append(work)
        if turn % 2:
            work.lifecycle.succeed()
        else:
            work.lifecycle.fail()

    def closing(run: Callable[[], None]) -> Callable[[], None]:
        def closed() -> None:
            try:
                run()
            finally:
                connections.close_all()

        return closed

    threads = [threading.Thread(target=closing(run)) for run in (succeed, again, again)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for _ in range(3):
        sweep()
    assert states().count("committed") == 1
    assert set(states()) <= {"committed", "released"}
    assert len(began) <= 2
    assert balance(customer) == (75, 0)
    assert_books_balance()


# Forgetting


def age(**ages: dt.timedelta) -> None:
    """Let all rows be older by these ages."""
    for name, by in ages.items():
        Reservation.objects.update(**{name: F(name) - by})


def a_day_passes() -> None:
    by = dt.timedelta(days=1, minutes=1)
    age(created_at=by, settled_at=by)
    Reservation.objects.exclude(next_attempt_at=None).update(
        next_attempt_at=F("next_attempt_at") - by
    )


def retention_passes() -> None:
    by = dt.timedelta(days=91)
    age(created_at=by, settled_at=by)


def denied() -> None:
    with pytest.raises(MeterlyInsufficientCreditsError):
        attempt().lifecycle.reserve()


def released() -> None:
    with pytest.raises(ZeroDivisionError), attempt():
        raise ZeroDivisionError


def charged() -> None:
    with attempt():
        pass


def charged_late() -> None:
    work = attempt()
    work.lifecycle.reserve()
    sweep()
    work.lifecycle.succeed()


def charged_without_a_hold() -> None:
    work = attempt()
    work.lifecycle.reserve()
    for hold in Reservation.objects.exclude(reservation_id=None):
        get_client().extend_reservation(str(hold.reservation_id), 1)
    connection.close()
    threading.Event().wait(1.2)
    work.lifecycle.succeed()


@pytest.mark.parametrize("on_unavailable", ["deny", "allow"])
@pytest.mark.parametrize("prunes_denied", [False, True])
@pytest.mark.parametrize(
    "history",
    [
        [charged],
        [charged_late],
        [charged_without_a_hold],
        [denied, charged],
        [denied, denied, charged],
        [released, charged],
        [denied, released, charged],
        [denied, charged_late],
        [released, charged_late],
    ],
    ids=lambda history: " ".join(each.__name__ for each in history),
)
def test_f74_a_key_that_was_charged_stays_charged_after_pruning(
    history: list[Callable[[], None]],
    prunes_denied: bool,
    on_unavailable: str,
    any_ledger: Any,
) -> None:
    customer = fund("user_1", 1)
    for number, event in enumerate(history):
        if event is not denied and balance(customer) == (1, 0):
            fund("user_1", 99)
        event()
        if prunes_denied and number + 1 < len(history):
            a_day_passes()
            journal.prune()
    assert balance(customer) == (75, 0)
    retention_passes()
    journal.prune()
    for _ in range(3):
        # The ledger knows the key, but not that the reference is new by default.
        with pytest.raises((MeterlyDuplicateError, MeterlyIdempotencyMismatchError)):
            attempt(on_unavailable=on_unavailable).lifecycle.reserve()
        sweep()
    assert balance(customer) == (75, 0)
    assert movements()[-1] in ("committed", "used")


def test_f59_what_was_denied_is_forgotten_after_a_day(any_ledger: Any) -> None:
    customer = fund("user_1", 10)
    for key in (None, "k"):
        with pytest.raises(MeterlyInsufficientCreditsError):
            guard(customer, 25, idempotency_key=key).lifecycle.reserve()
    with guard(customer, 5):
        pass
    assert journal.prune() == 0
    a_day_passes()
    assert journal.prunable().count() == 2
    assert journal.prune() == 2
    assert states() == ["committed"]
    # Nothing is left to the sweeper meanwhile.
    with pytest.raises(MeterlyInsufficientCreditsError):
        guard(customer, 25).lifecycle.reserve()
    lapse_leases()
    assert not Reservation.objects.due().exists()
    assert journal.backlog().due == 0


def test_f59_a_ledger_that_was_never_reached_is_no_denial(remote: Any) -> None:
    customer = fund("user_1", 100)
    remote.meet("reserve_credits", *["unsent"] * 3)
    with pytest.raises(MeterlyError) as caught:
        guard(customer, 25).lifecycle.reserve()
    assert not isinstance(caught.value.__cause__, type(None))
    assert isinstance(caught.value.__cause__, MeterlyNotSentError)
    a_day_passes()
    assert journal.prune() == 0
    assert states() == ["failed"]
