"""``MeterlyMiddleware``: views guarded by the settings, and what views raise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.contrib.auth.models import Group, User
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIHandler
from django.db import connection
from django.http import HttpResponse
from django.test import AsyncClient, Client
from django.urls import include, path, reverse
from django.views import View
from rest_framework.authentication import TokenAuthentication
from rest_framework.authtoken.models import Token
from rest_framework.decorators import api_view
from rest_framework.permissions import IsAuthenticated
from rest_framework.response import Response
from rest_framework.views import APIView

from django_meterly import MeterlyError, MeterlyUsageError, guard, meterly_guard
from django_meterly.middleware import MeterlyMiddleware
from django_meterly.views.patterns import key_for
from tests.books import balance, states

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_middleware"),
]
OURS = "django_meterly.middleware.MeterlyMiddleware"
COSTS = {"unit": "image_credits", "amount": 25}


def render(request: Any) -> HttpResponse:
    Group.objects.create(name=request.POST.get("trace", "trace"))
    if request.POST.get("boom"):
        raise LookupError("in the view")
    return HttpResponse(str(connection.in_atomic_block))


async def asynchronous(request: Any) -> HttpResponse:
    request.meterly.charge(7)
    return HttpResponse("done")


class Page(View):
    def get(self, request: Any) -> HttpResponse:
        return HttpResponse("free")

    def post(self, request: Any) -> HttpResponse:
        return HttpResponse(str(connection.in_atomic_block))


class Api(APIView):
    authentication_classes = [TokenAuthentication]
    permission_classes = [IsAuthenticated]

    def post(self, request: Any) -> Response:
        return Response({"atomic": connection.in_atomic_block})


class Partly(View):
    @meterly_guard("image_credits", 25)
    def post(self, request: Any) -> HttpResponse:
        return HttpResponse("done")


@meterly_guard("image_credits", 25)
def decorated(request: Any) -> HttpResponse:
    return HttpResponse("done")


def block(request: Any) -> HttpResponse:
    with guard(request.user, int(request.POST["amount"]), durable=False):
        return HttpResponse("done")


def plain_block(request: Any, kind: str) -> HttpResponse:
    with guard(request.user, unit="image_credits", **BLOCKS[kind][0]):
        return HttpResponse("done")


async def async_block(request: Any, kind: str) -> HttpResponse:
    user = await request.auser()
    async with guard(user, unit="image_credits", **BLOCKS[kind][0]):
        return HttpResponse("done")


@api_view(["POST"])
def api_block(request: Any, kind: str) -> Response:
    with guard(request._request.user, unit="image_credits", **BLOCKS[kind][0]):
        return Response("done")


def uses(request: Any) -> HttpResponse:
    request.meterly.charge(3)
    return HttpResponse("done")


def amount(request: Any) -> int:
    return int(request.POST["amount"])


reports = (
    [
        path("weekly/", render, name="weekly"),
        path("monthly/", render, name="monthly"),
        path("unnamed/", render),
    ],
    "reports",
)
urlpatterns = [
    path("render/", render, name="render"),
    path("again/", render, name="again"),
    path("async/", asynchronous, name="async"),
    path("page/", Page.as_view(), name="page"),
    path("api/", Api.as_view(), name="api"),
    path("partly/", Partly.as_view(), name="partly"),
    path("decorated/", decorated, name="decorated"),
    path("block/", block, name="block"),
    path("plain-block/<kind>/", plain_block),
    path("async-block/<kind>/", async_block),
    path("api-block/<kind>/", api_block),
    path("uses/", uses, name="uses"),
    path("one/", include(reports, namespace="one")),
    path("two/", include(reports, namespace="two")),
]


class Watches:
    """Another middleware, below ours, whose hooks must go on being called."""

    seen: list[str] = []

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)

    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        self.seen.append(f"view {states()}")
        if "refuse" in request.GET:
            raise PermissionDenied

    def process_exception(self, request: Any, exception: Exception) -> Any:
        self.seen.append(f"exception {type(exception).__name__}")
        return HttpResponse("caught", status=500)


class ChoosesUrlconf:
    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        request.urlconf = "tests.test_middleware"
        return self.get_response(request)


@pytest.fixture(autouse=True)
def middleware(settings: Any) -> None:
    Watches.seen = []
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, OURS, f"{__name__}.Watches"]


@pytest.fixture
def guard_views(settings: Any) -> Any:
    def guard_views(*names: str, **options: Any) -> None:
        settings.METERLY = {
            **settings.METERLY,
            "GUARDED_VIEWS": {name: {**COSTS, **options} for name in names},
        }

    return guard_views


def test_f30_a_view_is_guarded_by_its_urls_name(
    payer: Any, customer: Any, any_requests: bool, guard_views: Any
) -> None:
    guard_views("render")
    assert payer.post("/render/").content == str(any_requests).encode()
    assert balance(customer) == (75, 0)
    assert states() == ["committed"]
    # The same view under another name is free, and keeps its transaction.
    response = payer.post("/again/", {"trace": "b"})
    assert response.content == str(any_requests).encode()
    assert balance(customer) == (75, 0)


def test_f30_the_settings_are_read_at_each_request(
    payer: Any, customer: Any, guard_views: Any, settings: Any
) -> None:
    guard_views("render")
    payer.post("/render/")
    guard_views("render", amount=5)
    payer.post("/render/", {"trace": "b"})
    assert balance(customer) == (70, 0)
    guard_views("again")
    assert payer.post("/render/", {"trace": "c"}).status_code == 200
    assert balance(customer) == (70, 0)
    payer.post("/again/", {"trace": "d"})
    assert balance(customer) == (45, 0)


def test_f30_a_namespace_is_guarded_and_its_twin_is_not(
    payer: Any, customer: Any, guard_views: Any, settings: Any
) -> None:
    guard_views("one:", "two:weekly", amount=1)
    settings.METERLY["GUARDED_VIEWS"]["one:monthly"] = {**COSTS, "amount": 10}
    for number, (url, left) in enumerate(
        [
            ("/one/weekly/", 99),
            ("/one/unnamed/", 98),
            # A name goes before its namespace.
            ("/one/monthly/", 88),
            ("/two/weekly/", 87),
            ("/two/monthly/", 87),
            ("/two/unnamed/", 87),
        ]
    ):
        assert payer.post(url, {"trace": str(number)}).status_code == 200
        assert balance(customer) == (left, 0), url


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a:b:c", "a:b:c"),
        ("a:b:d", "a:b:"),
        ("a:b:", "a:b:"),
        ("a:x:c", "a:"),
        ("a:c", "a:"),
        ("c", "c"),
        ("a", None),
        ("", None),
        ("x:c", None),
    ],
)
def test_the_nearest_key_decides(guard_views: Any, name: str, key: str | None) -> None:
    guard_views("a:", "a:b:", "a:b:c", "c")
    assert key_for(name) == key


def test_f30_a_post_without_a_csrf_token_is_a_403_and_free(
    user: User, customer: Any, any_requests: bool, guard_views: Any
) -> None:
    guard_views("render", "page")
    client = Client(enforce_csrf_checks=True)
    client.force_login(user)
    assert client.post("/render/").status_code == 403
    assert client.post("/page/").status_code == 403
    assert states() == []
    client.cookies["csrftoken"] = token = "x" * 32
    assert client.post("/render/", headers={"x-csrftoken": token}).status_code == 200
    assert balance(customer) == (75, 0)


def test_f30_other_middleware_is_asked_before_and_told_after(
    payer: Any, customer: Any, any_requests: bool, guard_views: Any
) -> None:
    guard_views("render")
    assert payer.post("/render/?refuse=1").status_code == 403
    assert states() == []
    assert payer.post("/render/", {"boom": 1}).content == b"caught"
    assert Watches.seen == ["view []", "view []", "exception LookupError"]
    assert states() == ["released"]


@pytest.mark.parametrize("name", ["decorated", "partly"])
def test_f30_a_view_with_a_guard_is_charged_once(
    payer: Any, customer: Any, guard_views: Any, name: str
) -> None:
    guard_views(name)
    assert payer.post(f"/{name}/").content == b"done"
    assert balance(customer) == (75, 0)


def test_class_based_views_and_drf_are_guarded_too(
    payer: Any, user: User, customer: Any, any_requests: bool, guard_views: Any
) -> None:
    guard_views("page", "api")
    assert payer.post("/page/").content == str(any_requests).encode()
    assert payer.get("/page/").content == b"free"
    assert balance(customer) == (75, 0)
    assert payer.post("/api/").status_code == 401
    token = Token.objects.create(user=user)
    api = Client(headers={"authorization": f"Token {token.key}"})
    assert api.post("/api/").json() == {"atomic": any_requests}
    assert balance(customer) == (50, 0)


def test_async_views_are_guarded_under_asgi(
    user: User, customer: Any, guard_views: Any
) -> None:
    guard_views("async")
    client = AsyncClient()
    client.force_login(user)
    assert async_to_sync(client.post)("/async/").content == b"done"
    assert balance(customer) == (93, 0)


def test_the_stack_of_middleware_stays_async(settings: Any, user: User) -> None:
    settings.MIDDLEWARE = [OURS]
    client = AsyncClient()
    with pytest.raises(MeterlyUsageError, match="This view is not guarded"):
        async_to_sync(client.post)("/uses/")
    # Django adapts a middleware that is not: the chain's outermost would be a wrapper.
    (middleware,) = [
        cell.cell_contents
        for cell in ASGIHandler()._middleware_chain.__closure__
        if isinstance(cell.cell_contents, MeterlyMiddleware)
    ]
    assert iscoroutinefunction(middleware)


def test_functions_may_be_dotted_paths(
    payer: Any, customer: Any, guard_views: Any
) -> None:
    guard_views("render", amount=f"{__name__}.amount")
    payer.post("/render/", {"amount": 3})
    assert balance(customer) == (97, 0)


def test_views_are_still_reversed_by_the_function(
    payer: Any, customer: Any, guard_views: Any
) -> None:
    guard_views("uses")
    payer.post("/uses/")
    assert balance(customer) == (97, 0)
    assert reverse(uses) == "/uses/"


@pytest.mark.urls("tests.urls")
def test_another_urlconf_is_guarded_too(
    payer: Any, customer: Any, guard_views: Any, settings: Any
) -> None:
    guard_views("page")
    chooses = f"{__name__}.ChoosesUrlconf"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE[:-2], chooses, OURS]
    assert payer.post("/page/").status_code == 200
    assert balance(customer) == (75, 0)


@pytest.mark.urls("tests.urls")
def test_a_urlconf_chosen_too_late_runs_nothing(
    payer: Any, customer: Any, guard_views: Any, settings: Any
) -> None:
    guard_views("late")
    urlpatterns.append(path("late/", render, name="late"))
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE[:-2],
        OURS,
        f"{__name__}.ChoosesUrlconf",
    ]
    try:
        with pytest.raises(MeterlyUsageError, match="below the one that sets"):
            payer.post("/late/")
    finally:
        urlpatterns.pop()
    assert Group.objects.count() == 0


def test_what_guard_raises_is_answered(
    payer: Any, customer: Any, settings: Any
) -> None:
    settings.MIDDLEWARE = settings.MIDDLEWARE[:-1]
    assert payer.post("/block/", {"amount": 25}).content == b"done"
    response = payer.post("/block/", {"amount": 80})
    assert (response.status_code, response.json()["available"]) == (402, 75)
    page = payer.post("/block/", {"amount": 80}, headers={"accept": "text/html"})
    assert page.status_code == 402
    assert page["Content-Type"].startswith("text/html")


@pytest.fixture
def without(settings: Any) -> None:
    """Neither our middleware nor the one that watches."""
    settings.MIDDLEWARE = settings.MIDDLEWARE[:-2]


@pytest.fixture
def unanswered(
    without: None, payer: Any, customer: Any
) -> Callable[[str], BaseException]:
    """What asks a view whose guard() is refused, and returns the exception."""

    with guard(customer, 1, "image_credits", idempotency_key="used"):
        pass

    def ask(url: str) -> BaseException:
        with pytest.raises(MeterlyError) as caught:
            payer.post(url)
        return caught.value

    return ask


BLOCKS = {
    "credits": ({"amount": 1000}, "MeterlyInsufficientCreditsError"),
    "key": ({"amount": 1, "idempotency_key": "a b"}, "MeterlyInvalidKeyError"),
    "used": ({"amount": 1, "idempotency_key": "used"}, "MeterlyDuplicateError"),
    "mismatch": (
        {"amount": 2, "idempotency_key": "used"},
        "MeterlyIdempotencyMismatchError",
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("view", ["plain-block", "async-block", "api-block"])
def test_what_nothing_answers_names_the_middleware(
    unanswered: Any, view: str, kind: str
) -> None:
    exc = unanswered(f"/{view}/{kind}/")
    assert type(exc).__name__ == BLOCKS[kind][1]
    (note,) = exc.__notes__
    assert note == (
        "guard() has raised this in a view, and nothing answers it but a 500. Add "
        f"'{OURS}' to MIDDLEWARE to have it answered as @meterly_guard does."
    )


@pytest.mark.parametrize("debug", [False, True])
def test_the_log_and_the_debug_page_name_the_middleware(
    payer: Any,
    settings: Any,
    without: None,
    debug: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.DEBUG = debug
    payer.raise_request_exception = False
    page = payer.post("/plain-block/credits/")
    assert page.status_code == 500
    assert OURS in caplog.text
    assert (b"MeterlyMiddleware" in page.content) is debug


def test_with_the_middleware_there_is_nothing_to_name(
    payer: Any, settings: Any
) -> None:
    settings.MIDDLEWARE = settings.MIDDLEWARE[:-1]
    for view in ("plain-block", "async-block", "api-block"):
        assert payer.post(f"/{view}/credits/").status_code == 402


def test_outside_of_a_view_there_is_no_middleware_to_name(customer: Any) -> None:
    with pytest.raises(MeterlyError) as caught, guard(customer, 1000, "image_credits"):
        pass
    assert not hasattr(caught.value, "__notes__")


def test_another_exception_of_a_view_gets_no_note(payer: Any, without: None) -> None:
    with pytest.raises(LookupError) as caught:
        payer.post("/render/", {"boom": "1"})
    assert not hasattr(caught.value, "__notes__")


def test_an_unguarded_view_is_told_so(payer: Any, settings: Any) -> None:
    settings.MIDDLEWARE = settings.MIDDLEWARE[:-1]
    with pytest.raises(
        MeterlyUsageError, match=r"request\.meterly\.charge .* not guarded: put @"
    ):
        payer.post("/uses/")


def test_a_free_request_is_told_so(payer: Any, guard_views: Any, settings: Any) -> None:
    guard_views("uses")
    settings.MIDDLEWARE = settings.MIDDLEWARE[:-1]
    with pytest.raises(MeterlyUsageError, match=r'GET costs .* methods=\["GET"\]'):
        payer.get("/uses/")
    assert payer.post("/uses/").status_code == 200
