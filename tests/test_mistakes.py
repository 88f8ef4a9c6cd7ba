"""Mistakes that people make with guards, and what they are told."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from celery import Task, current_app
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.template import Context, Template
from django.test import AsyncRequestFactory, RequestFactory
from django.urls import path
from django.views import View
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from django_meterly import guard, meterly_guard
from django_meterly.checks.guards import check_urls
from django_meterly.errors import MeterlyUsageError
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.options import read_mapping, shows
from django_meterly.tasks import meterly_task
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_meterly.guards import Guard

EXAMPLES = {
    "view": '@meterly_guard("image_credits", 25)',
    "task": '@meterly_task("gpu_seconds", 100, customer=lambda job_id: ...)',
    "block": 'with guard(user, 25, "image_credits"): ...',
    "mapping": '{"unit": "image_credits", "amount": 25}',
}
ran: list[Any] = []


def view(request: HttpRequest) -> HttpResponse:
    ran.append("view")
    return HttpResponse()


def task(job_id: int) -> None:
    ran.append("task")


@pytest.fixture(autouse=True)
def nothing_has_run() -> Iterator[None]:
    ran.clear()
    known = set(current_app.tasks)
    yield
    for name in set(current_app.tasks) - known:
        current_app.tasks.pop(name)


def define(where: str, **options: Any) -> Any:
    """Tell each edge the same; return what it makes, or raise what it says."""
    if where == "view":
        return meterly_guard(**options)(view)
    if where == "task":
        return meterly_task(**options)(task)
    if where == "mapping":
        return read_mapping(options, "METERLY['GUARDED_VIEWS']['x']")
    if where == "mixin":

        class Poster(MeterlyGuardMixin, View):
            guard_options = options

        return Poster.as_view()
    return guard("user_1", **{"amount": 1, "unit": "image_credits", **options})


def told(error: type[Exception], where: str, call: Callable[[], Any]) -> str:
    """Return the message of the *error* that *call* raises; it shows a right call."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.endswith(
        f"For example: {EXAMPLES['mapping' if where == 'mixin' else where]}"
    )
    return text


EVERYWHERE = ["view", "task", "mapping", "mixin", "block"]

# Amounts, units and the other values

BAD_AMOUNTS = [0, -1, True, False, 2.5, "3", None, Decimal(3), 2**63, [3]]


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("amount", BAD_AMOUNTS, ids=repr)
def test_an_amount_that_is_none_is_named(where: str, amount: Any) -> None:
    if where in ("mapping", "mixin") and isinstance(amount, str):
        # There it is the dotted path of a function.
        with pytest.raises(ImportError, match="3"):
            define(where, unit="image_credits", amount=amount)
        return
    text = told(
        ValueError, where, lambda: define(where, unit="image_credits", amount=amount)
    )
    assert "amount must be" in text


def test_a_block_takes_no_function_for_its_amount() -> None:
    text = told(ValueError, "block", lambda: define("block", amount=lambda: 3))
    assert "amount must be an int, not function" in text


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(
    "unit", ["", "image credits", "é", "x" * 65, 25, 2.5, True, b"x"], ids=repr
)
def test_a_unit_that_is_none_is_named(where: str, unit: Any) -> None:
    text = told(ValueError, where, lambda: define(where, unit=unit, amount=25))
    assert "unit must be" in text


@pytest.mark.parametrize("where", ["view", "task", "mapping", "mixin"])
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        (
            "customer",
            "user_1",
            "customer must be a function of the arguments, not 'user_1'",
        ),
        ("customer", 5, "customer must be a function of the arguments, not 5"),
        ("reference", 5, "reference must be"),
        ("reference", " x", "reference must be"),
        ("ttl_seconds", 0, "ttl_seconds must be"),
        ("ttl_seconds", 2.5, "ttl_seconds must be"),
        ("ttl_seconds", True, "ttl_seconds must be"),
        ("ttl_seconds", dt.timedelta(1), "ttl_seconds must be"),
        ("overage", "free", "overage must be one of charge, cap"),
        ("on_unavailable", True, "on_unavailable must be one of"),
        ("enforcement", False, "enforcement must be one of"),
    ],
)
def test_another_value_that_is_none_is_named(
    where: str, option: str, value: Any, says: str
) -> None:
    if where in ("mapping", "mixin") and value == "user_1":
        with pytest.raises(ImportError, match="user_1"):
            define(where, **{option: value})
        return
    error = TypeError if "function" in says else ValueError
    assert says in told(error, where, lambda: define(where, **{option: value}))


@pytest.mark.parametrize("where", ["view", "mapping", "mixin"])
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("idempotency_key", 5, "idempotency_key must be a function of the arg"),
        ("success", 200, "success must be a function of the response"),
        ("success", [200], "success must be a function of the response"),
        ("methods", "GET", "methods is a list"),
    ],
)
def test_a_value_of_a_view_that_is_none_is_named(
    where: str, option: str, value: Any, says: str
) -> None:
    assert says in told(TypeError, where, lambda: define(where, **{option: value}))


# The way round, parentheses, and names


@pytest.mark.parametrize(
    ("where", "call", "says"),
    [
        (
            "view",
            lambda: meterly_guard(25, "image_credits"),  # type: ignore[arg-type]
            "unit is 25 and amount is 'image_credits', the wrong way round.",
        ),
        (
            "view",
            lambda: meterly_guard(unit=25, amount="image_credits"),  # type: ignore[arg-type]
            "unit is 25 and amount is 'image_credits', the wrong way round.",
        ),
        (
            "task",
            lambda: meterly_task(100, "gpu_seconds"),  # type: ignore[arg-type]
            "unit is 100 and amount is 'gpu_seconds', the wrong way round.",
        ),
        (
            "block",
            lambda: guard("user_1", "image_credits", 25),  # type: ignore[arg-type]
            "unit is 25 and amount is 'image_credits', the wrong way round.",
        ),
        (
            "block",
            lambda: guard(25, User(username="u"), "image_credits"),  # type: ignore[arg-type]
            "customer is 25 and amount is <User: u>, the wrong way round.",
        ),
        (
            "block",
            lambda: guard(25, "user_1", "image_credits"),  # type: ignore[arg-type]
            "customer is 25 and amount is 'user_1', the wrong way round.",
        ),
    ],
)
def test_arguments_the_wrong_way_round_are_named(
    where: str, call: Callable[[], Any], says: str
) -> None:
    assert says in told(TypeError, where, call)


@pytest.mark.parametrize("where", ["mapping", "mixin"])
def test_a_mapping_the_wrong_way_round_is_told(where: str) -> None:
    with pytest.raises((TypeError, ImportError), match=r"image_credits"):
        define(where, unit=25, amount="image_credits")


async def aview(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


class Class(View):
    pass


@pytest.mark.parametrize("function", [view, aview, Class, Class.as_view(), len])
@pytest.mark.parametrize("where", ["view", "task"])
def test_a_decorator_without_parentheses_is_told(where: str, function: Any) -> None:
    decorator: Any = meterly_guard if where == "view" else meterly_task
    text = told(TypeError, where, lambda: decorator(function))
    assert "unit must be a text, not the function" in text
    assert "The decorator needs parentheses." in text


@pytest.mark.parametrize(
    ("where", "call", "says"),
    [
        (
            "view",
            partial(meterly_guard, "x", ammount=3),
            "'ammount'. Did you mean 'amount'?",
        ),
        (
            "view",
            partial(meterly_guard, "x", customers=view),
            "Did you mean 'customer'?",
        ),
        ("view", partial(meterly_guard, "x", colour=3), "'colour'. For example"),
        ("view", partial(meterly_guard, "x", 25, unit="y"), "argument 'unit'"),
        ("view", partial(meterly_guard, "x", 25, 3), "positional arguments"),
        (
            "task",
            partial(meterly_task, "x", ammount=3),
            "'ammount'. Did you mean 'amount'?",
        ),
        (
            "task",
            partial(meterly_task, "x", onretry="keep"),
            "Did you mean 'on_retry'?",
        ),
        (
            "task",
            partial(meterly_task, "x", methods=["GET"]),
            "methods is an option of",
        ),
        ("task", partial(meterly_task, "x", success=view), "success is an option of a"),
        (
            "task",
            partial(meterly_task, "x", idempotency_key=view),
            "idempotency_key is",
        ),
        ("task", partial(meterly_task, "x", 25, unit="y"), "argument 'unit'"),
        ("block", partial(guard, "u", 25, "x", referense="y"), "mean 'reference'?"),
        ("block", partial(guard, "u", 25, "x", unit="y"), "argument 'unit'"),
        ("block", partial(guard, "u"), "argument: 'amount'"),
        ("block", partial(guard, view), "argument: 'amount'"),
        ("block", guard, "'customer' and 'amount'"),
        ("mapping", partial(define, "mapping", ammount=3), "Did you mean 'amount'?"),
        ("mixin", partial(define, "mixin", ammount=3), "Did you mean 'amount'?"),
    ],
)
def test_a_name_that_does_not_exist_is_told(
    where: str, call: Callable[[], Any], says: str
) -> None:
    text = told(TypeError, where, call)
    assert says in text
    assert text.count("Did you mean") == says.count("?")


@pytest.mark.parametrize(
    "options", [{"max_retries": 3}, {"rate_limit": "9/m"}, {"retry_backoff": True}]
)
def test_what_celery_is_told_is_none_of_ours(options: dict[str, Any]) -> None:
    meterly_task("gpu_seconds", name=str(uuid.uuid4()), **options)(task)


# Functions that cannot take what they are given


@pytest.mark.parametrize("where", ["view", "mapping", "mixin"])
@pytest.mark.parametrize(
    "option", ["amount", "customer", "reference", "idempotency_key", "success"]
)
@pytest.mark.parametrize(
    "function",
    [lambda: 3, lambda *, x: 3, partial(lambda request: 3, None)],
    ids=["nothing", "keyword", "partial"],
)
def test_a_function_that_takes_no_request_is_named(
    where: str, option: str, function: Any
) -> None:
    text = told(TypeError, where, lambda: define(where, **{option: function}))
    given = "response" if option == "success" else "request"
    assert f"{option} is called with ({given}" in text
    assert f"Write {option}=lambda {given}" in text


@pytest.mark.parametrize(
    "function", [lambda request: 3, lambda *args: 3, lambda request, **kwargs: 3, int]
)
@pytest.mark.parametrize("where", ["view", "mapping", "mixin"])
def test_a_function_that_takes_a_request_is_right(where: str, function: Any) -> None:
    define(where, amount=function)


def by_pk(request: HttpRequest, pk: int) -> HttpResponse:
    ran.append(pk)
    return HttpResponse()


class Handler(View):
    def post(self, request: HttpRequest, pk: int) -> HttpResponse:
        return HttpResponse()


@pytest.mark.parametrize("guarded", [by_pk, Handler.post])
@pytest.mark.parametrize("option", ["amount", "customer", "reference"])
def test_a_function_is_compared_with_its_view(guarded: Any, option: str) -> None:
    text = told_plainly(
        lambda: meterly_guard("x", **{option: lambda request: 3})(guarded)  # type: ignore[arg-type]
    )
    assert f"{option} is called with (request, pk)" in text
    assert f"Write {option}=lambda request, pk: ..." in text
    for right in (lambda request, pk: 3, lambda r, *a, **k: 3, lambda r, **k: 3):
        meterly_guard("x", **{option: right})(guarded)  # type: ignore[arg-type]


def test_a_function_is_compared_with_the_handlers_that_cost() -> None:
    def poster(price: Any, handler: Any = Handler.post, **more: Any) -> Any:
        options = {"unit": "x", "amount": price, **more}
        body = {"guard_options": options, "post": handler, "get": view}
        return type("Poster", (MeterlyGuardMixin, View), body).as_view()  # type: ignore[attr-defined]

    text = told(TypeError, "mixin", lambda: poster(lambda request: 3))
    assert text.startswith("Poster.guard_options: amount is called with (request, pk)")
    # GET has no pk, and is free.
    poster(lambda request, pk: 3)
    poster(lambda request, **path: 3, methods=["GET"])
    with pytest.raises(TypeError, match=r"called with \(request\)"):
        poster(lambda request, pk: 3, lambda self, request: None)


@pytest.mark.parametrize("guarded", [by_pk, Handler.as_view()])
def test_a_function_in_the_settings_is_compared_with_its_view(
    settings: Any, guarded: Any
) -> None:
    urlpatterns = [path("<int:pk>/", guarded, name="poster")]
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urlpatterns})

    def found(price: Any) -> list[Any]:
        options = {"unit": "x", "amount": price}
        settings.METERLY = {**settings.METERLY, "GUARDED_VIEWS": {"poster": options}}
        return check_urls()

    (message,) = found(lambda request: 3)
    assert message.id == "meterly.E009"
    assert message.msg.startswith(
        "METERLY['GUARDED_VIEWS']['poster']: amount is called with (request, pk)"
    )
    assert found(lambda request, pk: 3) == []


def told_plainly(call: Callable[[], Any]) -> str:
    with pytest.raises(TypeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize("option", ["amount", "customer", "reference"])
def test_a_function_is_compared_with_its_task(option: str, bind: bool) -> None:
    def bound(self: Any, job_id: int) -> None: ...

    def define(function: Any) -> None:
        named = {option: function, "name": str(uuid.uuid4()), "bind": bind}
        meterly_task("x", **named)(bound if bind else task)

    text = told_plainly(lambda: define(lambda: 3))
    assert f"{option} is called with (job_id)" in text
    assert f"Write {option}=lambda job_id: ..." in text
    for right in (lambda job_id: 3, lambda *args: 3, lambda *, job_id: 3):
        define(right)


def test_a_task_without_arguments_has_functions_without_arguments() -> None:
    def nightly() -> None: ...

    meterly_task("x", amount=lambda: 3)(nightly)


def test_an_async_success_decides_nothing() -> None:
    async def success(response: Any) -> bool:
        return True

    text = told(TypeError, "view", lambda: meterly_guard("x", success=success))  # type: ignore[arg-type]
    assert "success must be a sync function" in text


# What they return

RUBBISH = [None, "3", 2.5, True, -1, Decimal(3), [3], 2**63]


def run(options: dict[str, Any], user: User, *, asynchronous: bool) -> HttpResponse:
    if asynchronous:

        async def work(request: HttpRequest) -> HttpResponse:
            return view(request)

        request: Any = AsyncRequestFactory().post("/")
        request.user = user
        return asyncio.run(meterly_guard("image_credits", **options)(work)(request))  # type: ignore[no-any-return]
    request = RequestFactory().post("/")
    request.user = user
    return meterly_guard("image_credits", **options)(view)(request)  # type: ignore[no-any-return]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("amount", RUBBISH, ids=repr)
def test_an_amount_that_a_function_returns_is_checked(
    user: User, joined: None, amount: Any, asynchronous: bool
) -> None:
    def price(request: Any) -> Any:
        return amount

    with pytest.raises(ValueError, match=r"amount must be .* price has returned it"):
        run({"amount": price}, user, asynchronous=asynchronous)
    assert ran == states() == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("amount", None, ValueError),
        ("reference", 5, ValueError),
        ("idempotency_key", 5, TypeError),
    ],
)
def test_what_a_function_returns_is_checked_in_both_modes(
    user: User,
    joined: None,
    option: str,
    value: Any,
    error: type[Exception],
    enforcement: str,
) -> None:
    options = {option: lambda request: value, "enforcement": enforcement}
    with pytest.raises(error, match=rf"{option} must be .* has returned it"):
        run(options, user, asynchronous=False)
    assert ran == states() == []


@pytest.mark.parametrize(("option", "value"), [("amount", None), ("reference", 5)])
def test_off_what_a_function_returns_is_checked_where_the_guard_is_used(
    option: str, value: Any, request_: Any
) -> None:
    def uses(request: Any) -> HttpResponse:
        request.meterly.charge(3)
        return HttpResponse("unreached")

    options: Any = {option: lambda request: value, "enforcement": "off"}
    guarded = meterly_guard("image_credits", **options)(uses)
    with pytest.raises(ValueError, match=rf"{option} must be .* has returned it"):
        guarded(request_)


@pytest.mark.django_db(transaction=True)
def test_a_function_that_cannot_take_a_requests_arguments_is_named(
    user: User, joined: None, request_: Any
) -> None:
    guarded = meterly_guard("image_credits", lambda request, number: 3)(by_pk)
    with pytest.raises(TypeError, match=r"amount is called with .*pk=\.\.\..* takes"):
        guarded(request_, pk=5)
    assert ran == states() == []


@pytest.mark.django_db(transaction=True)
def test_a_type_error_of_the_function_itself_stays_its_own(
    user: User, joined: None
) -> None:
    def price(request: Any) -> int:
        return len(5)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        run({"amount": price}, user, asynchronous=False)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("customer", [5, True, object(), b"user_1"])
def test_a_customer_that_a_function_returns_is_checked(
    user: User, joined: None, customer: Any
) -> None:
    with pytest.raises(TypeError, match="A customer is a Customer"):
        run({"customer": lambda request: customer}, user, asynchronous=False)
    assert ran == states() == []


# Guards that guard nothing


def guarding(base: Any, **body: Any) -> Any:
    cls: Any = type("Poster", (MeterlyGuardMixin, base), body)
    if issubclass(base, ViewSet):
        return cls.as_view({"post": "create"})
    return cls.as_view()


PRICE = {"unit": "image_credits", "amount": 25}


@pytest.mark.parametrize("base", [View, APIView, ViewSet])
@pytest.mark.parametrize(
    "name",
    [
        "guards_options",
        "guard_option",
        "GUARD_OPTIONS",
        "gaurd_options",
        "guardoptions",
        "guard_optoins",
        "_guard_options",
        "meterly_options",
        "meterly_guard_options",
        "meterly_guard",
        "guard",
        "guards",
        "options_guard",
    ],
)
def test_a_name_that_is_nearly_guard_options_is_refused(base: Any, name: str) -> None:
    with pytest.raises(TypeError) as caught:
        guarding(base, **{name: PRICE, "create": view})
    assert str(caught.value) == (
        f"Poster.{name} guards nothing. Did you mean guard_options? "
        'For example: guard_options = {"unit": "image_credits", "amount": 25}'
    )


def test_a_slip_in_a_subclass_does_not_charge_its_base() -> None:
    class Base(MeterlyGuardMixin, View):
        guard_options = PRICE

    with pytest.raises(TypeError, match="guards_options"):
        type("Poster", (Base,), {"guards_options": {"amount": 50}}).as_view()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body",
    [
        {"card_options": {"colour": "red"}},
        {"form_options": ["unit"]},
        {"board_options": ("unit", 25)},
        {"base_guard_options": PRICE, "guard_options": PRICE},
        {"guard_options": PRICE, "form_options": {"unit": "cm"}},
        {"prices": PRICE},
        {"render_options": {"unit": "px"}},
        {"chart_options": {"unit": "px", "methods": ["linear"]}},
        {"guarded": {"unit": "px"}},
        {"guardian_fields": {"customer": "parent"}},
        {"_guard_options": PRICE, "guard_options": PRICE},
        {"options": lambda self, request: HttpResponse()},
    ],
    ids=",".join,
)
@pytest.mark.parametrize("base", [View, APIView])
def test_other_names_are_nobodys_business(base: Any, body: dict[str, Any]) -> None:
    guarding(base, **body)


def test_as_view_refuses_the_name_as_django_does() -> None:
    class Poster(MeterlyGuardMixin, View):
        pass

    with pytest.raises(TypeError, match="guards_options"):
        Poster.as_view(guards_options=PRICE)


# Blocks


@pytest.mark.django_db(transaction=True)
class TestBlocks:
    @pytest.fixture(autouse=True)
    def _funded(self, joined: None) -> None:
        self.customer = fund("user_1")

    def guard(self) -> Guard:
        return guard("user_1", 25, "image_credits")

    @pytest.mark.parametrize(
        "call",
        [
            lambda guard: guard.charge(3),
            lambda guard: guard.charge(0),
            lambda guard: guard.release(),
            lambda guard: guard.hand_off(None, 5),
        ],
    )
    @pytest.mark.parametrize("refused", [False, True])
    def test_before_the_block_is_entered(
        self, call: Callable[[Guard], Any], refused: bool
    ) -> None:
        held = guard("user_1", 125 if refused else 25, "image_credits")
        if refused:
            with pytest.raises(Exception, match="402"), held:
                pass
        with pytest.raises(MeterlyUsageError, match="came too early") as caught:
            call(held)
        assert "with guard(...) as reservation: reservation." in str(caught.value)
        if not refused:
            # It is as good as before.
            with held:
                held.charge(4)
            assert balance(self.customer) == (96, 0)

    def test_a_plain_with_in_async_code(self) -> None:
        async def work() -> None:
            with self.guard():
                ran.append(1)

        with pytest.raises(MeterlyUsageError, match=r"async with guard\(\.\.\.\)"):
            asyncio.run(work())
        assert ran == states() == []

    @pytest.mark.parametrize("enforcement", ["shadow", "off"])
    def test_a_plain_with_in_async_code_in_every_mode(self, enforcement: str) -> None:
        async def work() -> None:
            with guard("user_1", 25, "image_credits", enforcement=enforcement):
                ran.append(1)

        with pytest.raises(MeterlyUsageError, match=r"async with guard\(\.\.\.\)"):
            asyncio.run(work())
        assert ran == []

    def test_an_awaited_guard(self) -> None:
        async def work() -> None:
            await self.guard()

        with pytest.raises(TypeError, match=r"async with guard\(\.\.\.\)"):
            asyncio.run(work())
        assert states() == []

    def test_a_template_shows_a_guard_and_does_not_call_it(self) -> None:
        template = Template("{{ meterly.amount }} {{ meterly.available }}")
        with self.guard() as held:
            assert template.render(Context({"meterly": held})) == "25 75"

    def test_a_views_guard_as_a_block(self) -> None:
        block: Any = meterly_guard("image_credits", 25)
        with pytest.raises(TypeError, match="write with guard"), block:
            ran.append(1)

        async def work() -> None:
            async with block:
                ran.append(1)

        with pytest.raises(TypeError, match="write async with guard"):
            asyncio.run(work())
        assert ran == []


def test_no_unit_at_all_is_told(settings: Any) -> None:
    settings.METERLY = {**settings.METERLY, "DEFAULT_UNIT": None}
    with pytest.raises(ImproperlyConfigured, match='guard\\(user, 25, "image_cr'):
        guard("user_1", 25)


def test_what_python_itself_suggests_is_not_said_twice() -> None:
    said = "an unexpected keyword argument 'ammount'. Did you mean 'amount'?"

    @shows("right(3)")
    def right(amount: int = 3, **options: Any) -> None:
        # As Python does from 3.13 on.
        raise TypeError(said)

    with pytest.raises(TypeError) as caught:
        right(ammount=3)
    assert str(caught.value) == f"{said} For example: right(3)"


# Work that would be charged before it is done


async def awaits(job_id: int) -> None:
    ran.append("task")


def yields(job_id: int) -> Iterator[int]:
    ran.append("task")
    yield job_id


async def yields_async(job_id: int) -> Any:
    ran.append("task")
    yield job_id


UNRUN = [awaits, yields, yields_async]


@pytest.mark.parametrize("function", UNRUN, ids=lambda each: each.__name__)
def test_f61_a_task_that_celery_would_not_run_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="async, or a generator") as told_so:
        meterly_task("image_credits", 5)(function)
    assert function.__name__ in str(told_so.value)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("function", UNRUN, ids=lambda each: each.__name__)
def test_f61_a_task_that_returns_what_nobody_runs_is_released(
    function: Any, user: User
) -> None:
    customer = fund(user)

    # A call of something async, or a decorator, hides what it is.
    def hides(job_id: int) -> Any:
        return function(job_id)

    hidden = meterly_task(
        "image_credits",
        5,
        customer=lambda job_id: user,
        name=f"tests.hidden_{function.__name__}",
    )(hides)
    with pytest.raises(TypeError, match=r"The task tests\.hidden_\w+ is async"):
        hidden.apply((1,), throw=True)
    assert ran == []
    assert states() == ["released"]
    assert balance(customer) == (100, 0)


class Success:
    async def __call__(self, response: Any) -> bool:
        return False


async def asuccess(response: Any) -> bool:
    return False


def test_an_object_with_an_async_call_decides_nothing() -> None:
    with pytest.raises(TypeError, match="success must be a sync function"):
        meterly_guard("x", success=Success())  # type: ignore[arg-type]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "success", [lambda r: asuccess(r), partial(asuccess)], ids=["lambda", "partial"]
)
def test_a_success_that_nobody_awaits_charges_nothing(
    success: Any, user: User, request_: Any
) -> None:
    customer = fund(user)
    with pytest.raises(TypeError, match="success must be a sync function"):
        meterly_guard("image_credits", 5, success=success)(view)(request_)
    assert "committed" not in states()
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize("option", ["amount", "customer", "idempotency_key", "success"])
@pytest.mark.parametrize("text", ["25", "abc", "no.such.thing"])
def test_a_text_that_is_no_path_names_its_option(option: str, text: str) -> None:
    with pytest.raises(ImportError, match=f"^views: {option} must be .*{text!r}"):
        read_mapping({option: text}, "views")


def test_options_of_a_tasks_base_are_the_bases() -> None:
    class Singleton(Task):
        raise_on_duplicate = False

    made = meterly_task(
        "x", 5, base=Singleton, raise_on_duplicate=True, customer_id=7, threads=2
    )(task)
    assert made.raise_on_duplicate


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
def test_a_resolver_that_returns_an_anonymous_user_names_nobody(
    client: Any, settings: Any, enforcement: str
) -> None:
    settings.METERLY = {
        **settings.METERLY,
        "CUSTOMER_RESOLVER": lambda request: request.user,
        "ENFORCEMENT": enforcement,
    }
    answer = client.post("/paid/", HTTP_ACCEPT="application/json")
    assert answer.status_code == (401 if enforcement == "enforce" else 200)
    assert states() == []
