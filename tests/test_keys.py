"""Idempotency keys: one piece of work, however often it is asked for."""

from __future__ import annotations

import re
import threading
from functools import partial
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.files.uploadhandler import MemoryFileUploadHandler
from django.db import connections
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template import Context, Template
from django.template.loader import render_to_string
from django.test import Client, RequestFactory
from django.urls import path
from django.views.decorators.csrf import csrf_exempt, csrf_protect
from rest_framework.decorators import api_view
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.views import APIView

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    guard,
    meterly_guard,
)
from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance, sweep
from django_meterly.views.keys import requested_key
from tests.books import balance, fund, movements, states

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_keys"),
]
KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
PROBLEM = "application/problem+json"


class Gate:
    """Holds a view up until the test has done what it wants to do meanwhile."""

    entered = threading.Event()
    leave = threading.Event()


@meterly_guard("image_credits", 25)
def draw(request: HttpRequest) -> HttpResponse:
    return HttpResponse("drawn", status=int(request.headers.get("X-Status", "200")))


@meterly_guard("image_credits", 25)
def print_(request: HttpRequest) -> HttpResponse:
    return HttpResponse("printed")


@meterly_guard(
    "image_credits",
    amount=lambda request: int(request.headers.get("X-Amount", "25")),
)
def priced(request: HttpRequest) -> HttpResponse:
    return HttpResponse("done", status=int(request.headers.get("X-Status", "200")))


@meterly_guard("image_credits", 25)
async def adraw(request: HttpRequest) -> HttpResponse:
    return HttpResponse("drawn")


@meterly_guard("image_credits", 25)
def slow(request: HttpRequest) -> HttpResponse:
    Gate.entered.set()
    assert Gate.leave.wait(60)
    return HttpResponse("drawn")


@meterly_guard("image_credits", 25)
def upload(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.FILES["image"].read())


@meterly_guard("image_credits", 25)
def body(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.read())


class OwnHandler(MemoryFileUploadHandler):
    def file_complete(self, file_size: int) -> Any:
        file = super().file_complete(file_size)
        if file is not None:
            file.name = f"own-{file.name}"
        return file


@csrf_exempt
@meterly_guard("image_credits", 25)
def own_handlers(request: HttpRequest) -> HttpResponse:
    # How Django's documentation has a view set them.
    request.upload_handlers.insert(0, OwnHandler(request))

    @csrf_protect
    def receive(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.FILES["image"].name)

    return receive(request)


class Resource(APIView):
    def post(self, request: Any) -> JsonResponse:
        files = {name: file.read().decode() for name, file in request.FILES.items()}
        return JsonResponse({"data": request.data.get("title"), "files": files})


@meterly_guard("image_credits", 25)
@api_view(["POST"])
def function(request: Any) -> JsonResponse:
    return JsonResponse({"data": request.data.get("title")})


def _partial(name: str, request: HttpRequest) -> HttpResponse:
    return HttpResponse(name)


urlpatterns = [
    path("draw/", draw),
    path("print/", print_),
    path("priced/", priced),
    path("adraw/", adraw),
    path("slow/", slow),
    path("upload/", upload),
    path("body/", body),
    path("own-handlers/", own_handlers),
    path("resource/", meterly_guard("image_credits", 25)(Resource.as_view())),
    path("function/", function),
]


def post(client: Any, url: str, key: str = KEY, **headers: str) -> Any:
    return client.post(url, headers={"Idempotency-Key": key, **headers})


def problem(response: Any) -> tuple[int, str]:
    if hasattr(response, "accepted_renderer"):
        # REST framework's own format.
        assert response["Content-Type"] == "application/json"
    else:
        assert response["Content-Type"] == PROBLEM
        assert response.json()["status"] == response.status_code
    return response.status_code, response.json()["code"]


@pytest.mark.parametrize("url", ["/draw/", "/resource/", "/function/"])
def test_f27_a_finished_request_is_a_409_that_names_the_outcome(
    payer: Client, customer: Any, any_requests: bool, url: str
) -> None:
    assert post(payer, url).status_code == 200
    again = post(payer, url)
    assert problem(again) == (409, "duplicate")
    row = Reservation.objects.get()
    assert again.json()["state"] == row.state == "committed"
    assert again.json()["reference"] == row.reference
    assert "answer is not kept" in again.json()["detail"]
    assert "Retry-After" not in again
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]
    assert_books_balance()


def test_f27_an_async_view_runs_once(
    async_client: Any, user: User, customer: Any
) -> None:
    async_client.force_login(user)

    @async_to_sync
    async def send(data: Any = None, **headers: str) -> Any:
        return await async_client.post("/adraw/", data, headers=headers)

    assert send(**{"Idempotency-Key": KEY}).content == b"drawn"
    assert problem(send(**{"Idempotency-Key": KEY})) == (409, "duplicate")
    assert send({"meterly_form_key": "f"}).content == b"drawn"
    assert problem(send({"meterly_form_key": "f"})) == (409, "duplicate")
    assert movements() == ["reserved", "committed"] * 2


@pytest.mark.database
def test_f27_the_concurrent_request_is_a_409_with_retry_after(
    payer: Client, user: User, customer: Any
) -> None:
    Gate.entered.clear()
    Gate.leave.clear()
    answers: list[Any] = []

    def first() -> None:
        try:
            client = Client()
            client.force_login(user)
            answers.append(post(client, "/slow/"))
        finally:
            connections.close_all()

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert Gate.entered.wait(60)
        second = post(payer, "/slow/")
        other_amount = post(payer, "/draw/")
    finally:
        Gate.leave.set()
        thread.join()
    assert problem(second) == (409, "duplicate")
    assert second["Retry-After"] == "5"
    assert second.json()["state"] == "reserved"
    assert problem(other_amount) == (422, "idempotency_mismatch")
    assert answers[0].content == b"drawn"
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]


@pytest.mark.database
def test_f27_of_many_first_requests_at_once_exactly_one_runs(
    user: User, customer: Any
) -> None:
    racers = 4
    barrier = threading.Barrier(racers)
    answers: list[Any] = []

    def race() -> None:
        try:
            client = Client()
            client.force_login(user)
            barrier.wait(60)
            answers.append(post(client, "/draw/"))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=race) for _ in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] + [409] * (racers - 1)
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]
    assert_books_balance()


def test_f27_after_a_402_and_a_top_up_the_key_succeeds(
    client: Client, user: User, any_ledger: Any
) -> None:
    client.force_login(user)
    assert problem(post(client, "/draw/")) == (402, "insufficient_credits")
    assert problem(post(client, "/draw/")) == (402, "insufficient_credits")
    customer = fund(user)
    assert post(client, "/draw/").status_code == 200
    assert problem(post(client, "/draw/")) == (409, "duplicate")
    assert balance(customer) == (75, 0)
    rows = Reservation.objects.order_by("attempt")
    assert [(row.attempt, row.state) for row in rows] == [
        (1, "denied"),
        (2, "denied"),
        (3, "committed"),
    ]


def test_f27_after_a_failure_the_key_may_be_tried_again(
    payer: Client, customer: Any
) -> None:
    assert post(payer, "/draw/", **{"X-Status": "500"}).status_code == 500
    assert post(payer, "/draw/").status_code == 200
    assert states() == ["released", "committed"]
    assert balance(customer) == (75, 0)


def test_f27_another_customers_same_key_is_independent(
    payer: Client, customer: Any
) -> None:
    assert post(payer, "/draw/").status_code == 200
    bob = User.objects.create_user("bob")
    other = fund(bob)
    payer.force_login(bob)
    assert post(payer, "/print/").status_code == 200
    assert balance(customer) == balance(other) == (75, 0)


def test_f27_another_view_or_amount_is_a_422(payer: Client, customer: Any) -> None:
    assert post(payer, "/priced/").status_code == 200
    for url, headers in [("/draw/", {}), ("/priced/", {"X-Amount": "24"})]:
        mismatch = post(payer, url, **headers)
        assert problem(mismatch) == (422, "idempotency_mismatch")
    page = post(payer, "/draw/", Accept="text/html")
    assert page.status_code == 422
    assert "another request" in page.content.decode()
    assert balance(customer) == (75, 0)
    assert states() == ["committed"]


def test_f27_another_amount_is_allowed_after_an_attempt_that_cost_nothing(
    payer: Client, customer: Any
) -> None:
    assert post(payer, "/priced/", **{"X-Amount": "101"}).status_code == 402
    assert problem(post(payer, "/draw/")) == (422, "idempotency_mismatch")
    free = post(payer, "/priced/", **{"X-Amount": "30", "X-Status": "400"})
    assert free.status_code == 400
    assert post(payer, "/priced/").status_code == 200
    assert balance(customer) == (75, 0)
    assert states() == ["denied", "released", "committed"]


def test_f27_a_guards_key_is_for_one_amount_and_unit(customer: Any) -> None:
    with guard(customer, 10, idempotency_key="k"):
        pass
    with pytest.raises(MeterlyDuplicateError), guard(customer, 10, idempotency_key="k"):
        pass
    for amount, unit in [(11, None), (10, "gpu_seconds")]:
        with (
            pytest.raises(MeterlyIdempotencyMismatchError, match="something else"),
            guard(customer, amount, unit, idempotency_key="k"),
        ):
            pass
    assert balance(customer) == (90, 0)


def test_f27_a_client_cannot_use_up_a_key_of_the_projects_own_code(
    payer: Client, customer: Any
) -> None:
    assert post(payer, "/draw/", "invoice-7").status_code == 200
    with guard(customer, 25, idempotency_key="invoice-7"):
        pass
    assert balance(customer) == (50, 0)


def test_f27_a_release_the_ledger_has_not_confirmed_is_still_in_progress(
    client: Client, user: User, remote: Any
) -> None:
    customer = fund(user)
    client.force_login(user)
    remote.meet("release_reservation", "lost")
    assert post(client, "/priced/", **{"X-Status": "500"}).status_code == 500
    assert states() == ["release_pending"]
    for amount in ("25", "24"):
        again = post(client, "/priced/", **{"X-Amount": amount})
        assert problem(again) == (409, "duplicate")
        assert again["Retry-After"] == "5"
    sweep()
    assert post(client, "/priced/", **{"X-Amount": "24"}).status_code == 200
    assert balance(customer) == (76, 0)


def test_the_views_name_is_kept_with_the_reservation(
    payer: Client, user: User, customer: Any
) -> None:
    post(payer, "/draw/", "1")
    post(payer, "/resource/", "2")
    request = RequestFactory().post("/")
    request.user = user
    meterly_guard("image_credits", 25)(partial(_partial, "x"))(request)
    names = Reservation.objects.order_by("created_at").values_list("name", flat=True)
    assert list(names) == [
        f"tests.test_keys.{n}" for n in ("draw", "Resource", "_partial")
    ]


# The header


def journal_key(value: str) -> str | None:
    return requested_key(RequestFactory().post("/", headers={"Idempotency-Key": value}))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (KEY, f"client:{KEY}"),
        (f'"{KEY}"', f"client:{KEY}"),
        (r'"a\"b\\c"', r'client:a"b\c'),
        ("a,b;c=1", "client:a,b;c=1"),
        ("k" * 193, "client:" + "k" * 193),
    ],
)
def test_a_header_is_a_quoted_string_or_a_bare_key(value: str, key: str) -> None:
    assert journal_key(value) == key


def test_long_keys_are_told_apart_in_the_journals_200_characters() -> None:
    keys = {journal_key("k" * 199 + end) for end in "abc"} | {journal_key("k" * 199)}
    assert len(keys) == 4
    assert all(key is not None and len(key) <= 200 for key in keys)


@pytest.mark.parametrize(
    "value",
    [
        "",
        '""',
        "a b",
        '"a b"',
        '"a',
        '"a" ;x',
        '"a", "b"',
        r'"a\b"',
        '"a"b"',
        "k" * 201,
        f'"{"k" * 201}"',
        "schl\u00fcssel",
        "a\x7f",
    ],
)
def test_f27_a_header_that_cannot_be_a_key_is_a_400_with_the_limit(
    payer: Client, customer: Any, value: str
) -> None:
    answer = post(payer, "/draw/", value)
    assert problem(answer) == (400, "invalid_idempotency_key")
    assert "1 to 200 visible ASCII characters" in answer.json()["detail"]
    assert states() == []


def test_an_option_of_the_view_decides_alone(user: User, customer: Any) -> None:
    keys = iter([None, None, "mine", "mine"])

    @meterly_guard("image_credits", 25, idempotency_key=lambda request: next(keys))
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    request = RequestFactory().post(
        "/", {"meterly_form_key": "a b"}, headers={"Idempotency-Key": "a b"}
    )
    request.user = user
    assert [view(request).status_code for _ in range(4)] == [200, 200, 200, 409]
    assert Reservation.objects.filter(key="mine").count() == 1


def test_a_request_that_costs_nothing_needs_no_good_key(payer: Client) -> None:
    assert payer.get("/draw/", headers={"Idempotency-Key": "a b"}).status_code == 200


# The form


FORM = Template("{% load meterly %}{% meterly_form_key %}")


def test_each_rendering_of_the_form_has_a_key_of_its_own() -> None:
    keys = set()
    for _ in range(3):
        found = re.fullmatch(
            r'<input type="hidden" name="meterly_form_key" value="([0-9a-f-]{36})" '
            r'autocomplete="off">',
            FORM.render(Context()),
        )
        assert found
        keys.add(found[1])
    assert len(keys) == 3


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded; charset=utf-8"]
)
@pytest.mark.parametrize("csrf_checks", [False, True])
def test_f27_a_form_sent_twice_runs_once(
    user: User,
    customer: Any,
    any_requests: bool,
    content_type: str | None,
    csrf_checks: bool,
) -> None:
    client = Client(enforce_csrf_checks=csrf_checks)
    client.force_login(user)
    token = "t" * 32
    client.cookies["csrftoken"] = token
    sent = {
        True: {"data": f"meterly_form_key={KEY}&csrfmiddlewaretoken={token}"},
        False: {"data": {"meterly_form_key": KEY, "csrfmiddlewaretoken": token}},
    }[content_type is not None]
    if content_type:
        sent["content_type"] = content_type  # type: ignore[assignment]
    assert client.post("/draw/", **sent).status_code == 200
    assert problem(client.post("/draw/", **sent)) == (409, "duplicate")
    assert Reservation.objects.get().key == f"client:{KEY}"
    assert balance(customer) == (75, 0)


def test_rest_frameworks_request_is_seen_through() -> None:
    form = f"meterly_form_key={KEY}"
    urlencoded = "application/x-www-form-urlencoded; charset=utf-8"
    request = RequestFactory().post("/", form, content_type=urlencoded)
    assert requested_key(Request(request)) == f"client:{KEY}"
    multipart = RequestFactory().post("/", {"meterly_form_key": KEY})
    assert requested_key(Request(multipart, parsers=[MultiPartParser()])) is None
    parsed = Request(multipart, parsers=[MultiPartParser()])
    assert parsed.data["meterly_form_key"] == KEY
    assert requested_key(parsed) == f"client:{KEY}"


def test_the_header_goes_before_the_form(payer: Client, customer: Any) -> None:
    payer.post("/draw/", {"meterly_form_key": "f"}, headers={"Idempotency-Key": "h"})
    assert Reservation.objects.get().key == "client:h"


def test_a_form_key_that_cannot_be_one_is_a_400(payer: Client, customer: Any) -> None:
    answer = payer.post("/draw/", {"meterly_form_key": "a b"})
    assert problem(answer) == (400, "invalid_idempotency_key")


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "application/octet-stream", ""]
)
def test_other_bodies_are_left_to_the_view(
    payer: Client, customer: Any, content_type: str
) -> None:
    data = '{"meterly_form_key": "a b"}'
    for _ in range(2):
        answer = payer.post("/body/", data, content_type=content_type)
        assert answer.content.decode() == data
    assert states() == ["committed"] * 2


def test_a_form_with_files_arrives_whole(payer: Client, customer: Any) -> None:
    sent = {"meterly_form_key": KEY, "image": SimpleUploadedFile("a.txt", b"pixels")}
    assert payer.post("/upload/", sent).content == b"pixels"
    again = {**sent, "image": SimpleUploadedFile("a.txt", b"pixels")}
    assert problem(payer.post("/upload/", again)) == (409, "duplicate")


def test_a_view_may_still_set_its_upload_handlers(payer: Client, customer: Any) -> None:
    sent = {"meterly_form_key": "a b", "image": SimpleUploadedFile("a.txt", b"pixels")}
    assert payer.post("/own-handlers/", sent).content == b"own-a.txt"


def test_an_api_view_gets_its_form_and_files(payer: Client, customer: Any) -> None:
    sent = {"title": "Suns", "a": SimpleUploadedFile("a.txt", b"pixels")}
    answer = payer.post("/resource/", sent)
    assert answer.json() == {"data": "Suns", "files": {"a": "pixels"}}
    form = f"title=Suns&meterly_form_key={KEY}"
    urlencoded = "application/x-www-form-urlencoded"
    answer = payer.post("/resource/", form, content_type=urlencoded)
    assert answer.json()["data"] == "Suns"
    again = payer.post("/resource/", form, content_type=urlencoded)
    assert problem(again) == (409, "duplicate")


def test_the_tag_works_inside_a_real_template(rf: RequestFactory) -> None:
    page = render_to_string("tests/keyed_form.html", request=rf.get("/"))
    assert page.count('name="meterly_form_key"') == 1
    assert 'name="csrfmiddlewaretoken"' in page
