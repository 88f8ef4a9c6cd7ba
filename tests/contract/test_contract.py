"""What a client can rely on, whichever transport carries its calls."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connections

from django_meterly import MeterlyClient
from django_meterly.db import from_now
from django_meterly.errors import (
    MeterlyApiError,
    MeterlyCustomerExistsError,
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidRequestError,
    MeterlyNotFoundError,
    MeterlyReferenceConflictError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
    MeterlyUnknownOutcomeError,
)
from django_meterly.ledger.models import Hold
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.testing import FaultyTransport, faults
from django_meterly.transports import Call
from django_meterly.types import Balance
from django_meterly.wire import MAX_AMOUNT

# Of the transports, one for each test: they take turns.
pytestmark = [pytest.mark.database, pytest.mark.sample(1)]


@pytest.fixture
def customer(meterly) -> str:
    """The id of a customer with 100 tokens."""
    return meterly.grant_credits("user_1", 100, "tokens", "opening").grant.customer_id


def tokens(balance: int, reserved: int = 0) -> Balance:
    return Balance("tokens", balance, reserved, balance - reserved)


def let_expire() -> None:
    """Put an end to every hold, by the clock of the server's own database."""
    Hold.objects.update(expires_at=from_now(-1))


def refused(
    expected: type[MeterlyApiError], method: Any, *args: Any, **kwargs: Any
) -> MeterlyApiError:
    """Return the refusal of a call, which is *expected* with all it carries."""
    with pytest.raises(MeterlyApiError) as caught:
        method(*args, **kwargs)
    error = caught.value
    assert type(error) is expected
    assert (error.status, error.code) == (expected.status, expected.code)
    assert error.message
    assert error.request_id
    assert error.path.startswith("/v1/")
    return error


# Customers, grants, balances


def test_created_customer_is_found_by_both_ids(meterly):
    customer = meterly.create_customer("user_9", "tokens", idempotency_key="k")
    assert customer.customer_external_id == "user_9"
    assert customer.credit_unit == "tokens"
    assert abs(customer.created_at - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    assert meterly.find_customer("user_9") == customer
    assert meterly.get_balance(customer.customer_id) == tokens(0)
    again = meterly.create_customer("user_9", "tokens", idempotency_key="k")
    assert again == customer


def test_unknown_external_id_finds_none(meterly):
    assert meterly.find_customer("nobody") is None


def test_f40_external_ids_that_differ_in_case_stay_apart(meterly):
    lower = meterly.create_customer("user_a", "tokens")
    upper = meterly.create_customer("USER_A", "tokens")
    assert lower.customer_id != upper.customer_id


@pytest.mark.parametrize("unit", ["tokens", "seconds"])
def test_customer_exists_already_whatever_its_unit(meterly, customer, unit):
    error = refused(MeterlyCustomerExistsError, meterly.create_customer, "user_1", unit)
    assert error.customer_id == customer
    assert error.details == {"customerId": customer}
    assert (error.method, error.path) == ("POST", "/v1/customers")


def test_grant_creates_the_customer_and_returns_the_balance(meterly):
    result = meterly.grant_credits("user_2", 40, "tokens", "order-1", "Willkommen: é")
    grant = result.grant
    assert (grant.credit_amount, grant.credit_unit) == (40, "tokens")
    assert (grant.reference, grant.description) == ("order-1", "Willkommen: é")
    assert result.balance == tokens(40)
    assert meterly.find_customer("user_2").customer_id == grant.customer_id


def test_balances_has_every_unit(meterly, customer):
    meterly.add_credits(customer, 7, "seconds")
    balances = meterly.get_balances(customer)
    assert balances.customer_id == customer
    assert sorted(balances.balances, key=lambda item: item.credit_unit) == [
        Balance("seconds", 7, 0, 7),
        tokens(100),
    ]
    assert meterly.get_balance(customer) == tokens(100)


def test_add_and_use_return_entry_and_balance(meterly, customer):
    added = meterly.add_credits(customer, 20, reference="top-up")
    used = meterly.use_credits(customer, 30, reference="job")
    assert added.balance == tokens(120)
    assert used.balance == tokens(90)
    assert (added.entry.kind, added.entry.balance_delta) == ("credits_added", 20)
    assert (used.entry.kind, used.entry.balance_delta) == ("credits_used", -30)
    assert (used.entry.amount, used.entry.unit) == (30, "tokens")
    assert used.entry.reference == "job"


def test_entries_are_listed_newest_first_and_by_unit(meterly, customer):
    meterly.add_credits(customer, 7, "seconds", "more")
    meterly.use_credits(customer, 30, "tokens", "job")
    page = meterly.list_entries(customer)
    assert [entry.reference for entry in page.entries] == ["job", "more", "opening"]
    assert [entry.balance_after for entry in page.entries] == [70, 7, 100]
    assert page.next_cursor is None
    page = meterly.list_entries(customer, "seconds")
    assert [entry.kind for entry in page.entries] == ["credits_added"]


def test_entries_go_on_at_the_cursor(meterly, customer):
    oldest, newest = (
        meterly.add_credits(customer, 1, reference=name).entry
        for name in ("first", "second")
    )
    page = meterly.list_entries(customer, cursor=newest.entry_id)
    assert page.entries[0] == oldest
    assert [entry.reference for entry in page.entries] == ["first", "opening"]


def test_async_twins_come_to_the_same(meterly, customer):
    async def work() -> None:
        async with meterly.aguard(customer, 30, reference="job") as held:
            assert await meterly.aget_reservation(held.reservation_id) == held
        with pytest.raises(MeterlyInsufficientCreditsError):
            await meterly.ause_credits(customer, 71)

    asyncio.run(work())
    assert meterly.get_balance(customer) == tokens(70)


def test_using_more_than_available_is_refused_with_numbers(meterly, customer):
    meterly.reserve_credits(customer, 30)
    error = refused(MeterlyInsufficientCreditsError, meterly.use_credits, customer, 71)
    assert error.details == {
        "required": 71,
        "available": 70,
        "reserved": 30,
        "unit": "tokens",
    }
    assert error.held_by_running_work
    assert error.path == f"/v1/customers/{customer}/credits/use"
    assert meterly.get_balance(customer) == tokens(100, 30)


def test_unit_nobody_granted_is_insufficient(meterly, customer):
    error = refused(
        MeterlyInsufficientCreditsError, meterly.reserve_credits, customer, 1, unit="x"
    )
    assert error.details == {"required": 1, "available": 0, "reserved": 0, "unit": "x"}


def test_balance_cannot_leave_the_range(meterly, customer):
    refused(MeterlyInvalidRequestError, meterly.add_credits, customer, MAX_AMOUNT)
    assert meterly.get_balance(customer) == tokens(100)
    meterly.add_credits(customer, MAX_AMOUNT - 100)
    assert meterly.get_balance(customer) == tokens(MAX_AMOUNT)


# Reservations


def test_reservation_holds_and_commit_charges(meterly, customer):
    before = dt.datetime.now(dt.UTC)
    held = meterly.reserve_credits(customer, 30, reference="job", ttl_seconds=60)
    assert (held.status, held.amount, held.unit) == ("reserved", 30, "tokens")
    assert (held.customer_id, held.reference) == (customer, "job")
    assert held.balance == tokens(100, 30)
    assert 50 < (held.expires_at - before).total_seconds() < 70
    assert meterly.get_reservation(held.reservation_id) == held

    done = meterly.commit_reservation(held.reservation_id)
    assert (done.status, done.balance) == ("committed", tokens(70))
    assert meterly.get_reservation(held.reservation_id).status == "committed"


def test_release_gives_back(meterly, customer):
    held = meterly.reserve_credits(customer, 30)
    done = meterly.release_reservation(held.reservation_id)
    assert (done.status, done.balance) == ("released", tokens(100))


@pytest.mark.parametrize(("amount", "left"), [(10, 90), (0, 100), (30, 70)])
def test_commit_of_less_returns_the_rest(meterly, customer, amount, left):
    held = meterly.reserve_credits(customer, 30)
    done = meterly.commit_reservation(held.reservation_id, amount=amount)
    assert (done.status, done.balance) == ("committed", tokens(left))


def test_commit_of_more_than_the_hold_is_refused(meterly, customer):
    held = meterly.reserve_credits(customer, 30)
    error = refused(
        MeterlyInvalidRequestError,
        meterly.commit_reservation,
        held.reservation_id,
        amount=31,
    )
    assert list(error.fields) == ["amount"]
    assert meterly.get_balance(customer) == tokens(100, 30)


def test_reserving_more_than_available_is_refused(meterly, customer):
    error = refused(
        MeterlyInsufficientCreditsError, meterly.reserve_credits, customer, 101
    )
    assert (error.required, error.available, error.reserved) == (101, 100, 0)
    assert not error.held_by_running_work


def test_repeated_settlement_moves_nothing_and_the_opposite_is_refused(
    meterly, customer
):
    committed = meterly.reserve_credits(customer, 10).reservation_id
    released = meterly.reserve_credits(customer, 10).reservation_id
    for _ in range(2):
        assert meterly.commit_reservation(committed).status == "committed"
        assert meterly.release_reservation(released).status == "released"
    refused(MeterlyReservationCommittedError, meterly.release_reservation, committed)
    refused(MeterlyReservationReleasedError, meterly.commit_reservation, released)
    assert meterly.get_balance(customer) == tokens(90)


def test_expired_hold_is_free_again_and_cannot_be_settled(meterly, customer):
    held = meterly.reserve_credits(
        customer, 100, ttl_seconds=1, idempotency_key="key-1"
    )
    let_expire()
    assert meterly.get_balance(customer) == tokens(100)
    assert meterly.get_balances(customer).balances == (tokens(100),)
    now = meterly.get_reservation(held.reservation_id)
    assert (now.status, now.balance) == ("expired", tokens(100))
    refused(
        MeterlyReservationExpiredError, meterly.commit_reservation, held.reservation_id
    )
    refused(
        MeterlyReservationExpiredError, meterly.release_reservation, held.reservation_id
    )
    replayed = meterly.reserve_credits(
        customer, 100, ttl_seconds=1, idempotency_key="key-1", reference=held.reference
    )
    assert replayed.reservation_id == held.reservation_id
    assert replayed.status == "expired"
    # Enforced when credits are wanted, without waiting for a sweep.
    assert meterly.use_credits(customer, 100).balance == tokens(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_balance("cus_none"),
        lambda client: client.get_balances("cus_none"),
        lambda client: client.add_credits("cus_none", 1),
        lambda client: client.use_credits("cus_none", 1),
        lambda client: client.reserve_credits("cus_none", 1),
        lambda client: client.get_reservation("res_none"),
        lambda client: client.commit_reservation("res_none"),
        lambda client: client.release_reservation("res_none"),
    ],
)
def test_unknown_id_is_not_found(meterly, call):
    refused(MeterlyNotFoundError, call, meterly)


def test_extended_hold_lasts_as_long_as_asked_from_now(meterly, customer):
    held = meterly.reserve_credits(customer, 30, ttl_seconds=60)

    def extend(seconds, key):
        arguments = {"reservationId": held.reservation_id, "ttlSeconds": seconds}
        body = meterly.transport.send(Call("extend_reservation", arguments, key))
        left = dt.datetime.fromisoformat(body["expiresAt"]) - dt.datetime.now(dt.UTC)
        return body["status"], round(left.total_seconds(), -1)

    assert extend(600, "key-1") == ("reserved", 600)
    assert extend(300, "key-2") == ("reserved", 300)
    # A replay sets nothing, and shows the present time.
    assert extend(600, "key-1") == ("reserved", 300)
    refused(MeterlyIdempotencyMismatchError, extend, 601, "key-1")
    meterly.commit_reservation(held.reservation_id)
    refused(MeterlyReservationCommittedError, extend, 60, "key-3")


def test_hold_past_its_time_is_not_extended(meterly, customer):
    held = meterly.reserve_credits(customer, 30, ttl_seconds=1)
    let_expire()
    arguments = {"reservationId": held.reservation_id, "ttlSeconds": 60}
    call = Call("extend_reservation", arguments, "key-1")
    refused(MeterlyReservationExpiredError, meterly.transport.send, call)
    assert meterly.get_balance(customer) == tokens(100)


# Keys and references


def replays(client: Any, customer: str) -> dict[str, Any]:
    held = client.reserve_credits(customer, 5, idempotency_key="hold", reference="r")
    again = client.reserve_credits(customer, 6, idempotency_key="give", reference="r")
    return {
        "grant": lambda: client.grant_credits(
            "user_1", 9, "tokens", "g", idempotency_key="k"
        ),
        "add": lambda: client.add_credits(
            customer, 9, reference="a", idempotency_key="k"
        ),
        "use": lambda: client.use_credits(
            customer, 9, reference="u", idempotency_key="k"
        ),
        "reserve": lambda: client.reserve_credits(
            customer, 9, reference="h", ttl_seconds=60, idempotency_key="k"
        ),
        "commit": lambda: client.commit_reservation(
            held.reservation_id, amount=3, idempotency_key="k"
        ),
        "release": lambda: client.release_reservation(
            again.reservation_id, idempotency_key="k"
        ),
    }


@pytest.mark.parametrize(
    "operation", ["grant", "add", "use", "reserve", "commit", "release"]
)
def test_f42_replay_is_the_first_answer_and_moves_nothing(meterly, customer, operation):
    call = replays(meterly, customer)[operation]
    first = call()
    after = meterly.get_balance(customer)
    # The balance of a replay is the one after that movement, not today's.
    meterly.add_credits(customer, 1000, reference="later")
    assert call() == first
    now = meterly.get_balance(customer)
    assert (now.balance, now.reserved) == (after.balance + 1000, after.reserved)


def test_f42_key_with_another_request_is_a_mismatch(meterly, customer):
    meterly.use_credits(customer, 1, reference="r", idempotency_key="k")
    for amount, reference in ((2, "r"), (1, "s")):
        refused(
            MeterlyIdempotencyMismatchError,
            meterly.use_credits,
            customer,
            amount,
            reference=reference,
            idempotency_key="k",
        )
    refused(
        MeterlyIdempotencyMismatchError,
        meterly.add_credits,
        customer,
        1,
        reference="r",
        idempotency_key="k",
    )
    assert meterly.get_balance(customer) == tokens(99)


def test_f40_keys_that_differ_in_case_stay_apart(meterly, customer):
    meterly.use_credits(customer, 1, reference="r", idempotency_key="key")
    meterly.use_credits(customer, 1, reference="r", idempotency_key="KEY")
    assert meterly.get_balance(customer) == tokens(98)


def test_refusal_leaves_no_record_of_the_key(meterly, customer):
    arguments = {"reference": "r", "idempotency_key": "k"}
    refused(
        MeterlyInsufficientCreditsError,
        meterly.use_credits,
        customer,
        150,
        **arguments,
    )
    meterly.add_credits(customer, 100)
    assert meterly.use_credits(customer, 150, **arguments).balance == tokens(50)


def test_replayed_reservation_has_its_present_status(meterly, customer):
    arguments = {"reference": "r", "idempotency_key": "k"}
    held = meterly.reserve_credits(customer, 10, **arguments)
    meterly.commit_reservation(held.reservation_id)
    replayed = meterly.reserve_credits(customer, 10, **arguments)
    assert replayed.reservation_id == held.reservation_id
    assert (replayed.status, replayed.balance) == ("committed", held.balance)


@pytest.mark.parametrize("kind", ["grant", "add"])
def test_reference_dedupes_grants_and_adds(meterly, customer, kind):
    def move(amount: int) -> Any:
        if kind == "grant":
            return meterly.grant_credits("user_1", amount, "tokens", "order-7")
        return meterly.add_credits(customer, amount, reference="order-7")

    first = move(5)
    assert move(5) == first
    refused(MeterlyReferenceConflictError, move, 6)
    assert meterly.get_balance(customer) == tokens(105)


def test_reference_is_only_a_label_for_use_and_reserve(meterly, customer):
    for _ in range(2):
        meterly.use_credits(customer, 5, reference="job")
        meterly.reserve_credits(customer, 5, reference="job")
    assert meterly.get_balance(customer) == tokens(90, 10)


def test_reference_belongs_to_one_unit(meterly, customer):
    meterly.add_credits(customer, 5, "seconds", "order")
    meterly.add_credits(customer, 6, "tokens", "order")
    assert meterly.get_balance(customer) == tokens(106)


# The client's guard, and its key


@pytest.fixture
def guarded(meterly, customer) -> Any:
    """What runs work under the key "k", and what the work has done so far."""
    done: list[Any] = []

    def run(work: Any = lambda: None, **arguments: Any) -> None:
        def callback() -> None:
            work()
            done.append(meterly.get_balance(customer).reserved)

        meterly.guard(
            customer, 10, **{"idempotency_key": "k", "callback": callback, **arguments}
        )

    run.done = done
    return run


def test_key_of_a_guard_is_charged_once(meterly, customer, guarded):
    guarded(reference="job")
    for _ in range(2):
        with pytest.raises(MeterlyDuplicateError) as caught:
            guarded(reference="job")
        assert (caught.value.state, caught.value.in_progress) == ("committed", False)
        assert caught.value.reference == "job"
    assert guarded.done == [10]
    assert meterly.get_balance(customer) == tokens(90)


@pytest.mark.parametrize("failures", [1, 3])
def test_key_of_a_guard_may_be_tried_again_after_a_failure(
    meterly, customer, guarded, failures
):
    for _ in range(failures):
        with pytest.raises(ZeroDivisionError):
            guarded(lambda: 1 / 0)
    assert meterly.get_balance(customer) == tokens(100)
    guarded()
    with pytest.raises(MeterlyDuplicateError):
        guarded()
    assert guarded.done == [10]
    assert meterly.get_balance(customer) == tokens(90)


def test_key_of_a_guard_may_be_tried_again_after_a_top_up(meterly, customer, guarded):
    meterly.use_credits(customer, 95)
    with pytest.raises(MeterlyInsufficientCreditsError):
        guarded()
    meterly.add_credits(customer, 5)
    guarded()
    assert meterly.get_balance(customer) == tokens(0)


def test_key_of_a_guard_at_work_is_in_progress(meterly, customer, guarded):
    def again() -> None:
        with pytest.raises(MeterlyDuplicateError) as caught:
            guarded()
        assert (caught.value.state, caught.value.in_progress) == ("reserved", True)

    guarded(again)
    assert guarded.done == [10]
    assert meterly.get_balance(customer) == tokens(90)


def test_key_of_a_guard_whose_hold_has_expired_is_tried_again(
    meterly, customer, guarded
):
    # As if its process had died.
    held = meterly.guard(customer, 10, idempotency_key="k")
    held.__enter__()
    with pytest.raises(MeterlyDuplicateError, match="in use"):
        guarded()
    let_expire()
    guarded()
    assert len(guarded.done) == 1
    assert meterly.get_balance(customer).balance == 90
    # That one comes back: the first hold is over, and the second one is charged.
    refused(MeterlyReservationExpiredError, held.__exit__, None, None, None)
    assert meterly.get_balance(customer).balance == 90


def test_key_of_a_guard_for_something_else_is_a_mismatch(meterly, customer, guarded):
    guarded()
    for other in ({"reference": "other"}, {"ttl_seconds": 60}, {"unit": "seconds"}):
        refused(MeterlyIdempotencyMismatchError, guarded, **other)
    assert guarded.done == [10]


def test_async_guard_has_the_same_rules(meterly, customer):
    done = []

    async def fail() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        done.append(1)

    async def run(callback: Any) -> None:
        await meterly.aguard(customer, 10, idempotency_key="k", callback=callback)

    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            await run(fail)
        await run(work)
        with pytest.raises(MeterlyDuplicateError):
            await run(work)

    asyncio.run(story())
    assert done == [1]
    assert meterly.get_balance(customer) == tokens(90)


@pytest.mark.parametrize("operation", ["reserve_credits", "commit_reservation"])
@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_f02_lost_answer_of_a_guard_neither_holds_nor_charges_twice(
    transactional_db: None, operation: str, fault: str
) -> None:
    meterly = MeterlyClient(transport=FaultyTransport(LedgerTransport()))
    customer = meterly.grant_credits("user_1", 100, "tokens", "g").grant.customer_id
    done: list[int] = []

    def guarded() -> None:
        meterly.guard(
            customer, 10, idempotency_key="k", callback=lambda: done.append(1)
        )

    with (
        faults(**{operation: [fault]}),
        pytest.raises(MeterlyUnknownOutcomeError) as unknown,
    ):
        guarded()
    if operation == "commit_reservation":
        assert unknown.value.idempotency_key == "k:commit"
        if fault == "unanswered":
            with pytest.raises(MeterlyDuplicateError) as caught:
                guarded()
            assert not caught.value.in_progress
            assert meterly.get_balance(customer) == tokens(90)
        else:
            with pytest.raises(MeterlyDuplicateError) as caught:
                guarded()
            assert caught.value.in_progress
            # What the message says is to be done.
            held = meterly.reserve_credits(customer, 10, idempotency_key="k")
            meterly.commit_reservation(
                held.reservation_id, idempotency_key=unknown.value.idempotency_key
            )
        assert done == [1]
    elif fault == "unanswered":
        with pytest.raises(MeterlyDuplicateError) as caught:
            guarded()
        assert caught.value.in_progress
        assert meterly.get_balance(customer) == tokens(100, 10)
        let_expire()
        guarded()
    else:
        guarded()
    assert done == [1]
    assert meterly.get_balance(customer) == tokens(90)


# Entries


def test_entries_add_up_to_the_balance(meterly, customer):
    held = meterly.reserve_credits(customer, 30, reference="job")
    meterly.commit_reservation(held.reservation_id, amount=20)
    body = meterly.transport.send(
        Call("list_entries", {"customerId": customer, "unit": "tokens"})
    )
    entries = body["entries"]
    assert body["nextCursor"] is None
    assert sorted(entry["kind"] for entry in entries) == [
        "credits_committed",
        "credits_granted",
        "credits_reserved",
    ]
    assert sum(entry["balanceDelta"] for entry in entries) == 80
    assert sum(entry["reservedDelta"] for entry in entries) == 0
    assert {entry["unit"] for entry in entries} == {"tokens"}
    assert all(entry["createdAt"].endswith("Z") for entry in entries)


# Raw calls: what the typed methods would have stopped


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"amount": "5", "reference": "r"}, "amount"),
        ({"amount": 1.5, "reference": "r"}, "amount"),
        ({"amount": True, "reference": "r"}, "amount"),
        ({"amount": 0, "reference": "r"}, "amount"),
        ({"amount": 2**63, "reference": "r"}, "amount"),
        ({"amount": 5}, "reference"),
        ({"amount": 5, "reference": " r"}, "reference"),
        ({"amount": 5, "reference": "r", "unit": "a b"}, "unit"),
        ({"amount": 5, "reference": "r", "ttl": 5}, "ttl"),
    ],
)
def test_f11_ledger_checks_arguments_itself(meterly, customer, arguments, field):
    call = Call("use_credits", {"customerId": customer, **arguments}, "key-1")
    error = refused(MeterlyInvalidRequestError, meterly.transport.send, call)
    assert list(error.fields) == [field]
    assert set(error.details) == {"fields"}
    assert meterly.get_balance(customer) == tokens(100)


# At the same time


def at_once(count: int, work: Any) -> list[Any]:
    """Return what *count* simultaneous calls of *work* return or raise."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait()
        try:
            return work(number)
        except MeterlyApiError as exc:
            return type(exc)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_f42_one_key_at_once_is_one_movement_and_one_answer(meterly, customer):
    answers = at_once(
        8,
        lambda _: meterly.use_credits(customer, 5, reference="r", idempotency_key="k"),
    )
    assert all(answer == answers[0] for answer in answers), answers
    assert meterly.get_balance(customer) == tokens(95)


def test_f41_holds_at_once_never_exceed_the_balance(meterly, customer):
    answers = at_once(8, lambda _: meterly.reserve_credits(customer, 30))
    assert answers.count(MeterlyInsufficientCreditsError) == 5, answers
    assert meterly.get_balance(customer) == tokens(100, 90)


def test_f41_deliveries_of_one_grant_at_once_are_one_grant(meterly):
    answers = at_once(
        6,
        lambda _: meterly.grant_credits("user_5", 10, "tokens", "order"),
    )
    assert all(answer == answers[0] for answer in answers), answers
    assert answers[0].balance == tokens(10)


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/reservations", "/elsewhere"])
def test_f67_wrong_path_of_the_ledger_is_an_outage_that_names_it(
    live_ledger: str, api_key: str, path: str
) -> None:
    url = f"{live_ledger}{path}"
    patience = {"read_timeout": 30, "deadline": 60}
    with MeterlyClient(api_key, base_url=url, **patience) as meterly:
        for call in (
            lambda: meterly.create_customer("user_1", "image_credits"),
            lambda: meterly.find_customer("user_1"),
            lambda: meterly.get_balance("cus_1"),
            lambda: meterly.reserve_credits("cus_1", 1),
            lambda: meterly.commit_reservation("res_1"),
        ):
            with pytest.raises(MeterlyUnknownOutcomeError) as caught:
                call()
            assert url.rstrip("/") in str(caught.value)
            assert 'METERLY["BASE_URL"]' in str(caught.value)
