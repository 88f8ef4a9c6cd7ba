"""Guarded tasks in real workers on real brokers, killed, stopped and repeated."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from celery import Celery, _state, chain, group
from celery.signals import before_task_publish
from django.utils import timezone

from django_meterly import (
    MeterlyUnavailableError,
    get_client,
    guard,
    journal,
    tasks,
)
from django_meterly.handoffs import sign
from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance, sweep
from tests import brokers, jobs
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
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from django_meterly.models import Customer

# Workers over each database are in test_tasks; here it is brokers.
pytestmark = pytest.mark.django_db(transaction=True)
#: In make test the broker is a folder.
BROKERS = pytest.mark.slow("workers with Redis and RabbitMQ")

#: Seconds after which Redis takes a message for lost that nobody acknowledged.
VISIBILITY_TIMEOUT = 3


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a function that starts a broker on first use, or skips."""
    with ExitStack() as stack:
        urls: dict[str, str] = {}

        def url(name: str) -> str:
            if name not in urls:
                if not brokers.installed(f"{name}-server"):
                    pytest.skip(f"{name}-server is not installed")
                if name == "redis":
                    pytest.importorskip("redis")
                start = {"redis": brokers.redis, "rabbitmq": brokers.rabbitmq}[name]
                folder = tmp_path_factory.mktemp(name)
                urls[name] = stack.enter_context(start(folder))
            return urls[name]

        yield url


# One app for all tests: shared tasks stay with every app that there ever was.
APP = Celery("tests-of-workers", set_as_current=False)


class Site:
    """The workers of one test, on a queue of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.notes = folder / "notes"
        self._stack = stack
        # Leases of three seconds, and no patience with decided rows.
        self._env = environment(LEASE_GRACE=3, RESERVATION_TTL=60, DEADLINE=2)
        self._queue = f"tests-{uuid.uuid4()}"

    def connect(self, url: str) -> None:
        """Let tests and workers use the broker at *url*."""
        options: dict[str, Any] = {}
        if url == "filesystem://":
            options = broker_options(str(self.folder / "broker"))
            (self.folder / "broker").mkdir()
        elif url.startswith("redis:"):
            options = {"visibility_timeout": VISIBILITY_TIMEOUT}
        self._env |= {
            "CHILD_BROKER": str(self.folder / "broker"),
            "CHILD_BROKER_URL": url,
            "CHILD_BROKER_OPTIONS": json.dumps(options),
            "CHILD_QUEUE": self._queue,
        }
        APP.conf.update(
            broker_url=url,
            broker_transport="tests.broker.Transport" if "file" in url else None,
            broker_transport_options=options,
            task_default_queue=self._queue,
        )
        APP.set_current()
        self._stack.callback(self._disconnect)

    @staticmethod
    def _disconnect() -> None:
        APP.close()
        APP.__dict__.pop("amqp", None)

    def worker(self, concurrency: int = 1, **env: str) -> subprocess.Popen[str]:
        name = f"w{uuid.uuid4().hex}"
        command = ["-A", "tests.celery_app", "worker", "--pool=prefork"]
        command += [f"--concurrency={concurrency}", f"--hostname={name}@%h"]
        command += ["--without-gossip", "--without-mingle", "--loglevel=INFO"]
        return self._stack.enter_context(
            started("celery", *command, env={**self._env, **env}, log=self.log)
        )

    def send(self, task: Any, *args: Any, **options: Any) -> str:
        options.setdefault("task_id", str(uuid.uuid4()))
        task.apply_async(("user_1", *args), **options)
        return str(options["task_id"])

    def work(self, task: Any, *steps: str, **options: Any) -> str:
        return self.send(task, str(self.folder), *steps, **options)

    def said(self) -> str:
        return self.log.read_text()

    def noted(self, what: str) -> list[str]:
        if not self.notes.exists():
            return []
        lines = self.notes.read_text().splitlines()
        return [line for line in lines if line.startswith(what)]

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, self.log)

    def wait_for_run(self, number: int = 1) -> int:
        """Wait until that run has begun; return its process id."""
        self.wait_until(lambda: len(self.noted("began")) >= number)
        return int(self.noted("began")[number - 1].split()[1])

    def go(self, run: int = 1) -> None:
        (self.folder / f"go-{run}").touch()

    def wait_for(self, *expected: str) -> None:
        """Wait until the journal's rows are in these states."""
        self.wait_until(lambda: states() == list(expected))

    def sweep_until(self, *expected: str) -> None:
        def swept() -> bool:
            journal.sweep(get_client())
            return states() == list(expected)

        self.wait_until(swept)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    before = _state.get_current_app()
    with ExitStack() as stack:
        yield Site(tmp_path, stack)
    before.set_current()


@pytest.fixture
def customer(joined: None) -> Customer:
    return fund("user_1")


@pytest.fixture(
    params=[
        "filesystem",
        pytest.param("redis", marks=BROKERS),
        pytest.param("rabbitmq", marks=BROKERS),
    ]
)
def any_broker(request: pytest.FixtureRequest, site: Site, servers: Any) -> str:
    name = str(request.param)
    site.connect("filesystem://" if name == "filesystem" else servers(name))
    return name


@pytest.fixture(
    params=[
        pytest.param("redis", marks=BROKERS),
        pytest.param("rabbitmq", marks=BROKERS),
    ]
)
def broker(request: pytest.FixtureRequest, site: Site, servers: Any) -> str:
    site.connect(servers(request.param))
    return str(request.param)


@pytest.fixture
def redis(site: Site, servers: Any) -> None:
    site.connect(servers("redis"))


def assert_charged_once(customer: Customer, runs: int, site: Site) -> None:
    """Check that all is over, and paid for once, however many *runs* there were."""
    sweep()
    assert states().count("committed") == 1
    assert set(states()) <= {"committed", "released"}
    assert movements().count("committed") == 1
    assert balance(customer) == (75, 0)
    assert len(site.noted("began")) == runs
    assert_books_balance()


# Killed


@pytest.mark.slow("a killed child, with a worker of a broker")
def test_f31_the_credits_of_a_killed_child_come_back(
    any_broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works_early, "hang")
    os.kill(site.wait_for_run(), signal.SIGKILL)
    assert states() == ["reserved"]
    begun = time.monotonic()
    site.sweep_until("released")
    # After its lease, not after its hold.
    assert time.monotonic() - begun < 45
    assert balance(customer) == (100, 0)
    assert movements() == ["reserved", "released"]
    assert_books_balance()


def test_f31_a_killed_worker_is_no_charge_and_its_task_is_done_by_the_next(
    broker: str, site: Site, customer: Customer
) -> None:
    worker = site.worker()
    site.work(jobs.works, "hang", "finish")
    site.wait_for_run()
    lost_at = time.monotonic() + VISIBILITY_TIMEOUT
    kill_group(worker)
    site.sweep_until("released")
    assert balance(customer) == (100, 0)

    # A worker looks for lost messages when it starts, and then not for long.
    time.sleep(max(lost_at + 0.5 - time.monotonic(), 0))
    site.worker()
    site.wait_for("released", "committed")
    assert_charged_once(customer, 2, site)


def test_f32_the_next_run_of_a_killed_child_goes_on_under_the_same_hold(
    broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works, "die", "finish")
    # Nobody sweeps: the copy looks again until the lease has run out.
    site.wait_for("committed")
    assert movements() == ["reserved", "committed"]
    assert_charged_once(customer, 2, site)


# Stopped


def test_f31_a_warm_shutdown_lets_the_task_finish(
    broker: str, site: Site, customer: Customer
) -> None:
    worker = site.worker()
    site.work(jobs.works, "wait")
    site.wait_for_run()
    os.kill(worker.pid, signal.SIGTERM)
    site.wait_until(lambda: "Warm shutdown" in site.said())
    site.go()
    worker.wait(60)
    assert states() == ["committed"]
    assert_charged_once(customer, 1, site)


def test_f31_a_cold_shutdown_is_no_charge_and_the_next_worker_does_the_task(
    broker: str, site: Site, customer: Customer
) -> None:
    worker = site.worker()
    site.work(jobs.works, "hang", "finish")
    site.wait_for_run()
    os.kill(worker.pid, signal.SIGQUIT)
    worker.wait(60)
    site.worker()
    site.wait_until(lambda: "committed" in states())
    assert_charged_once(customer, 2, site)


# Delivered twice


@BROKERS
def test_f33_a_visibility_timeout_runs_no_second_copy(
    redis: None, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works, "wait")
    site.wait_for_run()
    time.sleep(VISIBILITY_TIMEOUT)
    # A worker that starts looks for such messages at once; it finds the lease alive.
    site.worker()
    site.wait_until(lambda: "is in use right now" in site.said())
    site.go()
    site.wait_for("committed")
    # And the copy that looks again finds it done.
    site.wait_until(lambda: "was used already" in site.said())
    assert_charged_once(customer, 1, site)


@BROKERS
def test_f33_a_copy_that_is_told_to_ignores_what_is_at_work(
    redis: None, site: Site, customer: Customer
) -> None:
    site.worker(concurrency=2)
    task_id = site.work(jobs.works_alone, "wait")
    site.wait_for_run()
    site.work(jobs.works_alone, "wait", task_id=task_id)
    site.wait_until(lambda: "is in use right now" in site.said())
    received = site.said().count("received")
    time.sleep(3)
    assert site.said().count("received") == received
    site.go()
    site.wait_for("committed")
    assert_charged_once(customer, 1, site)


@BROKERS
def test_f33_a_lost_connection_runs_no_second_copy(
    site: Site, servers: Any, customer: Customer
) -> None:
    url = servers("rabbitmq")
    wire = brokers.Wire(urlsplit(url).port or 0)
    try:
        site.connect(f"amqp://guest:guest@127.0.0.1:{wire.port}//")
        site.worker(concurrency=2)
        site.work(jobs.works, "wait")
        site.wait_for_run()
        wire.cut()
        # RabbitMQ delivers what was not acknowledged to the new connection.
        site.wait_until(lambda: site.said().count("] received") >= 2)
        site.go()
        site.wait_for("committed")
        # At once, or when the worker has looked after its lost task.
        site.wait_until(lambda: "is left alone" in site.said())
        assert_charged_once(customer, 1, site)
    finally:
        wire.close()


@BROKERS
def test_f33_a_copy_that_was_taken_for_dead_settles_nothing(
    redis: None, site: Site, customer: Customer
) -> None:
    site.worker(concurrency=2)
    task_id = site.work(jobs.works, "wait", "finish")
    child = site.wait_for_run()
    os.kill(child, signal.SIGSTOP)
    site.sweep_until("released")
    site.work(jobs.works, "wait", "finish", task_id=task_id)
    site.wait_for("released", "committed")

    os.kill(child, signal.SIGCONT)
    site.go()
    site.wait_until(lambda: "was claimed by another copy" in site.said())
    assert site.noted("done 1")
    assert_charged_once(customer, 2, site)


@BROKERS
def test_f72_work_is_charged_when_the_copy_dies_that_was_at_work_meanwhile(
    redis: None, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works, "wait", "hang", "finish")
    child = site.wait_for_run()
    os.kill(child, signal.SIGSTOP)
    site.sweep_until("released")
    time.sleep(VISIBILITY_TIMEOUT)
    second = site.worker()
    site.wait_for_run(2)

    os.kill(child, signal.SIGCONT)
    site.go()
    site.wait_until(lambda: site.noted("done 1"))
    kill_group(second)
    site.sweep_until("committed", "released")
    # Its hold was given back: what it cost was debited.
    assert movements() == ["reserved", "released", "reserved", "released", "used"]
    assert balance(customer) == (75, 0)


@BROKERS
@pytest.mark.parametrize("end", ["-raise", "-retry", "-reject", "-ignore"])
def test_f33_work_is_done_when_the_copy_dies_that_took_it_up(
    end: str, redis: None, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works, f"wait{end}", "hang", "finish")
    child = site.wait_for_run()
    os.kill(child, signal.SIGSTOP)
    site.sweep_until("released")
    time.sleep(VISIBILITY_TIMEOUT)
    second = site.worker()
    site.wait_for_run(2)

    os.kill(child, signal.SIGCONT)
    site.go()
    # It acknowledges the message of both: they have one delivery tag.
    site.wait_until(lambda: "was claimed by another copy" in site.said())
    kill_group(second)
    site.wait_until(lambda: "committed" in states())
    assert_charged_once(customer, 3, site)


def test_f32_a_task_that_was_done_is_not_done_again(
    any_broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    task_id = site.work(jobs.works, "finish")
    site.wait_for("committed")
    site.work(jobs.works, "finish", task_id=task_id)
    site.wait_until(lambda: "was used already" in site.said())
    assert_charged_once(customer, 1, site)


# Retried and replaced


@pytest.mark.parametrize(
    ("task", "settled"),
    [
        (jobs.retries_keeping, ["committed"]),
        (jobs.autoretries, ["committed"]),
        (jobs.retries_releasing, ["released", "released", "committed"]),
    ],
    ids=["retry", "autoretry", "releasing"],
)
def test_f34_a_retried_task_is_charged_once(
    task: Any, settled: list[str], broker: str, site: Site, customer: Customer
) -> None:
    site.worker(concurrency=2)
    site.send(task, 2, str(site.folder))
    site.wait_for(*settled)
    assert_charged_once(customer, 3, site)


@BROKERS
@pytest.mark.parametrize("task", [jobs.retries_keeping, jobs.autoretries])
def test_f34_the_final_failure_of_a_retried_task_releases(
    task: Any, redis: None, site: Site, customer: Customer
) -> None:
    site.worker()
    site.send(task, 9, str(site.folder))
    site.wait_for("released")
    assert balance(customer) == (100, 0)
    assert movements() == ["reserved", "released"]
    assert_books_balance()


@BROKERS
def test_f34_a_task_that_replaces_itself_is_charged_for_the_last(
    redis: None, site: Site, customer: Customer
) -> None:
    site.worker(concurrency=2)
    site.send(jobs.replaces, 2, str(site.folder))
    site.wait_until(lambda: sorted(states()) == ["committed", "released", "released"])
    # They have one id, and do not take each other for copies.
    assert Reservation.objects.values("key").distinct().count() == 3
    assert "is left alone" not in site.said()
    assert_charged_once(customer, 3, site)


# Time limits


@pytest.mark.slow("a soft time limit, with a worker of a broker")
def test_f35_a_soft_time_limit_releases(
    any_broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works_early, "hang", soft_time_limit=1)
    site.wait_for("released")
    assert movements() == ["reserved", "released"]
    assert balance(customer) == (100, 0)


@pytest.mark.slow("a hard time limit, with a worker of a broker")
def test_f35_a_hard_time_limit_is_one_settlement(
    any_broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    site.work(jobs.works, "hang", time_limit=1)
    # The parent says so while the child may still be at it.
    site.wait_until(lambda: "Hard time limit" in site.said())
    site.sweep_until("released")
    assert movements() == ["reserved", "released"]
    assert balance(customer) == (100, 0)
    assert_books_balance()


@BROKERS
def test_f35_a_soft_time_limit_within_the_commit_of_a_task_loses_no_success(
    redis: None, site: Site, customer: Customer, settings: Any
) -> None:
    transport = dying_transport(settings.METERLY["TRANSPORT"])
    worker = site.worker(
        HANG_AT="after:commit_reservation",
        CHILD_METERLY=json.dumps({**settings.METERLY, "TRANSPORT": transport}),
    )
    site.send(jobs.plain, soft_time_limit=3)
    site.wait_until(lambda: "SoftTimeLimitExceeded" in site.said())
    # Durable with the movement where both are one statement.
    durable = journal.carries_statements(get_client(), "default")
    assert states() == ["committed" if durable else "commit_pending"]
    kill_group(worker)
    sweep()
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)


# Handed off


def test_f36_a_handed_off_task_settles_what_was_reserved_for_it(
    any_broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    with guard("user_1", 25) as work:
        task_id = work.hand_off(jobs.handed_off, str(site.folder), used=7)
    site.wait_for("committed")
    assert task_id in site.said()
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (93, 0)
    # Neither a key nor a secret in what the worker got.
    assert Reservation.objects.get().key not in site.said()


def test_f34_a_handed_off_task_is_retried_under_the_same_reservation(
    broker: str, site: Site, customer: Customer
) -> None:
    site.worker()
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off_retries, str(site.folder))
    site.wait_for("committed")
    assert len(site.noted("began")) == 2
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (93, 0)


def test_f36_a_handed_off_task_that_expires_or_is_revoked_is_released(
    broker: str, site: Site, customer: Customer
) -> None:
    late = jobs.handed_off.s(str(site.folder))
    with guard("user_1", 25) as work:
        work.hand_off(late.clone().set(expires=0.1))
    time.sleep(0.2)
    # This one the worker drops itself, or RabbitMQ does before.
    site.worker()
    site.wait_until(lambda: " ready." in site.said())
    with guard("user_1", 25) as work:
        # It waits for its time in the worker, which hears of the end before that.
        revoked = work.hand_off(late.clone().set(countdown=5))
    site.wait_until(lambda: f"[{revoked}] received" in site.said())
    APP.control.revoke(revoked)
    discarded = f"Discarding revoked task: jobs.handed_off[{revoked}]"
    site.wait_until(lambda: discarded in site.said())
    # At once; nobody sweeps.
    if broker == "rabbitmq":
        site.wait_for("reserved", "released")
        # What it drops nobody is told of.
        Reservation.objects.filter(state="reserved").update(lease_until=timezone.now())
        site.sweep_until("released", "released")
    site.wait_for("released", "released")
    assert site.noted("began") == []
    assert balance(customer) == (100, 0)


def test_f58_a_worker_refuses_what_was_not_signed_for_the_task(
    any_broker: str, site: Site, customer: Customer
) -> None:
    with guard("user_1", 25) as work:
        # On a queue that nobody reads: the forger has only seen the id.
        work.hand_off(jobs.handed_off.s(str(site.folder)).set(queue="elsewhere"))
    row = str(work._row.pk)
    site.worker()
    forged = ("uncharged", row, sign(row, "jobs.handed_off", "other"), 7, None, [row])
    for header in forged:
        jobs.handed_off.apply_async(
            (str(site.folder),), headers={"meterly_reservation": header}
        )
    tasks.release_handed_off.delay("uncharged", "jobs.handed_off", "1")
    tasks.release_handed_off.delay(row, "jobs.handed_off", "1")
    site.wait_until(lambda: site.said().count(" raised ") == len(forged) + 2)
    assert site.said().count("is refused: its header") >= len(forged) + 2
    assert site.noted("began") == []
    assert (states(), balance(customer)) == (["reserved"], (100, 25))


def test_f58_web_and_worker_need_one_key(
    any_broker: str, site: Site, customer: Customer, settings: Any
) -> None:
    old = settings.SECRET_KEY
    worker = site.worker(CHILD_SECRET_KEY="new")
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off, str(site.folder))
    site.wait_until(lambda: " raised " in site.said())
    assert site.noted("began") == []
    assert states() == ["reserved"]
    kill_group(worker)
    # Nobody runs it, so it is free.
    sweep()
    assert states() == ["released"]

    site.worker(CHILD_SECRET_KEY="new", CHILD_SECRET_KEY_FALLBACKS=old)
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off, str(site.folder))
    site.wait_until(lambda: sorted(states()) == ["committed", "released"])
    assert balance(customer) == (75, 0)


def test_f58_what_celery_does_with_a_task_keeps_its_hand_off(
    any_broker: str, site: Site, customer: Customer
) -> None:
    """Callbacks, chains, groups, retries, replacements, ids, and tracing."""
    folder = str(site.folder)
    after = jobs.plain.si("user_1", used=1)

    def trace(headers: Any = None, **kwargs: Any) -> None:
        headers.setdefault("headers", {})["trace"] = "1"

    site.worker()
    handed_off = jobs.handed_off.s(folder, used=2)
    sent = [
        handed_off.set(task_id="of-the-projects-own"),
        handed_off.clone().set(link=after),
        handed_off.clone().set(link=chain(after, after)),
        handed_off.clone().set(link=group(after, after)),
        jobs.handed_off_retries.s(folder),
        # What takes its place has its id, no hand-off, and a payer of its own.
        jobs.handed_off_replaces.s(folder),
    ]
    for signature in sent:
        signature.options.setdefault("task_id", str(uuid.uuid4()))
        with guard("user_1", 10) as work:
            work.hand_off(signature)
    before_task_publish.connect(trace)
    try:
        with guard("user_1", 10) as work:
            work.hand_off(jobs.handed_off_retries, folder)
    finally:
        before_task_publish.disconnect(trace)
    committed = 4 + 2 + 5 + 1
    site.wait_until(lambda: states().count("committed") == committed)
    assert states().count("released") == 1
    assert "is refused" not in site.said()
    assert balance(customer) == (100 - 4 * 2 - 2 * 7 - 5 * 1 - 3, 0)
    assert len(site.noted("began")) == 4 + 2 * 2 + 1
    assert_books_balance()


def test_f58_tasks_of_a_chord_hand_off(
    any_broker: str, site: Site, customer: Customer
) -> None:
    """A chord's tasks hand work off to others, which have headers of their own."""
    site.worker()
    chain(
        jobs.hands_off.si(str(site.folder)),
        group(jobs.hands_off.si(str(site.folder)), jobs.plain.si("user_1", used=1)),
    ).apply_async()
    site.wait_until(lambda: states().count("committed") == 3)
    assert balance(customer) == (100 - 2 * 2 - 1, 0)
    assert "is refused" not in site.said()


@pytest.mark.slow("a lease that runs out, with a worker of a broker")
def test_f58_a_copy_that_looks_again_takes_the_hand_off_up(
    any_broker: str, site: Site, customer: Customer
) -> None:
    seen: dict[str, Any] = {}

    def see(sender: Any = None, headers: Any = None, **kwargs: Any) -> None:
        seen.update(headers)

    site.worker(concurrency=2)
    before_task_publish.connect(see)
    try:
        with guard("user_1", 25) as work:
            task_id = work.hand_off(
                jobs.works_early, "user_1", str(site.folder), "hang", "finish"
            )
    finally:
        before_task_publish.disconnect(see)
    site.wait_for_run()
    # Its copy finds it at work, and is sent around until the lease has run out.
    header = {"meterly_reservation": seen["meterly_reservation"]}
    site.work(jobs.works_early, "hang", "finish", task_id=task_id, headers=header)
    site.wait_until(lambda: "is left alone" in site.said())
    os.kill(int(site.noted("began")[0].split()[1]), signal.SIGKILL)
    site.wait_for("committed")
    assert_charged_once(customer, 2, site)
    assert "is refused" not in site.said()


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_f36_a_broker_that_cannot_be_reached_releases_at_once(
    scheme: str, site: Site, customer: Customer, free_port: int
) -> None:
    if scheme == "redis":
        pytest.importorskip("redis")
    site.connect(f"{scheme}://127.0.0.1:{free_port}/")
    begun = time.monotonic()
    with (
        pytest.raises(MeterlyUnavailableError, match="could not be sent"),
        guard("user_1", 25) as work,
    ):
        work.hand_off(jobs.handed_off)
    assert time.monotonic() - begun < 10
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
