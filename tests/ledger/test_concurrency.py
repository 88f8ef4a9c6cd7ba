from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.core.management import call_command
from django.db import connection

from django_meterly import errors
from django_meterly.db import from_now
from django_meterly.ledger import customers, expiry, grants, spending
from django_meterly.ledger.models import Entry, Hold, LedgerCustomer, Workspace
from tests.ledger.spender import run, start_spender

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("any_path"),
    pytest.mark.database,
    # On PostgreSQL both ways to move credits.
    pytest.mark.sample(1),
    *(
        [pytest.mark.slow("what many do to one ledger at once, which PostgreSQL tries")]
        if connection.vendor == "sqlite"
        else []
    ),
]

# What a project may have set, and the operations have to bear.
STRICTEST = {
    "postgresql": {"isolation_level": 4},
    "mysql": {"isolation_level": "serializable"},
    "sqlite": {"transaction_mode": "EXCLUSIVE"},
}


def together(*calls):
    """Run *calls* at the same moment; return their results, or their exceptions."""
    barrier = threading.Barrier(len(calls))

    def one(call):
        try:
            connection.ensure_connection()
            barrier.wait()
            return call()
        except errors.MeterlyApiError as exc:
            return exc
        finally:
            connection.close()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def top_up(workspace, amount):
    grants.add(
        workspace.pk,
        LedgerCustomer.objects.get().public_id,
        amount=amount,
        reference="top-up",
        idempotency_key="top-up",
    )


@pytest.mark.slow("3200 attempts to spend by 16 processes")
def test_f40_of_3200_attempts_of_16_processes_exactly_1000_succeed(workspace, customer):
    top_up(workspace, 900)

    counts = run([start_spender("user_1", attempts=200) for _ in range(16)])

    assert sum(succeeded for succeeded, refused in counts) == 1000
    assert sum(refused for succeeded, refused in counts) == 2200
    account = customers.default_balance(workspace.pk, customer)
    assert (account.balance, account.reserved) == (1000, 1000)
    call_command("meterly_ledger_verify")


def test_f40_the_strictest_isolation_is_retried_not_reported(workspace, customer):
    options = STRICTEST[connection.vendor]

    counts = run(
        [start_spender("user_1", attempts=40, options=options) for _ in range(4)]
    )

    assert sum(succeeded for succeeded, refused in counts) == 100
    call_command("meterly_ledger_verify")


def test_f41_six_deliveries_of_one_grant_at_once_are_one_grant(workspace):
    def deliver(number):
        return lambda: grants.grant(
            workspace.pk,
            external_id="user_1",
            amount=100,
            credit_unit="credits",
            reference="invoice-1",
            idempotency_key=f"delivery-{number}",
        )

    results = together(*(deliver(number) for number in range(6)))

    assert len({result.entry_id for result in results}) == 1
    assert sorted(result.replayed for result in results) == [False] + [True] * 5
    assert Entry.objects.count() == 1
    assert LedgerCustomer.objects.count() == 1
    call_command("meterly_ledger_verify")


def test_f41_of_six_holds_at_once_only_those_covered_succeed(workspace, customer):
    def hold(number):
        return lambda: spending.reserve(
            workspace.pk,
            customer,
            amount=40,
            reference="job",
            idempotency_key=f"job-{number}",
        )

    results = together(*(hold(number) for number in range(6)))

    denied = [
        result
        for result in results
        if isinstance(result, errors.MeterlyInsufficientCreditsError)
    ]
    assert len(denied) == 4
    account = customers.default_balance(workspace.pk, customer)
    assert (account.balance, account.reserved) == (100, 80)


def test_f75_all_who_come_when_a_hold_ends_are_served(workspace, customer):
    threads, calls = 8, 5
    for number in range(4):
        held = spending.reserve(
            workspace.pk,
            customer,
            amount=100,
            reference="job",
            idempotency_key=f"all-{number}",
        )
        Hold.objects.live().update(expires_at=from_now(-1))

        def spend(thread, number=number):
            def reserve_and_release():
                for call in range(calls):
                    one = spending.reserve(
                        workspace.pk,
                        customer,
                        amount=1,
                        reference="job",
                        idempotency_key=f"one-{number}-{thread}-{call}",
                    )
                    spending.release(
                        workspace.pk,
                        one.reservation_id,
                        idempotency_key=f"end-{number}-{thread}-{call}",
                    )
                return "served"

            return reserve_and_release

        served = together(*(spend(thread) for thread in range(threads)))

        assert served == ["served"] * threads
        assert Hold.objects.get(public_id=held.reservation_id).status == "expired"
    call_command("meterly_ledger_verify")


def test_f75_a_refusal_never_contradicts_its_details(workspace, customer):
    refusals = []

    def spend(thread):
        def reserve_and_release():
            for call in range(25):
                try:
                    held = spending.reserve(
                        workspace.pk,
                        customer,
                        amount=60,
                        reference="job",
                        idempotency_key=f"reserve-{thread}-{call}",
                    )
                except errors.MeterlyInsufficientCreditsError as exc:
                    refusals.append(exc)
                else:
                    spending.release(
                        workspace.pk,
                        held.reservation_id,
                        idempotency_key=f"release-{thread}-{call}",
                    )

        return reserve_and_release

    assert together(*map(spend, range(6))) == [None] * 6
    assert [exc for exc in refusals if exc.details["available"] >= 60] == []


@pytest.mark.parametrize("amount", [40, 100])
def test_f42_one_key_six_times_at_once_is_one_movement(workspace, customer, amount):
    def hold():
        return spending.reserve(
            workspace.pk,
            customer,
            amount=amount,
            reference="job",
            idempotency_key="job",
        )

    results = together(*[hold] * 6)

    assert len({result.reservation_id for result in results}) == 1
    assert len({result.account for result in results}) == 1
    assert sorted(result.replayed for result in results) == [False] + [True] * 5
    assert Hold.objects.count() == 1


def test_f42_one_commit_six_times_at_once_is_one_movement(workspace, customer):
    held = spending.reserve(
        workspace.pk, customer, amount=40, reference="job", idempotency_key="job"
    )

    def commit():
        return spending.commit(
            workspace.pk, held.reservation_id, idempotency_key="commit"
        )

    results = together(*[commit] * 6)

    assert {result.status for result in results} == {"committed"}
    assert Entry.objects.filter(kind="credits_committed").count() == 1
    assert customers.default_balance(workspace.pk, customer).balance == 60


@pytest.mark.parametrize("close", [spending.commit, spending.release])
def test_f43_a_hold_closed_during_a_sweep_ends_in_exactly_one_state(
    workspace, customer, close
):
    ends = set()
    delay = 0.05
    for number in range(30):
        held = spending.reserve(
            workspace.pk,
            customer,
            amount=1,
            reference="job",
            idempotency_key=f"job-{number}",
        )
        closed = threading.Event()

        def close_at_the_last_moment(
            held=held, number=number, delay=delay, closed=closed
        ):
            Hold.objects.live().update(expires_at=from_now(0.05))
            time.sleep(delay)
            try:
                return close(
                    workspace.pk,
                    held.reservation_id,
                    idempotency_key=f"close-{number}",
                )
            finally:
                closed.set()

        def sweep(closed=closed):
            while not closed.is_set():
                expiry.expire_due()

        result, *_ = together(close_at_the_last_moment, sweep, sweep)

        hold = Hold.objects.get(public_id=held.reservation_id)
        ends.add(hold.status)
        # The next round is closer to the moment where it could go either way.
        if isinstance(result, errors.MeterlyReservationExpiredError):
            assert hold.status == "expired"
            delay = max(0, delay - 0.01)
        else:
            assert hold.status == result.status
            delay += 0.01
        assert hold.entries.exclude(kind="credits_reserved").count() == 1
    assert len(ends) == 2, "The race went one way only: it was none."
    assert not Hold.objects.live().exists()
    call_command("meterly_ledger_verify")


def test_f44_a_process_killed_while_it_moves_credits_leaves_no_half_movement(
    workspace, customer
):
    top_up(workspace, 10_000)
    for delay in (0.1, 0.2, 0.31, 0.43):
        spender = start_spender("user_1", threads=3, attempts=10_000)
        try:
            assert spender.stdout.readline() == "ready\n"
            spender.stdin.write("go\n")
            spender.stdin.flush()
            before = Entry.objects.count()
            while Entry.objects.count() == before:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            spender.kill()
            spender.communicate()

    # Nothing is left locked, every hold has its entry, and the sums are right.
    spending.use(
        workspace.pk, customer, amount=1, reference="page", idempotency_key="page"
    )
    assert Hold.objects.count() == Entry.objects.filter(kind="credits_reserved").count()
    call_command("meterly_ledger_verify")


@pytest.mark.slow("a kill between any two statements of the ledger")
def test_f44_a_kill_between_any_two_statements_leaves_no_half_movement():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.ledger.killed"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert int(done.stdout) > 40


def test_a_workspace_first_needed_by_six_threads_is_made_once():
    results = together(*[lambda: customers.ensure_workspace("new")] * 6)
    assert len({result.pk for result in results}) == 1
    assert Workspace.objects.filter(name="new").count() == 1
