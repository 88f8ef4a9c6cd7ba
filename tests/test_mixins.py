"""Class-based views: by the mixin, and by guards on their handlers."""

from __future__ import annotations

from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.decorators import login_not_required
from django.contrib.auth.mixins import LoginRequiredMixin
from django.contrib.auth.models import Group, User
from django.db import connection, transaction
from django.http import HttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt

from django_meterly import MeterlyUsageError, meterly_guard
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, movements, states

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_mixins"),
]
guarded = meterly_guard("image_credits", 25)


class Boom(Exception):
    """What failing work raises."""


def _answer(request: Any) -> HttpResponse:
    Group.objects.create(name=request.POST.get("trace", "trace"))
    if request.POST.get("used"):
        request.meterly.charge(int(request.POST["used"]))
    if request.POST.get("boom"):
        raise Boom
    return HttpResponse(str(connection.in_atomic_block))


class Base(View):
    def get(self, request: Any) -> HttpResponse:
        return HttpResponse(str(connection.in_atomic_block))

    def post(self, request: Any) -> HttpResponse:
        return _answer(request)


class ByMixin(MeterlyGuardMixin, Base):
    guard_options = {"unit": "image_credits", "amount": 25}


class Configured(MeterlyGuardMixin, Base):
    pass


class Private(LoginRequiredMixin, MeterlyGuardMixin, Base):
    guard_options = {"unit": "image_credits", "amount": 25}


class PrivateInside(MeterlyGuardMixin, LoginRequiredMixin, Base):
    guard_options = {"unit": "image_credits", "amount": 25}


class ByHandler(MeterlyGuardMixin, Base):
    post = guarded(Base.post)

    def put(self, request: Any) -> HttpResponse:
        return _answer(request)


@method_decorator([guarded, never_cache], name="post")
class ByMethodDecorator(MeterlyGuardMixin, Base):
    pass


class Inherits(ByHandler):
    def post(self, request: Any) -> HttpResponse:
        return super().post(request)


class WithoutMixin(Base):
    post = guarded(Base.post)


@method_decorator(guarded, name="post")
class DecoratedWithoutMixin(Base):
    pass


class Both(ByHandler):
    guard_options = {"unit": "image_credits", "amount": 5}


class Late(MeterlyGuardMixin, Base):
    guard_options = {"unit": "image_credits", "amount": 25}

    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = super().dispatch(request, *args, **kwargs)
        raise Boom(response)

    def post(self, request: Any) -> TemplateResponse:
        return TemplateResponse(request, "tests/good.html", {"value": 1})


class WithoutSetup(MeterlyGuardMixin, Base):
    guard_options = {"unit": "image_credits", "amount": 25}

    def setup(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.request = request


@method_decorator(transaction.non_atomic_requests, name="dispatch")
class Exempt(ByMixin):
    pass


class Asynchronous(MeterlyGuardMixin, View):
    guard_options = {"unit": "image_credits", "amount": 25}

    async def get(self, request: Any) -> HttpResponse:
        return HttpResponse("free")

    async def post(self, request: Any) -> HttpResponse:
        if request.POST.get("boom"):
            raise Boom
        request.meterly.charge(7)
        return HttpResponse("done")


class AsynchronousHandler(View):
    async def get(self, request: Any) -> HttpResponse:
        return HttpResponse("free")

    post = guarded(Asynchronous.post)


class DirectDispatch(Base):
    dispatch = guarded(View.dispatch)


@method_decorator(guarded, name="dispatch")
class DecoratedDispatch(Base):
    pass


@method_decorator([guarded, never_cache], name="dispatch")
class DeeplyDecoratedDispatch(Base):
    pass


urlpatterns = [
    path("mixin/", ByMixin.as_view()),
    path(
        "configured/",
        Configured.as_view(guard_options={"unit": "image_credits", "amount": 25}),
    ),
    path("private/", Private.as_view()),
    path("private-inside/", PrivateInside.as_view()),
    path("handler/", ByHandler.as_view()),
    path("method-decorator/", ByMethodDecorator.as_view()),
    path("inherits/", never_cache(Inherits.as_view())),
    path("bare/", WithoutMixin.as_view()),
    path("decorated-bare/", DecoratedWithoutMixin.as_view()),
    path("both/", Both.as_view()),
    path("late/", Late.as_view()),
    path("without-setup/", WithoutSetup.as_view()),
    path("exempt/", Exempt.as_view()),
    path("async/", Asynchronous.as_view()),
    path("async-handler/", AsynchronousHandler.as_view()),
    path("dispatch/direct/", DirectDispatch.as_view()),
    path("dispatch/decorated/", DecoratedDispatch.as_view()),
    path("dispatch/deeply/", DeeplyDecoratedDispatch.as_view()),
]

GUARDED = [
    "/mixin/",
    "/configured/",
    "/private/",
    "/private-inside/",
    "/handler/",
    "/method-decorator/",
]
every_guard = pytest.mark.parametrize("url", GUARDED)


@every_guard
def test_success_charges_once_and_in_the_views_transaction(
    payer: Any, customer: Any, any_requests: bool, url: str
) -> None:
    response = payer.post(url, {"used": 7})
    assert response.content == str(any_requests).encode()
    assert balance(customer) == (93, 0)
    assert movements() == ["reserved", "committed"]
    assert states() == ["committed"]
    assert_books_balance()


@every_guard
def test_an_exception_releases_and_rolls_back(
    payer: Any, customer: Any, any_requests: bool, url: str
) -> None:
    with pytest.raises(Boom):
        payer.post(url, {"boom": 1})
    assert balance(customer) == (100, 0)
    assert states() == ["released"]
    assert Group.objects.count() == (0 if any_requests else 1)


@every_guard
def test_f26_reading_is_free_and_keeps_its_transaction(
    payer: Any, customer: Any, any_requests: bool, url: str
) -> None:
    assert payer.get(url).content == str(any_requests).encode()
    assert payer.delete(url).status_code == 405
    assert states() == []


@every_guard
def test_too_few_credits_are_a_402(
    client: Any, user: User, any_requests: bool, url: str
) -> None:
    fund(user, 3)
    client.force_login(user)
    response = client.post(url)
    assert (response.status_code, response.json()["available"]) == (402, 3)
    assert Group.objects.count() == 0


@pytest.mark.parametrize("url", ["/private/", "/private-inside/"])
def test_a_log_in_mixin_comes_first_wherever_it_stands(
    client: Any, customer: Any, any_requests: bool, url: str
) -> None:
    response = client.post(url)
    assert response.status_code == 302
    assert response["Location"].startswith("/accounts/login/")
    assert states() == []


def test_f25_unguarded_handlers_keep_their_transaction(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    assert payer.put("/handler/").content == str(any_requests).encode()
    assert states() == []


@pytest.mark.parametrize("url", ["/bare/", "/decorated-bare/"])
def test_f25_a_handler_without_the_mixin_needs_autocommit(
    payer: Any, customer: Any, any_requests: bool, url: str
) -> None:
    if any_requests:
        with pytest.raises(MeterlyUsageError, match="MeterlyGuardMixin"):
            payer.post(url)
        assert states() == []
    else:
        assert payer.post(url).status_code == 200
        assert balance(customer) == (75, 0)


def test_a_handler_may_be_called_by_another(payer: Any, customer: Any) -> None:
    assert payer.post("/inherits/").content == b"False"
    assert balance(customer) == (75, 0)


def test_guards_on_class_and_handler_are_both_charged(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    assert payer.post("/both/").content == str(any_requests).encode()
    assert states() == ["committed", "committed"]
    assert balance(customer) == (70, 0)


def test_exemption_is_kept(payer: Any, customer: Any, any_requests: bool) -> None:
    assert payer.post("/exempt/").content == b"False"
    assert payer.get("/exempt/").content == b"False"
    assert balance(customer) == (75, 0)


def test_what_dispatch_breaks_after_the_handler_is_released(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    with pytest.raises(Boom):
        payer.post("/late/")
    assert states() == ["released"]


def test_work_past_the_guard_is_an_error(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    with pytest.raises(MeterlyUsageError, match="WithoutSetup answered"):
        payer.post("/without-setup/")
    assert states() == []


@pytest.mark.parametrize("url", ["/async/", "/async-handler/"])
def test_f24_async_handlers_are_awaited_before_they_are_charged(
    async_client: Any, user: User, customer: Any, url: str
) -> None:
    async_client.force_login(user)
    assert async_to_sync(async_client.get)(url).content == b"free"
    assert states() == []
    assert async_to_sync(async_client.post)(url).content == b"done"
    assert balance(customer) == (93, 0)
    with pytest.raises(Boom):
        async_to_sync(async_client.post)(url, {"boom": 1})
    assert states() == ["committed", "released"]
    assert async_to_sync(async_client.delete)(url).status_code == 405


@pytest.mark.parametrize("url", ["/async/", "/async-handler/"])
def test_f24_async_handlers_work_under_wsgi(
    payer: Any, customer: Any, url: str
) -> None:
    assert payer.post(url).content == b"done"
    assert balance(customer) == (93, 0)


@pytest.mark.usefixtures("atomic_requests")
def test_djangos_refusal_of_async_views_under_atomic_requests_stands(
    payer: Any, customer: Any
) -> None:
    with pytest.raises(RuntimeError, match="ATOMIC_REQUESTS with async views"):
        payer.post("/async/")
    assert states() == []


@pytest.mark.parametrize("kind", ["direct", "decorated", "deeply"])
@pytest.mark.parametrize("method", ["get", "post"])
def test_f25_dispatch_is_refused_with_the_remedy(
    payer: Any, customer: Any, any_requests: bool, kind: str, method: str
) -> None:
    with pytest.raises(TypeError, match=r"dispatch\(\).* MeterlyGuardMixin"):
        getattr(payer, method)(f"/dispatch/{kind}/")
    assert states() == []


def test_f25_dispatch_is_refused_by_the_mixin_at_once() -> None:
    class Page(MeterlyGuardMixin, DirectDispatch):
        pass

    with pytest.raises(TypeError, match=r"dispatch\(\)"):
        Page.as_view()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amuont": 25}, TypeError, r"Page\.guard_options: .*mean 'amount'"),
        ({"xyz": 25}, TypeError, "The options are unit, amount"),
        ({"amount": 0}, ValueError, r"Page\.guard_options: .*from 1 to"),
        (
            {"amount": "no.such"},
            ImportError,
            r"Page\.guard_options: amount must .* No module",
        ),
        ([], TypeError, r"Page\.guard_options must be a dict"),
        ({"methods": "POST"}, TypeError, r"Page\.guard_options: methods is a list"),
    ],
)
def test_options_are_checked_by_as_view(
    options: Any, error: type[Exception], message: str
) -> None:
    class Page(MeterlyGuardMixin, Base):
        guard_options = options

    with pytest.raises(error, match=message):
        Page.as_view()


def test_a_mixin_behind_the_view_is_refused() -> None:
    with pytest.raises(TypeError, match="MeterlyGuardMixin before View"):

        class Page(View, MeterlyGuardMixin):
            pass


def test_f26_attributes_of_the_view_survive() -> None:
    @method_decorator([csrf_exempt, login_not_required], name="dispatch")
    class Page(ByMixin):
        pass

    view: Any = Page.as_view(http_method_names=["post"])
    assert view.view_class is Page
    assert view.view_initkwargs == {"http_method_names": ["post"]}
    assert view.csrf_exempt
    assert view.login_required is False
    assert view.meterly_guarded
