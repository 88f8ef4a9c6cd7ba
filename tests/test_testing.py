"""What the package ships for the tests of its users."""

from __future__ import annotations

import re
import unittest
import uuid
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import requests
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.core.management import call_command
from django.db import IntegrityError, transaction
from django.http import HttpResponse
from django.test import (
    AsyncClient,
    Client,
    LiveServerTestCase,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.urls import path

from django_meterly import (
    MeterlyApiError,
    MeterlyClient,
    MeterlyDebtError,
    MeterlyInsufficientCreditsError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
    get_client,
    grants,
    guard,
    journal,
    meterly_guard,
    testing,
)
from django_meterly.conf import meterly_settings
from django_meterly.errors import MeterlyRateLimitedError
from django_meterly.ledger.models import Entry, Hold, Workspace
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.models import Customer, Reservation
from django_meterly.testing import (
    Altered,
    FaultyTransport,
    assert_books_balance,
    assert_charged,
    assert_not_charged,
    expire_holds,
    faults,
    lapse_leases,
    override_credits,
    override_meterly,
    sweep,
)
from django_meterly.transports import HttpTransport
from django_meterly.wire import ROUTES
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = [pytest.mark.django_db, pytest.mark.database]

HTTP = "django_meterly.transports.HttpTransport"


def kinds_of_owner(user: User) -> dict[str, Any]:
    customer = Customer.objects.for_owner(user)
    return {
        "user": user,
        "customer": customer,
        "external id": customer.external_id,
        "function": lambda: user,
    }


def verify() -> None:
    call_command("meterly_ledger_verify", verbosity=0)


def failure(block: AbstractContextManager[Any], work: Callable[[], Any]) -> str:
    """Return what *block* says when it fails around *work*."""
    with pytest.raises(AssertionError) as caught, block:
        work()
    return str(caught.value)


def fail(*args: Any, **options: Any) -> None:
    with pytest.raises(ZeroDivisionError), guard(*args, **options):
        raise ZeroDivisionError


def charge(*args: Any, **options: Any) -> None:
    with guard(*args, **options):
        pass


# override_credits


@pytest.mark.parametrize("kind", ["user", "customer", "external id", "function"])
def test_the_owner_has_exactly_these_credits_and_then_what_they_had(
    user: User, any_ledger: Any, kind: str
) -> None:
    customer = fund(user, 7)
    with override_credits(kinds_of_owner(user)[kind], image_credits=100) as given:
        assert given == customer
        assert balance(customer) == (100, 0)
        charge(user, 25)
        assert balance(customer) == (75, 0)
    assert balance(customer) == (7, 0)
    assert_books_balance()


@pytest.mark.parametrize("before", [0, 7, 100, 5000])
@pytest.mark.parametrize("inside", [0, 1, 100])
def test_credits_are_added_and_taken_as_it_needs(
    user: User, joined: None, before: int, inside: int
) -> None:
    customer = Customer.objects.for_owner(user)
    if before:
        fund(user, before)
    with override_credits(user, image_credits=inside) as given:
        assert balance(given) == (inside, 0)
    customer.refresh_from_db()
    assert balance(customer) == (before, 0)
    verify()


def test_each_unit_is_for_itself_and_others_stay(user: User) -> None:
    fund(user, 3, "tokens")
    customer = fund(user, 4, "gpu.hours-2")
    units = {"image_credits": 10, "gpu.hours-2": 20}
    with override_credits(user, **units):
        assert balance(customer) == (10, 0)
        assert balance(customer, "gpu.hours-2") == (20, 0)
        assert balance(customer, "tokens") == (3, 0)
        charge(user, 1, "tokens")
    assert balance(customer) == (0, 0)
    assert balance(customer, "gpu.hours-2") == (4, 0)
    assert balance(customer, "tokens") == (2, 0)
    assert_books_balance()


@pytest.mark.parametrize(
    ("end", "held"),
    [
        (lambda work: None, 20),
        (lambda work: work.succeed(), 0),
        (lambda work: work.fail(), 0),
        (lambda work: expire_holds(), 0),
        (lambda work: sweep(), 0),
    ],
    ids=["kept", "committed", "released", "expired", "swept"],
)
@pytest.mark.parametrize("inside", [0, 10, 100])
def test_work_that_runs_when_the_block_begins_keeps_its_hold(
    user: User, any_ledger: Any, inside: int, end: Any, held: int
) -> None:
    customer = fund(user, 50)
    work = guard(user, 20)
    work.reserve()
    with override_credits(user, image_credits=inside):
        assert balance(customer) == (inside + 20, 20)
        end(work)
    assert balance(customer) == (50, held)
    verify()


@pytest.mark.parametrize("amount", [1, 30, 100])
def test_holds_that_the_block_leaves_open_are_released(
    user: User, any_ledger: Any, amount: int
) -> None:
    customer = fund(user, 20)
    running = guard(user, 5)
    running.reserve()
    with override_credits(user, image_credits=100):
        work = guard(user, amount)
        work.reserve()
        if amount < 100:
            get_client().reserve_credits(str(customer.customer_id), 1, reference="own")
    assert balance(customer) == (20, 5)
    verify()
    work.fail()
    running.succeed()
    assert balance(customer) == (15, 0)
    assert_books_balance()


def test_an_owner_that_another_ledger_has_registered_is_registered_again(
    user: User,
) -> None:
    customer = Customer.objects.for_owner(user)
    customer.learn("cus_of_the_cloud")
    with override_credits(user, image_credits=25), assert_charged(user, 25):
        charge(user, 25)
    with override_credits(customer, image_credits=25), assert_charged(customer, 25):
        charge(user, 25)
    assert_books_balance()


def test_blocks_may_be_nested(user: User) -> None:
    customer = fund(user, 7)
    with override_credits(user, image_credits=100):
        charge(user, 10)
        with override_credits(user, image_credits=3):
            charge(user, 2)
            assert balance(customer) == (1, 0)
        assert balance(customer) == (90, 0)
    assert balance(customer) == (7, 0)
    assert_books_balance()


@pytest.mark.parametrize("fault", ["unsent", "lost", "unanswered"])
def test_faults_are_not_for_the_block_itself(user: User, fault: Any) -> None:
    customer = fund(user, 7)
    with faults(fault) as line, override_credits(user, image_credits=30):
        pass
    assert line.calls == []
    with override_credits(user, image_credits=30), faults(fault):
        pass
    assert balance(customer) == (7, 0)


def test_an_exception_restores_the_credits_and_goes_on(user: User) -> None:
    customer = fund(user, 7)
    with pytest.raises(ZeroDivisionError), override_credits(user, image_credits=30):
        raise ZeroDivisionError
    assert balance(customer) == (7, 0)


def test_a_transaction_that_a_test_has_broken_is_left_to_its_rollback(
    user: User,
) -> None:
    customer = fund(user, 7)
    with (
        pytest.raises(IntegrityError),
        transaction.atomic(),
        override_credits(user, image_credits=30),
        transaction.atomic(savepoint=False),
    ):
        User.objects.create(username="alice")
    assert balance(customer) == (7, 0)
    verify()


def test_expired_holds_that_nobody_has_swept_do_not_count(user: User) -> None:
    customer = fund(user, 50)
    guard(user, 20).reserve()
    past = Hold.objects.get().created_at
    Hold.objects.update(expires_at=past)
    with override_credits(user, image_credits=10):
        assert balance(customer) == (10, 0)
        with pytest.raises(MeterlyInsufficientCreditsError):
            guard(user, 11).reserve()
    assert balance(customer) == (50, 0)


@pytest.mark.parametrize(
    ("credits", "error", "message"),
    [
        ({}, TypeError, r"override_credits\(user, image_credits=100\)"),
        ({"image_credits": -1}, ValueError, "image_credits must be from 0"),
        ({"image_credits": "5"}, ValueError, "image_credits must be an int"),
        ({"image_credits": True}, ValueError, "image_credits must be an int"),
        ({"image credits": 5}, ValueError, "'image credits'"),
    ],
)
def test_credits_that_nobody_can_have_are_refused(
    credits: dict[str, Any],  # noqa: A002
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        override_credits("user_1", **credits)


@pytest.mark.parametrize(
    "block",
    [
        lambda: override_credits("user_1", minutes=5),
        lambda: assert_charged("user_1", 0, "minutes"),
        lambda: assert_not_charged("user_1", "minutes"),
    ],
)
def test_a_unit_may_be_declared_after_the_block_was_written(block: Any) -> None:
    ran: list[int] = []
    with override_meterly(UNITS={"image_credits": "image credits"}):
        decorated = block()(lambda: ran.append(1))
    override_meterly(UNITS={"minutes": "minutes"})(decorated)()
    assert ran == [1]
    with (
        override_meterly(UNITS={"minute": "minutes"}),
        pytest.raises(ValueError, match="Did you mean 'minute'"),
    ):
        decorated()
    assert ran == [1]


def test_an_assertion_refuses_what_is_no_unit() -> None:
    with pytest.raises(ValueError, match="'image credits'"):
        assert_charged("user_1", 5, "image credits")
    with pytest.raises(ValueError, match="'image credits'"):
        assert_not_charged("user_1", "image credits")


@pytest.mark.parametrize(
    "block",
    [
        lambda: override_credits("user_1", image_credits=10),
        lambda: assert_charged("user_1", 0),
        lambda: assert_not_charged("user_1"),
        lambda: faults("lost"),
        lambda: override_meterly(ENFORCEMENT="off"),
    ],
)
def test_a_block_is_entered_once_at_a_time(block: Any) -> None:
    customer = fund("user_1", 3)
    before = django_settings.METERLY
    one = block()
    for _ in range(2):
        with one, pytest.raises(MeterlyUsageError, match="entered already"), one:
            pass
        assert django_settings.METERLY is before
        assert FaultyTransport.lines == []
        assert balance(customer) == (3, 0)
        # An exception ends it as well.
        with pytest.raises(KeyError), one:
            raise KeyError


# Decorators, and the classes of tests


@override_credits(lambda: "user_1", image_credits=3)
def _decorated(external_id: str) -> tuple[int, int]:
    return balance(Customer.objects.resolve(external_id))


@override_credits("user_1", image_credits=4)
async def _adecorated() -> int:
    customer = await Customer.objects.aget(external_id="user_1")
    return (await get_client().aget_balance(str(customer.customer_id))).available


def test_it_decorates_functions() -> None:
    assert _decorated(external_id="user_1") == (3, 0)
    assert async_to_sync(_adecorated)() == 4
    assert balance(Customer.objects.get()) == (0, 0)


@override_credits("user_1", image_credits=9)
def _nested(depth: int) -> None:
    with guard("user_1", depth):
        pass
    if depth > 1:
        _nested(depth - 1)
    assert balance(Customer.objects.get()) == (9 - depth, 0)


def test_a_decorated_function_may_call_itself() -> None:
    customer = fund("user_1", 5)
    _nested(depth=3)
    assert balance(customer) == (5, 0)


class _Methods:
    @override_credits(lambda test: test.user, image_credits=100)
    def test_a_method(self: Any) -> None:
        assert self.client.post("/paid/").status_code == 200
        assert balance(self.customer) == (75, 0)

    @override_credits(lambda test: test.user, image_credits=100)
    async def test_an_async_method(self: Any) -> None:
        await self.async_client.aforce_login(self.user)
        async with assert_charged(self.user, 25):
            assert (await self.async_client.post("/paid/")).status_code == 200

    def test_a_block(self: Any) -> None:
        with override_credits(self.user, image_credits=24):
            assert self.client.post("/paid/").status_code == 402

    def test_nothing(self: Any) -> None:
        assert balance(self.customer) == (0, 0)

    def setUp(self: Any) -> None:
        self.user = User.objects.create_user("alice")
        self.customer = Customer.objects.for_owner(self.user)
        self.customer.register(get_client(), "image_credits")
        self.client.force_login(self.user)


class _Decorated:
    @override_credits(lambda test: test.user, image_credits=3)
    def test_a_method_of_it(self: Any) -> None:
        assert balance(self.customer) == (3, 0)
        charge(self.user, 3)

    def test_a_test_of_it(self: Any) -> None:
        assert balance(self.customer) == (50, 0)
        assert self.client.post("/paid/").status_code == 200

    def tearDown(self: Any) -> None:
        assert_books_balance()
        self.user.delete()


class MethodsInTestCase(_Methods, TestCase):
    pass


class MethodsInTransactionTestCase(_Methods, TransactionTestCase):
    pass


@override_credits(lambda test: test.user, image_credits=50)
class DecoratedTestCase(_Decorated, _Methods, TestCase):
    test_nothing = None  # type: ignore[assignment]


@override_credits(lambda test: test.user, image_credits=50)
class DecoratedTransactionTestCase(_Decorated, _Methods, TransactionTestCase):
    test_nothing = None  # type: ignore[assignment]


class ForTheClassTestCase(TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        cls.user = User.objects.create_user("alice")
        cls.enterClassContext(override_credits(cls.user, image_credits=25))

    def test_one_request(self) -> None:
        self.client.force_login(self.user)
        assert self.client.post("/paid/").status_code == 200
        assert self.client.post("/paid/").status_code == 402

    test_and_another = test_one_request

    @classmethod
    def doClassCleanups(cls) -> None:  # noqa: N802
        super().doClassCleanups()
        # The class was rolled back before its blocks ended: they leave nothing.
        assert not Workspace.objects.exists()


def test_other_classes_cannot_be_decorated() -> None:
    with pytest.raises(TypeError, match="override_credits decorates functions and"):
        override_credits("user_1", image_credits=1)(type("Tests", (), {}))


def test_a_simple_test_case_is_told_that_it_may_ask_no_database() -> None:
    class Simple(SimpleTestCase):
        def test_it(self) -> None:
            with override_credits("user_1", image_credits=5):
                pass

    result = unittest.TestResult()
    Simple.setUpClass()
    try:
        Simple("test_it").run(result)
    finally:
        Simple.doClassCleanups()
    ((_, said),) = result.failures
    assert "queries to 'default' are not allowed in SimpleTestCase" in said


@pytest.mark.parametrize(
    "block",
    [
        partial(override_credits, image_credits=5),
        partial(assert_charged, amount=0),
        assert_not_charged,
    ],
    ids=["override_credits", "assert_charged", "assert_not_charged"],
)
def test_async_code_is_told_to_write_async_with(block: Any) -> None:
    async def use(kind: str) -> None:
        if kind == "sync":
            with block("user_1"):
                pass
        async with block("user_1"):
            pass

    async_to_sync(use)("async")
    with pytest.raises(SynchronousOnlyOperation, match=r"async with \w+\("):
        async_to_sync(use)("sync")


# assert_charged


@pytest.mark.parametrize("kind", ["user", "customer", "external id", "function"])
def test_a_right_charge_passes(user: User, any_ledger: Any, kind: str) -> None:
    fund(user)
    owner = kinds_of_owner(user)[kind]
    charge(user, 7)
    with assert_charged(owner, 35):
        charge(user, 25)
        charge(user, 10)
        fail(user, 30)
    with assert_charged(owner, 0), assert_not_charged(owner):
        fail(user, 25)


def test_an_owner_without_a_customer_yet_is_charged_as_well(user: User) -> None:
    with assert_not_charged(user):
        pass
    with assert_charged(user, 25), override_credits(user, image_credits=25):
        charge(user, 25)


def test_what_override_credits_takes_and_what_is_granted_is_no_charge(
    user: User,
) -> None:
    fund(user)
    with assert_charged(user, 5), override_credits(user, image_credits=5):
        fund(user, 50)
        charge(user, 5)


def test_a_debit_counts_and_a_charge_is_counted_once(user: User, remote: Any) -> None:
    customer = fund(user)
    with assert_charged(user, 30), guard(user, 25) as work:
        work.charge(30)
    with assert_charged(user, 4), guard(user, 25) as work:
        work.charge(4)
    with assert_charged(user, 3):
        get_client().use_credits(str(customer.customer_id), 3)


def test_more_than_a_page_of_entries_is_counted(user: User) -> None:
    fund(user, 1000)
    with assert_charged(user, 60):
        for _ in range(60):
            charge(user, 1)
    with assert_charged(user, 1):
        charge(user, 1)
    assert Entry.objects.count() > 100


def test_the_unit_is_the_one_that_was_named(user: User, settings: Any) -> None:
    fund(user)
    fund(user, 100, "tokens")
    with assert_charged(user, 25), assert_charged(user, 5, unit="tokens"):
        charge(user, 25)
        charge(user, 5, "tokens")
    with assert_not_charged(user, "tokens"):
        charge(user, 25)
    message = failure(assert_not_charged(user), lambda: charge(user, 5, "tokens"))
    assert f"user_{user.pk} was charged 5 tokens instead of nothing." in message
    settings.METERLY = {**settings.METERLY, "DEFAULT_UNIT": None}
    with pytest.raises(ImproperlyConfigured, match='unit="image_credits"'):
        assert_charged(user, 25).__enter__()


class Told:
    """What a failed assertion says: one method for each way to fail."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.name = f"user_{user.pk}"

    def nothing_reserved(self) -> tuple[Any, str]:
        return (
            lambda: None,
            (
                "{0} was charged nothing instead of 25 image_credits.\n"
                "Nothing was reserved."
            ),
        )

    def another_amount(self) -> tuple[Any, str]:
        return (
            lambda: charge(self.user, 24, reference="poster-1"),
            (
                "{0} was charged 24 image_credits instead of 25 image_credits.\n"
                "  24 image_credits for poster-1\n"
                "Reservations of the block:\n"
                "  poster-1: 24 image_credits held, committed, charge 24"
            ),
        )

    def twice(self) -> tuple[Any, str]:
        def work() -> None:
            charge(self.user, 25, reference="poster-1")
            charge(self.user, 25, reference="poster-2")

        return work, (
            "{0} was charged 50 image_credits instead of 25 image_credits.\n"
            "  25 image_credits for poster-1\n"
            "  25 image_credits for poster-2\n"
            "Reservations of the block:\n"
            "  poster-1: 25 image_credits held, committed, charge 25\n"
            "  poster-2: 25 image_credits held, committed, charge 25"
        )

    def released(self) -> tuple[Any, str]:
        return (
            lambda: fail(self.user, 25, reference="poster-1"),
            (
                "{0} was charged nothing instead of 25 image_credits.\n"
                "Reservations of the block:\n"
                "  poster-1: 25 image_credits held, released"
            ),
        )

    def denied(self) -> tuple[Any, str]:
        def work() -> None:
            with pytest.raises(MeterlyInsufficientCreditsError):
                guard(self.user, 2500, reference="poster-1").reserve()

        return work, (
            "{0} was charged nothing instead of 25 image_credits.\n"
            "Reservations of the block:\n"
            "  poster-1: 2500 image_credits held, denied"
        )

    def not_ended(self) -> tuple[Any, str]:
        return (
            lambda: guard(self.user, 25, reference="poster-1").reserve(),
            (
                "{0} was charged nothing instead of 25 image_credits.\n"
                "Reservations of the block:\n"
                "  poster-1: 25 image_credits held, reserved"
            ),
        )

    def not_carried_out(self) -> tuple[Any, str]:
        def work() -> None:
            with faults(commit_reservation="lost"):
                charge(self.user, 25, reference="poster-1")

        return work, (
            "{0} was charged nothing, and 25 image_credits are due, "
            "instead of 25 image_credits.\n"
            "Reservations of the block:\n"
            "  poster-1: 25 image_credits held, commit_pending, charge 25 "
            "(read time-out)\n"
            "A charge that is decided is not carried out yet: call sweep() before the "
            "block ends."
        )

    def not_recorded(self) -> tuple[Any, str]:
        """Taken, but for all that anybody knows it is to be taken once more."""

        def work() -> None:
            with faults(commit_reservation="unanswered"):
                charge(self.user, 25, reference="poster-1")

        return work, (
            "{0} was charged 25 image_credits, and 25 image_credits are due, "
            "instead of 25 image_credits.\n"
            "  25 image_credits for poster-1\n"
            "Reservations of the block:\n"
            "  poster-1: 25 image_credits held, commit_pending, charge 25 "
            "(read time-out)\n"
            "A charge that is decided is not carried out yet: call sweep() before the "
            "block ends."
        )

    def owed(self) -> tuple[Any, str]:
        def work() -> None:
            with guard(self.user, 25, reference="poster-1") as held:
                held.charge(125)

        return work, (
            "{0} was charged 25 image_credits, and 100 image_credits are due, "
            "instead of 25 image_credits.\n"
            "  25 image_credits for poster-1\n"
            "Reservations of the block:\n"
            "  poster-1: 25 image_credits held, unbilled, charge 125 "
            "(402 insufficient_credits: ...)"
        )

    def handed_off(self) -> tuple[Any, str]:
        def work() -> None:
            held = guard(self.user, 25, reference="poster-1")
            held.reserve()
            held.offer(60)

        return work, (
            "{0} was charged nothing instead of 25 image_credits.\n"
            "Reservations of the block:\n"
            "  poster-1: 25 image_credits held, reserved, handed off to a task that "
            "has not run"
        )


WAYS = [name for name in vars(Told) if not name.startswith("_")]


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_charge_says_what_was_charged_instead(user: User, way: str) -> None:
    fund(user)
    told = Told(user)
    work, message = getattr(told, way)()
    said = failure(assert_charged(user, 25), work)
    said = re.sub(r"(402 insufficient_credits: ).*\)", r"\1...)", said)
    assert said == message.format(told.name)


@pytest.mark.parametrize(
    "way", ["another_amount", "twice", "not_carried_out", "not_recorded"]
)
def test_what_is_charged_or_will_be_is_not_nothing(user: User, way: str) -> None:
    fund(user)
    told = Told(user)
    work, _ = getattr(told, way)()
    said = failure(assert_not_charged(user), work)
    assert re.match(rf"{told.name} was charged .* instead of nothing\.\n", said)


def test_a_charge_from_before_the_block_is_no_part_of_it(user: User) -> None:
    fund(user)
    with faults(commit_reservation="lost"):
        charge(user, 25)
    with assert_not_charged(user):
        pass
    with assert_charged(user, 25):
        sweep()


def test_an_exception_from_the_block_is_the_one_to_see(user: User) -> None:
    with pytest.raises(ZeroDivisionError), assert_charged(user, 25):
        raise ZeroDivisionError


# assert_books_balance


def _poster() -> Any:
    return Reservation.objects.filter(reference="poster-1")


def _open(user: User) -> str:
    guard(user, 25, reference="poster-1").reserve()
    return "poster-1 (25 image_credits, reserved) is still open: end its work, or let"


def _offered(user: User) -> str:
    work = guard(user, 25, reference="poster-1")
    work.reserve()
    work.offer(60)
    return "poster-1 (25 image_credits, reserved) was handed off to a task that has not"


def _undecided(user: User) -> str:
    with faults(reserve_credits="lost"), pytest.raises(Exception, match="time-out"):
        guard(user, 25, reference="poster-1").reserve()
    return "poster-1 (25 image_credits, intent) is still open"


def _not_committed(user: User) -> str:
    with faults(commit_reservation="lost"):
        charge(user, 25, reference="poster-1")
    return (
        "poster-1 (25 image_credits, commit_pending) is decided, and not carried out "
        "yet: call sweep(). (read time-out)"
    )


def _not_released(user: User) -> str:
    with faults(release_reservation="unsent"):
        fail(user, 25, reference="poster-1")
    return (
        "poster-1 (25 image_credits, release_pending) is decided, and not carried out "
        "yet: call sweep(). (refused)"
    )


def _unknown_hold(user: User) -> str:
    customer = Customer.objects.resolve(user)
    get_client().reserve_credits(str(customer.customer_id), 25, reference="poster-1")
    return (
        "poster-1 (25 image_credits) is held at the ledger, and the journal does not "
        "know it."
    )


def _hold_left(user: User) -> str:
    guard(user, 25, reference="poster-1").reserve()
    _poster().update(state="released", lease_until=None)
    return "poster-1 (25 image_credits, released) is over, but its hold is open at the"


def _free_at_the_ledger(user: User) -> str:
    fail(user, 25, reference="poster-1")
    _poster().update(state="committed", charge=25)
    return "poster-1 (25 image_credits, committed) costs 25, but the ledger took 0."


def _charged_at_the_ledger(user: User) -> str:
    charge(user, 25, reference="poster-1")
    _poster().update(state="released", charge=None)
    return "poster-1 (25 image_credits, released) costs 0, but the ledger took 25."


def _another_charge(user: User) -> str:
    charge(user, 25, reference="poster-1")
    _poster().update(charge=24)
    return "poster-1 (25 image_credits, committed) costs 24, but the ledger took 25."


def _conflict(user: User) -> str:
    charge(user, 25, reference="poster-1")
    _poster().update(state="conflict")
    return "poster-1 (25 image_credits, conflict) was released by the journal, and"


def _tampered(user: User) -> str:
    from django_meterly.ledger.models import Account

    Account.objects.update(balance=99)
    return "the books do not balance.\n\nROW"


@pytest.mark.parametrize(
    "disorder",
    [
        _open,
        _offered,
        _undecided,
        _not_committed,
        _not_released,
        _unknown_hold,
        _hold_left,
        _free_at_the_ledger,
        _charged_at_the_ledger,
        _another_charge,
        _conflict,
        _tampered,
    ],
)
def test_books_that_do_not_balance_fail_and_say_why(user: User, disorder: Any) -> None:
    fund(user)
    charge(user, 10)
    assert_books_balance()
    said = disorder(user)
    with pytest.raises(AssertionError) as caught:
        assert_books_balance()
    assert str(caught.value).startswith("The books do not balance.\n")
    assert said in str(caught.value)
    assert str(caught.value).count("poster-1") == said.count("poster-1")


@pytest.mark.parametrize("kind", ["joined", "remote"])
def test_every_way_in_which_work_ends_balances(
    user: User, kind: str, request: pytest.FixtureRequest, settings: Any
) -> None:
    request.getfixturevalue(kind)
    settings.METERLY = {**settings.METERLY, "ON_DEBT": "allow"}
    fund(user)
    charge(user, 1)
    fail(user, 1)
    with guard(user, 10) as work:
        work.charge(0)
    with guard(user, 10) as work:
        work.charge(3)
    with guard(user, 10) as work:
        work.charge(13)
    with guard(user, 10) as work:
        expire_holds()
    with guard(user, 10) as work:
        lapse_leases()
        journal.sweep(get_client())
    guard(user, 10).reserve()
    sweep()
    with pytest.raises(MeterlyInsufficientCreditsError):
        guard(user, 1000).reserve()
    get_client().use_credits(f"{Customer.objects.get().customer_id}", 2)
    with guard(user, 10) as work:
        work.charge(1000)
    assert set(states()) == {"committed", "released", "denied", "unbilled"}
    assert_books_balance()
    journal.write_off(Reservation.objects.get(state="unbilled"))
    assert_books_balance()


# Time


def test_work_that_outlives_its_hold_is_charged_by_a_debit(
    user: User, any_ledger: Any
) -> None:
    customer = fund(user)
    with assert_charged(user, 25), guard(user, 25):
        expire_holds()
        assert balance(customer) == (100, 0)
    assert Entry.objects.filter(kind="credits_used").count() == 1
    assert_books_balance()


def test_lapsed_work_is_released_by_the_sweeper_and_late_success_is_charged(
    user: User, any_ledger: Any
) -> None:
    customer = fund(user)
    work = guard(user, 25)
    work.reserve()
    lapse_leases()
    assert states() == ["reserved"]
    assert sweep() == (1, 1)
    assert (states(), balance(customer)) == (["released"], (100, 0))
    with assert_charged(user, 25):
        work.succeed()
        sweep()
    assert_books_balance()


def test_the_sweeper_carries_out_grants_as_well(user: User) -> None:
    customer = Customer.objects.for_owner(user)
    with faults(grant_credits="lost"):
        grants.grant(None, customer, 5, "image_credits", reason="r", reference="g")
        sweep()
    customer.register(get_client(), "image_credits")
    assert balance(customer) == (0, 0)
    sweep()
    assert balance(customer) == (5, 0)


# faults


def _calls(client: MeterlyClient, customer_id: str) -> dict[str, Any]:
    """Return a call of each operation."""
    held = client.reserve_credits(customer_id, 1, reference="r")
    hold = held.reservation_id
    return {
        "create_customer": lambda: client.create_customer(
            str(uuid.uuid4()), "image_credits"
        ),
        "find_customer": lambda: client.find_customer("user_1"),
        "grant_credits": lambda: client.grant_credits(
            "user_1", 5, "image_credits", "grant"
        ),
        "get_balance": lambda: client.get_balance(customer_id),
        "get_balances": lambda: client.get_balances(customer_id),
        "add_credits": lambda: client.add_credits(customer_id, 5),
        "use_credits": lambda: client.use_credits(customer_id, 5),
        "reserve_credits": lambda: client.reserve_credits(customer_id, 5),
        "get_reservation": lambda: client.get_reservation(hold),
        "commit_reservation": lambda: client.commit_reservation(hold),
        "release_reservation": lambda: client.release_reservation(hold),
        "extend_reservation": lambda: client.extend_reservation(hold, 60),
        "list_entries": lambda: client.list_entries(customer_id),
    }


MOVES = {
    "grant_credits",
    "add_credits",
    "use_credits",
    "reserve_credits",
    "commit_reservation",
    "release_reservation",
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "everything"])
@pytest.mark.parametrize("fault", ["unsent", "lost", "unanswered"])
@pytest.mark.parametrize("operation", ROUTES)
def test_every_call_meets_every_fault(operation: str, fault: Any, named: bool) -> None:
    customer = fund("user_1")
    error = MeterlyNotSentError if fault == "unsent" else MeterlyUnknownOutcomeError
    outside = get_client()
    block = faults(**{operation: fault}) if named else faults(fault)
    client = get_client()
    with ExitStack() as stack:
        client = MeterlyClient(transport=FaultyTransport(LedgerTransport()))
        calls = _calls(client, str(customer.customer_id))
        line = stack.enter_context(block)
        before = Entry.objects.count()
        with pytest.raises(error):
            calls[operation]()
        moved = Entry.objects.count() - before
        assert moved == (fault == "unanswered" and operation in MOVES)
        assert line.operations() == [operation]
        assert isinstance(get_client().transport, FaultyTransport)
        for other in {"find_customer", "get_balance"} - {operation}:
            with nullcontext() if named else pytest.raises(error):
                calls[other]()
    calls[operation]()
    assert get_client().transport is not client.transport
    assert type(get_client().transport) is type(outside.transport)
    verify()


def test_lists_are_for_the_next_calls(user: User) -> None:
    fund(user)
    customer_id = str(Customer.objects.get().customer_id)
    with faults(get_balance=["lost", None, MeterlyRateLimitedError()]) as line:
        line.meet("get_balance", MeterlyRateLimitedError)
        with pytest.raises(MeterlyUnknownOutcomeError):
            get_client().get_balance(customer_id)
        get_client().get_balance(customer_id)
        for _ in range(2):
            with pytest.raises(MeterlyRateLimitedError):
                get_client().get_balance(customer_id)
        get_client().get_balance(customer_id)
    assert line.operations() == ["get_balance"] * 5


def test_functions_run_before_the_call_and_answers_can_be_altered(user: User) -> None:
    fund(user)
    with assert_charged(user, 25), faults(commit_reservation=expire_holds):
        charge(user, 25)
    customer_id = str(Customer.objects.get().customer_id)
    double = Altered(lambda answer: {**answer, "available": 2 * answer["available"]})
    with faults(get_balance=double):
        assert get_client().get_balance(customer_id).available == 150


def test_the_innermost_block_that_names_a_call_decides(user: User) -> None:
    fund(user)
    customer_id = str(Customer.objects.get().customer_id)
    with faults("unsent") as outer:
        with faults(get_balance="lost") as inner:
            with pytest.raises(MeterlyUnknownOutcomeError):
                get_client().get_balance(customer_id)
            with pytest.raises(MeterlyNotSentError):
                get_client().get_balances(customer_id)
        assert inner.operations() == outer.operations()
        with pytest.raises(MeterlyNotSentError):
            get_client().get_balance(customer_id)
    get_client().get_balance(customer_id)


class First(LedgerTransport):
    def __repr__(self) -> str:
        return "First()"


class Second(First):
    def __repr__(self) -> str:
        return "Second()"


def test_the_ledger_at_the_far_end_is_the_one_of_the_settings() -> None:
    for kind in ("First", "Second"):
        with override_meterly(TRANSPORT=f"{__name__}.{kind}"):
            for _ in range(2):
                with faults():
                    assert repr(get_client().transport) == f"FaultyTransport({kind}())"
                    longest = FaultyTransport.longest_hold()
                    assert longest == LedgerTransport.longest_hold()
    with override_meterly(TRANSPORT=f"{__name__}.Second"):
        assert repr(get_client().transport) == "Second()"
    with override_meterly(TRANSPORT=f"{testing.__name__}.FaultyTransport"):
        assert repr(get_client().transport) == "FaultyTransport(LedgerTransport())"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"commit_reservatoin": "lost"},
            TypeError,
            "Did you mean 'commit_reservation'",
        ),
        ({"commit": "lost"}, TypeError, "name a method of MeterlyClient"),
        (
            {"commit_reservation": "lots"},
            ValueError,
            "unsent, lost, unanswered.*'lots'",
        ),
        ({"commit_reservation": ["lost", "lots"]}, ValueError, "'lots'"),
        ({"commit_reservation": 3}, ValueError, "3 is not a fault"),
        ({"commit_reservation": int}, ValueError, "'int'> is not a fault"),
        ({"commit_reservation": [Altered]}, ValueError, "Altered'> is not a fault"),
        ({"everything": ["lost"]}, ValueError, "is not a fault"),
    ],
)
def test_faults_that_there_are_not_are_refused(
    arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        faults(**arguments)
    if "everything" not in arguments and not isinstance(arguments, list):
        (operation, value), *_ = arguments.items()
        with faults() as line, pytest.raises(error):
            line.meet(operation, *(value if isinstance(value, list) else [value]))


@meterly_guard("image_credits", 25)
async def _apaid(request: Any) -> HttpResponse:
    return HttpResponse("done")


urlpatterns = [path("apaid/", _apaid)]


@override_settings(ROOT_URLCONF=__name__)
def test_faults_are_for_async_code_as_well(user: User) -> None:
    fund(user)

    async def story() -> None:
        client = AsyncClient()
        await client.aforce_login(user)
        with faults(reserve_credits=["unsent"]):
            assert (await client.post("/apaid/")).status_code == 503
        async with assert_charged(user, 25), faults():
            assert (await client.post("/apaid/")).status_code == 200

    async_to_sync(story)()


def test_a_refusal_of_the_ledger_is_what_the_client_sees(
    client: Client, user: User
) -> None:
    client.force_login(user)
    short = MeterlyInsufficientCreditsError(details={"required": 25, "available": 1})
    with override_credits(user, image_credits=100), faults(reserve_credits=short):
        assert client.post("/paid/").status_code == 402
    assert isinstance(short, MeterlyApiError)


# override_meterly


@override_meterly(DEFAULT_UNIT="tokens")
def _unit() -> Any:
    return meterly_settings.DEFAULT_UNIT


@override_meterly(DEFAULT_UNIT="tokens")
async def _aunit() -> Any:
    return meterly_settings.DEFAULT_UNIT


@override_meterly(DEFAULT_UNIT="tokens", LOW_BALANCE={"tokens": 5})
class OverriddenTests(TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        assert meterly_settings.DEFAULT_UNIT == "tokens"

    def test_the_others_stay(self) -> None:
        assert meterly_settings.TRANSPORT is LedgerTransport
        with override_meterly(ENFORCEMENT="off"):
            assert meterly_settings.DEFAULT_UNIT == "tokens"
            assert meterly_settings.ENFORCEMENT == "off"

    @override_meterly(DEFAULT_UNIT="gpu_seconds")
    def test_a_method(self) -> None:
        assert meterly_settings.DEFAULT_UNIT == "gpu_seconds"
        assert meterly_settings.LOW_BALANCE == {"tokens": 5}


@override_meterly(ENFORCEMENT="shadow")
class InheritingTests(OverriddenTests):
    def test_both(self) -> None:
        assert meterly_settings.ENFORCEMENT == "shadow"
        assert meterly_settings.DEFAULT_UNIT == "tokens"


def test_some_settings_are_changed_and_the_rest_is_kept(settings: Any) -> None:
    before = dict(settings.METERLY)
    assert _unit() == async_to_sync(_aunit)() == "tokens"
    with override_meterly(ENFORCEMENT="off"):
        assert {**before, "ENFORCEMENT": "off"} == django_settings.METERLY
    assert before == settings.METERLY
    settings.METERLY = {**before, "OVERAGE": "cap"}
    with override_meterly(ENFORCEMENT="off"):
        assert meterly_settings.OVERAGE == "cap"
    assert _unit() == "tokens"


def test_a_setting_that_there_is_not_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="Did you mean 'ENFORCEMENT'"):
        override_meterly(ENFORCMENT="off")


# A ledger that is not the embedded one


@pytest.mark.parametrize(
    ("name", "helper"),
    [
        ("override_credits", lambda: override_credits("u", unit=5).__enter__()),
        ("assert_charged", lambda: assert_charged("u", 5, "unit").__enter__()),
        ("assert_not_charged", lambda: assert_not_charged("u").__enter__()),
        ("assert_books_balance", assert_books_balance),
        ("expire_holds", expire_holds),
    ],
)
@pytest.mark.parametrize("faulty", [False, True])
def test_another_ledger_is_never_asked(
    name: str, helper: Any, faulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(HttpTransport, "send", lambda *call: sent.append(call))
    with (
        override_meterly(TRANSPORT=HTTP, API_KEY="mk_live_" + 32 * "x"),
        faults() if faulty else nullcontext(),
        pytest.raises(MeterlyUsageError, match=rf"^{name}\(\)") as caught,
    ):
        helper()
    assert sent == []
    assert "add 'django_meterly.ledger' to INSTALLED_APPS" in str(caught.value)
    assert LedgerTransport.__module__ in str(caught.value)


# What a TestCase leaves to its COMMIT, which never comes


class CommitTests(TestCase):
    def setUp(self) -> None:
        self.user = User.objects.create_user("alice")
        self.customer = fund(self.user, 10)

    def test_the_mark_of_a_debtor(self) -> None:
        def owe() -> None:
            with guard(self.user, 10) as work:
                work.charge(15)

        owe()
        assert not Customer.objects.get().owes
        with self.captureOnCommitCallbacks(execute=True):
            fund(self.user, 10)
            with guard(self.user, 10) as work:
                work.charge(20)
        with pytest.raises(MeterlyDebtError):
            guard(Customer.objects.get(), 1).reserve()

    def test_a_guard_that_is_not_durable_at_a_remote_ledger(self) -> None:
        def work() -> None:
            with faults(), guard(self.user, 5, durable=False):
                pass

        said = failure(assert_charged(self.user, 5), work)
        assert "commit_pending" in said
        with assert_charged(self.user, 5), self.captureOnCommitCallbacks(execute=True):
            work()


class LiveServerTests(LiveServerTestCase):
    def test_a_server_in_another_thread(self) -> None:
        user = User.objects.create_user("alice")
        client = Client()
        client.force_login(user)
        token = "a" * 32
        cookies = {name: morsel.value for name, morsel in client.cookies.items()}
        browser = {"cookies": {**cookies, "csrftoken": token}, "timeout": 30}

        def post() -> int:
            url = f"{self.live_server_url}/paid/"
            data = {"trace": uuid.uuid4().hex, "csrfmiddlewaretoken": token}
            return int(requests.post(url, data, **browser).status_code)

        with override_credits(user, image_credits=25):
            with faults(reserve_credits=["unsent"]), assert_not_charged(user):
                assert post() == 503
            with assert_charged(user, 25):
                assert (post(), post()) == (200, 402)
        assert_books_balance()
