from __future__ import annotations

import dataclasses
import datetime as dt
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import Any

import pytest
from celery import Celery, current_app
from django.contrib.auth.models import Group
from django.core.checks import CheckMessage, Error, run_checks
from django.core.management import call_command
from django.db import OperationalError, connection, transaction
from django.http import HttpResponse
from django.test import override_settings
from django.urls import clear_url_caches, include, path
from django.utils import timezone
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import FormView
from rest_framework.views import APIView

from django_meterly import checks, meterly_guard
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.models import Customer, Reservation
from django_meterly.tasks import beat_schedule
from django_meterly.testing.failures import LEDGER_TRANSPORT
from django_meterly.transports import Transport
from tests import guarded_urls, jobs
from tests.books import balance, fund

HTTP = {"TRANSPORT": "django_meterly.transports.HttpTransport"}

# Some checks look into the database, if there is one to look into.
pytestmark = pytest.mark.django_db


def found(**options: Any) -> list[Any]:
    """Return what ``manage.py check`` shows."""
    messages = run_checks(tags=["meterly"], **options)
    return [message for message in messages if not message.is_silenced()]


def ids(databases: Any = ()) -> list[str]:
    return [str(message.id) for message in found(databases=databases)]


def test_the_suites_settings_are_fine() -> None:
    assert ids() == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "meterly.E001"),
        ({"API_KEYS": "x"}, "meterly.E002"),
        ({**HTTP, "API_KEY": "x", "DEADLINE": -1}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "RESERVATION_TTL": 90000}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "DEFAULT_UNIT": "a b"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "OVERAGE": "maybe"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "ON_DISCONNECT": "maybe"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "MAX_ATTEMPTS": 0}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "MAX_ATTEMPTS": True}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "MAX_ATTEMPTS": "3"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "EXTERNAL_ID": "no.such"}, "meterly.E004"),
        ({**HTTP, "API_KEY": "x", "SIGNER": "no.such.Signer"}, "meterly.E004"),
        ({"TRANSPORT": "no.such.Transport"}, "meterly.E004"),
        (HTTP, "meterly.E006"),
        ({}, "meterly.E006"),
        ({**HTTP, "API_KEY": "x", "BASE_URL": "ledger.test"}, "meterly.E007"),
        ({**HTTP, "API_KEY": "x", "BASE_URL": "http://ledger.test"}, "meterly.E007"),
        ({**HTTP, "API_KEY": "x", "BASE_URL": "http://[::1"}, "meterly.E007"),
        ({**HTTP, "API_KEY": "x y"}, "meterly.E006"),
        ({**HTTP, "API_KEY": "x", "MAX_SETTLE_ATTEMPTS": "20"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "ENFORCEMENT": "maybe"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "ON_UNAVAILABLE": "maybe"}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "UNAVAILABLE_CAP": -1}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "UNAVAILABLE_CAP": 1.5}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "LOW_BALANCE": 5}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "LOW_BALANCE": {"a b": 5}}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "LOW_BALANCE": {"tokens": 0}}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "LOW_BALANCE": {"tokens": "5"}}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "LOW_BALANCE_COOLDOWN": 0}, "meterly.E003"),
        ({**HTTP, "API_KEY": "x", "ON_UNAVAILABLE": "allow"}, "meterly.W004"),
    ],
)
def test_a_mistake_is_found(value: Any, expected: str) -> None:
    with override_settings(METERLY=value):
        assert ids() == [expected]


@pytest.mark.parametrize(
    "extra",
    [
        {"BASE_URL": "https://ledger.test"},
        {"BASE_URL": "http://127.0.0.1:8000/ledger"},
        {"BASE_URL": "http://ledger.test", "ALLOW_INSECURE_HTTP": True},
    ],
)
def test_good_addresses_pass(extra: dict[str, Any]) -> None:
    with override_settings(METERLY={**HTTP, "API_KEY": "x", **extra}):
        assert ids() == []


@pytest.mark.parametrize(
    "extra",
    [
        {"ON_UNAVAILABLE": "allow", "UNAVAILABLE_CAP": 1},
        {"LOW_BALANCE": {"tokens": 5}},
        {"ENFORCEMENT": "shadow"},
        # Without a key: nobody is asked.
        {"ENFORCEMENT": "off", "API_KEY": None},
    ],
)
def test_good_policies_pass(extra: dict[str, Any]) -> None:
    with override_settings(METERLY={**HTTP, "API_KEY": "x", **extra}):
        assert ids() == []


@pytest.mark.parametrize("word", ["shadow", "off"])
def test_what_runs_for_nothing_is_warned_of_when_deployed(
    settings: Any, word: str
) -> None:
    def deployed() -> list[str]:
        messages = found(include_deployment_checks=True)
        return [str(message.id) for message in messages]

    assert deployed() == []
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": word}
    assert deployed() == ["meterly.W005"]
    settings.METERLY = []
    assert deployed() == ["meterly.E001"]


def test_f58_a_secret_key_that_others_know_is_warned_of_when_deployed(
    settings: Any,
) -> None:
    def deployed() -> list[Any]:
        return found(include_deployment_checks=True)

    assert deployed() == []
    key = settings.SECRET_KEY
    for keys in (("django-insecure-1", []), (key, ["old", "django-insecure-1"])):
        settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = keys
        [message] = deployed()
        assert message.id == "meterly.W009"
        assert "the same for web and workers" in message.hint
        assert "SECRET_KEY_FALLBACKS" in message.hint
    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "", []
    assert deployed() == []


def test_an_unknown_setting_gets_a_suggestion() -> None:
    with override_settings(METERLY={"API_KEYS": "x"}):
        (message,) = checks.settings.check_settings()
    assert message.hint == "Did you mean 'API_KEY'?"


class Gateway(Transport):
    @classmethod
    def check(cls, settings: Any) -> list[CheckMessage]:
        if settings.API_KEY is None:
            return [Error("The gateway needs METERLY['API_KEY'].", id="shop.E001")]
        return []


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({}, ["shop.E001"]), ({"API_KEY": "x"}, []), ({"ENFORCEMENT": "off"}, [])],
)
def test_a_transport_checks_the_settings(
    extra: dict[str, Any], expected: list[str]
) -> None:
    with override_settings(METERLY={"TRANSPORT": Gateway, **extra}):
        assert [message.id for message in checks.settings.check_settings()] == expected


LASTING = guarded_urls.Writes.as_view()
lasting = [
    path("view/", meterly_guard(amount=1, ttl_seconds=61)(LASTING), name="too-long"),
    path("fine/", meterly_guard(amount=1, ttl_seconds=60)(LASTING)),
    path("named/", guarded_urls.view, name="named"),
]


def test_a_guard_that_lasts_longer_than_the_ledgers_holds_is_found(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.METERLY_LEDGER = {"MAX_TTL": 60}
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": lasting})
    settings.METERLY = {
        **settings.METERLY,
        "TRANSPORT": LEDGER_TRANSPORT,
        "RESERVATION_TTL": 61,
        "GUARDED_VIEWS": {"named": {"amount": 1, "ttl_seconds": 62}},
    }
    task = jobs.long._get_current_object()
    options = dataclasses.replace(task.meterly_options, ttl_seconds=63)
    monkeypatch.setattr(task, "meterly_options", options)
    messages = checks.guards.check_holds()
    assert {message.id for message in messages} == {"meterly.E013"}
    assert [message.msg.partition(" seconds")[0] for message in messages] == [
        "METERLY['RESERVATION_TTL'] is 61",
        "METERLY['GUARDED_VIEWS']['named']: its ttl_seconds is 62",
        "The view 'too-long': its ttl_seconds is 61",
        "The task 'jobs.long': its ttl_seconds is 63",
    ]
    # A ledger at the other end of a line has limits of its own.
    settings.METERLY = {**settings.METERLY, **HTTP, "API_KEY": "x"}
    assert checks.guards.check_holds() == []


@pytest.mark.parametrize(
    "bad",
    [
        {"GUARDED_VIEWS": []},
        {"GUARDED_VIEWS": {"named": {"ttl_seconds": 0}}},
        {"RESERVATION_TTL": "long"},
        {"TRANSPORT": "no.such.Transport"},
        {"NO_SUCH": 1},
    ],
)
def test_what_is_wrong_otherwise_is_said_by_the_other_checks(
    bad: dict[str, Any], settings: Any
) -> None:
    settings.METERLY_LEDGER = {"MAX_TTL": 60}
    settings.METERLY = {**settings.METERLY, **bad}
    assert checks.guards.check_holds() == []
    assert ids() != []


@pytest.mark.usefixtures("atomic_requests")
def test_sqlite_with_atomic_requests_is_warned_of() -> None:
    on_sqlite = connection.vendor == "sqlite"
    assert ids() == ["meterly.W001"] * on_sqlite


def test_the_check_command_finds_nothing() -> None:
    call_command("check", fail_level="WARNING", databases=["default"])


def test_bad_settings_do_not_crash_the_check_of_the_database(settings: Any) -> None:
    settings.METERLY = []
    assert ids(databases=["default"]) == ["meterly.E001"]


def test_a_database_out_of_reach_is_not_our_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> None:
        raise OperationalError("out of reach")

    monkeypatch.setattr(connection, "cursor", refuse)
    assert ids(databases=["default"]) == []


def test_a_customer_model_changed_later_is_refused(settings: Any) -> None:
    assert ids(databases=["default"]) == []
    settings.METERLY = {**settings.METERLY, "CUSTOMER_MODEL": "auth.Group"}
    (message,) = checks.customers.check_customer_model(databases=["default"])
    assert message.id == "meterly.E008"
    assert "auth_user" in str(message.msg)
    assert Group._meta.db_table not in str(message.msg)


MIDDLEWARE = ["django_meterly.middleware.MeterlyMiddleware"]
COSTS = {"unit": "image_credits", "amount": 25}


@pytest.fixture
def guard_views(settings: Any) -> Any:
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, *MIDDLEWARE]
    settings.ROOT_URLCONF = "tests.guarded_urls"

    def guard_views(views: Any) -> list[Any]:
        settings.METERLY = {**settings.METERLY, "GUARDED_VIEWS": views}
        return [message for message in found() if "never-" not in message.msg]

    return guard_views


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("posters:rendr", "Did you mean 'posters:render'?"),
        ("poster:", "Did you mean 'posters:'?"),
        ("posters", "Did you mean 'posters:'?"),
        ("xyz", "A name needs its namespace, 'posters:render', and a namespace its "),
    ],
)
def test_a_guarded_view_that_matches_no_url_is_warned_of(
    guard_views: Any, name: str, hint: str
) -> None:
    (message,) = guard_views({name: COSTS})
    assert message.id == "meterly.W002"
    assert message.hint.startswith(hint)


def test_guarded_views_that_match_are_fine(guard_views: Any) -> None:
    assert guard_views({"posters:render": COSTS, "posters:": COSTS}) == []


@pytest.mark.parametrize(
    "options", [{"amuont": 5}, {"amount": 0}, [], {"amount": "no.such.function"}]
)
def test_bad_options_of_guarded_views_are_found(guard_views: Any, options: Any) -> None:
    (message,) = guard_views({"posters:render": options})
    assert message.id == "meterly.E009"
    assert "METERLY['GUARDED_VIEWS']['posters:render']" in message.msg


def test_guarded_views_are_a_dict(guard_views: Any) -> None:
    assert [message.id for message in guard_views(["posters:"])] == ["meterly.E009"]


def test_guarded_views_need_the_middleware(guard_views: Any, settings: Any) -> None:
    settings.MIDDLEWARE = ["no.such.Middleware", *settings.MIDDLEWARE[:-1]]
    (message,) = guard_views({"posters:": COSTS})
    assert message.id == "meterly.E010"


@pytest.mark.urls("tests.guarded_urls")
def test_f48_guards_that_never_charge_are_warned_of() -> None:
    messages = found()
    assert {message.id for message in messages} == {"meterly.W003"}
    handlers = {4: "never-4, get()", 13: "never-13, options()"}
    assert [message.msg.split("'")[1] for message in messages] == [
        handlers.get(number, f"never-{number}") for number in range(1, 14)
    ]


def test_a_guarded_view_that_only_reads_is_warned_of(guard_views: Any) -> None:
    (message,) = guard_views({"plain": COSTS})
    assert message.id == "meterly.W003"
    assert guard_views({"plain": {**COSTS, "methods": ["GET"]}}) == []


@pytest.mark.urls("tests.guarded_urls")
def test_f25_a_guard_on_dispatch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_urls, "urlpatterns", guarded_urls.dispatch)
    clear_url_caches()
    assert ids() == ["meterly.E011"]


@pytest.mark.urls("tests.guarded_urls")
def test_f25_a_handler_without_the_mixin_is_found_under_atomic_requests(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(guarded_urls, "urlpatterns", guarded_urls.handler)
    clear_url_caches()
    assert ids() == []
    request.getfixturevalue("atomic_requests")
    assert "meterly.E012" in ids()


async def apost(self: Any, request: Any) -> HttpResponse:
    return HttpResponse()


class AsyncMixin(MeterlyGuardMixin, View):
    guard_options = COSTS
    post = apost


class AsyncHandler(MeterlyGuardMixin, View):
    post = guarded_urls.guarded(apost)


class AsyncClass(View):
    post = apost


ASYNC = {
    "function": guarded_urls.guarded(guarded_urls.aview),
    "around as_view()": guarded_urls.guarded(AsyncClass.as_view()),
    "guard_options": AsyncMixin.as_view(),
    "on a handler": AsyncHandler.as_view(),
}


@pytest.mark.parametrize("kind", ASYNC)
def test_an_async_view_under_atomic_requests_has_its_own_remedy(
    settings: Any, atomic_requests: None, kind: str
) -> None:
    def found(view: Any) -> list[Any]:
        urlpatterns = [path("view/", view, name="async")]
        settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})
        return [
            each for each in checks.guards.check_urls() if each.id != "meterly.W001"
        ]

    (message,) = found(ASYNC[kind])
    assert message.id == "meterly.E012"
    assert message.msg == (
        "The guarded view 'async' is async, which Django refuses under "
        "ATOMIC_REQUESTS (on the database 'default')."
    )
    assert "@transaction.non_atomic_requests above its guard" in message.hint
    assert "MeterlyGuardMixin" not in message.hint
    # The remedy is one: see test_f08 for what it is charged.
    assert found(transaction.non_atomic_requests(_wrapped(ASYNC[kind]))) == []


def _wrapped(view: Any) -> Any:
    """Return a view of its own, for a decorator that marks what it is given."""

    @wraps(view)
    async def wrapper(request: Any) -> Any:
        return await view(request)

    wrapper._non_atomic_requests = set()  # type: ignore[attr-defined]
    return wrapper


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("kind", ASYNC)
@pytest.mark.usefixtures("joined", "atomic_requests")
def test_the_remedy_of_an_async_view_works(
    settings: Any, client: Any, user: Any, kind: str
) -> None:
    view = transaction.non_atomic_requests(_wrapped(ASYNC[kind]))
    urlpatterns = [path("view/", view), path("bare/", ASYNC[kind])]
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})
    customer = fund(user)
    client.force_login(user)
    with pytest.raises(RuntimeError, match="ATOMIC_REQUESTS with async views"):
        client.post("/bare/")
    assert client.post("/view/").status_code == 200
    assert balance(customer) == (75, 0)


class Bare(MeterlyGuardMixin, guarded_urls.Writes):
    pass


class BareForm(MeterlyGuardMixin, FormView):
    pass


class BareApi(MeterlyGuardMixin, APIView):
    pass


class BareSet(MeterlyGuardMixin, guarded_urls.Posters):
    pass


class Cleared(guarded_urls.ReadsByMixin):
    guard_options = None  # type: ignore[assignment]


class WithoutMixin(guarded_urls.Writes):
    guard_options = COSTS


class OtherMapping(guarded_urls.Writes):
    guard_options = MappingProxyType(COSTS)


class GuardedSet(MeterlyGuardMixin, guarded_urls.Posters):
    create = guarded_urls.guarded(guarded_urls.Posters.create)


UNGUARDED = [
    (Bare.as_view(), "has MeterlyGuardMixin, but no guard_options"),
    (BareForm.as_view(), "has MeterlyGuardMixin, but no guard_options"),
    (BareApi.as_view(), "has MeterlyGuardMixin, but no guard_options"),
    (BareSet.as_view({"post": "create"}), "has MeterlyGuardMixin, but no guard_opt"),
    (Cleared.as_view(), "has MeterlyGuardMixin, but no guard_options"),
    (WithoutMixin.as_view(), "has guard_options, but not MeterlyGuardMixin."),
    (OtherMapping.as_view(), "has guard_options, but not MeterlyGuardMixin."),
    (csrf_exempt(Bare.as_view()), "has MeterlyGuardMixin, but no guard_options"),
]
GUARDED = [
    guarded_urls.view,
    guarded_urls.Writes.as_view(),
    guarded_urls.HandlerByMixin.as_view(),
    AsyncMixin.as_view(),
    Bare.as_view(guard_options=COSTS),
    # Its guard is on an action that answers at another URL.
    GuardedSet.as_view({"get": "list"}),
    guarded_urls.guarded(Bare.as_view()),
    guarded_urls.guarded(WithoutMixin.as_view()),
]


def test_a_class_that_only_looks_guarded_is_warned_of(settings: Any) -> None:
    urlpatterns = [
        *(
            path(f"bad/{n}/", each[0], name=f"bad-{n}")
            for n, each in enumerate(UNGUARDED)
        ),
        *(path(f"good/{n}/", view) for n, view in enumerate(GUARDED)),
    ]
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})
    messages = checks.guards.check_urls()
    assert {message.id for message in messages} == {"meterly.W010"}
    for number, (message, (_, says)) in enumerate(
        zip(messages, UNGUARDED, strict=True)
    ):
        assert f"'bad-{number}' costs nothing: its class {says}" in message.msg
        assert "guard_options = {" in message.hint


def test_a_class_that_the_settings_guard_is_not_warned_of(guard_views: Any) -> None:
    def found(name: str) -> list[str]:
        return [str(each.id) for each in guard_views({name: COSTS})]

    urls = guarded_urls
    bare = [path("bare/", include(([path("x/", Bare.as_view(), name="x")], "bare")))]
    with other_patterns(urls, [*bare, *urls.urlpatterns]):
        assert found("bare:x") == found("bare:") == []
        assert found("plain") == ["meterly.W010", "meterly.W003"]


@contextmanager
def other_patterns(urls: Any, patterns: Any) -> Any:
    before, urls.urlpatterns = urls.urlpatterns, patterns
    clear_url_caches()
    try:
        yield
    finally:
        urls.urlpatterns = before
        clear_url_caches()


@pytest.mark.parametrize(
    ("state", "since"),
    [("reserved", "lease_until"), ("commit_pending", "next_attempt_at")],
)
def test_rows_that_nobody_sweeps_are_warned_of(state: str, since: str) -> None:
    row = Reservation.objects.create(
        customer=Customer.objects.create(external_id="user_1"),
        unit="image_credits",
        amount=1,
        charge=1,
        reference="left",
        key="left",
        ttl_seconds=300,
        state=state,
        **{since: timezone.now() - dt.timedelta(minutes=50)},
    )
    assert ids(databases=["default"]) == []
    overdue = {since: timezone.now() - dt.timedelta(hours=5)}
    Reservation.objects.update(**overdue)
    assert ids() == []
    (message,) = checks.sweeping.check_sweeping(databases=["default"])
    assert message.id == "meterly.W007"
    assert "1 reservations" in str(message.msg)
    assert "5.0 hours" in str(message.msg)
    # Whoever is stuck waits for people, and not for a sweeper.
    Reservation.objects.filter(pk=row.pk).update(
        state="commit_pending", stuck_at=timezone.now(), next_attempt_at=timezone.now()
    )
    assert ids(databases=["default"]) == []


@pytest.fixture
def beat() -> Any:
    """A project's Celery app."""
    before = current_app._get_current_object()
    app = Celery("project", set_as_current=False)
    app.set_current()
    yield app
    before.set_current()
    app.close()


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ([], []),
        (["meterly-settle-reservations"], ["meterly.W008"]),
        (["meterly-ledger-seal-entries"], ["meterly.W008"]),
        (["meterly-release-stale-reservations"], ["meterly.W008"]),
        # Perhaps cron does it; if nothing does, W007 finds out.
        (list(beat_schedule(ledger=True)), []),
    ],
)
def test_a_beat_with_some_of_the_tasks_is_warned_of(
    beat: Celery, left_out: list[str], expected: list[str]
) -> None:
    beat.conf.beat_schedule = {
        "other": {"task": "project.other", "schedule": 5.0},
        **{
            name: entry
            for name, entry in beat_schedule(ledger=True).items()
            if name not in left_out
        },
    }
    assert ids() == expected


def test_a_retention_that_is_shorter_than_work_may_be_is_refused(settings: Any) -> None:
    settings.METERLY = {**settings.METERLY, "JOURNAL_RETENTION": 3600}
    assert ids() == ["meterly.E003"]
