"""Which HTTP methods run a guarded view, and what they cost: every kind of view."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any, ClassVar

import pytest
from asgiref.sync import async_to_sync
from django.http import HttpResponse
from django.test import AsyncClient, Client
from django.urls import path
from django.views import View
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import (
    require_GET,
    require_http_methods,
    require_POST,
    require_safe,
)
from django.views.generic import RedirectView
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from django_meterly import MeterlyUsageError, meterly_guard
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.policies import ViewOptions
from django_meterly.views import methods
from tests.books import balance, fund

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.attacks.test_methods"),
]
READS = ["GET", "HEAD"]
WRITES = ["POST", "PUT", "PATCH", "DELETE"]
UNKNOWN = ["QUERY", "PROPFIND", "FOO", "CONNECT"]
EVERY = [*READS, *WRITES, "OPTIONS", "TRACE", *UNKNOWN]
HANDLERS = ["get", *map(str.lower, WRITES)]
#: The methods for which work was done.
ran: list[str] = []


def function(request: Any, **kwargs: Any) -> HttpResponse:
    ran.append(request.method)
    return HttpResponse("done")


async def coroutine(request: Any, **kwargs: Any) -> HttpResponse:
    return function(request)


class Callable:
    def __call__(self, request: Any) -> HttpResponse:
        return function(request)


def answer(self: Any, request: Any, **kwargs: Any) -> HttpResponse:
    return function(request)


async def aanswer(self: Any, request: Any, **kwargs: Any) -> HttpResponse:
    return function(request)


def api_answer(self: Any, request: Any, **kwargs: Any) -> Response:
    function(request)
    return Response("done")


def of(base: Any, handler: Any, decorate: Any = None, **attributes: Any) -> Any:
    """Return a class with a handler of its own for each method."""

    def copy(name: str) -> Any:
        @wraps(handler)
        def sync(*args: Any, **kwargs: Any) -> Any:
            return handler(*args, **kwargs)

        @wraps(handler)
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            return await handler(*args, **kwargs)

        own: Any = asynchronous if handler is aanswer else sync
        return decorate(own) if decorate else own

    bases = base if isinstance(base, tuple) else (base,)
    return type("Page", bases, {**attributes, **{n: copy(n) for n in HANDLERS}})


def unguarded_functions() -> dict[str, Any]:
    return {
        "function": function,
        "async-function": coroutine,
        "partial": partial(function, size=1),
        "async-partial": partial(coroutine, size=1),
        "callable": Callable(),
        "decorated": csrf_exempt(never_cache(function)),
    }


def unguarded_classes() -> dict[str, Any]:
    viewset = type("Set", (ViewSet,), {f"do_{name}": api_answer for name in HANDLERS})
    actions = {name: f"do_{name}" for name in HANDLERS}
    return {
        "class": of(View, answer).as_view(),
        "async-class": of(View, aanswer).as_view(),
        "class-partial": partial(of(View, answer).as_view(), size=1),
        "class-decorated": never_cache(of(View, answer).as_view()),
        "api": of(APIView, api_answer).as_view(),
        "api-partial": partial(of(APIView, api_answer).as_view(), size=1),
        "viewset": viewset.as_view(actions),  # type: ignore[attr-defined]
        "api-view": api_view([*READS, *WRITES])(
            lambda request, **kwargs: api_answer(None, request)
        ),
    }


def guarded_otherwise(guard: Any, options: dict[str, Any]) -> dict[str, Any]:
    mixin: dict[str, Any] = {"guard_options": {"unit": "image_credits", **options}}
    inside = api_view([*READS, *WRITES])(guard(api_function))
    return {
        "mixin": of((MeterlyGuardMixin, View), answer, **mixin).as_view(),
        "async-mixin": of((MeterlyGuardMixin, View), aanswer, **mixin).as_view(),
        "api-mixin": of((MeterlyGuardMixin, APIView), api_answer, **mixin).as_view(),
        "handlers": of((MeterlyGuardMixin, View), answer, guard).as_view(),
        "async-handlers": of((MeterlyGuardMixin, View), aanswer, guard).as_view(),
        "api-handlers": of((MeterlyGuardMixin, APIView), api_answer, guard).as_view(),
        "inside-api-view": inside,
    }


#: The views whose options are the default, and ``methods=["GET"]``.
NAMED: dict[str, Any] = {"default": {}, "reads": {"methods": ["GET"]}}
guarded = meterly_guard("image_credits", 1)
reading = meterly_guard("image_credits", 1, methods=["GET"])


class OwnOptions(View):
    """Answers OPTIONS itself, as some do for CORS."""

    def post(self, request: Any) -> HttpResponse:
        return function(request)

    def options(self, request: Any) -> HttpResponse:
        ran.append("own")
        return HttpResponse(status=204)


class Shares(View):
    """Does the work of its other methods for OPTIONS and TRACE, too."""

    get = post = options = trace = answer


class Dispatches(View):
    """Does all its work in dispatch(), as GraphQL views do."""

    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        return function(request)


class Redirects(RedirectView):
    def get(self, request: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        return function(request)


class Traces(View):
    def get(self, request: Any) -> HttpResponse:
        return function(request)

    def trace(self, request: Any) -> HttpResponse:
        return function(request)


class MixinShares(MeterlyGuardMixin, Shares):
    guard_options = {"unit": "image_credits", "methods": ["GET"]}


class Creates(ViewSet):
    def create(self, request: Any) -> Response:
        return api_answer(self, request)


class CreatesByHandler(MeterlyGuardMixin, Creates):
    create = guarded(Creates.create)


def api_function(request: Any) -> Response:
    return api_answer(None, request)


def lookalike(request_method_list: Any) -> Any:
    def decorator(view: Any) -> Any:
        @wraps(view)
        def inner(request: Any) -> Any:
            ran.extend(request_method_list)
            return view(request)

        return inner

    return decorator


class SetsMethod:
    """A middleware that lets a header decide what the method is."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        request.method = request.headers.get("X-Method", request.method)
        return self.get_response(request)


create_by_options = {"post": "create", "options": "create"}
#: Views that let OPTIONS do the work of another method, and what ``Allow`` says.
SHARED: dict[str, tuple[Any, set[str]]] = {
    "class": (reading(Shares.as_view()), {*READS, "POST", "OPTIONS"}),
    "mixin": (MixinShares.as_view(), {*READS, "POST", "OPTIONS"}),
    "redirect": (reading(Redirects.as_view()), {*READS, *WRITES, "OPTIONS"}),
    "dispatch": (reading(Dispatches.as_view()), {*READS, *WRITES, "OPTIONS"}),
    "dispatch-require": (reading(require_safe(Dispatches.as_view())), {*READS}),
    "api-view": (
        reading(api_view(["GET", "OPTIONS"])(api_function)),
        {*READS, "OPTIONS"},
    ),
    "viewset": (guarded(Creates.as_view(create_by_options)), {"POST", "OPTIONS"}),
    "viewset-handler": (
        CreatesByHandler.as_view(create_by_options),
        {"POST", "OPTIONS"},
    ),
}
#: Functions, and what ``Allow`` says about them.
ALLOW: dict[str, tuple[Any, str]] = {
    "post": (guarded(require_POST(function)), "POST"),
    "safe": (guarded(never_cache(require_safe(function))), "GET, HEAD"),
    "get": (guarded(require_GET(coroutine)), "GET"),
    "both": (
        guarded(
            require_http_methods(["PUT", "POST"])(
                require_http_methods(("GET", "POST", "PUT"))(function)
            )
        ),
        "PUT, POST",
    ),
    "none": (guarded(require_POST(require_safe(function))), ""),
    "listed": (
        guarded(require_http_methods(["GET", "OPTIONS"])(function)),
        "GET, OPTIONS",
    ),
    "partial": (guarded(partial(require_POST(function), size=1)), "POST"),
    "unknown": (
        guarded(lookalike(["PUT"])(function)),
        "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS",
    ),
    "off": (
        meterly_guard("image_credits", enforcement="off")(require_POST(function)),
        "POST",
    ),
}

urlpatterns = [
    *[path(f"shared/{kind}/", view) for kind, (view, _) in SHARED.items()],
    *[path(f"allow/{kind}/", view) for kind, (view, _) in ALLOW.items()],
    path("above/post/", require_POST(guarded(function))),
    path("own/around/", guarded(OwnOptions.as_view())),
    path(
        "own/mixin/",
        of((MeterlyGuardMixin, OwnOptions), answer, guard_options={}).as_view(),
    ),
    path("traces/", guarded(Traces.as_view())),
]
FUNCTIONS: list[str] = []
CLASSES: list[str] = []
for prefix, named in NAMED.items():
    each_guard = meterly_guard("image_credits", 1, **named)
    for urls, views in (
        (FUNCTIONS, unguarded_functions()),
        (CLASSES, unguarded_classes()),
    ):
        for kind, view in views.items():
            urls += [kind, f"settings/{kind}"]
            named_view = path(
                f"{prefix}/settings/{kind}/", view, name=f"settings:{prefix}:{kind}"
            )
            urlpatterns += [path(f"{prefix}/{kind}/", each_guard(view)), named_view]
    for kind, view in guarded_otherwise(each_guard, named).items():
        CLASSES.append(kind)
        urlpatterns.append(path(f"{prefix}/{kind}/", view))


@pytest.fixture
def customer(user: Any, joined: None) -> Any:
    return fund(user, 1000)


@pytest.fixture
def send(client: Client, user: Any, customer: Any, settings: Any) -> Any:
    """Send a request; return what work was done, what it cost, and the answer."""
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django_meterly.middleware.MeterlyMiddleware",
        "tests.attacks.test_methods.SetsMethod",
    ]
    settings.METERLY = {
        **settings.METERLY,
        "GUARDED_VIEWS": {f"settings:{name}:": NAMED[name] for name in NAMED},
    }
    async_client = AsyncClient()
    for each in (client, async_client):
        each.force_login(user)

    def send(
        method: str, url: str, *, asgi: bool = False, **extra: Any
    ) -> tuple[list[str], int, Any]:
        async def asend() -> Any:
            return await async_client.generic(method, url, **extra)

        ran.clear()
        before = balance(customer)[0]
        response: Any
        if asgi:
            response = async_to_sync(asend)()
        else:
            response = client.generic(method, url, **extra)
        now, reserved = balance(customer)
        assert reserved == 0
        return list(ran), before - now, response

    return send


def expected(
    named: str, method: str, *, is_function: bool
) -> tuple[list[str], int, int]:
    if method == "OPTIONS":
        return [], 0, 200
    if method == "TRACE" or (not is_function and method in UNKNOWN):
        return [], 0, 405
    is_free = method in READS and named == "default"
    return [method], 0 if is_free else 1, 200


def assert_as_expected(send: Any, kind: str, *, is_function: bool) -> None:
    for named in NAMED:
        for method in EVERY:
            for asgi in (False, True):
                work, cost, response = send(method, f"/{named}/{kind}/", asgi=asgi)
                assert (work, cost, response.status_code) == expected(
                    named, method, is_function=is_function
                ), (named, method, asgi)


def runs(kinds: list[str]) -> list[Any]:
    """Return *kinds*, each once, with those that ``ATOMIC_REQUESTS`` lets run."""
    return [
        (kind, atomic)
        for kind in dict.fromkeys(kinds)
        for atomic in (False, True)
        # Refused: by Django, and by meterly.E012.
        if not atomic or not ("async-" in kind or "inside-" in kind)
    ]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("kind", "atomic"), runs(FUNCTIONS))
def test_f48_functions_never_run_for_nothing(
    send: Any, request: Any, kind: str, atomic: bool
) -> None:
    if atomic:
        request.getfixturevalue("atomic_requests")
    assert_as_expected(send, kind, is_function=True)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("kind", "atomic"), runs(CLASSES))
def test_f48_classes_keep_their_own_options(
    send: Any, request: Any, kind: str, atomic: bool
) -> None:
    if atomic:
        request.getfixturevalue("atomic_requests")
    assert_as_expected(send, kind, is_function=False)


@pytest.mark.parametrize("kind", ALLOW)
def test_f48_a_function_that_does_not_run_says_what_is_allowed(
    send: Any, kind: str
) -> None:
    for asgi in (False, True):
        for method, status in (("OPTIONS", 200), ("TRACE", 405)):
            work, cost, response = send(method, f"/allow/{kind}/", asgi=asgi)
            assert (work, cost, response.status_code) == ([], 0, status)
            assert response["Allow"] == ALLOW[kind][1]
            assert (response.content, response["Content-Length"]) == (b"", "0")


def test_f48_a_decorator_above_the_guard_answers_before_it(send: Any) -> None:
    for method in ("OPTIONS", "TRACE"):
        work, cost, response = send(method, "/above/post/")
        assert (work, cost, response.status_code) == ([], 0, 405)
        assert response["Allow"] == "POST"


@pytest.mark.parametrize("kind", SHARED)
def test_f48_options_does_not_do_the_work_of_another_method(
    send: Any, any_requests: bool, kind: str
) -> None:
    for asgi in (False, True):
        work, cost, response = send("OPTIONS", f"/shared/{kind}/", asgi=asgi)
        assert (work, cost, response.status_code) == ([], 0, 200)
        # REST framework has no order.
        assert set(response["Allow"].split(", ")) == SHARED[kind][1]
        work, cost, response = send("TRACE", f"/shared/{kind}/", asgi=asgi)
        assert (work, cost, response.status_code) == ([], 0, 405)


@pytest.mark.parametrize("kind", ["around", "mixin"])
def test_f48_a_handler_that_only_answers_options_runs_and_is_free(
    send: Any, kind: str
) -> None:
    work, cost, response = send("OPTIONS", f"/own/{kind}/")
    assert (work, cost, response.status_code) == (["own"], 0, 204)


def test_f48_a_handler_for_trace_costs(send: Any) -> None:
    assert send("TRACE", "/traces/")[:2] == (["TRACE"], 1)


@pytest.mark.parametrize("kind", ["function", "class", "mixin", "api", "handlers"])
@pytest.mark.parametrize("other", ["GET", "HEAD", "OPTIONS", "TRACE"])
def test_f48_what_a_request_says_about_its_method_changes_nothing(
    send: Any, kind: str, other: str
) -> None:
    form: dict[str, Any] = {
        "data": f"_method={other}&_httpmethod={other}",
        "content_type": "application/x-www-form-urlencoded",
    }
    for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        form["headers"] = {header: other}
        url = f"/default/{kind}/?_method={other}"
        assert send("POST", url, **form)[:2] == (["POST"], 1)


@pytest.mark.parametrize("kind", ["function", "class", "mixin", "api", "handlers"])
def test_f48_the_method_that_a_middleware_sets_counts(send: Any, kind: str) -> None:
    def overridden(method: str, by: str) -> tuple[list[str], int, int]:
        answered = send(method, f"/default/{kind}/", headers={"X-Method": by})
        return (*answered[:2], answered[2].status_code)

    is_function = kind == "function"
    for method, by in (("POST", "GET"), ("GET", "POST"), ("GET", "FOO")):
        assert overridden(method, by) == expected(
            "default", by, is_function=is_function
        )
    for method in ("OPTIONS", "TRACE"):
        assert overridden("POST", method)[:2] == ([], 0)
    # Methods are case-sensitive, so this one is unknown; Django's classes fold it.
    assert overridden("POST", "get") == (["get"], 1, 200)


def test_f48_methods_adds_get_and_head() -> None:
    assert methods.check_methods(["get"]) == {"GET", "HEAD"}
    assert methods.check_methods(("HEAD",)) == {"HEAD"}
    assert methods.check_methods([]) == set()
    for named in (None, [], ["POST"], ["GET"], ["HEAD"]):
        options = ViewOptions(unit="image_credits", methods=named)
        for method in (*WRITES, *UNKNOWN, "TRACE", "get", "head", "options", "", None):
            assert options.costs(method), (named, method)
        assert not options.costs("OPTIONS")
        assert options.costs("GET") is (named == ["GET"])
        assert options.costs("HEAD") is (named in (["GET"], ["HEAD"]))


@pytest.mark.parametrize(
    ("named", "error"),
    [
        (["OPTIONS"], ValueError),
        (["GET", "trace"], ValueError),
        ("GET", TypeError),
        ([1], TypeError),
        ([None], TypeError),
        (1, TypeError),
    ],
)
def test_f48_methods_refuses_what_cannot_be_named(named: Any, error: Any) -> None:
    with pytest.raises(error, match=r"^methods "):
        meterly_guard("image_credits", methods=named)


def test_f48_a_free_options_is_told_so(send: Any, monkeypatch: Any) -> None:
    def options(self: Any, request: Any) -> HttpResponse:
        request.meterly.charge(3)
        return HttpResponse()

    monkeypatch.setattr(OwnOptions, "options", options)
    with pytest.raises(
        MeterlyUsageError, match=r"OPTIONS costs nothing on this view.$"
    ):
        send("OPTIONS", "/own/around/")


class Overrides(MeterlyGuardMixin, View):
    """Lets a form decide, as browsers have no PUT and no DELETE."""

    guard_options = {"unit": "image_credits"}

    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        request.method = request.POST.get("_method", request.method)
        return super().dispatch(request, *args, **kwargs)

    get = post = put = answer

    def delete(self, request: Any) -> HttpResponse:
        # One piece of work, whoever does it.
        return self.post(request)


class AsyncOverrides(Overrides):
    get = post = put = aanswer

    async def delete(self, request: Any) -> HttpResponse:
        response: HttpResponse = await self.post(request)
        return response


class Calls(Overrides):
    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        name = request.POST.get("_method", request.method).lower()
        return getattr(self, name)(request, *args, **kwargs)


class ApiOverrides(MeterlyGuardMixin, APIView):
    guard_options = {"unit": "image_credits"}

    def initialize_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        request.method = request.POST.get("_method", request.method)
        return super().initialize_request(request, *args, **kwargs)

    get = post = put = api_answer

    def delete(self, request: Any) -> Response:
        return self.post(request)


class TriesAgain(MeterlyGuardMixin, View):
    """Calls the handler that it has looked up once more, after an error."""

    guard_options = {"unit": "image_credits"}
    failed: ClassVar[list[bool]] = []

    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        handler = getattr(self, request.method.lower())
        try:
            return handler(request)
        except OSError:
            return handler(request)

    def post(self, request: Any) -> HttpResponse:
        if not self.failed:
            self.failed.append(True)
            raise OSError
        return answer(self, request)


urlpatterns += [path("again/", TriesAgain.as_view())]


def test_a_handler_that_is_called_again_is_another_piece_of_work(send: Any) -> None:
    TriesAgain.failed.clear()
    work, cost, response = send("POST", "/again/")
    assert (len(work), cost, response.status_code) == (1, 1, 200)


overriding = [Overrides, AsyncOverrides, Calls, ApiOverrides]
urlpatterns += [
    path(f"overriding/{cls.__name__}/", cls.as_view()) for cls in overriding
]


@pytest.mark.parametrize("name", [cls.__name__ for cls in overriding])
def test_f48_a_class_that_chooses_another_handler_is_charged_once(
    send: Any, request: Any, any_requests: bool, name: str
) -> None:
    if any_requests and name == "AsyncOverrides":
        # Django refuses it.
        return
    for method in ("POST", "PUT", "DELETE"):
        work, cost, response = send(
            "POST",
            f"/overriding/{name}/",
            data=f"_method={method}",
            content_type="application/x-www-form-urlencoded",
        )
        assert (len(work), cost, response.status_code) == (1, 1, 200), method
