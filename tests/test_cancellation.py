"""Async work that is cancelled, with a ledger that takes its time."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.http import HttpResponse

from django_meterly import guard, meterly_guard
from django_meterly.testing import assert_books_balance, sweep
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from django.contrib.auth.models import User

pytestmark = pytest.mark.django_db(transaction=True)


class Slow:
    """A call that has arrived at the ledger, and waits there to be let go."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> None:
        self.arrived.set()
        assert self.go.wait(60)


async def cancel_in(slow: Slow, task: asyncio.Task[Any], times: int) -> None:
    """Cancel *task* while its call waits, *times* times, before it may go on."""
    while not slow.arrived.is_set():
        await asyncio.sleep(0.005)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
    slow.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(
    ("operation", "ran", "end"),
    [
        ("reserve_credits", False, "released"),
        ("commit_reservation", True, "committed"),
    ],
)
@pytest.mark.parametrize("kind", ["view", "block"])
def test_f22_cancelled_while_the_ledger_is_slow_still_settles(
    request_: Any,
    user: User,
    remote: Any,
    operation: str,
    ran: bool,
    end: str,
    times: int,
    kind: str,
) -> None:
    customer = fund(user)
    done = []

    @meterly_guard("image_credits", 25)
    async def view(request: Any) -> HttpResponse:
        done.append(True)
        return HttpResponse()

    async def block() -> None:
        async with guard(user, 25):
            done.append(True)

    async def scenario() -> None:
        slow = Slow()
        remote.meet(operation, slow)
        work = view(request_) if kind == "view" else block()
        await cancel_in(slow, asyncio.ensure_future(work), times)

    async_to_sync(scenario)()
    assert bool(done) is ran
    # Nothing is left to a sweeper.
    assert states() == [end]
    assert movements() == ["reserved", end]
    assert balance(customer) == (75 if ran else 100, 0)
    assert_books_balance()


@pytest.mark.parametrize("kind", ["view", "block"])
def test_f22_cancelled_in_the_work_and_again_in_its_release_still_settles(
    request_: Any, user: User, remote: Any, kind: str
) -> None:
    customer = fund(user)
    running = asyncio.Event()

    @meterly_guard("image_credits", 25, on_disconnect="release")
    async def view(request: Any) -> HttpResponse:
        running.set()
        await asyncio.sleep(60)
        return HttpResponse()

    async def block() -> None:
        async with guard(user, 25):
            running.set()
            await asyncio.sleep(60)

    async def scenario() -> None:
        slow = Slow()
        remote.meet("release_reservation", slow)
        work = view(request_) if kind == "view" else block()
        task = asyncio.ensure_future(work)
        await running.wait()
        task.cancel()
        await cancel_in(slow, task, 2)

    async_to_sync(scenario)()
    assert states() == ["released"]
    assert movements() == ["reserved", "released"]
    assert balance(customer) == (100, 0)


def test_f22_the_decision_is_on_record_before_the_ledger_is_awaited(
    request_: Any, user: User, remote: Any
) -> None:
    fund(user)
    seen = []

    @meterly_guard("image_credits", 25)
    async def view(request: Any) -> HttpResponse:
        return HttpResponse()

    remote.meet("commit_reservation", lambda: seen.extend(states()))
    async_to_sync(view)(request_)
    assert seen == ["commit_pending"]


@pytest.mark.parametrize(
    "thrown",
    [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError("of its own")],
    ids=repr,
)
def test_f23_the_very_exception_of_async_work_goes_on(
    request_: Any, user: User, any_ledger: Any, thrown: BaseException
) -> None:
    customer = fund(user)

    @meterly_guard("image_credits", 25)
    async def view(request: Any) -> HttpResponse:
        raise thrown

    async def scenario() -> BaseException | None:
        # Caught within the coroutine: a task would end its loop by some of these.
        try:
            await view(request_)
        except BaseException as exc:  # noqa: BLE001
            return exc
        return None

    assert async_to_sync(scenario)() is thrown
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


def test_f23_a_view_that_is_closed_instead_of_finished_is_left_to_its_lease(
    request_: Any, user: User, any_ledger: Any
) -> None:
    fund(user)

    @meterly_guard("image_credits", 25)
    async def view(request: Any) -> HttpResponse:
        await Forever()
        return HttpResponse()

    async def scenario() -> None:
        work = view(request_)
        # As a loop drives it, until it waits for what never comes.
        while (waits := work.send(None)) is not Forever.token:
            waits._asyncio_future_blocking = False
            while not waits.done():
                await asyncio.sleep(0.005)
        work.close()

    async_to_sync(scenario)()
    assert states() == ["reserved"]

    sweep()
    assert movements() == ["reserved", "released"]


class Forever:
    token = object()

    def __await__(self) -> Any:
        yield self.token
