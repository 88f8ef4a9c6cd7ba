"""Every generic view of Django and of Django REST framework, with the mixin."""

from __future__ import annotations

from inspect import isclass
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import sync_to_async
from django import forms
from django.contrib.auth.models import Group, User
from django.http import HttpResponse, HttpResponseRedirect
from django.urls import path
from django.views import View, generic
from rest_framework import generics, serializers, viewsets

from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from django.test import Client

    from django_meterly.models import Customer

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_generic_views"),
]


class Name(forms.Form):
    name = forms.CharField()


class NameSerializer(serializers.ModelSerializer):
    class Meta:
        model = Group
        fields = ["name"]


#: What each of Django's generic views needs, and how it is asked.
DAY = {"year": 2026, "month": "nov", "day": 28}
DATED = {"model": User, "date_field": "date_joined", "allow_empty": True}
DATED |= {"allow_future": True, "template_name": "tests/good.html"}
SHOWN = {"model": Group, "template_name": "tests/good.html"}
FORM = {**SHOWN, "fields": ["name"], "success_url": "/"}
DJANGO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "View": ("POST", {"post": lambda self, request: HttpResponse()}, {}),
    "TemplateView": ("GET", {"template_name": "tests/good.html"}, {}),
    "RedirectView": ("POST", {"url": "/"}, {}),
    "ArchiveIndexView": ("GET", DATED, {}),
    "YearArchiveView": ("GET", DATED, {"year": 2026}),
    "MonthArchiveView": ("GET", DATED, {"year": 2026, "month": "nov"}),
    "WeekArchiveView": ("GET", DATED, {"year": 2026, "week": 47}),
    "DayArchiveView": ("GET", DATED, DAY),
    "TodayArchiveView": ("GET", DATED, {}),
    "DateDetailView": ("GET", DATED, {**DAY, "pk": "user"}),
    "DetailView": ("GET", SHOWN, {"pk": "group"}),
    "ListView": ("GET", SHOWN, {}),
    "FormView": (
        "POST",
        {"form_class": Name, "template_name": "tests/good.html", "success_url": "/"},
        {},
    ),
    "CreateView": ("POST", FORM, {}),
    "UpdateView": ("POST", FORM, {"pk": "group"}),
    "DeleteView": ("POST", {**SHOWN, "success_url": "/"}, {"pk": "group"}),
}
#: The views with a form that may not validate.
FORMS = ["FormView", "CreateView", "UpdateView"]

#: How each of Django REST framework's is asked.
REST = {
    "CreateAPIView": "POST",
    "ListAPIView": "GET",
    "RetrieveAPIView": "GET",
    "DestroyAPIView": "DELETE",
    "UpdateAPIView": "PUT",
    "ListCreateAPIView": "POST",
    "RetrieveUpdateAPIView": "PATCH",
    "RetrieveDestroyAPIView": "DELETE",
    "RetrieveUpdateDestroyAPIView": "PUT",
    "ModelViewSet": "POST",
    "ReadOnlyModelViewSet": "GET",
}


def options(method: str) -> dict[str, Any]:
    return {
        "unit": "image_credits",
        "amount": 25,
        **({"methods": ["GET"]} if method == "GET" else {}),
    }


def guarded(name: str, **more: Any) -> Any:
    method, attributes, _ = DJANGO[name]
    base = getattr(generic, name)
    body = {"guard_options": options(method), **attributes, **more}
    return type(f"Guarded{name}", (MeterlyGuardMixin, base), body)


def guarded_api(name: str) -> Any:
    base = getattr(generics, name, None) or getattr(viewsets, name)
    body = {
        "guard_options": options(REST[name]),
        "queryset": Group.objects.all(),
        "serializer_class": NameSerializer,
    }
    cls = type(f"Guarded{name}", (MeterlyGuardMixin, base), body)
    if issubclass(cls, viewsets.ViewSetMixin):
        actions = {"get": "list"}
        return cls.as_view(
            actions if name.startswith("ReadOnly") else {**actions, "post": "create"}
        )
    return cls.as_view()


class AsyncFormView(MeterlyGuardMixin, generic.FormView):
    guard_options = options("POST")
    form_class = Name
    template_name = "tests/good.html"
    success_url = "/"

    async def get(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        return await sync_to_async(super().get)(request)

    async def post(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        return await sync_to_async(super().post)(request)

    put = post


class AsyncInvalid(AsyncFormView):
    """Checks its form without Django's help, as async views do."""

    async def post(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        form = Name(request.POST)
        if form.is_valid():
            return HttpResponseRedirect("/")
        return await self.form_invalid(form)

    async def form_invalid(self, form: Any) -> HttpResponse:  # type: ignore[override]
        return HttpResponse("again")


class OwnInvalid(MeterlyGuardMixin, generic.FormView):
    """Answers an invalid form by itself, and has attributes that DRF has, too."""

    guard_options = options("POST")
    initial: Any = {"name": "x"}
    form_class = Name
    success_url = "/"

    def form_invalid(self, form: Any) -> HttpResponse:
        if self.request.POST.get("checked"):
            self.request.meterly.charge(3)
        return HttpResponse("again")


class Initial(MeterlyGuardMixin, View):
    """Has a method that DRF's views have, too."""

    guard_options = options("POST")

    def initial(self) -> str:
        return "a letter"

    def post(self, request: Any) -> HttpResponse:
        return HttpResponse(self.initial())


urlpatterns = [
    *(
        path(
            f"{name}/" + "".join(f"<{part}>/" for part in DJANGO[name][2]),
            guarded(name).as_view(),
        )
        for name in DJANGO
    ),
    *(path(f"api/{name}/<pk>/", guarded_api(name)) for name in REST),
    path("async/", AsyncFormView.as_view()),
    path("async-invalid/", AsyncInvalid.as_view()),
    path("own/", OwnInvalid.as_view()),
    path("initial/", Initial.as_view()),
]


@pytest.fixture
def customer(user: User, joined: None) -> Customer:
    return fund(user)


@pytest.fixture
def group() -> Group:
    return Group.objects.create(name="before")


def url_of(name: str, user: User, group: Group) -> str:
    parts = [
        {"user": user.pk, "group": group.pk}.get(str(value), value)
        for value in DJANGO[name][2].values()
    ]
    return f"/{name}/" + "".join(f"{part}/" for part in parts)


def test_every_generic_view_is_tried() -> None:
    views = {name for name in generic.__all__ if isclass(getattr(generic, name))}
    assert views - {"GenericViewError"} == set(DJANGO)
    handled = {
        name
        for module in (generics, viewsets)
        for name, cls in vars(module).items()
        if isclass(cls)
        and issubclass(cls, generics.GenericAPIView)
        and any(
            hasattr(cls, each)
            for each in ("get", "post", "put", "patch", "delete", "list")
        )
    }
    assert handled == set(REST)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", DJANGO)
def test_f60_a_generic_view_is_charged_once(
    payer: Client,
    user: User,
    customer: Customer,
    group: Group,
    name: str,
    any_requests: bool,
) -> None:
    # At noon it is that day in every time zone of the tests.
    user.date_joined = user.date_joined.replace(year=2026, month=11, day=28, hour=12)
    user.save()
    send = getattr(payer, DJANGO[name][0].lower())
    response = send(url_of(name, user, group), {"name": "after"})
    assert response.status_code in (200, 302), response.content
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.mark.parametrize("name", [*FORMS, "async", "async-invalid"])
def test_f60_a_form_that_does_not_validate_is_free(
    payer: Client,
    user: User,
    customer: Customer,
    group: Group,
    name: str,
    any_requests: bool,
) -> None:
    if name.startswith("async") and any_requests:
        # Django refuses async views there.
        return
    url = f"/{name}/" if name.startswith("async") else url_of(name, user, group)
    response = payer.post(url, {"name": ""})
    assert response.status_code == 200
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
    assert payer.post(url, {"name": "after"}).status_code == 302
    assert balance(customer) == (75, 0)
    assert_books_balance()


def test_f60_a_form_may_say_what_an_invalid_one_costs(
    payer: Client, customer: Customer
) -> None:
    assert payer.post("/own/", {"name": ""}).content == b"again"
    assert balance(customer) == (100, 0)
    payer.post("/own/", {"name": "", "checked": "yes"})
    assert balance(customer) == (97, 0)
    payer.post("/own/", {"name": "right"})
    assert balance(customer) == (72, 0)


def test_f60_attributes_of_a_class_mean_nothing(
    payer: Client, customer: Customer
) -> None:
    assert payer.post("/initial/").content == b"a letter"
    assert balance(customer) == (75, 0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", REST)
def test_f60_a_generic_view_of_rest_framework_is_charged_once(
    payer: Client,
    customer: Customer,
    group: Group,
    name: str,
    any_requests: bool,
) -> None:
    send = getattr(payer, REST[name].lower())
    data = {"name": "after"}
    response = send(
        f"/api/{name}/{group.pk}/",
        data,
        **({} if REST[name] == "GET" else {"content_type": "application/json"}),
    )
    assert response.status_code in (200, 201, 204), response.content
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()
