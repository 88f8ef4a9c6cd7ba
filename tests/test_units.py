"""``UNITS``: an undeclared unit is refused wherever it is typed, and never lost."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from celery import current_app
from django.contrib import admin
from django.core.exceptions import ImproperlyConfigured
from django.template import Context, Template
from django.test import RequestFactory
from django.urls import include, path
from django.utils.functional import lazystr
from django.utils.translation import gettext_lazy, override
from django.views import View
from rest_framework.decorators import api_view
from rest_framework.test import APIRequestFactory

from django_meterly import checks, get_client, grants, guard, journal, meterly_guard
from django_meterly.conf import meterly_settings
from django_meterly.errors import MeterlyDebtError, MeterlyInsufficientCreditsError
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.models import Customer, Grant, Reservation
from django_meterly.rest_framework.permissions import HasCredits
from django_meterly.tasks import meterly_task
from django_meterly.testing import assert_books_balance, sweep
from django_meterly.views import responses as refusals
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.contrib.auth.models import User
    from django.http import HttpResponse
    from django.test import Client
    from rest_framework.response import Response

    from django_meterly.testing import faults

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_units"),
]

UNITS = {"image_credits": "image credits", "gpu_seconds": gettext_lazy("seconds")}
TYPO = "image_credit"


def work(request: Any) -> HttpResponse:
    raise AssertionError("This work was refused.")


async def awork(request: Any) -> HttpResponse:
    raise AssertionError("This work was refused.")


class ByMixin(MeterlyGuardMixin, View):
    guard_options = {"unit": TYPO, "amount": 5}
    post = staticmethod(work)


class Handler(MeterlyGuardMixin, View):
    @meterly_guard(TYPO, 5)
    def post(self, request: Any) -> HttpResponse:
        return work(request)


@meterly_guard(TYPO, 5)
@api_view(["POST"])
def api(request: Any) -> Response:
    raise AssertionError("This work was refused.")


guarded = {
    "function": meterly_guard(TYPO, 5)(work),
    "coroutine": meterly_guard(TYPO, 5)(awork),
    "class": ByMixin.as_view(),
    "handler": Handler.as_view(),
    "rest": api,
}
urlpatterns = [
    *(path(f"{name}/", view, name=name) for name, view in guarded.items()),
    path("settings/", work, name="settings"),
    path("admin/", admin.site.urls),
    path("credits/", include("django_meterly.rest_framework.urls")),
    path("good/", meterly_guard("image_credits", 5)(work), name="good"),
]


@pytest.fixture
def declare(settings: Any) -> Callable[..., None]:
    """Declare units and change other settings, or undeclare what was declared."""

    def declare(units: Any = UNITS, **changes: Any) -> None:
        settings.METERLY = {**settings.METERLY, "UNITS": units, **changes}

    return declare


@pytest.fixture
def declared(declare: Callable[..., None]) -> None:
    declare()


def by_guard(customer: Customer) -> None:
    with guard(customer, 5, TYPO):
        raise AssertionError("This work was refused.")


def by_async_guard(customer: Customer) -> None:
    async def block() -> None:
        async with guard(customer, 5, TYPO):
            raise AssertionError("This work was refused.")

    asyncio.run(block())


def by_task(customer: Customer) -> None:
    @meterly_task(TYPO, 5, customer=lambda: customer, name="tests.typo")
    def task() -> None:
        raise AssertionError("This work was refused.")

    try:
        task()
    finally:
        task.app.tasks.pop("tests.typo")


def by_grant(customer: Customer) -> None:
    grants.grant(None, customer, 5, TYPO, reason="x", reference="x")


def by_async_grant(customer: Customer) -> None:
    grant = async_to_sync(grants.agrant)
    grant(None, customer, 5, TYPO, reason="x", reference="x")


def by_registration(customer: Customer) -> None:
    customer.register(get_client(), TYPO)
    Customer.objects.resolve("team_7").register(get_client(), TYPO)


def by_permission(customer: Customer) -> None:
    class HasFive(HasCredits):
        unit = TYPO

    request = APIRequestFactory().post("/")
    HasFive().has_permission(request, None)  # type: ignore[arg-type]  # not asked


def by_tag(customer: Customer) -> None:
    Template(f'{{% load meterly %}}{{% meterly_credits 5 "{TYPO}" %}}').render(
        Context()
    )


def assert_refused(error: pytest.ExceptionInfo[Exception], unit: str = TYPO) -> None:
    for part in (repr(unit), "METERLY['UNITS']", "Did you mean 'image_credits'?"):
        assert part in str(error.value)
    assert "Declare a new unit there first." in str(error.value)
    assert not Reservation.objects.exists()
    assert not Grant.objects.exists()


@pytest.mark.parametrize(
    "typed",
    [
        by_guard,
        by_async_guard,
        by_task,
        by_grant,
        by_async_grant,
        by_registration,
        by_permission,
        by_tag,
    ],
)
def test_an_undeclared_unit_is_refused_where_it_is_typed(
    declared: None, customer: Customer, typed: Callable[[Customer], None]
) -> None:
    with pytest.raises(ValueError, match="UNITS") as error:
        typed(customer)
    assert_refused(error)
    assert get_client().find_customer("team_7") is None


@pytest.mark.parametrize("name", [*guarded, "settings"])
def test_a_view_with_an_undeclared_unit_does_not_run(
    declare: Callable[..., None], payer: Client, settings: Any, name: str
) -> None:
    declare(GUARDED_VIEWS={"settings": {"unit": TYPO, "amount": 5}})
    settings.MIDDLEWARE = [
        *settings.MIDDLEWARE,
        "django_meterly.middleware.MeterlyMiddleware",
    ]
    with pytest.raises(ValueError, match="UNITS") as error:
        payer.post(f"/{name}/")
    assert_refused(error)


@pytest.mark.parametrize("enforcement", ["enforce", "shadow", "off"])
def test_no_mode_takes_an_undeclared_unit(
    declare: Callable[..., None], customer: Customer, enforcement: str
) -> None:
    declare(ENFORCEMENT=enforcement)
    with pytest.raises(ValueError, match="UNITS"):
        guard(customer, 5, TYPO)


def test_without_a_near_one_the_declared_units_are_named(declared: None) -> None:
    with pytest.raises(ValueError, match="They are image_credits, gpu_seconds"):
        guard("user_1", 5, "tokens")


@pytest.mark.parametrize("unit", ["Image_Credits", "image_credits_", "image-credits"])
def test_units_are_compared_by_the_letter(declared: None, unit: str) -> None:
    with pytest.raises(ValueError, match="UNITS") as error:
        guard("user_1", 5, unit)
    assert_refused(error, unit)


@pytest.mark.parametrize("units", [{}, UNITS])
def test_declared_units_and_those_of_nobody_work(
    declare: Callable[..., None], customer: Customer, units: Any
) -> None:
    declare(units)
    with guard(customer, 5, "image_credits"):
        pass
    with guard(customer, 5):
        pass
    assert balance(customer) == (90, 0)
    assert_books_balance()


def test_the_balance_of_an_undeclared_unit_is_not_found(
    declared: None, payer: Client
) -> None:
    for unit, status in (("image_credits", 200), ("gpu_seconds", 200), (TYPO, 404)):
        assert payer.get(f"/credits/balances/{unit}/").status_code == status


# Settings


def test_an_undeclared_default_unit_names_the_setting(
    declare: Callable[..., None], remote: faults
) -> None:
    declare(DEFAULT_UNIT=TYPO)
    uses: list[Callable[[], Any]] = [
        lambda: guard("user_1", 5),
        # A new customer's account would have that unit.
        lambda: guard("user_1", 5, "gpu_seconds").lifecycle.reserve(),
        lambda: HasCredits().has_permission(
            APIRequestFactory().post("/"),
            None,  # type: ignore[arg-type]  # not asked
        ),
    ]
    for use in uses:
        with pytest.raises(ImproperlyConfigured, match="METERLY\\['DEFAULT_UNIT'\\]"):
            use()
    assert states() == []
    assert remote.operations() == []


@pytest.mark.parametrize(
    "units",
    [
        None,
        [],
        ["image_credits"],
        ("image_credits",),
        {"image_credits"},
        "image_credits",
        5,
        True,
        {"image credits": "image credits"},
        {"": "nothing"},
        {"_credits": "credits"},
        {"x" * 65: "long"},
        {5: "five"},
        {None: "none"},
        {"image_credits": ""},
        {"image_credits": "  "},
        {"image_credits": None},
        {"image_credits": 5},
        {"image_credits": ["image credits"]},
        {"image_credits": b"image credits"},
        {"image_credits": "image credits", "gpu seconds": "seconds"},
    ],
    ids=repr,
)
def test_invalid_units_are_refused_where_they_are_read(
    declare: Callable[..., None], units: Any
) -> None:
    declare(units)
    with pytest.raises(ImproperlyConfigured, match=r"^METERLY\['UNITS'\]"):
        _ = meterly_settings.UNITS
    with pytest.raises(ImproperlyConfigured, match=r"^METERLY\['UNITS'\]"):
        guard("user_1", 5, "image_credits")
    assert [message.id for message in found()] == ["meterly.E003"]
    assert "UNITS" in found()[0].msg


@pytest.mark.parametrize(
    "changes",
    [
        {"units": {"image_credits": lazystr("")}},
        {"units": {"image_credits": lazystr(" ")}},
        {"DEFAULT_UNIT": TYPO},
        {"LOW_BALANCE": {TYPO: 5}},
        {"LOW_BALANCE": {"image_credits": 5, TYPO: 5}},
    ],
    ids=repr,
)
def test_settings_about_units_are_checked(
    declare: Callable[..., None], changes: Any
) -> None:
    declare(**changes)
    (error,) = found()
    assert error.id == "meterly.E003"
    assert next(iter(changes)).upper() in error.msg


def found() -> list[Any]:
    """Return what the checks find, but for the guards of this file."""
    return [
        message
        for message in [*checks.settings.check_settings(), *checks.guards.check_units()]
        if message.id not in ("meterly.E014", "meterly.I001")
    ]


def test_checks_find_the_guards_of_undeclared_units(
    declare: Callable[..., None],
) -> None:
    @meterly_task(TYPO, 5, name="tests.checked")
    def task() -> None: ...

    declare(GUARDED_VIEWS={"settings": {"unit": TYPO, "amount": 5}})
    try:
        # Pages of the documentation have tasks, too.
        errors = [
            error
            for error in checks.guards.check_units()
            if "docs_jobs." not in error.msg
        ]
    finally:
        task.app.tasks.pop("tests.checked")
    assert {error.id for error in errors} == {"meterly.E014"}
    where = [error.msg.partition(":")[0] for error in errors]
    assert where == [
        "METERLY['GUARDED_VIEWS']['settings']",
        *(f"The view {name!r}" for name in guarded),
        "The task 'tests.checked'",
    ]
    for error in errors:
        assert "Did you mean 'image_credits'?" in error.msg


def without_a_unit() -> list[str]:
    """Return where ``meterly.E015`` is found, but for the tasks of other files."""
    return [
        message.msg.partition(" names no unit")[0]
        for message in checks.guards.check_units()
        if message.id == "meterly.E015"
        and ("The task" not in message.msg or "tests.unitless" in message.msg)
    ]


def test_checks_find_the_guards_without_a_unit(
    declare: Callable[..., None], settings: Any
) -> None:
    @meterly_task(amount=5, customer=lambda: "user_1", name="tests.unitless")
    def task() -> None: ...

    # It settles what a view has reserved.
    @meterly_task(amount=5, name="tests.unitless_too")
    def handed_off() -> None: ...

    class Mixed(MeterlyGuardMixin, View):
        guard_options = {"amount": 5}
        post = staticmethod(work)

    class Handled(MeterlyGuardMixin, View):
        post = meterly_guard(amount=5)(Handler.post)

    views = {
        "function": meterly_guard(amount=5)(work),
        "mixin": Mixed.as_view(),
        "handler": Handled.as_view(),
    }
    urlpatterns = [path(f"{name}/", view, name=name) for name, view in views.items()]
    urlpatterns.append(path("settings/", work, name="settings"))
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})
    found, options = {}, {"settings": {"amount": 5}}
    try:
        for units in ({}, UNITS):
            declare(units, DEFAULT_UNIT="image_credits", GUARDED_VIEWS=options)
            assert without_a_unit() == []
            declare(units, DEFAULT_UNIT=None)
            found[len(units)] = without_a_unit()
    finally:
        for name in ("tests.unitless", "tests.unitless_too"):
            current_app.tasks.pop(name)
    where = [
        "METERLY['GUARDED_VIEWS']['settings']",
        *(f"The view {name!r}" for name in views),
        "The task 'tests.unitless'",
    ]
    assert found == {0: where, len(UNITS): where}


def test_a_project_without_units_is_recommended_to_declare_those_it_has(
    declare: Callable[..., None],
) -> None:
    declare({}, DEFAULT_UNIT="tokens")
    (info,) = checks.guards.check_units()
    assert info.id == "meterly.I001"
    assert "'image_credits': 'image credits'" in info.hint
    assert "'tokens': 'tokens'" in info.hint


# What is on record


@pytest.fixture
def undeclare(declare: Callable[..., None]) -> Callable[[], None]:
    declare()
    return lambda: declare({"tokens": "tokens"}, DEFAULT_UNIT=None)


def test_work_goes_on_when_its_unit_is_removed(
    customer: Customer, undeclare: Callable[[], None]
) -> None:
    with guard(customer, 25, "image_credits"):
        undeclare()
    assert states() == ["committed"]
    assert balance(customer) == (75, 0)
    assert_books_balance()


@pytest.mark.parametrize("fault", [None, "unanswered", "lost"])
def test_the_sweeper_settles_a_removed_unit(
    remote: faults, undeclare: Callable[[], None], fault: str | None
) -> None:
    customer = fund("user_1")
    if fault is not None:
        remote.meet("reserve_credits", fault)
    reserve = guard(customer, 25, "image_credits").lifecycle.reserve
    if fault is None:
        reserve()
    else:
        with pytest.raises(Exception, match="cannot be asked"):
            reserve()
    # As after a crash: the ledger's id is not known.
    Customer.objects.update(customer_id=None)
    undeclare()
    sweep()
    sweep()
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
    assert_books_balance()


def test_a_pending_grant_of_a_removed_unit_is_made(
    remote: faults, undeclare: Callable[[], None]
) -> None:
    customer = Customer.objects.resolve("user_1")
    remote.meet("grant_credits", "lost")
    grants.grant(get_client(), customer, 25, "image_credits", reason="x", reference="x")
    undeclare()
    assert grants.settle_due(get_client()) == 1
    customer.refresh_from_db()
    assert balance(customer) == (25, 0)


def test_a_debt_in_a_removed_unit_is_collected(
    customer: Customer, undeclare: Callable[[], None]
) -> None:
    with guard(customer, 100, "image_credits") as reservation:
        reservation.charge(130)
    assert states() == ["unbilled"]
    undeclare()
    fund(customer, 50)
    journal.collect(get_client(), customer, "image_credits")
    assert states() == ["committed"]
    assert balance(customer) == (20, 0)


def test_pages_show_a_removed_unit(
    admin_client: Client,
    user: User,
    customer: Customer,
    undeclare: Callable[[], None],
) -> None:
    grants.grant(get_client(), customer, 25, "image_credits", reason="x", reference="x")
    with guard(customer, 5, "image_credits"):
        pass
    undeclare()
    for url in (
        "grant/",
        f"grant/{Grant.objects.get().pk}/change/",
        "reservation/",
        f"reservation/{Reservation.objects.get().pk}/change/",
        f"customer/{customer.pk}/change/",
    ):
        assert "image_credits" in admin_client.get(f"/admin/meterly/{url}").text
    admin_client.force_login(user)
    balances = admin_client.get("/credits/balances/").json()["balances"]
    assert [each["unit"] for each in balances] == ["image_credits"]
    one = admin_client.get("/credits/balances/image_credits/").json()
    assert (one["unit"], one["available"]) == ("image_credits", 120)


# Names for people


def refused(unit: str = "image_credits", **details: Any) -> Any:
    error = MeterlyDebtError if "owed" in details else MeterlyInsufficientCreditsError
    return error(
        details={
            "required": 25,
            "available": 5,
            "reserved": 3,
            "unit": unit,
            **details,
        }
    )


def answered(accept: str, error: Any) -> Any:
    request = RequestFactory().post("/", headers={"Accept": accept})
    return refusals.render(request, error)


@pytest.mark.parametrize("details", [{}, {"owed": 7}])
def test_a_402_calls_units_what_people_do(declared: None, details: Any) -> None:
    page = answered("text/html", refused(**details)).text
    for amount in (25, 5, 3, *details.values()):
        assert f">{amount} image credits<" in page
    assert "image_credits" not in page
    problem = answered("application/json", refused(**details))
    facts = json.loads(problem.content)
    assert facts["unit"] == "image_credits"
    assert f"{facts.get('owed', 25)} image credits" in facts["detail"]


def test_a_402_of_another_unit_calls_it_what_the_code_does(declared: None) -> None:
    assert ">25 tokens<" in answered("text/html", refused("tokens")).text


def test_names_are_in_the_readers_language(declare: Callable[..., None]) -> None:
    declare({"image_credits": gettext_lazy("Yes")})
    for language, name in (("en", "Yes"), ("de", "Ja")):
        with override(language):
            page = answered("text/html", refused()).text
            assert f">25 {name}<" in page
            problem = answered("application/json", refused())
            assert f"25 {name}" in problem.text


def rendered(source: str, **context: Any) -> str:
    return Template("{% load meterly %}" + source).render(Context(context))


def test_tags_name_units(declared: None, settings: Any) -> None:
    assert rendered('{% meterly_credits 25 "image_credits" %}') == "25 image credits"
    assert rendered("{{ unit|meterly_unit }}", unit="image_credits") == "image credits"
    account = {"available": 25000, "credit_unit": "gpu_seconds"}
    source = "{% meterly_credits account.available account.credit_unit %}"
    assert rendered(source, account=account) == "25000 seconds"
    settings.USE_THOUSAND_SEPARATOR = True
    with override("de"):
        assert rendered(source, account=account).startswith("25.000 ")
    # It came from a ledger: nobody typed it.
    removed = {"available": 1, "credit_unit": "<b>"}
    assert rendered(source, account=removed) == "1 &lt;b&gt;"
    assert rendered("{{ unit|meterly_unit }}", unit="tokens") == "tokens"


@pytest.mark.parametrize("unit", ["image_credits", "account.unit", "nothing", "empty"])
@pytest.mark.parametrize("invalid", ["", "INVALID"])
def test_the_tag_refuses_a_unit_that_is_no_text(
    settings: Any, unit: str, invalid: str
) -> None:
    (engine,) = settings.TEMPLATES
    options = {**engine["OPTIONS"], "string_if_invalid": invalid}
    settings.TEMPLATES = [{**engine, "OPTIONS": options}]
    values = {"account": {"unit": 5}, "nothing": None, "empty": ""}
    with pytest.raises(ValueError, match=f"The unit {unit} of .* quotes around"):
        rendered(f"{{% meterly_credits 25 {unit} %}}", **values)
    source = f'{{% meterly_credits 25 {unit}|default:"tokens" %}}'
    if unit != "account.unit":
        assert rendered(source, **values) == "25 tokens"


@pytest.mark.parametrize("arguments", ["", "25", '25 "tokens" 3'])
def test_the_tag_says_what_it_takes(arguments: str) -> None:
    with pytest.raises(Exception, match='meterly_credits 25 "image_credits"'):
        rendered(f"{{% meterly_credits {arguments} %}}")


@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
def test_work_does_without_a_default_unit_that_is_not_declared(
    customer: Customer, declare: Callable[..., None], enforcement: str
) -> None:
    declare(DEFAULT_UNIT=TYPO)
    with guard(customer, 5, "image_credits", enforcement=enforcement):
        pass
    assert states() == ["committed"]
    assert balance(customer) == (95, 0)
