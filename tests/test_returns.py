"""What guarded views return, wherever their guard is, if it is not a response."""

from __future__ import annotations

import asyncio
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import pytest
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST
from rest_framework.decorators import action, api_view
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from django_meterly import meterly_guard
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from django.test import Client

    from django_meterly.models import Customer

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_returns"),
]
OPTIONS = {"unit": "image_credits", "amount": 25}
guarded = meterly_guard("image_credits", 25)


async def coroutine() -> HttpResponse:
    return HttpResponse()


async def chunks() -> Any:
    yield b"chunk"


#: What a view may return by mistake, and what another decorator may make good of.
VALUES: dict[str, Any] = {
    "None": lambda: None,
    "dict": lambda: {"url": "/posters/7"},
    "tuple": lambda: (200, {"url": "/posters/7"}),
    "str": lambda: "drawn",
    "bytes": lambda: b"drawn",
    "int": lambda: 200,
    "bool": lambda: True,
    "list": lambda: [HttpResponse()],
    "type": lambda: HttpResponse,
    "generator": lambda: (chunk for chunk in [b"chunk"]),
    "async_generator": chunks,
    "coroutine": coroutine,
    "function": lambda: lambda: HttpResponse(),
    "View": View,
}


def value(request: Any) -> Any:
    return VALUES[request.GET["value"]]()


@guarded
def function(request: HttpRequest) -> Any:
    return value(request)


@guarded
async def afunction(request: HttpRequest) -> Any:
    await asyncio.sleep(0)
    return value(request)


class Mixin(MeterlyGuardMixin, View):
    guard_options = OPTIONS

    def post(self, request: HttpRequest) -> Any:
        return value(request)


class AsyncMixin(MeterlyGuardMixin, View):
    guard_options = OPTIONS

    async def post(self, request: HttpRequest) -> Any:
        return value(request)


class Handler(MeterlyGuardMixin, View):
    @guarded
    def post(self, request: HttpRequest) -> Any:
        return value(request)


class Plain(View):
    def post(self, request: HttpRequest) -> Any:
        return value(request)


@method_decorator(guarded, name="post")
class Decorated(MeterlyGuardMixin, Plain):
    pass


@method_decorator([never_cache, guarded, require_POST], name="post")
class DecoratedByMany(MeterlyGuardMixin, Plain):
    pass


class DecoratedInside(MeterlyGuardMixin, View):
    @method_decorator(guarded)
    def post(self, request: HttpRequest) -> Any:
        return value(request)


@guarded
@api_view(["POST"])
def api(request: Any) -> Any:
    return value(request)


@api_view(["POST"])
@guarded
def api_below(request: Any) -> Any:
    return value(request)


class Api(MeterlyGuardMixin, APIView):
    guard_options = OPTIONS

    def post(self, request: Any) -> Any:
        return value(request)


class Posters(MeterlyGuardMixin, ViewSet):
    @action(detail=False, methods=["post"])
    @guarded
    def draw(self, request: Any) -> Any:
        return value(request)

    @method_decorator(guarded)
    @action(detail=False, methods=["post"])
    def draw_above(self, request: Any) -> Any:
        return value(request)


def plain(request: HttpRequest) -> Any:
    return value(request)


def json(view: Any) -> Any:
    """A decorator that makes a response of whatever a view returns."""

    @wraps(view)
    def as_json(request: HttpRequest) -> Any:
        found = view(request)
        return JsonResponse({"value": str(found)})

    return as_json


VIEWS = {
    "function": function,
    "afunction": afunction,
    "partial": guarded(partial(plain)),
    "json": json(function),
    "csrf": csrf_exempt(function),
    "mixin": Mixin.as_view(),
    "amixin": AsyncMixin.as_view(),
    "handler": Handler.as_view(),
    "around": guarded(Plain.as_view()),
    "decorated": Decorated.as_view(),
    "decorated_by_many": DecoratedByMany.as_view(),
    "decorated_inside": DecoratedInside.as_view(),
    "initkwargs": Mixin.as_view(guard_options=OPTIONS),
    "api": api,
    "api_class": Api.as_view(),
    "action": Posters.as_view({"post": "draw"}),
    "action_above": Posters.as_view({"post": "draw_above"}),
    "settings": plain,
}
#: REST framework opens the transaction early there, which the guard refuses.
EARLY = {"api_below": api_below}
urlpatterns = [
    path(f"{name}/", view, name=name) for name, view in {**VIEWS, **EARLY}.items()
]


@pytest.fixture
def customer(user: User, joined: None, settings: Any) -> Customer:
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django_meterly.middleware.MeterlyMiddleware",
    ]
    settings.METERLY = {**settings.METERLY, "GUARDED_VIEWS": {"settings": OPTIONS}}
    return fund(user)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", [*VIEWS, *EARLY])
@pytest.mark.parametrize("kind", VALUES)
def test_f61_what_is_no_response_is_refused_and_free(
    payer: Client, customer: Customer, kind: str, name: str
) -> None:
    with pytest.raises(TypeError, match=r"meterly_guard") as caught:
        payer.post(f"/{name}/?value={kind}")
    if kind == "coroutine":
        assert "view that returns a coroutine" in str(caught.value)
    else:
        expected = {"None": "NoneType", "generator": "generator"}.get(kind, kind)
        assert f"this one has returned {expected}. Nothing is charged." in str(
            caught.value
        )
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
    assert_books_balance()


@pytest.mark.parametrize("name", [*VIEWS, *EARLY])
def test_a_response_is_charged_once_wherever_the_guard_is(
    payer: Client, customer: Customer, name: str, any_requests: bool, monkeypatch: Any
) -> None:
    if any_requests and name in ("afunction", "amixin", *EARLY):
        return  # Django, and the guard, refuse these.
    rest = name.startswith(("api", "action"))
    monkeypatch.setitem(VALUES, "good", Response if rest else HttpResponse)
    assert payer.post(f"/{name}/?value=good").status_code == 200
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()
