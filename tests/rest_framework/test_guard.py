"""Guards on the views of Django REST framework: whoever has authenticated pays."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.db import connection, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.test import TestCase
from django.urls import path
from django.views.decorators.cache import never_cache
from rest_framework import permissions, serializers, throttling, viewsets
from rest_framework.authentication import TokenAuthentication
from rest_framework.authtoken.models import Token
from rest_framework.decorators import (
    action,
    api_view,
    authentication_classes,
    permission_classes,
)
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.test import APIClient
from rest_framework.views import APIView

from django_meterly import MeterlyUsageError, guard, meterly_guard
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, movements, states

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.rest_framework.test_guard"),
    pytest.mark.sample(4),
]


def _answer(request: Any) -> Response:
    """Work: leave a trace, and tell what was seen."""
    Group.objects.create(name=request.data.get("trace", "trace"))
    if "used" in request.data:
        request.meterly.charge(int(request.data["used"]))
    if "invalid" in request.data:
        raise serializers.ValidationError({"invalid": ["so it is"]})
    return Response(
        {"atomic": connection.in_atomic_block}, status=request.data.get("status", 200)
    )


class Throttle(throttling.BaseThrottle):
    def allow_request(self, request: Any, view: Any) -> bool:
        return "throttle" not in request.GET


class OnlyNice(permissions.BasePermission):
    def has_permission(self, request: Any, view: Any) -> bool:
        return "forbid" not in request.GET


class Base(APIView):
    authentication_classes = [TokenAuthentication]
    permission_classes = [permissions.IsAuthenticated, OnlyNice]
    throttle_classes = [Throttle]

    def get(self, request: Any) -> Response:
        return Response({"atomic": connection.in_atomic_block})

    def post(self, request: Any) -> Response:
        return _answer(request)


class ByMixin(MeterlyGuardMixin, Base):
    guard_options = {"unit": "image_credits", "amount": 25}


class ByHandler(MeterlyGuardMixin, Base):
    @meterly_guard("image_credits", 25)
    def post(self, request: Any) -> Response:
        return _answer(request)

    def put(self, request: Any) -> Response:
        return _answer(request)


class WithoutMixin(Base):
    post = ByHandler.post


class Around(Base):
    pass


class Posters(MeterlyGuardMixin, viewsets.ViewSet):
    authentication_classes = [TokenAuthentication]
    permission_classes = [permissions.IsAuthenticated, OnlyNice]
    throttle_classes = [Throttle]

    def list(self, request: Any) -> Response:
        return Response({"atomic": connection.in_atomic_block})

    @meterly_guard("image_credits", 25)
    def create(self, request: Any) -> Response:
        return _answer(request)

    @action(detail=False, methods=["post"])
    @meterly_guard("image_credits", 25)
    def above(self, request: Any) -> Response:
        return _answer(request)

    @meterly_guard("image_credits", 25)
    @action(detail=False, methods=["post"])
    def below(self, request: Any) -> Response:
        return _answer(request)

    @action(detail=False, methods=["post"])
    def free(self, request: Any) -> Response:
        return _answer(request)


class AllPosters(viewsets.ViewSet):
    authentication_classes = [TokenAuthentication]
    permission_classes = [permissions.IsAuthenticated, OnlyNice]
    throttle_classes = [Throttle]

    def list(self, request: Any) -> Response:
        return Response({"atomic": connection.in_atomic_block})

    def create(self, request: Any) -> Response:
        return _answer(request)


@meterly_guard("image_credits", amount=lambda request: request.data.get("amount", 25))
@api_view(["GET", "POST"])
@authentication_classes([TokenAuthentication])
@permission_classes([permissions.IsAuthenticated, OnlyNice])
def function(request: Any) -> Response:
    if request.method == "GET":
        return Response({"atomic": connection.in_atomic_block})
    return _answer(request)


@api_view(["POST"])
@meterly_guard("image_credits", 25)
@authentication_classes([TokenAuthentication])
def inside(request: Any) -> Response:
    return _answer(request)


class Open(Around):
    """Everybody may ask, so that it is the guard that refuses."""

    permission_classes = []


class Reads(Base):
    def get(self, request: Any) -> Response:
        assert request.meterly.amount == 3
        return Response("paid")


class ReadsByHandler(MeterlyGuardMixin, Reads):
    get = meterly_guard("image_credits", 3, methods=["GET"])(Reads.get)


class Streams(Base):
    def post(self, request: Any) -> Any:
        return StreamingHttpResponse([b"one", b"two"])


class Unrenderable(Base):
    def post(self, request: Any) -> Response:
        return Response(object())


class Evades(Base):
    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        return HttpResponse("work for nothing")


class Breaks(Around):
    def finalize_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().finalize_response(*args, **kwargs)
        if response.status_code == 200:
            raise RuntimeError("too late")
        return response


@api_view(["POST"])
@authentication_classes([TokenAuthentication])
def block(request: Any) -> Response:
    with guard(request.user, 25, durable=False):
        return _answer(request)


guarded = meterly_guard("image_credits", 25)
reads = meterly_guard("image_credits", 3, methods=["GET"])
router = SimpleRouter()
router.register("posters", Posters, basename="posters")
urlpatterns = [
    *router.urls,
    path("mixin/", ByMixin.as_view()),
    path("handler/", ByHandler.as_view()),
    path("around/", guarded(Around.as_view())),
    path("between/", guarded(never_cache(Around.as_view()))),
    path("viewset/", guarded(AllPosters.as_view({"get": "list", "post": "create"}))),
    path("function/", function),
    path("inside/", inside),
    path("bare/", WithoutMixin.as_view()),
    path("open/", guarded(Open.as_view())),
    path("evades/", guarded(Evades.as_view())),
    path("breaks/", guarded(Breaks.as_view())),
    path("block/", block),
    path("streams/", guarded(Streams.as_view())),
    path("unrenderable/", guarded(Unrenderable.as_view())),
    path("reads/", reads(Reads.as_view())),
    path("reads-handler/", ReadsByHandler.as_view()),
    path("twice/", guarded(ByHandler.as_view())),
]

GUARDED = [
    "/mixin/",
    "/handler/",
    "/around/",
    "/between/",
    "/viewset/",
    "/function/",
    "/posters/",
    "/posters/above/",
    "/posters/below/",
]
every_guard = pytest.mark.parametrize("url", GUARDED)


@pytest.fixture
def api(user: User) -> APIClient:
    token = Token.objects.create(user=user)
    return APIClient(headers={"authorization": f"Token {token.key}"})


@every_guard
def test_f25_the_tokens_user_pays(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    # Somebody else is logged in, in the browser that sends the token.
    bob = User.objects.create_user("bob")
    api.force_login(bob)
    bobs = fund(bob)
    response = api.post(url, {}, format="json")
    assert response.json() == {"atomic": any_requests}
    assert balance(customer) == (75, 0)
    assert balance(bobs) == (100, 0)
    assert movements() == ["reserved", "committed"]
    assert states() == ["committed"]
    assert_books_balance()


@every_guard
def test_f25_whom_drf_turns_away_makes_no_ledger_call(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    nobody = APIClient().post(url)
    assert nobody.status_code == 401
    assert nobody["WWW-Authenticate"] == "Token"
    assert APIClient(headers={"authorization": "Token x"}).post(url).status_code == 401
    assert api.post(f"{url}?forbid=1").status_code == 403
    if "function" not in url:
        assert api.post(f"{url}?throttle=1").status_code == 429
    assert api.delete(url).status_code == 405
    assert states() == []


@every_guard
def test_f26_reading_is_free_and_keeps_its_transaction(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    if url.startswith("/posters/") and url != "/posters/":
        assert api.options(url).status_code == 200
    else:
        assert api.get(url).json() == {"atomic": any_requests}
    assert states() == []


@every_guard
def test_f18_a_drf_error_does_not_stop_the_release(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    response = api.post(url, {"invalid": 1}, format="json")
    assert (response.status_code, response.json()) == (400, {"invalid": ["so it is"]})
    assert Group.objects.count() == (0 if any_requests else 1)
    assert balance(customer) == (100, 0)
    assert states() == ["released"]
    assert_books_balance()


@every_guard
def test_f19_an_error_response_releases(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    assert api.post(url, {"status": 409}, format="json").status_code == 409
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


@every_guard
def test_the_work_settles_on_drfs_request(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    api.post(url, {"used": 7}, format="json")
    assert balance(customer) == (93, 0)


@pytest.mark.parametrize(
    ("method", "url"), [("put", "/handler/"), ("post", "/posters/free/")]
)
def test_f25_unguarded_handlers_keep_their_transaction(
    api: APIClient, customer: Any, any_requests: bool, method: str, url: str
) -> None:
    response = getattr(api, method)(url, {}, format="json")
    assert response.json() == {"atomic": any_requests}
    # As in DRF: an error rolls the whole request back.
    getattr(api, method)(url, {"trace": "x", "invalid": 1}, format="json")
    assert Group.objects.filter(name="x").exists() is not any_requests
    assert states() == []


@pytest.mark.parametrize("url", ["/bare/", "/inside/"])
def test_f25_a_handler_without_the_mixin_needs_autocommit(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    if any_requests:
        with pytest.raises(MeterlyUsageError, match="MeterlyGuardMixin"):
            api.post(url)
        assert states() == []
    else:
        assert api.post(url).status_code == 200
        assert balance(customer) == (75, 0)


@every_guard
def test_too_few_credits_are_a_402_in_drfs_format(
    api: APIClient, user: User, any_requests: bool, url: str, settings: Any
) -> None:
    fund(user, 20)
    settings.METERLY = {**settings.METERLY, "TOP_UP_URL": "/buy/"}
    response = api.post(url)
    assert response.status_code == 402
    assert response.json() == {
        "detail": "This needs 25 image_credits, and 20 are available.",
        "code": "insufficient_credits",
        "required": 25,
        "available": 20,
        "reserved": 0,
        "unit": "image_credits",
        "top_up_url": "/buy/",
        "held_by_running_work": False,
    }
    assert states() == ["denied"]
    assert Group.objects.count() == 0


def test_a_ledger_out_of_reach_is_a_503_in_drfs_format(
    api: APIClient, user: User, remote: Any, any_requests: bool
) -> None:
    fund(user)
    remote.meet("reserve_credits", "unsent")
    response = api.post("/around/")
    assert response.status_code == 503
    assert response["Retry-After"] == "5"
    assert response.json()["code"] == "unavailable"


def test_f25_nobody_is_refused_by_the_guard_as_drf_would(
    customer: Any, any_requests: bool
) -> None:
    response = APIClient().post("/open/")
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == "Token"
    assert states() == []


def test_f25_work_past_the_guard_is_an_error(
    api: APIClient, customer: Any, any_requests: bool
) -> None:
    with pytest.raises(MeterlyUsageError, match=r"Evades answered .* super\(\)"):
        api.post("/evades/")
    assert api.get("/evades/").status_code == 200


def test_what_drf_breaks_after_the_handler_is_released(
    api: APIClient, customer: Any, any_requests: bool
) -> None:
    with pytest.raises(RuntimeError, match="too late"):
        api.post("/breaks/")
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


def test_a_class_is_guarded_only_where_it_was_asked_for(
    api: APIClient, customer: Any, rf: Any, user: User
) -> None:
    # /open/ has hooked Around's subclass; this one is as it was.
    request = rf.post("/")
    request.META["HTTP_AUTHORIZATION"] = f"Token {Token.objects.get().key}"
    assert Open.as_view()(request).status_code == 200
    assert states() == []


def test_two_guards_are_both_charged(
    api: APIClient, customer: Any, any_requests: bool
) -> None:
    assert api.post("/twice/").json() == {"atomic": any_requests}
    assert states() == ["committed", "committed"]
    assert balance(customer) == (50, 0)
    assert api.put("/twice/", {"trace": "b"}, format="json").json() == {
        "atomic": any_requests
    }
    assert balance(customer) == (25, 0)


def test_the_data_decides_the_amount(api: APIClient, customer: Any) -> None:
    api.post("/function/", {"amount": 3}, format="json")
    assert balance(customer) == (97, 0)


def test_guard_raises_in_drfs_format_with_the_handler(
    api: APIClient, user: User, settings: Any
) -> None:
    fund(user, 3)
    settings.REST_FRAMEWORK = {
        "EXCEPTION_HANDLER": (
            "django_meterly.rest_framework.exceptions.exception_handler"
        )
    }
    response = api.post("/block/")
    assert (response.status_code, response.json()["available"]) == (402, 3)


@pytest.mark.parametrize("url", ["/reads/", "/reads-handler/"])
def test_f26_reading_costs_when_asked_for(
    api: APIClient, customer: Any, any_requests: bool, url: str
) -> None:
    assert api.get(url).json() == "paid"
    assert api.head(url).status_code == 200
    assert balance(customer) == (94, 0)
    # Naming GET makes nothing else free.
    assert api.post(url).status_code == 200
    assert balance(customer) == ({"/reads/": 91, "/reads-handler/": 94}[url], 0)


def test_f21_a_stream_is_charged_after_its_last_chunk(
    api: APIClient, customer: Any, any_requests: bool
) -> None:
    response = api.post("/streams/")
    assert balance(customer) == (100, 25)
    assert b"".join(response) == b"onetwo"
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("form", ["application/json", "text/html"])
def test_f20_data_is_charged_when_it_is_rendered(
    api: APIClient, customer: Any, any_requests: bool, form: str
) -> None:
    response = api.post("/around/", {}, format="json", headers={"accept": form})
    assert response["Content-Type"].startswith(form)
    assert states() == ["committed"]


def test_f20_data_that_cannot_be_rendered_is_released(
    api: APIClient, customer: Any, any_requests: bool
) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        api.post("/unrenderable/")
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


def test_f26_attributes_of_the_views_survive() -> None:
    view: Any = guarded(AllPosters.as_view({"post": "create"}, detail=True))
    assert view.cls is AllPosters
    assert view.actions == {"post": "create"}
    assert view.initkwargs == {"detail": True}
    assert view.csrf_exempt
    assert view.login_required is False
    assert view._non_atomic_requests == {"default"}
    by_mixin: Any = ByMixin.as_view()
    assert by_mixin.cls is by_mixin.view_class is ByMixin
    assert by_mixin.csrf_exempt


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/around/", "Around"),
        ("/function/", "function"),
        ("/mixin/", "ByMixin"),
        ("/handler/", "ByHandler.post"),
        ("/posters/above/", "Posters.above"),
    ],
)
def test_the_work_is_named_after_the_view(
    api: APIClient, customer: Any, url: str, name: str
) -> None:
    api.post(url)
    assert Reservation.objects.get().reference.startswith(f"{name}:")


@pytest.mark.django_db(transaction=False)
@pytest.mark.usefixtures("atomic_requests")
class TestInATestCase(TestCase):
    def test_a_drf_error_leaves_the_tests_own_transaction_usable(self) -> None:
        user = User.objects.create_user("alice")
        fund(user, 30)
        token = Token.objects.create(user=user)
        api = APIClient(headers={"authorization": f"Token {token.key}"})
        assert api.post("/around/?forbid=1").status_code == 403
        assert api.post("/around/", {"invalid": 1}, format="json").status_code == 400
        assert states() == ["released"]
        assert not transaction.get_rollback()
