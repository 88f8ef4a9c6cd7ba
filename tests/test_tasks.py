"""Guards inside Celery tasks, and the tasks that settle: real workers, killed."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import uuid
from collections import Counter
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, current_app
from celery.beat import ScheduleEntry, Scheduler
from django.core.management import call_command
from django.utils import timezone
from kombu import Connection

from django_meterly import get_client, guard, journal, tasks
from django_meterly.models import Grant, Reservation
from django_meterly.testing import assert_books_balance, lapse_leases
from tests.backlog import leave_behind
from tests.books import balance, fund, movements, states
from tests.children import (
    broker_options,
    dying_transport,
    environment,
    kill_group,
    started,
    wait_until,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from django_meterly.models import Customer

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]


class Site:
    """A broker in a folder, and the workers and beats of one test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.log = folder / "log"
        self.marker = folder / "marker"
        self.broker = folder / "broker"
        self.broker.mkdir()
        self._folder = folder
        self._stack = stack
        # Leases of three seconds, and no patience with decided rows.
        self._env = {
            **environment(LEASE_GRACE=1, RESERVATION_TTL=2, DEADLINE=2),
            "CHILD_BROKER": str(self.broker),
        }
        self._sender = Celery(
            set_as_current=False,
            broker="filesystem://",
            broker_transport="tests.broker.Transport",
            broker_transport_options=broker_options(str(self.broker)),
        )
        stack.callback(self._sender.close)

    def worker(self, **env: str) -> subprocess.Popen[str]:
        return self._celery(env, "worker", "--pool=prefork", "--concurrency=1")

    def beat(self, name: str) -> subprocess.Popen[str]:
        schedule = f"--schedule={self._folder / name}"
        return self._celery({}, "beat", "--pidfile=", schedule)

    def _celery(self, env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
        command = ["-A", "tests.celery_app", *arguments, "--loglevel=INFO"]
        return self._stack.enter_context(
            started("celery", *command, env={**self._env, **env}, log=self.log)
        )

    def send(self, task: str, *arguments: str, **options: Any) -> None:
        self._sender.send_task(task, arguments, **options)

    def wait_until(self, condition: Any) -> None:
        wait_until(condition, self.log)

    def wait_for_work(self) -> int:
        """Wait until a task is inside its guard; return its process id."""
        self.wait_until(self.marker.exists)
        return int(self.marker.read_text())


@pytest.fixture
def customer(any_ledger: Any) -> Customer:
    return fund("user_1")


@pytest.fixture
def site(customer: Customer, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_held(customer: Customer, reserved: int = 25) -> None:
    assert states() == ["reserved"]
    assert balance(customer) == (100, reserved)
    assert movements() == ["reserved"]


def assert_restored(customer: Customer) -> None:
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
    # The hold's own time was up before the lease was.
    assert movements() == ["reserved", "expired"]
    assert_books_balance()


def test_a_task_that_finishes_is_charged_once(site: Site, customer: Customer) -> None:
    site.worker()
    site.send("finish", customer.external_id)
    site.wait_until(lambda: states() == ["committed"])
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]
    assert_books_balance()


def test_f31_the_credits_of_a_killed_pool_child_come_back(
    site: Site, customer: Customer
) -> None:
    worker = site.worker()
    site.send("hang", customer.external_id, str(site.marker))
    child = site.wait_for_work()
    assert child != worker.pid
    os.kill(child, signal.SIGKILL)
    site.wait_until(lambda: not is_running(child))
    assert_held(customer)

    site.wait_until(Reservation.objects.lapsed().exists)
    # The hold's time is up, too.
    assert_held(customer, reserved=0)
    site.send(tasks.release_stale_reservations.name)
    site.wait_until(lambda: states() == ["released"])
    assert_restored(customer)


def test_f31_the_credits_of_a_killed_worker_come_back(
    site: Site, customer: Customer
) -> None:
    worker = site.worker()
    site.send("hang", customer.external_id, str(site.marker))
    site.wait_for_work()
    kill_group(worker)
    assert_held(customer)

    site.wait_until(Reservation.objects.lapsed().exists)
    # The hold's time is up, too.
    assert_held(customer, reserved=0)
    site.worker()
    site.send(tasks.release_stale_reservations.name)
    site.wait_until(lambda: states() == ["released"])
    assert_restored(customer)


def test_f35_a_soft_time_limit_within_the_commit_loses_no_success(
    site: Site, customer: Customer, settings: Any
) -> None:
    transport = dying_transport(settings.METERLY["TRANSPORT"])
    worker = site.worker(
        HANG_AT="after:commit_reservation",
        CHILD_METERLY=json.dumps({**settings.METERLY, "TRANSPORT": transport}),
    )
    site.send("finish", customer.external_id, soft_time_limit=2)
    site.wait_until(lambda: "SoftTimeLimitExceeded" in site.log.read_text())
    # Durable with the movement where both are one statement.
    durable = journal.carries_statements(get_client(), "default")
    assert states() == ["committed" if durable else "commit_pending"]
    kill_group(worker)

    lapse_leases()
    call_command("meterly_settle")
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


def lose_a_commit_and_a_grant(customer: Customer) -> None:
    """Leave things as if a commit's answer and a grant's question had been lost."""
    with guard(customer, 25):
        pass
    Reservation.objects.filter(state="committed").update(
        state="commit_pending", next_attempt_at=timezone.now(), settled_at=None
    )
    Grant.objects.create(
        customer=customer,
        unit="image_credits",
        amount=50,
        reason="r",
        reference="welcome",
    )


def test_a_lost_commit_and_a_lost_grant_are_carried_out(
    site: Site, customer: Customer
) -> None:
    lose_a_commit_and_a_grant(customer)
    site.worker()
    site.send(tasks.settle_reservations.name)
    site.wait_until(lambda: balance(customer) == (125, 0))
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert_books_balance()


@pytest.mark.slow("two beats and the row of a worker that was killed")
def test_f39_two_beats_release_a_lapsed_reservation_once(
    site: Site, customer: Customer
) -> None:
    site.beat("one")
    site.beat("two")
    worker = site.worker()
    site.send("hang", customer.external_id, str(site.marker))
    site.wait_for_work()
    kill_group(worker)
    assert_held(customer)

    site.worker()
    site.wait_until(lambda: states() == ["released"])
    # Both beats have had another go, and found nothing to do.
    already = site.log.read_text().count("succeeded")
    site.wait_until(lambda: site.log.read_text().count("succeeded") >= already + 4)
    assert_restored(customer)


def test_f39_two_beats_settle_what_is_due_once(site: Site, customer: Customer) -> None:
    leave_behind(customer, 20)
    lose_a_commit_and_a_grant(customer)
    site.beat("one")
    site.beat("two")
    site.worker()
    site.worker()
    site.wait_until(lambda: balance(customer) == (125, 0))
    site.wait_until(lambda: sorted(states()) == ["committed"] + ["released"] * 20)
    already = site.log.read_text().count("succeeded")
    site.wait_until(lambda: site.log.read_text().count("succeeded") >= already + 4)
    assert Counter(movements()) == {"reserved": 21, "committed": 1, "released": 20}
    assert balance(customer) == (125, 0)
    assert_books_balance()


def test_the_beat_schedule_names_tasks_that_exist() -> None:
    schedule = tasks.beat_schedule(release_every=30, settle_every=5)
    assert {entry["task"] for entry in schedule.values()} == {
        tasks.release_stale_reservations.name,
        tasks.settle_reservations.name,
    }
    assert {entry["task"] for entry in schedule.values()} <= set(current_app.tasks)
    assert [entry["schedule"] for entry in schedule.values()] == [30, 5]
    # A backlog does not keep more workers than there are tasks.
    assert [entry["kwargs"] for entry in schedule.values()] == [
        {"seconds": 30},
        {"seconds": 5},
    ]
    # A lagging queue still comes to run them, and a dead one does not fill up.
    assert [entry["options"]["expires"] for entry in schedule.values()] == [600, 100]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("task", "seconds"),
    [
        ("django_meterly.tasks.release_stale_reservations", 20 * 60),
        ("django_meterly.tasks.settle_reservations", 20 * 15),
        ("django_meterly.ledger.tasks.expire_holds", 20 * 60),
        ("django_meterly.ledger.tasks.seal_entries", 20 * 300),
    ],
)
def test_a_run_expires_if_the_scheduler_drops_what_the_entry_says(
    task: str, seconds: int
) -> None:
    # As autodiscover_tasks() does.
    import_module(task.rpartition(".")[0])
    schedule = tasks.beat_schedule(ledger=True)
    (entry,) = [each for each in schedule.values() if each["task"] == task]
    # What django-celery-beat keeps of it in the database.
    # A queue of its own: the broker is that of all tests of the process.
    queue = f"beat-{uuid.uuid4()}"
    options = {"headers": {}, "queue": queue}
    kept = ScheduleEntry(**{**entry, "name": task, "options": options})
    scheduler = Scheduler(current_app, lazy=True)
    with Connection("memory://") as connection, connection.SimpleQueue(queue) as sent:
        scheduler.apply_async(kept, producer=connection.Producer(), advance=False)
        message = sent.get(timeout=5)
        message.ack()
    assert message.headers["task"] == task
    expires = dt.datetime.fromisoformat(message.headers["expires"])
    left = expires - dt.datetime.now(dt.UTC)
    assert 0 <= seconds - left.total_seconds() < 60


def test_the_beat_schedule_has_the_ledgers_tasks_if_asked() -> None:
    import django_meterly.ledger.tasks as ledger_tasks

    ours = tasks.beat_schedule()
    schedule = tasks.beat_schedule(ledger=True, expire_every=30, seal_every=40)
    added = [entry for name, entry in schedule.items() if name not in ours]
    assert [entry["task"] for entry in added] == [
        ledger_tasks.expire_holds.name,
        ledger_tasks.seal_entries.name,
    ]
    assert [entry["schedule"] for entry in added] == [30, 40]
    assert [entry["options"]["expires"] for entry in added] == [600, 800]
