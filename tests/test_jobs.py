"""Guarded tasks without a worker: plain calls, eager ones, hand-offs, fences."""

from __future__ import annotations

import datetime as dt
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from celery import Celery, _state, chord, group
from celery.app.trace import build_tracer
from celery.exceptions import Reject
from django.contrib.auth.models import User
from django.core.signing import Signer
from django.db import connections, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import path
from django.utils import timezone
from hypothesis import strategies as st
from kombu.exceptions import OperationalError

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyUsageError,
    get_client,
    guard,
    journal,
    meterly_guard,
    signals,
)
from django_meterly.handoffs import sign
from django_meterly.heart import Heart
from django_meterly.journal import attempts
from django_meterly.ledger.models import Hold
from django_meterly.models import Reservation
from django_meterly.tasks import check_tasks, meterly_task, release_handed_off
from django_meterly.testing import assert_books_balance, lapse_leases, sweep
from tests import jobs
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.http import HttpRequest

    from django_meterly.models import Customer

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def customer(any_ledger: Any) -> Customer:
    return fund("user_1")


# Shared tasks stay with every app that there ever was: one for all tests.
APP = Celery("tests-of-jobs", broker="memory://", set_as_current=False)


@pytest.fixture(autouse=True)
def app() -> Iterator[Celery]:
    """The current app; its messages stay in this process's memory."""
    before = _state.get_current_app()
    APP.set_current()
    yield APP
    APP.conf.update(task_always_eager=False, task_eager_propagates=False)
    before.set_current()


def call(task: Any, *args: Any, **kwargs: Any) -> Any:
    return task(*args, **kwargs)


def apply(task: Any, *args: Any, **kwargs: Any) -> Any:
    return task.apply(args, kwargs, throw=True).get()


@pytest.fixture(params=["called", "applied", "always_eager"])
def run(request: pytest.FixtureRequest, app: Celery) -> Any:
    """The ways to run a task without a worker."""
    if request.param == "called":
        return call
    if request.param == "applied":
        return apply
    app.conf.task_always_eager = True
    app.conf.task_eager_propagates = True
    return lambda task, *args, **kwargs: task.delay(*args, **kwargs).get()


# What a task costs


def test_f37_a_task_that_succeeds_is_charged(run: Any, customer: Customer) -> None:
    assert run(jobs.plain, "user_1") == "done for user_1"
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_f37_a_task_that_fails_is_free(run: Any, customer: Customer) -> None:
    with pytest.raises(jobs.Broken):
        run(jobs.fails, "user_1")
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


def test_f37_a_task_is_charged_what_it_settles(run: Any, customer: Customer) -> None:
    run(jobs.plain, "user_1", used=7)
    assert balance(customer) == (93, 0)


def test_f37_a_task_that_nobody_can_pay_for_does_not_run(
    run: Any, customer: Customer
) -> None:
    with pytest.raises(MeterlyInsufficientCreditsError):
        run(jobs.priced, "user_1", 101)
    assert states() == ["denied"]
    assert balance(customer) == (100, 0)


def test_f37_each_call_is_charged(run: Any, customer: Customer) -> None:
    run(jobs.plain, "user_1")
    run(jobs.plain, "user_1")
    assert balance(customer) == (50, 0)


def test_the_options_get_the_tasks_arguments(customer: Customer) -> None:
    assert jobs.priced.apply(("user_1", 30)).get() == "order-30"
    row = Reservation.objects.get()
    assert (row.amount, row.reference, row.unit) == (30, "order-30", "image_credits")


def test_a_task_is_refused_within_a_transaction(customer: Customer) -> None:
    with transaction.atomic(), pytest.raises(MeterlyUsageError, match="transaction"):
        jobs.plain("user_1")
    assert states() == []


def test_a_task_in_a_task_is_a_reservation_of_its_own(customer: Customer) -> None:
    assert jobs.nested.apply(("user_1",)).get() == 2
    assert balance(customer) == (97, 0)
    assert states() == ["committed", "committed"]


def test_the_body_alone_is_guarded_too(customer: Customer) -> None:
    jobs.plain.run("user_1")
    assert balance(customer) == (75, 0)


def test_a_rejected_task_is_free(customer: Customer) -> None:
    jobs.rejects.apply(("user_1",))
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


def test_groups_chains_and_chords_are_charged_by_the_task(
    app: Celery, customer: Customer
) -> None:
    app.conf.task_always_eager = True
    group(jobs.plain.si("user_1", 1), jobs.plain.si("user_1", 2)).delay().get()
    (jobs.plain.si("user_1", 3) | jobs.plain.si("user_1", 4)).delay().get()
    chord([jobs.plain.si("user_1", 5)], jobs.plain.si("user_1", 6)).delay().get()
    assert balance(customer) == (100 - 21, 0)
    assert states() == ["committed"] * 6
    assert Reservation.objects.values("key").distinct().count() == 6


def test_arguments_that_a_task_does_not_take_are_refused_when_it_is_sent() -> None:
    with pytest.raises(TypeError):
        jobs.plain.delay()
    with pytest.raises(TypeError):
        jobs.priced.delay("user_1", 1, 2)


def test_a_task_without_a_customer_can_only_be_handed_off(customer: Customer) -> None:
    with pytest.raises(MeterlyUsageError, match="customer="):
        jobs.handed_off()
    assert states() == []


def test_a_task_that_is_not_at_work_has_no_guard() -> None:
    with pytest.raises(MeterlyUsageError, match="not at work"):
        _ = jobs.plain.meterly


@pytest.mark.parametrize(
    "options",
    [
        {"amount": 0},
        {"amount": True},
        {"unit": "no unit"},
        {"ttl_seconds": 0},
        {"overage": "perhaps"},
        {"on_retry": "commit"},
        {"on_duplicate": "run"},
    ],
)
def test_options_out_of_bounds_are_refused_at_once(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        meterly_task(**options)


def test_a_task_whose_next_run_would_be_ignored_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert check_tasks() == []
    monkeypatch.setattr(jobs.works_alone._get_current_object(), "acks_late", True)
    [message] = check_tasks()
    assert message.id == "meterly.W006"
    assert "'jobs.works_alone'" in message.msg


# One task id, one charge


def test_f32_a_task_that_was_charged_does_not_run_again(
    customer: Customer, tmp_path: Any
) -> None:
    arguments = ("user_1", 0, str(tmp_path))
    first = jobs.retries_keeping.apply(arguments, task_id="one")
    again = jobs.retries_keeping.apply(arguments, task_id="one")
    assert (first.state, again.state) == ("SUCCESS", "IGNORED")
    assert (tmp_path / "notes").read_text().count("began") == 1
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)


def test_f32_a_task_whose_attempt_was_released_runs_under_the_next(
    customer: Customer,
) -> None:
    jobs.fails.apply(("user_1",), task_id="one")
    jobs.fails.apply(("user_1",), task_id="one")
    assert states() == ["released", "released"]
    assert list(
        Reservation.objects.order_by("attempt").values_list("attempt", flat=True)
    ) == [1, 2]
    assert movements() == ["reserved", "released"] * 2


def left_by_a_worker() -> Any:
    """Return the guard of a run of ``jobs.plain`` with the id "one"."""
    left = guard("user_1", 25, idempotency_key="task:jobs.plain:one")
    left.lifecycle.name = "jobs.plain"
    return left


def test_f32_a_copy_for_which_the_amount_has_changed_is_a_copy(
    customer: Customer,
) -> None:
    first = jobs.priced.apply(("user_1", 30), task_id="one")
    again = jobs.priced.apply(("user_1", 40), task_id="one")
    assert (first.state, again.state) == ("SUCCESS", "IGNORED")
    assert balance(customer) == (70, 0)


def test_f32_a_task_whose_worker_died_goes_on_under_the_same_hold(
    customer: Customer,
) -> None:
    left = left_by_a_worker()
    left.lifecycle.reserve()
    lapse_leases()
    assert jobs.plain.apply(("user_1",), task_id="one").state == "SUCCESS"
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    # The copy that was taken for dead has nothing to say any more.
    left.lifecycle.succeed()
    assert left.superseded
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_f33_a_copy_leaves_a_task_alone_that_is_at_work(customer: Customer) -> None:
    left_by_a_worker().lifecycle.reserve()
    assert jobs.plain.apply(("user_1",), task_id="one").state == "IGNORED"
    assert states() == ["reserved"]


def run_at_once(count: int, folder: Any) -> None:
    """Run *count* copies of a task, each in a thread."""
    task = jobs.retries_keeping._get_current_object()
    at_once = threading.Barrier(count)

    def deliver_copy() -> None:
        try:
            at_once.wait()
            task.apply(("user_1", 0, str(folder)), task_id="one")
        finally:
            connections.close_all()

    copies = [threading.Thread(target=deliver_copy) for _ in range(count)]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()


@pytest.mark.database
def test_f33_of_many_copies_at_once_one_runs(customer: Customer, tmp_path: Any) -> None:
    run_at_once(6, tmp_path)
    assert (tmp_path / "notes").read_text().count("began") == 1
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("task_id", ["x" * 300, "a b", "größer"])
def test_any_id_of_a_task_will_do(task_id: str, customer: Customer) -> None:
    assert jobs.plain.apply(("user_1",), task_id=task_id).state == "SUCCESS"
    assert jobs.plain.apply(("user_1",), task_id=task_id).state == "IGNORED"
    assert states() == ["committed"]


@pytest.mark.parametrize("ends", ["first", "last"])
def test_f33_of_two_attempts_of_a_key_only_the_later_one_settles(
    ends: str, customer: Customer
) -> None:
    early = guard("user_1", 25, idempotency_key="k")
    early.lifecycle.reserve()
    sweep()
    assert states() == ["released"]
    late = guard("user_1", 25, idempotency_key="k")
    late.lifecycle.reserve()
    for work in (early, late) if ends == "first" else (late, early):
        work.lifecycle.succeed()
    assert sorted(states()) == ["committed", "released"]
    assert late.fence > early.fence
    # What it did was not charged: its result is dropped, if it is a task's.
    assert early.superseded == (ends == "last")
    assert not late.superseded
    sweep()
    assert sorted(states()) == ["committed", "released"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_f04_work_that_outlives_its_lease_is_charged_if_nobody_has_tried_again(
    customer: Customer,
) -> None:
    work = guard("user_1", 25, idempotency_key="k")
    work.lifecycle.reserve()
    sweep()
    work.lifecycle.succeed()
    assert states() == ["committed"]
    with pytest.raises(MeterlyDuplicateError):
        guard("user_1", 25, idempotency_key="k").lifecycle.reserve()
    assert balance(customer) == (75, 0)


def test_f33_an_attempt_that_succeeds_while_the_next_is_opened_is_the_only_one(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = guard("user_1", 25, idempotency_key="k")
    early.lifecycle.reserve()
    sweep()
    number_attempt = attempts.number

    def after_it_was_numbered(*args: Any) -> None:
        number_attempt(*args)
        early.lifecycle.succeed()

    monkeypatch.setattr(attempts, "number", after_it_was_numbered)
    with pytest.raises(MeterlyDuplicateError):
        guard("user_1", 25, idempotency_key="k").lifecycle.reserve()
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)


def test_f33_only_one_of_two_takes_up_what_was_handed_over(customer: Customer) -> None:
    work = guard("user_1", 25, idempotency_key="k")
    work.lifecycle.reserve()
    assert work.lifecycle.offer(60)
    client = get_client()
    taken = [journal.claim(client, customer, "k") for _ in range(2)]
    assert taken[0] is not None
    assert taken[0].fence == 2
    assert taken[1] is None
    work.lifecycle.fail()
    assert states() == ["reserved"]


def outrun(customer: Customer, error: Exception | None) -> Any:
    """Run a task whose work another copy takes up, and that then ends with *error*."""

    def freeze() -> None:
        lapse_leases()
        assert journal.claim(get_client(), customer, "task:jobs.long:one")
        if error is not None:
            raise error

    return jobs.long.apply(("user_1", 0.1, freeze), task_id="one")


@pytest.mark.parametrize("error", [None, jobs.Broken(), Reject("no", requeue=False)])
def test_f33_nobody_hears_what_became_of_a_copy_that_was_outrun(
    error: Exception | None, customer: Customer, caplog: pytest.LogCaptureFixture
) -> None:
    assert outrun(customer, error).state == "IGNORED"
    [record] = [r for r in caplog.records if "claimed by another copy" in r.message]
    # Celery says no word of it.
    assert error is None or (record.exc_info and record.exc_info[1] is error)
    assert states() == ["reserved"]
    assert balance(customer) == (100, 25)


def test_a_task_does_not_go_on_under_a_hold_that_is_gone(customer: Customer) -> None:
    work = left_by_a_worker()
    work.lifecycle.reserve()
    past = timezone.now() - dt.timedelta(minutes=5)
    Hold.objects.update(expires_at=past)
    lapse_leases()
    assert jobs.plain.apply(("user_1",), task_id="one").state == "SUCCESS"
    assert states() == ["released", "committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.fixture
def shadow(settings: Any) -> Iterator[list[str]]:
    """Nobody is denied anything; return what is said of those who would be."""
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": "shadow"}
    said: list[str] = []

    def hear(error: Exception, **facts: Any) -> None:
        said.append(type(error).__name__)

    signals.would_deny.connect(hear, weak=False)
    yield said
    signals.would_deny.disconnect(hear)


def test_f33_in_shadow_a_copy_runs_uncharged_while_the_task_is_at_work(
    customer: Customer, shadow: list[str]
) -> None:
    left = left_by_a_worker()
    left.lifecycle.reserve()
    assert jobs.plain.apply(("user_1", 7), task_id="one").state == "SUCCESS"
    assert states() == ["reserved"]
    left.lifecycle.succeed()
    assert shadow == ["MeterlyDuplicateError"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)


def test_f32_in_shadow_a_copy_of_what_was_charged_runs_uncharged(
    customer: Customer, shadow: list[str]
) -> None:
    for used in (3, 4, None):
        assert jobs.plain.apply(("user_1", used), task_id="one").state == "SUCCESS"
    assert shadow == ["MeterlyDuplicateError"] * 2
    assert states() == ["committed"]
    assert balance(customer) == (97, 0)


def test_f33_in_shadow_all_of_many_copies_run_and_one_is_charged(
    customer: Customer, shadow: list[str], tmp_path: Any
) -> None:
    run_at_once(6, tmp_path)
    assert (tmp_path / "notes").read_text().count("began") == 6
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize(
    ("error", "state"), [(None, "SUCCESS"), (jobs.Broken(), "FAILURE")]
)
def test_f33_in_shadow_a_copy_that_was_outrun_ends_as_it_would_have(
    error: Exception | None, state: str, customer: Customer, shadow: list[str]
) -> None:
    assert outrun(customer, error).state == state
    # The copy that has taken it up decides what is charged.
    assert states() == ["reserved"]


def test_f36_in_shadow_copies_of_what_was_handed_off_are_charged_once(
    customer: Customer, sent: list[Any], shadow: list[str]
) -> None:
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off, used=7)
    assert [deliver(sent[0]).state for _ in range(3)] == ["SUCCESS"] * 3
    assert shadow == ["MeterlyDuplicateError"] * 2
    assert states() == ["committed"]
    assert balance(customer) == (93, 0)


class Copy:
    """One delivery of a message, as far as it has come."""

    def __init__(self, customer: Customer) -> None:
        self.customer = customer
        self.work: Any = None

    def start(self) -> None:
        work = guard(self.customer, 25, idempotency_key="one")
        try:
            work.lifecycle.resume()
        except MeterlyDuplicateError:
            return
        self.work = work

    def succeed(self) -> None:
        if self.work:
            self.work.lifecycle.succeed()

    def fail(self) -> None:
        if self.work:
            self.work.lifecycle.fail()

    def retry(self) -> None:
        if self.work:
            self.work.lifecycle.offer(60)

    def lapse(self) -> None:
        lapse_leases()

    def sweep(self) -> None:
        journal.sweep(get_client())


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    said=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["start", "succeed", "fail", "retry", "lapse", "sweep"]),
        ),
        min_size=4,
        max_size=10,
    )
)
def test_f33_whatever_becomes_of_its_copies_a_task_is_charged_once(
    joined: None, said: list[tuple[int, str]]
) -> None:
    customer = fund(f"user-{uuid.uuid4()}")
    copies = [Copy(customer) for _ in range(3)]

    def rows(state: str) -> list[tuple[int, int]]:
        found = Reservation.objects.filter(customer=customer, state=state)
        return list(found.values_list("attempt", "fence"))

    for number, action in said:
        getattr(copies[number], action)()
        assert len(rows("committed")) <= 1
        # Nobody shares a fence with another one.
        [*held] = rows("reserved")
        assert len(held) <= 1
        fences = [(c.work.reservation.attempt, c.work.fence) for c in copies if c.work]
        assert all(fences.count(one) <= 1 for one in held if not one[1] % 2)
    sweep()
    charged = len(rows("committed"))
    assert charged + len(rows("released")) == customer.reservation_set.count()
    assert balance(customer) == (100 - 25 * charged, 0)


# Retries


@pytest.mark.parametrize(
    "task", [jobs.retries_keeping, jobs.autoretries], ids=["retry", "autoretry"]
)
def test_f34_a_retry_keeps_the_hold(task: Any, customer: Customer) -> None:
    assert task.apply(("user_1", 2, None)).state == "SUCCESS"
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)


def test_f34_a_retry_releases_the_hold_if_it_is_told_to(customer: Customer) -> None:
    assert jobs.retries_releasing.apply(("user_1", 1, None)).get() == 1
    assert states() == ["released", "committed"]
    assert movements() == ["reserved", "released", "reserved", "committed"]
    assert balance(customer) == (75, 0)


def test_f34_a_retry_that_another_worker_begins_at_once_is_a_retry(
    customer: Customer, app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    def begin_at_once(reservation: Reservation, **kwargs: Any) -> None:
        again = guard("user_1", 25, idempotency_key=reservation.key)
        again.lifecycle.name = reservation.name
        again.lifecycle.reserve()

    task = jobs.retries_releasing
    tracer = build_tracer(task.name, task, app=app, eager=False)
    request = {"id": "one", "task": task.name, "retries": 0, "is_eager": False}
    signals.credits_released.connect(begin_at_once)
    try:
        tracer("one", ("user_1", 1, None), {}, {**request, "delivery_info": {}})
    finally:
        signals.credits_released.disconnect(begin_at_once)
    assert states() == ["released", "reserved"]
    assert "claimed by another copy" not in caplog.text


@pytest.mark.parametrize(
    "task",
    [jobs.retries_keeping, jobs.retries_releasing, jobs.autoretries],
    ids=["keeping", "releasing", "autoretry"],
)
def test_f34_the_final_failure_releases(task: Any, customer: Customer) -> None:
    result = task.apply(("user_1", 9, None))
    assert result.state == "FAILURE"
    assert isinstance(result.result, jobs.Broken)
    assert set(states()) == {"released"}
    assert balance(customer) == (100, 0)
    assert_books_balance()


def test_f34_a_task_that_is_replaced_by_itself_does_not_collide(
    customer: Customer, tmp_path: Any
) -> None:
    result = jobs.replaces.apply(("user_1", 2, str(tmp_path)))
    assert result.get() == "replaced"
    assert (tmp_path / "notes").read_text().count("began") == 3
    assert_books_balance()


def test_f34_a_retry_called_plainly_raises_and_releases(customer: Customer) -> None:
    with pytest.raises(jobs.Broken):
        jobs.retries_keeping("user_1", 1, None)
    assert states() == ["released"]


def test_f34_a_ledger_that_cannot_be_asked_is_asked_again(
    remote: Any, settings: Any
) -> None:
    customer = fund("user_1")
    remote.meet("reserve_credits", "unsent", "unsent")
    assert jobs.waits_for_the_ledger.apply(("user_1",)).state == "SUCCESS"
    assert states() == ["failed", "failed", "committed"]
    assert balance(customer) == (75, 0)


# Heartbeats


def beats(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    said: list[bool] = []
    beat = journal.beat

    def noted(*args: Any, **kwargs: Any) -> bool:
        said.append(beat(*args, **kwargs))
        return said[-1]

    monkeypatch.setattr(journal, "beat", noted)
    return said


def hearts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, Heart)]


def wait_until(condition: Any) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_long_job_keeps_its_lease_and_its_hold(
    customer: Customer, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "LEASE_GRACE": 2.0}
    seen = set()

    def look() -> None:
        journal.sweep(get_client())
        live = Hold.objects.live().filter(expires_at__gt=timezone.now())
        seen.add((*states(), live.count()))

    # Longer than its hold, of two seconds, and the lease together.
    jobs.long("user_1", 5, look)
    assert seen == {("reserved", 1)}
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert hearts() == []


def test_a_short_job_has_no_heartbeat(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = beats(monkeypatch)
    jobs.plain("user_1")
    assert said == []
    assert hearts() == []


def test_a_heart_stops_when_the_work_is_somebody_elses(
    customer: Customer, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.METERLY = {**settings.METERLY, "LEASE_GRACE": 0.3}
    said = beats(monkeypatch)
    work = guard("user_1", 25)
    work.lifecycle.reserve()
    assert work.reservation is not None
    heart = Heart(work.reservation, work.fence)
    heart.start()
    wait_until(lambda: len(said) >= 2)
    assert work.lifecycle.offer(60)
    wait_until(lambda: not heart.is_alive())
    assert said[-1] is False


def test_a_beat_is_worth_lease_grace(customer: Customer, settings: Any) -> None:
    work = guard("user_1", 25, ttl_seconds=3600)
    work.lifecycle.reserve()
    assert work.reservation is not None
    assert journal.beat(work.reservation, fence=work.fence)
    lease = Reservation.objects.get().lease_until
    assert lease is not None
    left = (lease - timezone.now()).total_seconds()
    assert 50 < left <= 60


# Hand-off


@meterly_guard(amount=25)
def order(request: HttpRequest) -> HttpResponse:
    task_id = request.meterly.hand_off(jobs.handed_off, used=request.GET.get("used"))  # type: ignore[attr-defined]
    if "raise" in request.GET:
        raise jobs.Broken
    return HttpResponse(task_id, status=int(request.GET.get("status", "202")))


@pytest.fixture
def client(any_ledger: Any) -> Iterator[Client]:
    user = User.objects.create_user("alice")
    fund(user)
    client = Client(raise_request_exception=False)
    client.force_login(user)
    with override_settings(ROOT_URLCONF=__name__):
        yield client


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, app: Celery) -> list[dict[str, Any]]:
    """What is sent, whether a transaction is open then, and what is in the row."""
    found: list[dict[str, Any]] = []

    def send_task(name: str, args: Any, kwargs: Any, **options: Any) -> None:
        found.append(
            {
                "name": name,
                "kwargs": kwargs,
                "states": states(),
                "in_transaction": transaction.get_connection().in_atomic_block,
                **options,
            }
        )

    monkeypatch.setattr(app, "send_task", send_task)
    return found


def deliver(message: dict[str, Any]) -> Any:
    """Run a task as a worker does that gets *message*."""
    return jobs.handed_off.apply(
        (),
        message["kwargs"],
        task_id=message["task_id"],
        headers=message["headers"],
    )


@pytest.mark.parametrize("enforcement", ["enforce", "off"])
def test_what_was_handed_off_is_settled_when_its_unit_is_removed(
    customer: Customer, sent: list[Any], settings: Any, enforcement: str
) -> None:
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": enforcement}
    with guard("user_1", 25, "image_credits") as work:
        work.hand_off(jobs.handed_off, used=7)
    units = {"UNITS": {"tokens": "tokens"}}
    settings.METERLY = {**settings.METERLY, **units, "DEFAULT_UNIT": None}
    assert deliver(sent[0]).state == "SUCCESS"
    assert balance(customer) == ((93, 0) if enforcement == "enforce" else (100, 0))


def hands_off(request: HttpRequest) -> HttpResponse:
    request.meterly.hand_off(jobs.handed_off, used=7)  # type: ignore[attr-defined]
    return HttpResponse(status=int(request.GET["status"]))


def hands_off_in_its_stream(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[str]:
        yield "begun"
        request.meterly.hand_off(jobs.handed_off, used=7)  # type: ignore[attr-defined]

    return StreamingHttpResponse(chunks())


@pytest.mark.parametrize("enforcement", ["enforce", "off"])
@pytest.mark.parametrize(
    ("view", "status", "messages"),
    [(hands_off, 202, 1), (hands_off, 400, 0), (hands_off_in_its_stream, 200, 1)],
    ids=["success", "failure", "stream"],
)
def test_a_view_hands_off_by_its_end_in_every_mode(
    customer: Customer,
    sent: list[Any],
    enforcement: str,
    view: Any,
    status: int,
    messages: int,
) -> None:
    guarded = meterly_guard(
        amount=25, customer=lambda request: "user_1", enforcement=enforcement
    )(view)
    response = guarded(RequestFactory().post(f"/?status={status}"))
    if response.streaming:
        assert sent == []
        assert b"".join(response) == b"begun"
        response.close()
    assert len(sent) == messages
    assert not any(message["in_transaction"] for message in sent)


def alice() -> Customer:
    return Reservation.objects.latest("created_at").customer


def test_f36_a_view_reserves_and_its_task_settles(
    any_requests: bool, client: Client, sent: list[Any]
) -> None:
    response = client.post("/?used=7")
    assert response.status_code == 202
    [message] = sent
    row = Reservation.objects.get()
    assert message["states"] == ["reserved"]
    assert not message["in_transaction"]
    assert response.content.decode() == message["task_id"]
    # Ids, and nothing else, travel.
    assert message["headers"].keys() == {"meterly_reservation"}
    signed = message["headers"]["meterly_reservation"]
    assert Signer(salt="django_meterly.handoffs").unsign_object(signed) == [
        str(row.pk),
        "jobs.handed_off",
        message["task_id"],
    ]
    assert (row.state, row.fence) == ("reserved", 1)
    assert balance(row.customer) == (100, 25)

    message["kwargs"]["used"] = 7
    assert deliver(message).state == "SUCCESS"
    assert states() == ["committed"]
    assert balance(row.customer) == (93, 0)
    assert deliver(message).state == "IGNORED"
    assert balance(row.customer) == (93, 0)
    assert_books_balance()


@pytest.mark.parametrize("query", ["?raise", "?status=422"])
def test_f36_a_view_that_fails_sends_nothing_and_releases(
    query: str, any_requests: bool, client: Client, sent: list[Any]
) -> None:
    client.post(f"/{query}")
    assert sent == []
    assert states() == ["released"]
    assert balance(alice()) == (100, 0)


def test_f36_a_commit_that_fails_sends_nothing_and_releases(
    atomic_requests: None,
    client: Client,
    sent: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = transaction.get_connection()
    commit = type(connection)._commit

    def fail(self: Any) -> None:
        if Reservation.objects.filter(fence=1).exists():
            self.rollback()
            raise transaction.TransactionManagementError("no")
        commit(self)

    monkeypatch.setattr(type(connection), "_commit", fail)
    client.post("/")
    monkeypatch.undo()
    assert sent == []
    assert states() == ["released"]


def test_f14_a_receiver_that_raises_after_the_commit_does_not_stop_the_task(
    atomic_requests: None, client: Client, sent: list[Any]
) -> None:
    # Another app's on_commit raises: the row says that the work was handed off.
    hand_off = order.__wrapped__  # type: ignore[attr-defined]

    @meterly_guard(amount=25)
    def unlucky(request: HttpRequest) -> HttpResponse:
        def unlucky_receiver() -> None:
            raise jobs.Broken

        transaction.on_commit(unlucky_receiver)
        return hand_off(request)  # type: ignore[no-any-return]

    urls = type("urls", (), {"urlpatterns": [path("", unlucky)]})
    with override_settings(ROOT_URLCONF=urls):
        assert client.post("/").status_code == 500
    assert len(sent) == 1
    assert states() == ["reserved"]


def test_f36_a_broker_that_is_down_releases_at_once_and_says_so(
    any_requests: bool,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    app: Celery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def down(*args: Any, **options: Any) -> None:
        raise OperationalError("connection refused")

    monkeypatch.setattr(app, "send_task", down)
    response = client.post("/")
    assert response.status_code >= 500
    assert "could not be handed off" in caplog.text
    assert states() == ["released"]
    assert balance(alice()) == (100, 0)


def test_f36_the_middleware_answers_503_when_the_broker_is_down(
    any_requests: bool,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    app: Celery,
    settings: Any,
) -> None:
    def down(*args: Any, **options: Any) -> None:
        raise OperationalError("connection refused")

    middleware = "django_meterly.middleware.MeterlyMiddleware"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, middleware]
    monkeypatch.setattr(app, "send_task", down)
    response = client.post("/")
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert states() == ["released"]


@pytest.mark.parametrize("enforcement", ["off", "shadow"])
def test_what_nobody_is_charged_for_is_handed_off_all_the_same(
    enforcement: str, any_requests: bool, client: Client, sent: list[Any], settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": enforcement}
    user = User.objects.get()
    if enforcement == "shadow":
        # Shadow charges whoever can pay: leave nothing to pay with.
        with guard(user, 100):
            pass
    before = states()
    assert client.post("/").status_code == 202
    [message] = sent
    message["kwargs"]["used"] = None
    assert deliver(message).state == "SUCCESS"
    assert set(states()) - set(before) <= {"denied"}
    assert states().count("committed") == before.count("committed")


def test_f36_a_task_that_is_never_delivered_is_released(
    client: Client, sent: list[Any]
) -> None:
    client.post("/")
    sweep()
    assert states() == ["released"]
    assert balance(alice()) == (100, 0)


def test_f36_what_was_handed_off_is_taken_back_unless_it_was_taken_up(
    customer: Customer, sent: list[Any]
) -> None:
    for _ in range(2):
        with guard("user_1", 25) as work:
            work.hand_off(jobs.handed_off)
    taken = Reservation.objects.latest("created_at")
    assert journal.claim(get_client(), customer, taken.key)
    for message in sent * 2:
        header = message["headers"]["meterly_reservation"]
        release_handed_off(header, message["name"], message["task_id"])
    assert states() == ["released", "reserved"]
    assert balance(customer) == (100, 25)
    assert deliver(sent[0]).state == "SUCCESS"
    assert states() == ["released", "reserved", "committed"]


def test_f36_a_task_that_comes_too_late_reserves_anew(
    client: Client, sent: list[Any]
) -> None:
    client.post("/")
    sweep()
    assert deliver(sent[0]).state == "SUCCESS"
    assert states() == ["released", "committed"]
    first, second = Reservation.objects.order_by("attempt")
    assert (first.key, 2) == (second.key, second.attempt)
    assert balance(alice()) == (75, 0)


def test_f36_a_task_that_comes_too_late_for_the_credits_does_not_run(
    client: Client, sent: list[Any], tmp_path: Any
) -> None:
    client.post("/")
    sweep()
    guard(alice(), 90).lifecycle.reserve()
    sent[0]["kwargs"]["folder"] = str(tmp_path)
    result = deliver(sent[0])
    assert isinstance(result.result, MeterlyInsufficientCreditsError)
    assert not (tmp_path / "notes").exists()


def test_f36_a_handed_off_task_that_fails_is_free(
    client: Client, sent: list[Any]
) -> None:
    client.post("/")
    sent[0]["kwargs"]["used"] = "none"
    assert deliver(sent[0]).state == "FAILURE"
    assert states() == ["released"]
    assert balance(alice()) == (100, 0)


def test_f36_a_view_that_outlives_its_reservation_hands_nothing_off(
    customer: Customer, sent: list[Any]
) -> None:
    work = guard("user_1", 25)
    work.lifecycle.reserve()
    work.hand_off(jobs.handed_off)
    sweep()
    with pytest.raises(MeterlyUnavailableError):
        work.lifecycle.succeed()
    assert sent == []


def test_f36_a_transaction_that_rolls_back_takes_the_hand_off_along(
    joined: None, sent: list[Any]
) -> None:
    customer = fund("user_1")
    with transaction.atomic():
        with guard("user_1", 25, durable=False) as work:
            work.hand_off(jobs.handed_off)
        transaction.set_rollback(True)
    assert (sent, states()) == ([], [])
    with transaction.atomic(), guard("user_1", 25, durable=False) as work:
        work.hand_off(jobs.handed_off)
    assert len(sent) == 1
    assert not sent[0]["in_transaction"]
    assert states() == ["reserved"]
    assert balance(customer) == (100, 25)


def test_what_was_handed_off_is_sent_once(customer: Customer, sent: list[Any]) -> None:
    work = guard("user_1", 25)
    work.lifecycle.reserve()
    work.hand_off(jobs.handed_off)
    work.lifecycle.succeed()
    work.lifecycle.succeed()
    work.lifecycle.fail()
    assert len(sent) == 1
    assert states() == ["reserved"]


def test_what_was_handed_off_is_out_of_the_views_hands(
    customer: Customer, sent: list[Any]
) -> None:
    with guard("user_1", 25) as work:
        work.hand_off(jobs.handed_off)
        for verb in (
            work.release,
            lambda: work.charge(1),
            lambda: work.hand_off(jobs.handed_off),
        ):
            with pytest.raises(MeterlyUsageError, match="handed off"):
                verb()
    with pytest.raises(MeterlyUsageError, match="ended"):
        work.hand_off(jobs.handed_off)
    assert len(sent) == 1


def test_only_a_guarded_task_and_its_arguments_can_be_handed_off(
    customer: Customer, app: Celery
) -> None:
    unguarded = app.tasks["celery.backend_cleanup"]
    work = guard("user_1", 25)
    work.lifecycle.reserve()
    for task in (unguarded, unguarded.s(), group(jobs.handed_off.s()), print):
        with pytest.raises(TypeError, match="not a meterly_task"):
            work.hand_off(task)
    with pytest.raises(TypeError):
        work.hand_off(jobs.handed_off, 1, 2, 3)
    work.lifecycle.fail()
    assert states() == ["released"]


def test_a_signature_keeps_its_own_options(customer: Customer, sent: list[Any]) -> None:
    signature = jobs.handed_off.s(used=3).set(queue="gpu", headers={"mine": 1})
    with guard("user_1", 25) as work:
        task_id = work.hand_off(signature)
    assert sent[0]["queue"] == "gpu"
    assert sent[0]["task_id"] == task_id
    assert sent[0]["kwargs"] == {"used": 3}
    assert sent[0]["headers"].keys() == {"mine", "meterly_reservation"}


def test_f37_a_task_that_is_always_eager_can_be_handed_off(
    any_requests: bool, client: Client, app: Celery
) -> None:
    app.conf.task_always_eager = True
    assert client.post("/").status_code == 202
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(alice()) == (75, 0)


def test_a_header_that_names_no_reservation_runs_nothing(
    customer: Customer, tmp_path: Any
) -> None:
    header = sign("00000000-0000-0000-0000-000000000000", "jobs.handed_off", "1")
    result = jobs.handed_off.apply(
        (str(tmp_path),), task_id="1", headers={"meterly_reservation": header}
    )
    assert isinstance(result.result, MeterlyUsageError)
    assert not (tmp_path / "notes").exists()


urlpatterns = [path("", order)]
