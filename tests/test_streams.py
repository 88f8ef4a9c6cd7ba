"""Streams that take long: what keeps their credits, and who waits for that."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.http import StreamingHttpResponse
from django.utils import timezone

from django_meterly import get_client, journal, meterly_guard
from django_meterly.heart import Heart
from django_meterly.ledger.models import Hold
from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance, lapse_leases, sweep
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from django.http import HttpRequest

    from django_meterly.models import Customer

pytestmark = pytest.mark.django_db(transaction=True)

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
CHUNKS = 8


def read_sync(request: HttpRequest, look: Any) -> None:
    @meterly_guard("image_credits", 25, ttl_seconds=2)
    def view(request: HttpRequest) -> StreamingHttpResponse:
        def chunks() -> Iterator[bytes]:
            for number in range(CHUNKS):
                yield b"%d" % number

        return StreamingHttpResponse(chunks())

    response = view(request)
    if not response.streaming:
        raise Refused(response.status_code)
    for number, _chunk in enumerate(response):
        look(number)
    response.close()


def read_async(request: HttpRequest, look: Any) -> None:
    @meterly_guard("image_credits", 25, ttl_seconds=2)
    async def view(request: HttpRequest) -> StreamingHttpResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for number in range(CHUNKS):
                yield b"%d" % number

        return StreamingHttpResponse(chunks())

    async def scenario() -> None:
        response = await view(request)
        if not response.streaming:
            raise Refused(response.status_code)
        number = 0
        async for _chunk in response:
            await sync_to_async(look)(number)
            number += 1
        await sync_to_async(response.close)()

    async_to_sync(scenario)()


class Refused(Exception):
    """The view did not run; says with which status."""


@pytest.fixture(params=[read_sync, read_async])
def read(request: pytest.FixtureRequest) -> Any:
    """Read a guarded stream of either kind to its end."""
    return request.param


@pytest.fixture
def keyed(request_: Any, customer: Customer) -> Any:
    """The customer's request, with an idempotency key."""
    request_.META["HTTP_IDEMPOTENCY_KEY"] = KEY
    return request_


def no_heart_beats() -> bool:
    return not any(isinstance(thread, Heart) for thread in threading.enumerate())


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.sample(1)
def test_f49_a_stream_keeps_its_lease_and_its_hold(
    read: Any, keyed: Any, customer: Customer, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "LEASE_GRACE": 2.0}
    seen = set()
    refused = []

    def look(number: int) -> None:
        # Altogether longer than its hold, of two seconds, and the lease.
        time.sleep(5 / CHUNKS)
        journal.sweep(get_client())
        live = Hold.objects.live().filter(expires_at__gt=timezone.now())
        seen.add((*states(), live.count()))
        if number == CHUNKS - 2:
            # Its key makes no second one meanwhile.
            with pytest.raises(Refused) as info:
                read(keyed, None)
            refused.append(info.value.args[0])

    read(keyed, look)
    assert seen == {("reserved", 1)}
    assert refused == [409]
    assert states() == ["committed"]
    assert movements() == ["reserved", "committed"]
    assert balance(customer) == (75, 0)
    wait_until(no_heart_beats)
    assert_books_balance()


def test_f49_no_chunk_waits_for_the_renewal(
    read: Any, request_: Any, user: Any, remote: Any, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "LEASE_GRACE": 0.3}
    customer = fund(user)
    extending, answer = threading.Event(), threading.Event()

    def slow() -> None:
        extending.set()
        assert answer.wait(60)

    remote.meet("extend_reservation", slow)
    waits = []

    def look(number: int) -> None:
        if number == 0:
            # The ledger is asked to extend the hold, and takes its time.
            assert extending.wait(60)
        waits.append(answer.is_set())

    try:
        read(request_, look)
    finally:
        answer.set()
    assert waits == [False] * CHUNKS
    wait_until(no_heart_beats)
    sweep()
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)


def test_f49_a_stream_that_stalled_longer_than_its_lease_is_a_late_success(
    read: Any, request_: Any, customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a process that was stopped, with its heart.
    monkeypatch.setattr(Heart, "run", lambda heart: None)

    def look(number: int) -> None:
        if number == 3:
            # The heart has said that the stream has begun, before it stopped.
            Reservation.objects.update(charge=None)
            lapse_leases()
            journal.sweep(get_client())
            assert states() == ["released"]
            connections.close_all()

    read(request_, look)
    assert states() == ["committed"]
    assert movements() == ["reserved", "released", "used"]
    assert balance(customer) == (75, 0)
