"""``meterly_guard`` on async views, and ``async with guard()``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.http import HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.test import RequestFactory
from django.views import View

from django_meterly import (
    MeterlyInsufficientCreditsError,
    guard,
    meterly_guard,
)
from django_meterly.testing import assert_books_balance
from tests import views
from tests.books import balance, movements, states

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.django_db(transaction=True)


def as_function(body: Any) -> Any:
    async def view(request: Any) -> Any:
        return await body(request)

    return view


def as_partial(body: Any) -> Any:
    async def view(extra: str, request: Any) -> Any:
        return await body(request)

    return partial(view, "extra")


def as_object(body: Any) -> Any:
    class Callable:
        async def __call__(self, request: Any) -> Any:
            return await body(request)

    return Callable()


def as_class(body: Any) -> Any:
    class Page(View):
        async def post(self, request: Any) -> Any:
            return await body(request)

    return Page.as_view()


every_kind = pytest.mark.parametrize(
    "kind", [as_function, as_partial, as_object, as_class]
)


@every_kind
def test_f24_async_work_is_awaited_before_it_is_charged(
    request_: Any, customer: Any, kind: Any
) -> None:
    seen = []

    async def body(request: Any) -> HttpResponse:
        await asyncio.sleep(0)
        seen.extend(await sync_to_async(movements)())
        request.meterly.charge(7)
        return HttpResponse("done")

    view = meterly_guard("image_credits", 25)(kind(body))
    assert async_to_sync(view)(request_).content == b"done"
    assert seen == ["reserved"]
    assert balance(customer) == (93, 0)
    assert states() == ["committed"]
    assert_books_balance()


@every_kind
def test_f24_async_work_that_raises_is_released(
    request_: Any, customer: Any, kind: Any
) -> None:
    boom = views.Boom("this one")

    async def body(request: Any) -> HttpResponse:
        await asyncio.sleep(0)
        raise boom

    view = meterly_guard("image_credits", 25)(kind(body))
    with pytest.raises(views.Boom) as info:
        async_to_sync(view)(request_)
    assert info.value is boom
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


def test_options_may_be_coroutine_functions(request_: Any, customer: Any) -> None:
    async def amount(request: Any) -> int:
        await asyncio.sleep(0)
        return 5

    async def who(request: Any) -> Any:
        return await User.objects.aget(username="alice")

    @meterly_guard("image_credits", amount, customer=who)
    async def view(request: Any) -> HttpResponse:
        return HttpResponse()

    @meterly_guard("image_credits", amount, customer=who)
    def sync_view(request: Any) -> HttpResponse:
        return HttpResponse()

    async_to_sync(view)(request_)
    sync_view(request_)
    assert balance(customer) == (90, 0)


def test_too_few_credits_are_a_402_and_the_async_view_does_not_run(
    request_: Any, customer: Any
) -> None:
    @meterly_guard("image_credits", 101)
    async def view(request: Any) -> HttpResponse:
        raise AssertionError

    response = async_to_sync(view)(request_)
    assert response.status_code == 402
    assert states() == ["denied"]


@pytest.mark.parametrize(
    ("policy", "used", "left"),
    [("charge", None, 75), ("charge", 5, 95), ("charge", 0, 100), ("release", 5, 100)],
)
@pytest.mark.parametrize("times", [1, 2])
def test_f22_a_cancelled_view_follows_the_policy(
    request_: Any, customer: Any, times: int, policy: str, used: int | None, left: int
) -> None:
    running = asyncio.Event()

    @meterly_guard("image_credits", 25, on_disconnect=policy)
    async def view(request: Any) -> HttpResponse:
        if used is not None:
            request.meterly.charge(used)
        running.set()
        await asyncio.sleep(60)
        return HttpResponse()

    async def scenario() -> None:
        task = asyncio.ensure_future(view(request_))
        await running.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    async_to_sync(scenario)()
    assert balance(customer) == (left, 0)
    end = "released" if policy == "release" else "committed"
    assert states() == [end]
    assert movements() == ["reserved", end]


@pytest.mark.parametrize("steps", range(12))
def test_f22_a_view_cancelled_anywhere_is_settled_once(
    request_: Any, customer: Any, steps: int
) -> None:
    done = []

    @meterly_guard("image_credits", 25, on_disconnect="release")
    async def view(request: Any) -> HttpResponse:
        await asyncio.sleep(0)
        done.append(True)
        return HttpResponse()

    async def scenario() -> None:
        task = asyncio.ensure_future(view(request_))
        for _ in range(steps):
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.wait([task])

    async_to_sync(scenario)()
    assert balance(customer)[1] == 0
    assert len(states()) <= 1
    assert balance(customer)[0] == (75 if done else 100)
    assert_books_balance()


def test_f20_an_async_views_template_is_decided_by_its_rendering(
    request_: Any, customer: Any
) -> None:
    @meterly_guard("image_credits", 25)
    async def view(request: Any) -> TemplateResponse:
        return TemplateResponse(request, "tests/good.html", {"value": 1})

    response = async_to_sync(view)(request_)
    assert states() == ["reserved"]
    response.render()
    assert states() == ["committed"]


def streaming(**options: Any) -> Any:
    @meterly_guard("image_credits", 25, **options)
    async def view(request: Any) -> StreamingHttpResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            request.meterly.charge(5)
            yield b"two"
            if request.POST.get("break"):
                raise views.Boom("in the stream")
            yield b"three"

        return StreamingHttpResponse(chunks())

    return view


def test_f21_an_async_stream_is_charged_after_its_last_chunk(
    request_: Any, customer: Any
) -> None:
    async def scenario() -> list[bytes]:
        response = await streaming()(request_)
        assert await sync_to_async(balance)(customer) == (100, 25)
        return [chunk async for chunk in response]

    assert async_to_sync(scenario)() == [b"one", b"two", b"three"]
    assert balance(customer) == (95, 0)
    assert movements() == ["reserved", "committed"]


@pytest.mark.parametrize("way", ["closed", "cancelled"])
@pytest.mark.parametrize(("policy", "left"), [("release", 100), ("charge", 95)])
def test_f21_a_disconnected_async_stream_follows_the_policy(
    request_: Any, customer: Any, policy: str, left: int, way: str
) -> None:
    async def scenario() -> None:
        response = await streaming(on_disconnect=policy)(request_)
        content = aiter(response)
        await anext(content)
        await anext(content)
        if way == "closed":
            await content.aclose()
        else:
            with pytest.raises(asyncio.CancelledError):
                await content.athrow(asyncio.CancelledError())
        await sync_to_async(response.close)()

    async_to_sync(scenario)()
    assert balance(customer) == (left, 0)


def test_f21_an_async_stream_that_breaks_is_released(user: User, customer: Any) -> None:
    request = RequestFactory().post("/", {"break": "1"})
    request.user = user

    async def scenario() -> None:
        response = await streaming()(request)
        with pytest.raises(views.Boom):
            [chunk async for chunk in response]

    async_to_sync(scenario)()
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize(("policy", "left"), [("release", 100), ("charge", 75)])
def test_f47_an_async_stream_that_never_starts_follows_the_policy(
    request_: Any, customer: Any, settings: Any, policy: str, left: int
) -> None:
    settings.METERLY = {**settings.METERLY, "ON_DISCONNECT": policy}

    async def scenario() -> None:
        response = await streaming()(request_)
        await sync_to_async(response.close)()

    async_to_sync(scenario)()
    assert balance(customer) == (left, 0)


def test_async_with_guard_charges_and_releases(user: User, customer: Any) -> None:
    async def scenario() -> None:
        async with guard(user, 10) as work:
            work.charge(4)
        with pytest.raises(views.Boom):
            async with guard(user, 10):
                raise views.Boom
        with pytest.raises(MeterlyInsufficientCreditsError):
            async with guard(user, 1000):
                raise AssertionError

    async_to_sync(scenario)()
    assert states() == ["committed", "released", "denied"]
    assert balance(customer) == (96, 0)
