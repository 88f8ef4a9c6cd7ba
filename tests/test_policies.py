"""Every policy arrives in the guard that runs, whichever edge it was told to.

To see it fail, drop one policy at one edge. For example, let ``guard()`` build
``Policies(ttl_seconds=policies.get("ttl_seconds"))``.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from celery import current_app, current_task
from django.http import HttpResponse
from django.test import AsyncRequestFactory, Client
from django.urls import path
from django.views import View
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.test import APIRequestFactory, force_authenticate
from rest_framework.views import APIView

from django_meterly import guard, meterly_guard
from django_meterly.conf import DEFAULTS
from django_meterly.guards import Guard
from django_meterly.middleware import MIDDLEWARE
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.options import read_mapping
from django_meterly.policies import (
    Policies,
    PolicyKeywords,
    TaskKeywords,
    TaskOptions,
    ViewKeywords,
    ViewOptions,
    WorkKeywords,
    WorkOptions,
)
from django_meterly.tasks import meterly_task
from tests.books import fund

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.contrib.auth.models import User

    from django_meterly.lifecycle import Lifecycle

#: For each policy a value that is not its default, and an invalid one. A new policy
#: needs both here, or its tests fail.
VALUES: dict[str, tuple[Any, Any]] = {
    "ttl_seconds": (77, 0),
    "overage": ("cap", "never"),
    "on_unavailable": ("allow", "never"),
    "enforcement": ("shadow", "never"),
}
POLICIES = [field.name for field in fields(Policies)]
#: The lifecycles of the guards that have run.
seen: list[Lifecycle] = []


@pytest.fixture(autouse=True)
def nothing_is_seen() -> Iterator[None]:
    seen.clear()
    known = set(current_app.tasks)
    yield
    for name in set(current_app.tasks) - known:
        current_app.tasks.pop(name)


def work(request: Any, **kwargs: Any) -> HttpResponse:
    seen.append(request.meterly.lifecycle)
    return HttpResponse()


# The edges: each is told options, and runs some work.


def decorator(user: User, settings: Any, **told: Any) -> None:
    request = APIRequestFactory().post("/")
    request.user = user
    meterly_guard("image_credits", 25, **told)(work)(request)


def async_decorator(user: User, settings: Any, **told: Any) -> None:
    @meterly_guard("image_credits", 25, **told)
    async def view(request: Any) -> HttpResponse:
        return work(request)

    request: Any = AsyncRequestFactory().post("/")
    request.user = user
    asyncio.run(view(request))


def rest_function(user: User, settings: Any, **told: Any) -> None:
    @meterly_guard("image_credits", 25, **told)
    @api_view(["POST"])
    def view(request: Any) -> Response:
        work(request)
        return Response()

    request = APIRequestFactory().post("/")
    force_authenticate(request, user)
    view(request)


def rest_handler(user: User, settings: Any, **told: Any) -> None:
    class Api(APIView):
        @meterly_guard("image_credits", 25, **told)
        def post(self, request: Any) -> Response:
            work(request)
            return Response()

    request = APIRequestFactory().post("/")
    force_authenticate(request, user)
    Api.as_view()(request).render()


def mixin(user: User, settings: Any, **told: Any) -> None:
    class Page(MeterlyGuardMixin, View):
        guard_options = {"unit": "image_credits", "amount": 25, **told}

        def post(self, request: Any) -> HttpResponse:
            return work(request)

    request = APIRequestFactory().post("/")
    request.user = user
    Page.as_view()(request)


def rest_mixin(user: User, settings: Any, **told: Any) -> None:
    class Api(MeterlyGuardMixin, APIView):
        guard_options = {"unit": "image_credits", "amount": 25, **told}

        def post(self, request: Any) -> Response:
            work(request)
            return Response()

    request = APIRequestFactory().post("/")
    force_authenticate(request, user)
    Api.as_view()(request).render()


def guarded_views(user: User, settings: Any, **told: Any) -> None:
    urlpatterns = [path("paid/", work, name="work")]
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, MIDDLEWARE]
    options = {"unit": "image_credits", "amount": 25, **told}
    settings.METERLY = {**settings.METERLY, "GUARDED_VIEWS": {"work": options}}
    client = Client()
    client.force_login(user)
    client.post("/paid/")


def block(user: User, settings: Any, **told: Any) -> None:
    with guard(user, 25, "image_credits", **told) as held:
        seen.append(held.lifecycle)


def async_block(user: User, settings: Any, **told: Any) -> None:
    async def run() -> None:
        async with guard(user, 25, "image_credits", **told) as held:
            seen.append(held.lifecycle)

    asyncio.run(run())


def _task(user: User, **told: Any) -> Any:
    def run() -> None:
        seen.append(current_task.meterly.lifecycle)

    name = f"tests.{uuid.uuid4()}"
    decorate = meterly_task(
        "image_credits", 25, customer=lambda: user, name=name, **told
    )
    return decorate(run)


def task(user: User, settings: Any, **told: Any) -> None:
    _task(user, **told).apply(throw=True)


def handed_off(user: User, settings: Any, **told: Any) -> None:
    """The task's policies hold, and not those of the block that hands it off."""
    guarded = _task(user, **told)
    guarded.app.conf.task_always_eager = True
    try:
        with guard(user, 25, "image_credits") as held:
            held.hand_off(guarded)
    finally:
        guarded.app.conf.task_always_eager = False


EDGES: list[Callable[..., None]] = [
    decorator,
    async_decorator,
    rest_function,
    rest_handler,
    mixin,
    rest_mixin,
    guarded_views,
    block,
    async_block,
    task,
    handed_off,
]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_a_policy_arrives_in_the_guard_that_runs(
    edge: Any, name: str, user: User, joined: None, settings: Any
) -> None:
    fund(user)
    value, _ = VALUES[name]
    if (edge, name) == (handed_off, "ttl_seconds"):
        # How long the credits are held was said when they were.
        value = DEFAULTS["RESERVATION_TTL"]
    edge(user, settings, **{name: VALUES[name][0]})
    (lifecycle,) = seen
    assert lifecycle.policies.value(name) == value
    assert getattr(lifecycle, name, value) == value


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_an_invalid_policy_is_refused_by_its_name(
    edge: Any, name: str, user: User, joined: None, settings: Any
) -> None:
    fund(user)
    _, invalid = VALUES[name]
    with pytest.raises(ValueError, match=rf"\b{name} must be"):
        edge(user, settings, **{name: invalid})
    assert seen == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_a_policy_that_is_not_told_is_its_setting(
    edge: Any, user: User, joined: None, settings: Any
) -> None:
    fund(user)
    of_settings = {
        field.metadata["setting"]: VALUES[field.name][0] for field in fields(Policies)
    }
    settings.METERLY = {**settings.METERLY, **of_settings}
    edge(user, settings)
    (lifecycle,) = seen
    for name in POLICIES:
        assert lifecycle.policies.value(name) == VALUES[name][0]


# What they do, at one edge of each kind


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("edge", [decorator, block, task])
def test_overage_caps_what_is_charged(
    edge: Any, user: User, joined: None, settings: Any, monkeypatch: Any
) -> None:
    customer = fund(user)
    charged = []

    class Seen(list[Any]):
        def append(self, lifecycle: Any) -> None:
            Guard(lifecycle).charge(60)
            charged.append(lifecycle.charge)

    monkeypatch.setitem(globals(), "seen", Seen())
    edge(user, settings, overage="cap")
    edge(user, settings, overage="charge")
    assert charged == [25, 60]
    assert customer.reservation_set.count() == 2


# The declarations agree with each other


@pytest.mark.parametrize(
    ("declared", "keywords", "named"),
    [
        (Policies, PolicyKeywords, ()),
        (WorkOptions, WorkKeywords, ("unit", "amount")),
        (ViewOptions, ViewKeywords, ("unit", "amount")),
        (TaskOptions, TaskKeywords, ("unit", "amount")),
    ],
)
def test_a_class_and_its_keywords_agree(
    declared: Any, keywords: Any, named: tuple[str, ...]
) -> None:
    hints = get_type_hints(declared)
    names = {field.name for field in fields(declared)}
    assert {name: hints[name] for name in names - {*named}} == get_type_hints(keywords)
    assert not keywords.__required_keys__
    # Each is explained, where it is declared.
    for name in vars(declared)["__annotations__"]:
        assert f"*{name}*" in declared.__doc__, name


def test_every_policy_has_a_setting() -> None:
    assert set(VALUES) == set(POLICIES)
    for field in fields(Policies):
        assert field.default is None
        assert field.metadata["setting"] in DEFAULTS
        assert f"*{field.name}* (``{field.metadata['setting']}``)" in str(
            Policies.__doc__
        )


def test_the_edges_show_their_options_by_name() -> None:
    for edge, options in (
        (meterly_guard, ViewOptions),
        (meterly_task, TaskOptions),
        (guard, Policies),
    ):
        named = set(signature(edge).parameters)
        assert named >= {field.name for field in fields(options)}
    assert "options" not in signature(meterly_guard).parameters


def test_options_are_frozen_and_checked_again_when_they_are_replaced() -> None:
    options = read_mapping({"unit": "image_credits", "methods": ["get"]}, "here")
    with pytest.raises(AttributeError):
        options.overage = "cap"  # type: ignore[misc]
    assert replace(options, overage="cap").methods == {"GET", "HEAD"}
    with pytest.raises(ValueError, match="overage must be"):
        replace(options, overage="never")
