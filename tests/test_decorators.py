"""``meterly_guard`` on sync function views: the outcome of the work decides."""

from __future__ import annotations

import logging
from copy import copy
from functools import partial
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Group, User
from django.db import IntegrityError, OperationalError, connections, transaction
from django.http import HttpResponse, JsonResponse
from django.template import TemplateDoesNotExist
from django.template.response import TemplateResponse
from django.test import RequestFactory
from django.utils import timezone
from django.views import View

from django_meterly import (
    MeterlyUsageError,
    get_client,
    guard,
    journal,
    meterly_guard,
)
from django_meterly.models import Reservation
from django_meterly.testing import assert_books_balance, lapse_leases, sweep
from tests import views
from tests.books import balance, fund, movements, states

pytestmark = pytest.mark.django_db(transaction=True)
ON_POSTGRESQL = connections["default"].vendor == "postgresql"


def kill_backend(connection: Any) -> None:
    """End the database's end of *connection*, from another connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
    other = connection.copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    other.close()


@pytest.mark.database
def test_success_charges_once(payer: Any, customer: Any, any_requests: bool) -> None:
    response = payer.post("/paid/")
    assert response.content == b"done"
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]
    assert states() == ["committed"]
    assert Group.objects.count() == 1
    assert_books_balance()


def test_settled_amount_is_charged_and_the_rest_returns(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    payer.post("/settles/", {"used": 7})
    assert balance(customer) == (93, 0)
    payer.post("/settles/", {"used": 0})
    assert balance(customer) == (93, 0)


def test_overage_is_charged_by_default_and_capped_by_setting(
    payer: Any,
    customer: Any,
    any_requests: bool,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    payer.post("/settles/", {"used": 30})
    assert balance(customer) == (70, 0)
    settings.METERLY = {**settings.METERLY, "OVERAGE": "cap"}
    with caplog.at_level(logging.WARNING, "django_meterly"):
        payer.post("/settles/", {"used": 30})
    assert balance(customer) == (45, 0)
    assert "used 30 image_credits, but is charged the 25" in caplog.text


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("boom", views.Boom),
        ("exit", SystemExit),
        ("interrupt", KeyboardInterrupt),
        ("generator", GeneratorExit),
    ],
)
def test_f12_f19_f23_an_exception_releases_and_goes_on(
    payer: Any,
    customer: Any,
    any_requests: bool,
    kind: str,
    raised: type[BaseException],
) -> None:
    with pytest.raises(raised):
        payer.post("/raises/", {"kind": kind})
    assert balance(customer) == (100, 0)
    assert movements() == ["reserved", "released"]
    assert states() == ["released"]
    # The view's own work went with its transaction, the journal's row did not.
    assert Group.objects.count() == (0 if any_requests else 1)
    assert_books_balance()


def test_f19_the_very_exception_is_raised(user: User, customer: Any) -> None:
    boom = views.Boom("this one")

    @meterly_guard("image_credits", 25)
    def view(request: Any) -> HttpResponse:
        raise boom

    request = RequestFactory().post("/")
    request.user = user
    with pytest.raises(views.Boom) as info:
        view(request)
    assert info.value is boom
    assert states() == ["released"]


@pytest.mark.parametrize("kind", ["404", "403"])
def test_f19_http_exceptions_release(
    payer: Any, customer: Any, any_requests: bool, kind: str
) -> None:
    response = payer.post("/raises/", {"kind": kind})
    assert response.status_code == int(kind)
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
def test_f19_error_responses_release(
    payer: Any, customer: Any, any_requests: bool, status: int
) -> None:
    response = payer.post("/paid/", {"status": status})
    assert response.status_code == status
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


@pytest.mark.parametrize("status", [201, 302])
def test_f19_other_responses_are_charged(
    payer: Any, customer: Any, any_requests: bool, status: int
) -> None:
    payer.post("/paid/", {"status": status})
    assert balance(customer) == (75, 0)


@pytest.mark.usefixtures("atomic_requests")
def test_f19_a_rollback_that_was_asked_for_releases(payer: Any, customer: Any) -> None:
    assert payer.post("/rolls_back/").status_code == 200
    assert Group.objects.count() == 0
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


@pytest.mark.usefixtures("atomic_requests")
@pytest.mark.database
def test_f13_a_failed_commit_releases(payer: Any, customer: Any) -> None:
    with pytest.raises(IntegrityError):
        payer.post("/breaks_at_commit/")
    assert balance(customer) == (100, 0)
    assert movements() == ["reserved", "released"]
    assert states() == ["released"]
    assert_books_balance()


if ON_POSTGRESQL:

    @pytest.mark.database
    @pytest.mark.usefixtures("atomic_requests")
    def test_f13_a_killed_connection_releases(payer: Any, customer: Any) -> None:
        with pytest.raises(OperationalError):
            payer.post("/loses_connection/")
        assert Group.objects.count() == 0
        assert balance(customer) == (100, 0)
        assert states() == ["released"]

    @pytest.mark.database
    def test_f29_a_connection_lost_during_the_work_is_replaced(
        user: User, customer: Any
    ) -> None:
        with guard(user, 25):
            kill_backend(connections["default"])
        assert balance(customer) == (75, 0)
        assert states() == ["committed"]


@pytest.mark.usefixtures("atomic_requests")
def test_f14_an_on_commit_that_raises_does_not_undo_the_charge(
    payer: Any, customer: Any
) -> None:
    with pytest.raises(views.Boom):
        payer.post("/breaks_after_commit/")
    assert Group.objects.count() == 1
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]
    assert states() == ["committed"]


def test_f14_settlement_trouble_never_becomes_a_500(
    client: Any, user: User, remote: Any, any_requests: bool
) -> None:
    customer = fund(user)
    client.force_login(user)
    remote.meet("commit_reservation", "lost")
    assert client.post("/paid/").status_code == 200
    assert states() == ["commit_pending"]
    lapse_leases()
    from django_meterly import get_client, journal

    journal.sweep(get_client())
    assert balance(customer) == (75, 0)


@pytest.mark.usefixtures("atomic_requests")
def test_f15_the_decision_is_in_the_views_own_commit(
    user: User, customer: Any, any_ledger: Any
) -> None:
    seen = []

    @meterly_guard("image_credits", 25)
    def view(request: Any) -> HttpResponse:
        # Called right after the COMMIT, before the guard gets to do anything.
        transaction.on_commit(lambda: seen.extend(states()))
        return HttpResponse()

    request = RequestFactory().post("/")
    request.user = user
    view(request)
    assert seen == ["commit_pending" if any_ledger else "committed"]


@pytest.mark.parametrize("template", ["good", "bad"])
def test_f20_a_template_response_is_decided_by_its_rendering(
    payer: Any, customer: Any, any_requests: bool, template: str
) -> None:
    name = f"tests/{template}.html"
    if template == "good":
        assert payer.post("/template/", {"template": name}).content == b"Value: 1\n"
        assert balance(customer) == (75, 0)
    else:
        with pytest.raises(Exception, match="no_such_library"):
            payer.post("/template/", {"template": name})
        assert balance(customer) == (100, 0)
        assert states() == ["released"]


def test_f21_a_stream_is_charged_after_its_last_chunk(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    response = payer.post("/stream/")
    assert balance(customer) == (100, 25)
    assert b"".join(response) == b"onetwothree"
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]


@pytest.mark.parametrize(
    ("policy", "used", "left"),
    [
        ("release", None, 100),
        ("release", 5, 100),
        ("charge", None, 75),
        ("charge", 5, 95),
    ],
)
def test_f21_a_disconnect_follows_the_policy(
    payer: Any,
    customer: Any,
    any_requests: bool,
    settings: Any,
    policy: str,
    used: int | None,
    left: int,
) -> None:
    settings.METERLY = {**settings.METERLY, "ON_DISCONNECT": policy}
    response = payer.post("/stream/", {"used": used or ""})
    chunks = iter(response.streaming_content)
    next(chunks), next(chunks)
    response.close()
    assert balance(customer) == (left, 0)


def test_f21_a_stream_that_breaks_is_released(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    response = payer.post("/stream/", {"break": 1})
    with pytest.raises(views.Boom):
        b"".join(response)
    response.close()
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


@pytest.mark.parametrize(("policy", "left"), [("release", 100), ("charge", 75)])
@pytest.mark.parametrize("closed", [True, False])
def test_f47_a_stream_that_never_starts_follows_the_policy(
    payer: Any,
    customer: Any,
    any_requests: bool,
    settings: Any,
    policy: str,
    left: int,
    closed: bool,
) -> None:
    settings.METERLY = {**settings.METERLY, "ON_DISCONNECT": policy}
    response = payer.post("/stream/")
    if closed:
        response.close()
    lapse_leases()
    journal.sweep(get_client())
    assert balance(customer) == (left, 0)
    assert movements() == ["reserved", "released" if left == 100 else "committed"]


def late(request: Any) -> TemplateResponse:
    return TemplateResponse(request, "tests/good.html", {"value": 1})


late_view = meterly_guard("image_credits", 25)(late)


def test_f47_a_template_that_nobody_renders_is_charged(
    request_: Any, customer: Any, any_requests: bool
) -> None:
    late_view(request_)
    assert states() == ["reserved"]
    lapse_leases()
    journal.sweep(get_client())
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]


def test_f47_a_rendering_that_fails_after_the_lapse_stays_charged(
    request_: Any, customer: Any, any_requests: bool
) -> None:
    response = late_view(request_)
    lapse_leases()
    assert journal.record_lapsed() == 1
    response.template_name = "no such template"
    with pytest.raises(TemplateDoesNotExist):
        response.render()
    assert balance(customer) == (75, 0)
    assert states() == ["committed"]


def test_f47_the_lease_of_a_late_response_ends_before_its_hold(
    request_: Any, customer: Any
) -> None:
    for ttl, least, most in [(300, 55, 60), (40, 15, 20)]:
        meterly_guard("image_credits", 1, ttl_seconds=ttl)(late)(request_)
        row = Reservation.objects.order_by("-created_at").first()
        assert row is not None
        assert row.lease_until is not None
        assert row.is_presumed
        left = (row.lease_until - timezone.now()).total_seconds()
        assert least < left <= most


@pytest.mark.usefixtures("atomic_requests")
def test_f14_an_on_commit_that_raises_does_not_undo_a_late_charge(
    payer: Any, customer: Any
) -> None:
    with pytest.raises(views.Boom):
        payer.post("/breaks_after_commit/", {"late": 1})
    assert balance(customer) == (75, 0)
    assert states() == ["committed"]


@pytest.mark.usefixtures("atomic_requests")
def test_f13_a_late_response_whose_commit_fails_is_released(
    payer: Any, customer: Any
) -> None:
    with pytest.raises(IntegrityError):
        payer.post("/breaks_at_commit/", {"late": 1})
    assert balance(customer) == (100, 0)
    assert states() == ["released"]


def test_f73_a_stream_with_a_length_is_decided_before_its_last_chunk(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    response = payer.post("/stream/", {"length": "11"})
    chunks = iter(response.streaming_content)
    assert [next(chunks), next(chunks)] == [b"one", b"two"]
    assert states() == ["reserved"]
    assert next(chunks) == b"three"
    # The reader has everything now; nobody may come to ask for the end.
    assert states() == ["committed"]
    response.close()
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]


def test_f28_a_guard_inside_a_guarded_view_is_its_own_reservation(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    payer.post("/nested/")
    if any_requests:
        lapse_leases()
        journal.sweep(get_client())
    assert balance(customer) == (65, 0)
    assert states() == ["committed", "committed"]


def test_too_few_credits_are_a_402_and_the_view_does_not_run(
    payer: Any, customer: Any, any_requests: bool, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "TOP_UP_URL": "/top-up/"}
    for _ in range(4):
        assert payer.post("/paid/", {"trace": _}).status_code == 200
    response = payer.post("/paid/")
    assert response.status_code == 402
    assert response["Content-Type"] == "application/problem+json"
    assert response.json() == {
        "type": "about:blank",
        "title": "Not enough credits",
        "status": 402,
        "detail": "This needs 25 image_credits, and 0 are available.",
        "code": "insufficient_credits",
        "required": 25,
        "available": 0,
        "reserved": 0,
        "unit": "image_credits",
        "top_up_url": "/top-up/",
        "held_by_running_work": False,
    }
    page = payer.post("/paid/", headers={"accept": "text/html,*/*;q=0.8"})
    assert page.status_code == 402
    assert page["Content-Type"].startswith("text/html")
    assert "Get more credits" in page.text
    assert Group.objects.count() == 4
    assert states() == ["committed"] * 4 + ["denied"] * 2


def test_credits_held_by_running_work_are_told_apart(
    payer: Any, user: User, customer: Any
) -> None:
    with guard(user, 90):
        response = payer.post("/paid/")
    assert response.status_code == 402
    assert response.json()["held_by_running_work"] is True
    assert "running work holds" in response.json()["detail"]


def test_f01_a_lost_answer_to_the_reserve_is_a_503_and_released_later(
    client: Any, user: User, remote: Any, any_requests: bool
) -> None:
    customer = fund(user)
    client.force_login(user)
    for fault in ("unanswered", "lost"):
        remote.meet("reserve_credits", fault)
        response = client.post("/paid/")
        assert response.status_code == 503
        assert int(response["Retry-After"]) > 0
    assert Group.objects.count() == 0
    assert states() == ["intent", "intent"]
    assert balance(customer) == (100, 25)
    lapse_leases()
    from django_meterly import get_client, journal

    assert journal.sweep(get_client()) == (2, 2)
    assert balance(customer) == (100, 0)
    assert states() == ["released", "released"]
    assert_books_balance()


def test_f02_a_reserve_that_was_never_sent_is_a_503_and_over(
    client: Any, user: User, remote: Any
) -> None:
    customer = fund(user)
    client.force_login(user)
    remote.meet("reserve_credits", "unsent")
    assert client.post("/paid/").status_code == 503
    assert states() == ["failed"]
    assert "release_reservation" not in remote.operations()
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize("fault", ["lost", "unanswered", "unsent"])
def test_f03_a_lost_commit_is_committed_once_by_the_sweeper(
    client: Any, user: User, remote: Any, any_requests: bool, fault: str
) -> None:

    customer = fund(user)
    client.force_login(user)
    remote.meet("commit_reservation", fault, fault, fault)
    response = client.post("/paid/")
    assert (response.status_code, response.content) == (200, b"done")
    for _ in range(4):
        assert "release_reservation" not in remote.operations()
        sweep()
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert movements() == ["reserved", "committed"]


def test_f26_reading_is_free_and_keeps_its_transaction(
    payer: Any, customer: Any, any_requests: bool
) -> None:
    for method in (payer.get, payer.head, payer.options):
        assert method("/atomic/").status_code == 200
    assert payer.get("/atomic/").content == str(any_requests).encode()
    assert payer.post("/atomic/").content == str(any_requests).encode()
    assert states() == ["committed"]


def test_f26_reading_costs_when_asked_for(user: User, customer: Any) -> None:
    request = RequestFactory().get("/")
    request.user = user
    request.POST = {"amount": "3"}  # type: ignore[assignment]
    assert views.reading(request).status_code == 200
    assert balance(customer) == (97, 0)


def test_f26_attributes_of_the_view_survive() -> None:
    def view(request: Any) -> HttpResponse:
        return HttpResponse()

    exempt = {"other"}
    view.csrf_exempt = True  # type: ignore[attr-defined]
    view._non_atomic_requests = exempt  # type: ignore[attr-defined]
    guarded = meterly_guard("x", 1)(view)
    assert guarded.csrf_exempt  # type: ignore[attr-defined]
    assert guarded.__name__ == "view"
    assert exempt == {"other"}
    assert guarded._non_atomic_requests >= set(connections)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("atomic_requests")
def test_exemption_above_the_guard_is_kept(payer: Any, customer: Any) -> None:
    assert payer.post("/exempt/").content == b"False"
    assert balance(customer) == (75, 0)


def test_nobody_logged_in_is_never_charged(client: Any) -> None:
    response = client.post("/paid/")
    assert (response.status_code, response.json()["code"]) == (401, "unauthenticated")
    page = client.post("/paid/", headers={"accept": "text/html"})
    assert page.status_code == 302
    assert page["Location"] == "/accounts/login/?next=/paid/"
    assert states() == []


def test_f27_a_used_key_is_a_409_and_a_refused_one_may_try_again(
    payer: Any, customer: Any
) -> None:
    assert payer.post("/keyed/", {"key": "k", "status": 500}).status_code == 500
    assert payer.post("/keyed/", {"key": "k"}).status_code == 200
    response = payer.post("/keyed/", {"key": "k"})
    assert (response.status_code, response.json()["code"]) == (409, "duplicate")
    assert response.json()["state"] == "committed"
    assert balance(customer) == (75, 0)
    assert list(Reservation.objects.values_list("attempt", flat=True)) == [1, 2]


def test_f27_customers_do_not_share_keys(payer: Any, customer: Any) -> None:
    bob = User.objects.create_user("bob")
    other = fund(bob)
    assert payer.post("/keyed/", {"key": "k"}).status_code == 200
    payer.force_login(bob)
    assert payer.post("/keyed/", {"key": "k"}).status_code == 200
    assert balance(customer) == balance(other) == (75, 0)


def test_f27_a_key_that_cannot_be_one_is_a_400(payer: Any, customer: Any) -> None:
    response = payer.post("/keyed/", {"key": "k" * 201})
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_idempotency_key"
    page = payer.post("/keyed/", {"key": "k k"}, headers={"accept": "text/html"})
    assert page.status_code == 400
    assert states() == []


def test_stacked_guards_are_both_charged_after_the_rendering(
    user: User, customer: Any, rf: RequestFactory
) -> None:
    @meterly_guard("image_credits", 2)
    @meterly_guard("image_credits", 3)
    def view(request: Any) -> TemplateResponse:
        return TemplateResponse(request, "tests/good.html")

    request = rf.post("/")
    request.user = user
    view(request).render()
    assert states() == ["committed", "committed"]
    assert balance(customer) == (95, 0)


def test_naming_get_names_head_too(user: User, customer: Any) -> None:
    request = RequestFactory().head("/")
    request.user = user
    request.POST = {"amount": "3"}  # type: ignore[assignment]
    views.reading(request)
    assert balance(customer) == (97, 0)


@pytest.mark.parametrize("returned", [None, {"drawn": True}, "drawn", (201, {})])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_f61_what_a_view_returns_has_to_be_a_response(
    user: User, customer: Any, kind: str, returned: Any
) -> None:
    def to_json(view: Any) -> Any:
        # As the decorators of other frameworks do.
        return lambda request: JsonResponse({"result": view(request)})

    @meterly_guard("image_credits", 25)
    def view(request: Any) -> Any:
        return returned

    @meterly_guard("image_credits", 25)
    async def aview(request: Any) -> Any:
        return returned

    request = RequestFactory().post("/")
    request.user = user
    guarded = to_json(view if kind == "sync" else async_to_sync(aview))
    with pytest.raises(TypeError, match=rf"returned {type(returned).__name__}\. Noth"):
        guarded(request)
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


def test_f61_the_guard_of_what_makes_the_response_charges(
    user: User, customer: Any
) -> None:
    def to_json(view: Any) -> Any:
        return lambda request: JsonResponse({"result": view(request)})

    @meterly_guard("image_credits", 25)
    @to_json
    def view(request: Any) -> Any:
        return {"drawn": True}

    request = RequestFactory().post("/")
    request.user = user
    assert view(request).status_code == 200
    assert balance(customer) == (75, 0)


def test_class_based_views_are_named_after_their_class(
    user: User, customer: Any
) -> None:
    class Page(View):
        def post(self, request: Any) -> HttpResponse:
            return HttpResponse(request.meterly.reference)

    request = RequestFactory().post("/")
    request.user = user
    response = meterly_guard("image_credits", 25)(Page.as_view())(request)
    assert response.content.startswith(b"Page:")


def test_what_cannot_be_guarded_is_refused_at_once() -> None:
    class Page(View):
        def post(self, request: Any) -> HttpResponse:
            return HttpResponse()

    with pytest.raises(TypeError, match=r"Page\.as_view\(\)"):
        meterly_guard("x", 1)(Page)
    with pytest.raises(TypeError, match="not 'view'"):
        meterly_guard("x", 1)("view")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be an int"):
        meterly_guard("x", True)
    with pytest.raises(ValueError, match="from 1 to"):
        meterly_guard("x", 0)
    with pytest.raises(TypeError, match="list of HTTP methods"):
        meterly_guard("x", 1, methods="POST")
    with pytest.raises(ValueError, match="overage must be one of charge, cap"):
        meterly_guard("x", 1, overage="free")
    with pytest.raises(ValueError, match="on_disconnect must be one of charge, r"):
        meterly_guard("x", 1, on_disconnect="ignore")


def test_f24_a_hidden_coroutine_is_never_charged(user: User, customer: Any) -> None:
    async def work() -> HttpResponse:
        return HttpResponse()

    @meterly_guard("image_credits", 25)
    def view(request: Any) -> Any:
        return work()

    request = RequestFactory().post("/")
    request.user = user
    with pytest.raises(TypeError, match="coroutine"):
        view(request)
    assert balance(customer) == (100, 0)


class Renderer:
    csrf_exempt = False

    def __init__(self) -> None:
        self.csrf_exempt = True

    def __call__(self, request: Any, word: str = "done") -> HttpResponse:
        return HttpResponse(word)


def _worded(word: str, request: Any) -> HttpResponse:
    return HttpResponse(word)


@pytest.mark.parametrize(
    ("view", "name"),
    [
        (partial(_worded, "done"), "_worded"),
        (partial(partial(_worded), "done"), "_worded"),
        (Renderer(), "Renderer"),
        (partial(Renderer(), word="done"), "Renderer"),
        (Renderer().__call__, "Renderer.__call__"),
    ],
)
def test_f24_every_sync_callable_is_guarded(
    user: User, customer: Any, any_requests: bool, view: Any, name: str
) -> None:
    request = RequestFactory().post("/")
    request.user = user
    guarded = meterly_guard("image_credits", 25)(view)
    assert guarded(request).content == b"done"
    assert balance(customer) == (75, 0)
    assert Reservation.objects.get().reference.startswith(f"{name}:")
    if isinstance(view, Renderer):
        assert guarded.csrf_exempt  # type: ignore[attr-defined]


def test_a_method_of_no_view_is_refused(user: User) -> None:
    class Page:
        @meterly_guard("image_credits", 25)
        def post(self, request: Any) -> HttpResponse:
            return HttpResponse()

    with pytest.raises(TypeError, match="got a Page where a view gets its request"):
        Page().post(RequestFactory().post("/"))
    assert states() == []


def test_a_free_request_says_that_it_is_free(user: User) -> None:
    @meterly_guard("image_credits", 25)
    def view(request: Any) -> HttpResponse:
        request.meterly.charge(3)
        return HttpResponse()

    request = RequestFactory().get("/")
    request.user = user
    with pytest.raises(MeterlyUsageError, match=r'methods=\["GET"\]'):
        view(request)
    assert "GET costs nothing" in repr(request.meterly)  # type: ignore[attr-defined]
    copy(request)


def test_class_based_views_are_guarded_around_as_view(
    user: User, customer: Any, any_requests: bool
) -> None:
    class Page(View):
        def post(self, request: Any) -> HttpResponse:
            return HttpResponse("done")

    view = meterly_guard("image_credits", 25)(Page.as_view())
    assert view.view_class is Page  # type: ignore[attr-defined]
    request = RequestFactory().post("/")
    request.user = user
    assert view(request).content == b"done"
    assert balance(customer) == (75, 0)


@pytest.mark.database
def test_the_views_transaction_holds_the_ledgers_lock_only_at_its_end(
    user: User, joined: None, atomic_requests: None
) -> None:
    customer = fund(user)

    @meterly_guard("image_credits", 25)
    def view(request: Any) -> HttpResponse:
        # Nothing of the hold is pending in the view's own transaction: it is
        # visible, and movable, elsewhere.
        assert transaction.get_connection().in_atomic_block
        if ON_POSTGRESQL:
            other = connections["default"].copy()
            with other.cursor() as cursor:
                cursor.execute("SET lock_timeout = '1s'")
                cursor.execute("UPDATE meterly_ledger_account SET reserved = reserved")
                cursor.execute("SELECT reserved FROM meterly_ledger_account")
                assert cursor.fetchone() == (25,)
            other.close()
        return HttpResponse()

    request = RequestFactory().post("/")
    request.user = user
    view(request)
    assert balance(customer) == (75, 0)
