"""The sweeper with many rows, with other sweepers, with poison and in an outage."""

from __future__ import annotations

import datetime as dt
import gc
import json
import os
import re
import tracemalloc
from collections import Counter
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.models import F
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_meterly import (
    MeterlyDuplicateError,
    get_client,
    grants,
    guard,
    journal,
    signals,
)
from django_meterly.errors import (
    MeterlyIdempotencyMismatchError,
    MeterlyInvalidRequestError,
)
from django_meterly.journal import sweeping
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.models import Reservation
from django_meterly.testing import FaultyTransport, assert_books_balance, lapse_leases
from tests.backlog import leave_behind, settled_by_two
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from django_meterly.models import Customer
    from django_meterly.transports.base import Call

pytestmark = pytest.mark.django_db(transaction=True)
State = Reservation.State

DAY = dt.timedelta(days=1)
#: 10000 in the environment takes a minute or more.
ROWS = int(os.environ.get("SWEEP_ROWS", "1000"))


@pytest.fixture
def customer(any_ledger: Any) -> Customer:
    return fund("user_1", 1000)


@pytest.fixture
def notebook(settings: Any, tmp_path: Path, monkeypatch: Any) -> Path:
    """The file in which a remote ledger notes what it was told to release."""
    path = tmp_path / "notebook"
    path.touch()
    monkeypatch.setenv("NOTEBOOK", str(path))
    settings.METERLY = {**settings.METERLY, "TRANSPORT": "tests.backlog.Notebook"}
    return path


@pytest.fixture
def stuck() -> Any:
    """What ``reservation_stuck`` was sent for."""
    heard: list[Reservation] = []

    def hear(reservation: Reservation, **kwargs: Any) -> None:
        heard.append(reservation)

    signals.reservation_stuck.connect(hear)
    yield heard
    signals.reservation_stuck.disconnect(hear)


def meterly_settle(*arguments: str) -> str:
    call_command("meterly_settle", *arguments, stdout=(out := StringIO()))
    return out.getvalue()


def settle_json(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(meterly_settle("--json", *arguments))
    return found


def age(rows: Any, by: dt.timedelta) -> None:
    """Let *rows* be older."""
    rows.update(created_at=F("created_at") - by, settled_at=F("settled_at") - by)


# Many rows


def test_lapsed_rows_are_given_up_some_at_a_time(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 10)
    leave_behind(customer, 35)
    with CaptureQueriesContext(connection) as queries:
        assert journal.record_lapsed() == 35
    updates = [q["sql"] for q in queries if q["sql"].startswith("UPDATE")]
    assert len(updates) == 4
    assert states() == ["release_pending"] * 35
    # They have been due since their lease ended.
    assert journal.backlog(3000).due == 35
    assert journal.record_lapsed() == 0


def test_a_settled_row_takes_two_queries_of_the_journal(
    notebook: Path, joined: None
) -> None:
    customer = fund("user_1", 1000)
    leave_behind(customer, 20)
    journal.record_lapsed()
    table = Reservation._meta.db_table
    with CaptureQueriesContext(connection) as queries:
        assert journal.settle_due(get_client()).settled == 20
    # The claim and the outcome; and three to find all of them.
    assert sum(table in q["sql"] for q in queries) == 2 * 20 + 3


@pytest.mark.slow("the sweeper's memory, with a backlog")
def test_memory_does_not_grow_with_the_backlog(
    notebook: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 10)
    monkeypatch.setattr(sweeping, "WINDOW", 20)
    remote = settings.METERLY
    settings.METERLY = {
        **remote,
        "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    }
    customer = fund("user_1", 10_000)
    settings.METERLY = remote

    def collect(count: int) -> None:
        if count % 10 == 0:
            gc.collect()

    def peak(rows: int) -> int:
        leave_behind(customer, rows)
        tracemalloc.start()
        try:
            journal.record_lapsed()
            # What waits for the garbage collector is not kept.
            journal.settle_due(get_client(), on_row=collect)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(30)
    small, large = peak(30), peak(240)
    # A row that is kept takes some KiB; what the interpreter keeps is a plateau.
    assert large - small < (240 - 30) * 1024, (small, large)
    assert set(states()) == {"released"}


@pytest.mark.slow("two sweepers and a large backlog")
@pytest.mark.database
def test_f38_two_sweepers_settle_many_rows_once_each(
    notebook: Path, settings: Any, tmp_path: Path
) -> None:
    remote = settings.METERLY
    settings.METERLY = {
        **remote,
        "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    }
    leave_behind(fund("user_1", ROWS), ROWS)
    settings.METERLY = remote
    said = settled_by_two(tmp_path / "log", timeout=60 + ROWS / 10)
    taken = [int(count) for count in re.findall(r"(\d+) tried", said)]
    assert sum(taken) == ROWS
    # Both had their share.
    assert min(taken) > ROWS / 10, said

    times = Counter(notebook.read_text().split())
    assert len(times) == ROWS
    assert set(times.values()) == {1}
    assert set(Reservation.objects.values_list("state", "settle_attempts")) == {
        ("released", 1)
    }


def test_a_round_ends_when_its_time_is_up(customer: Customer) -> None:
    leave_behind(customer, 3)
    assert journal.record_lapsed() == 3
    assert journal.settle_due(get_client(), seconds=0).taken == 0
    assert journal.settle_due(get_client(), seconds=60).taken == 3


def test_a_backlog_without_an_end_leaves_the_rest_of_the_lapsed(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "BATCH", 10)
    leave_behind(customer, 15)
    assert journal.record_lapsed(seconds=0) == 10
    assert journal.record_lapsed(seconds=0) == 5


# A row that another sweeper has had


def test_a_row_that_was_taken_up_since_it_was_read_is_left_alone(
    remote: Any,
) -> None:
    leave_behind(fund("user_1", 10), 1)
    journal.record_lapsed()
    row = Reservation.objects.select_related("customer").get()
    # Tried by somebody else meanwhile, without success, and due again.
    Reservation.objects.update(settle_attempts=1)
    assert sweeping._sweep_row(get_client(), "default", row) is None
    # Or it has another decision by now.
    Reservation.objects.update(settle_attempts=0, state="commit_pending", charge=1)
    assert sweeping._sweep_row(get_client(), "default", row) is None
    assert "release_reservation" not in remote.operations()


# Poison


class Poisoned(LedgerTransport):
    poison: ClassVar[set[str]] = set()

    def send(self, call: Call) -> dict[str, Any]:
        if call.arguments.get("reservationId") in self.poison:
            raise RuntimeError("poison")
        return super().send(call)


class PoisonedRemote(FaultyTransport):
    """The same at the far end of a line."""

    far_end = "tests.test_sweeper.Poisoned"


@pytest.mark.database
@pytest.mark.parametrize("decision", ["fail", "succeed"])
def test_f76_rows_whose_account_the_database_refuses_get_stuck_and_stop_no_others(
    decision: str,
    settings: Any,
    customer: Customer,
    refusing: Callable[[str], None],
    stuck: list[Reservation],
) -> None:
    settings.METERLY = {**settings.METERLY, "MAX_SETTLE_ATTEMPTS": 3}
    fund("user_1", 100, "refused")
    for unit in ["refused"] * 6 + ["image_credits"] * 20:
        work = guard(customer, 1, unit)
        work.reserve()
        row = work.reservation
        assert row is not None
        if decision == "succeed":
            journal.record_success(row, 1)
    refusing("refused")
    lapse_leases()
    journal.record_lapsed()
    lapse_leases()
    done = journal.settle_due(get_client())
    assert (done.taken, done.settled, done.outage) == (26, 20, False)
    assert not stuck
    for _ in range(2):
        lapse_leases()
        assert not journal.settle_due(get_client()).outage
    assert len(stuck) == 6
    rows = Reservation.objects.stuck()
    assert set(rows.values_list("unit", flat=True)) == {"refused"}
    assert all("refused" in row.last_error for row in rows)
    call_command("meterly_ledger_verify", verbosity=0)


def test_an_answer_that_comes_too_late_does_not_postpone_another_decision(
    remote: Any,
) -> None:
    customer = fund("user_1")
    work = guard(customer, 25, idempotency_key="k")
    work.reserve()
    lapse_leases()
    journal.record_lapsed()
    lapse_leases()

    def succeed_meanwhile() -> None:
        assert journal.record_success(Reservation.objects.get(), 25)
        lapse_leases()
        raise MeterlyInvalidRequestError("no")

    remote.meet("release_reservation", succeed_meanwhile)
    journal.settle_due(get_client(), limit=1)
    row = Reservation.objects.get()
    # What was refused is the release, of which nothing is left.
    assert (row.state, row.refusals, row.last_error) == ("commit_pending", 0, "")
    assert journal.settle_due(get_client()).settled == 1
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("transport", [Poisoned, PoisonedRemote])
def test_f38_a_poison_row_stops_no_others_and_gets_stuck(
    transport: Any, settings: Any, stuck: list[Reservation]
) -> None:
    settings.METERLY = {
        **settings.METERLY,
        "TRANSPORT": f"{__name__}.{transport.__name__}",
        "MAX_SETTLE_ATTEMPTS": 3,
    }
    customer = fund("user_1", 100)
    leave_behind(customer, 20)
    bad = Reservation.objects.all()[7]
    Poisoned.poison = {str(bad.reservation_id)}
    try:
        assert journal.sweep(get_client()) == (20, 20)
        bad.refresh_from_db()
        assert Counter(states()) == {"released": 19, "release_pending": 1}
        assert (bad.state, bad.refusals, bad.settle_attempts) == (
            "release_pending",
            1,
            1,
        )
        assert bad.last_error == "poison"
        assert not Reservation.objects.due().exists()
        for _ in range(2):
            lapse_leases()
            assert journal.settle_due(get_client()).taken == 1
        bad.refresh_from_db()
        assert bad.stuck_at
        assert stuck == [bad]
        lapse_leases()
        assert journal.settle_due(get_client()).taken == 0
    finally:
        Poisoned.poison = set()
    assert journal.retry_stuck(Reservation.objects.all()) == 1
    assert journal.settle_due(get_client()).settled == 1
    assert states() == ["released"] * 20
    assert balance(customer) == (100, 0)
    assert_books_balance()


# Outages


def test_f38_a_sweeper_that_meets_an_outage_ends_its_round(remote: Any) -> None:
    customer = fund("user_1", 100)
    leave_behind(customer, 50)
    remote.calls.clear()
    remote.meet("release_reservation", *["lost"] * 5, "unsent")
    found = settle_json()
    assert (found["lapsed"], found["taken"], found["settled"]) == (50, 3, 0)
    assert found["outage"] is True
    assert found["due"] == 47
    assert remote.operations() == ["release_reservation"] * 3
    # Those that were tried do not come back at once, nor all together.
    backed_off = set(
        Reservation.objects.filter(settle_attempts=1).values_list(
            "next_attempt_at", flat=True
        )
    )
    assert len(backed_off) == 3
    assert all(moment > timezone.now() for moment in backed_off)

    # An outage is no refusal, however long.
    assert settle_json()["taken"] == 3
    assert set(Reservation.objects.values_list("refusals", flat=True)) == {0}
    found = settle_json()
    assert (found["taken"], found["settled"], found["outage"]) == (44, 44, False)
    lapse_leases()
    assert settle_json()["settled"] == 6
    assert states() == ["released"] * 50
    assert movements() == ["reserved"] * 50 + ["released"] * 50
    assert_books_balance()


def test_lost_answers_now_and_then_do_not_end_a_round(remote: Any) -> None:
    leave_behind(fund("user_1", 100), 30)
    remote.meet("release_reservation", *["lost", "lost", None] * 10)
    journal.record_lapsed()
    found = journal.settle_due(get_client())
    assert (found.taken, found.settled, found.outage) == (30, 10, False)


def test_the_back_off_grows_up_to_an_hour(remote: Any) -> None:
    leave_behind(fund("user_1", 100), 1)
    remote.meet("release_reservation", *["lost"] * 12)
    journal.record_lapsed()
    waits = []
    for _ in range(12):
        assert journal.settle_due(get_client()).taken == 1
        next_attempt_at = Reservation.objects.get().next_attempt_at
        assert next_attempt_at
        waits.append((next_attempt_at - timezone.now()).total_seconds())
        lapse_leases()
    assert 0 < waits[0] <= 10
    assert 20 <= waits[3] <= 80
    assert 1750 < waits[-1] <= 3600


# Debts, and stuck rows


def owe(customer: Customer) -> Reservation:
    """Leave a debt behind, as old as the journal keeps anything."""
    with guard(customer, 5, reference="owed") as work:
        work.charge(5 + 1000)
    (row,) = Reservation.objects.all()
    assert row.state == State.UNBILLED
    Reservation.objects.update(decided_at=timezone.now() - 91 * DAY)
    lapse_leases()
    return row


def test_an_old_debt_is_tried_once_more_before_it_is_stuck(
    any_ledger: Any, stuck: list[Reservation]
) -> None:
    customer = fund("user_1", 10)
    row = owe(customer)
    assert journal.settle_due(get_client()).taken == 1
    row.refresh_from_db()
    assert (row.state, bool(row.stuck_at)) == ("unbilled", True)
    assert stuck == [row]

    fund("user_1", 1000)
    assert journal.retry_stuck(Reservation.objects.all()) == 1
    assert journal.settle_due(get_client()).settled == 1
    row.refresh_from_db()
    assert (row.state, row.stuck_at) == ("committed", None)
    assert balance(customer) == (5, 0)
    assert_books_balance()


def test_an_old_debt_is_not_stuck_by_an_outage(
    remote: Any, stuck: list[Reservation]
) -> None:
    row = owe(fund("user_1", 10))
    remote.meet("use_credits", "lost")
    remote.meet("commit_reservation", "lost")
    journal.settle_due(get_client())
    row.refresh_from_db()
    assert (row.state, row.stuck_at, stuck) == ("unbilled", None, [])


def refuse(remote: Any, count: int) -> None:
    """Let *count* releases be refused, for the last time."""
    remote.meet("release_reservation", *[MeterlyInvalidRequestError("no")] * count)
    Reservation.objects.filter(state="release_pending").update(refusals=100)


def test_the_command_ends_with_3_when_rows_are_stuck_and_tries_them_again(
    remote: Any,
) -> None:
    customer = fund("user_1", 100)
    leave_behind(customer, 2)
    journal.record_lapsed()
    refuse(remote, 2)
    with pytest.raises(CommandError, match="Stuck reservations: 2") as caught:
        meterly_settle()
    assert caught.value.returncode == 3
    # Nobody tries them, until somebody says so.
    lapse_leases()
    with pytest.raises(CommandError):
        meterly_settle()
    assert states() == ["release_pending"] * 2

    found = settle_json("--retry-stuck")
    assert (found["retried"], found["settled"], found["stuck"]) == (2, 2, 0)
    assert states() == ["released"] * 2
    assert set(Reservation.objects.values_list("refusals", "stuck_at")) == {(0, None)}
    assert balance(customer) == (100, 0)


def test_only_stuck_rows_are_tried_again(remote: Any) -> None:
    customer = fund("user_1", 100)
    leave_behind(customer, 1)
    journal.record_lapsed()
    later = timezone.now() + DAY
    Reservation.objects.update(next_attempt_at=later, refusals=2)
    assert journal.retry_stuck(Reservation.objects.all()) == 0
    assert set(Reservation.objects.values_list("next_attempt_at", "refusals")) == {
        (later, 2)
    }


# The command


def rows() -> list[Any]:
    return sorted(Reservation.objects.values_list(), key=str)


def test_a_dry_run_tells_and_changes_nothing(remote: Any) -> None:
    customer = fund("user_1", 100)
    leave_behind(customer, 3)
    with guard(customer, 1):
        pass
    remote.meet("commit_reservation", "lost")
    with guard(customer, 1):
        pass
    age(Reservation.objects.filter(state="committed"), 91 * DAY)
    lapse_leases()
    remote.meet("grant_credits", "lost")
    grants.grant(get_client(), customer, 5, "image_credits", reason="r", reference="g")
    remote.calls.clear()
    before = rows()
    said = meterly_settle("--dry-run").splitlines()
    assert [line.split() for line in said] == [
        ["Nothing", "is", "changed.", "These", "would", "be"],
        ["given", "up:", "3", "reserved"],
        ["carried", "out:", "1", "commit", "pending"],
        ["tried", "again:", "0", "of", "0", "stuck"],
        ["grants", "asked:", "1"],
        ["deleted", "as", "old:", "1"],
    ]
    found = settle_json("--dry-run")
    assert found.pop("oldest_due_seconds") >= 86400
    assert found == {
        "dry_run": True,
        "lapsed": 3,
        "due": 1,
        "by_state": {"reserved": 3, "commit_pending": 1},
        "unbilled": 0,
        "stuck": 0,
        "grants": 1,
        "prunable": 1,
    }
    assert rows() == before
    assert remote.operations() == []


def test_json_counts_what_was_done_and_what_is_left(customer: Customer) -> None:
    leave_behind(customer, 5)
    found = settle_json("--limit=2")
    assert found.pop("oldest_due_seconds") >= 3600
    assert found == {
        "lapsed": 5,
        "taken": 2,
        "settled": 2,
        "grants": 0,
        "pruned": 0,
        "retried": 0,
        "outage": False,
        "due": 3,
        "unbilled": 0,
        "stuck": 0,
    }
    found = settle_json()
    assert (found["settled"], found["due"]) == (3, 0)
    assert found["oldest_due_seconds"] is None


def test_older_than_leaves_the_younger_alone(customer: Customer) -> None:
    leave_behind(customer, 4)
    some = list(Reservation.objects.values_list("pk", flat=True)[:2])
    Reservation.objects.filter(pk__in=some).update(
        lease_until=timezone.now() - dt.timedelta(minutes=5)
    )
    found = settle_json("--older-than=1800")
    assert (found["lapsed"], found["settled"]) == (2, 2)
    assert Counter(states()) == {"released": 2, "reserved": 2}
    found = settle_json("--older-than=60")
    assert (found["lapsed"], found["settled"]) == (2, 2)


def test_a_terminal_gets_a_progress_bar(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    leave_behind(customer, 4)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    meterly_settle()
    assert re.search(r"\[\.+\]", terminal.getvalue())


# Retention


def make(customer: Customer, state: str, **fields: Any) -> Reservation:
    now = timezone.now()
    needed: dict[str, Any] = {
        "intent": {"lease_until": now + DAY},
        "reserved": {"lease_until": now + DAY},
        "release_pending": {"next_attempt_at": now + DAY},
        "commit_pending": {"next_attempt_at": now + DAY, "charge": 1},
        "unbilled": {"next_attempt_at": now + DAY, "charge": 1, "owed": 1},
    }.get(state, {"settled_at": now})
    return Reservation.objects.create(
        customer=customer,
        unit="image_credits",
        amount=1,
        reference="old",
        key=f"{state}-{Reservation.objects.count()}",
        ttl_seconds=300,
        state=state,
        **{**needed, **fields},
    )


def test_only_what_was_settled_long_ago_is_deleted(customer: Customer) -> None:
    for state in State.values:
        make(customer, state)
    # Without the moment of its end, as before there was one for every row.
    make(customer, "denied", settled_at=None)
    stuck = make(customer, "commit_pending", stuck_at=timezone.now())
    assert journal.prune() == 0
    age(Reservation.objects.all(), 89 * DAY)
    assert journal.prune() == 0
    age(Reservation.objects.all(), 2 * DAY)
    late = make(customer, "committed")
    age(Reservation.objects.filter(pk=late.pk), 80 * DAY)
    # Begun long ago, and settled only just now.
    debt = make(customer, "committed")
    Reservation.objects.filter(pk=debt.pk).update(created_at=timezone.now() - 99 * DAY)

    assert journal.prune() == 6
    assert Counter(states()) == Counter(
        [
            "intent",
            "reserved",
            "release_pending",
            "commit_pending",
            "unbilled",
            stuck.state,
            late.state,
            debt.state,
        ]
    )
    assert journal.prune() == 0


def test_old_rows_are_deleted_some_at_a_time(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(25):
        make(customer, "released")
    age(Reservation.objects.all(), 91 * DAY)
    monkeypatch.setattr(sweeping, "BATCH", 10)
    with CaptureQueriesContext(connection) as queries:
        assert settle_json()["pruned"] == 25
    assert sum(q["sql"].startswith("DELETE") for q in queries) == 3


def test_every_end_is_dated_by_the_database(any_ledger: Any) -> None:
    customer = fund("user_1", 10)
    with guard(customer, 1):
        pass
    with pytest.raises(LookupError), guard(customer, 1):
        raise LookupError
    with pytest.raises(Exception, match="credits"):
        guard(customer, 100).reserve()
    assert states() == ["committed", "released", "denied"]
    assert not Reservation.objects.filter(settled_at=None).exists()


def forget(customer: Customer) -> None:
    age(Reservation.objects.filter(customer=customer), 91 * DAY)
    assert journal.prune() >= 1
    assert states() == []


def test_a_forgotten_key_is_still_refused_for_the_same_request(
    customer: Customer,
) -> None:
    with guard(customer, 5, reference="job-1", idempotency_key="k"):
        pass
    forget(customer)
    for _ in range(2):
        with pytest.raises(MeterlyDuplicateError) as caught:
            guard(customer, 5, reference="job-1", idempotency_key="k").reserve()
        assert caught.value.state == "committed"
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (995, 0)
    assert_books_balance()


def test_f74_a_forgotten_key_stays_refused_for_another_request(
    customer: Customer,
) -> None:
    with guard(customer, 5, reference="job-1", idempotency_key="k"):
        pass
    forget(customer)
    for _ in range(3):
        with pytest.raises(MeterlyIdempotencyMismatchError):
            guard(customer, 7, reference="job-2", idempotency_key="k").reserve()
    # An attempt on record would be followed by the next, with a key of its own.
    assert states() == []
    assert balance(customer) == (995, 0)


def test_a_forgotten_key_whose_work_failed_may_be_used_again(
    customer: Customer,
) -> None:
    def work() -> Any:
        return guard(customer, 5, reference="job-1", idempotency_key="k")

    with pytest.raises(LookupError), work():
        raise LookupError
    forget(customer)
    with pytest.raises(MeterlyDuplicateError) as caught:
        work().reserve()
    assert caught.value.state == "released"
    with work():
        pass
    assert states() == ["released", "committed"]
    assert balance(customer) == (995, 0)
    assert_books_balance()
