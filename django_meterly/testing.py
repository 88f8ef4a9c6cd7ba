"""Helpers for your project's own tests: credits, assertions, and a ledger that fails.

For example::

    class PosterTests(TestCase):
        def test_a_poster_costs_25_credits(self):
            with override_credits(self.user, image_credits=100):
                with assert_charged(self.user, 25, unit="image_credits"):
                    self.client.post("/posters/")
            assert_books_balance()

All of it works on the embedded ledger, with real calls: nothing is mocked. It is for
tests only. No other module of this package imports it.
"""

from __future__ import annotations

import io
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast
from unittest import TestCase

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.core.management import CommandError, call_command
from django.db import connections, router
from django.test.utils import TestContextDecorator, override_settings
from django.utils.module_loading import import_string

from . import client as clients
from . import grants, journal, units
from .client import MeterlyClient, get_client
from .conf import DEFAULTS, meterly_settings, suggestion
from .db import from_now
from .errors import (
    MeterlyNotFoundError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)
from .models import Customer, Reservation
from .transports.base import ROUTES, Call, Transport, check_amount, check_unit

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .types import Balance, LedgerEntry

__all__ = [
    "Altered",
    "Fault",
    "FaultyTransport",
    "assert_books_balance",
    "assert_charged",
    "assert_not_charged",
    "expire_holds",
    "faults",
    "lapse_leases",
    "override_credits",
    "override_meterly",
    "sweep",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)
State = Reservation.State

LEDGER_TRANSPORT = "django_meterly.ledger.transport.LedgerTransport"
#: Begins the references of what ``override_credits`` moves: these are no charges.
OVERRIDE = "override_credits:"
#: How many seconds ago a lease or a hold has ended that is ended now.
LONG_AGO = 86400.0


class _Block(TestContextDecorator, Generic[T]):
    """A block of a test: ``with``, ``async with``, or a decorator.

    It decorates functions, ``async`` functions and classes of tests. As a decorator
    it is made anew for each call, and for each test of a class.
    """

    #: What a function that stands for the owner gets: the test, if there is one.
    _arguments: tuple[Any, ...] = ()
    #: A block keeps one beginning, so it cannot begin again before it ends.
    _entered = False
    #: Whether an exception from the block leaves something to be undone.
    _ends_after_an_exception = True

    def enable(self) -> T:
        raise NotImplementedError

    def __enter__(self) -> T:  # type: ignore[override]
        name = type(self).__name__
        if self._entered:
            raise _entered_twice(name)
        try:
            begun = self.enable()
        except SynchronousOnlyOperation as exc:
            raise SynchronousOnlyOperation(
                f"In async code, write 'async with {name}(...)'."
            ) from exc
        self._entered = True
        return begun

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered = False
        if exc_type is None or self._ends_after_an_exception:
            self.disable()

    async def __aenter__(self) -> T:
        return await sync_to_async(self.__enter__)()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await sync_to_async(self.__exit__)(exc_type, exc, traceback)

    def decorate_callable(self, func: F) -> F:
        wrapper: Any
        if iscoroutinefunction(func):

            @wraps(func)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                async with self._for(*args[:1]):
                    return await func(*args, **kwargs)

        else:

            @wraps(func)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self._for(*args[:1]):
                    return func(*args, **kwargs)

        return cast("F", wrapper)

    def decorate_class(self, cls: C) -> C:
        if not issubclass(cls, TestCase):
            raise TypeError(
                f"{type(self).__name__} decorates functions and subclasses of "
                f"unittest.TestCase, not {cls!r}."
            )
        set_up: Any = cls.setUp

        @wraps(set_up)
        def wrapper(test: Any) -> None:
            # Afterwards: setUp() may be what makes the owner.
            set_up(test)
            block = self._for(test)
            block.__enter__()
            test.addCleanup(block.__exit__, None, None, None)

        cast("Any", cls).setUp = wrapper
        return cast("C", cls)

    def _for(self, *arguments: Any) -> Self:
        block = copy(self)
        block._entered = False
        block._arguments = arguments
        return block

    def _customer(self, owner: Any) -> Customer:
        if callable(owner):
            owner = owner(*self._arguments)
        return Customer.objects.resolve(owner)


def _entered_twice(name: str) -> MeterlyUsageError:
    return MeterlyUsageError(
        f"This {name}(...) has been entered already: write a second {name}(...) for "
        "the block inside."
    )


# Settings


class override_meterly(override_settings):  # noqa: N801
    """Change some of ``settings.METERLY`` in a block, and keep the rest.

    ``override_settings(METERLY={...})`` replaces the whole dict. This merges::

        with override_meterly(ENFORCEMENT="off"):
            ...

    It decorates what ``override_settings`` decorates. Raises ``ImproperlyConfigured``
    for a name that is not a setting, and ``MeterlyUsageError`` if one object is entered
    twice at once.
    """

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in DEFAULTS:
                raise ImproperlyConfigured(
                    f"There is no setting METERLY[{name!r}]."
                    f"{suggestion(name, DEFAULTS)}"
                )
        super().__init__()
        self._values = values

    def enable(self) -> None:
        if hasattr(self, "wrapped"):
            # Django would never find the way back to the first settings.
            raise _entered_twice(type(self).__name__)
        self.options = {"METERLY": {**meterly_settings.as_dict(), **self._values}}
        super().enable()

    def save_options(self, test_func: Any) -> None:
        # What a class overrides is on record in the class until its tests run.
        saved = test_func._overridden_settings or {}
        before = saved.get("METERLY", meterly_settings.as_dict())
        self.options = {"METERLY": {**before, **self._values}}
        super().save_options(test_func)


# Credits


class override_credits(_Block[Customer]):  # noqa: N801
    """Let *owner* have exactly these credits available in a block of a test.

    ::

        with override_credits(user, image_credits=100, gpu_seconds=0):
            ...

        @override_credits(lambda test: test.user, image_credits=100)
        class PosterTests(TestCase): ...

    *owner* is a user (an instance of ``CUSTOMER_MODEL``), a ``Customer``, an external
    id, or a function that returns one of them. Such a function gets the test if this
    decorates a method or a class, else nothing. In a class it is called after
    ``setUp()``. Units that are not named stay as they are, and so do credits that are
    held when the block begins.

    Afterwards the balances are what they were before, whatever the test has charged
    and granted. Holds that the block leaves open are released. The block yields the
    ``Customer``.

    The credits are added and used by calls to the embedded ledger, so the books
    balance. Raises ``MeterlyUsageError`` if the ledger is not the embedded one, and if
    one object is entered twice at once. Raises ``TypeError`` without any unit,
    ``ValueError`` for an invalid unit or amount and, when the block begins, for a unit
    that ``UNITS`` does not declare: tests may override the setting.
    """

    def __init__(self, owner: Any, /, **credits: int) -> None:  # noqa: A002
        if not credits:
            raise TypeError(
                "Name the credits: override_credits(user, image_credits=100)."
            )
        for unit, amount in credits.items():
            check_amount(amount, check_unit(unit), minimum=0)
        super().__init__()
        self._owner = owner
        self._credits = credits

    def enable(self) -> Customer:
        self._client = _embedded("override_credits()")
        for unit in self._credits:
            units.check_declared(unit)
        customer = self._customer(self._owner)
        unit = next(iter(self._credits))
        self._id = customer.register(self._client, unit)
        _expire_due()
        try:
            self._before = self._balances()
        except MeterlyNotFoundError:
            # Another ledger's id: from a fixture of real data, for example.
            customer.register_again(self._client, unit)
            self._id = str(customer.customer_id)
            self._before = self._balances()
        self._holds = set(self._live_holds())
        for unit, amount in self._credits.items():
            self._move(unit, amount - self._before[unit].available)
        return customer

    def disable(self) -> None:
        from .ledger.database import write_alias
        from .ledger.models import LedgerCustomer

        using = write_alias()
        if connections[using].needs_rollback:
            # A statement has failed in the test's transaction. Nothing more can be
            # done in it, and its rollback restores everything.
            return
        if not LedgerCustomer.objects.using(using).filter(public_id=self._id).exists():
            # The tables were emptied, or a class of tests was rolled back. Asking the
            # ledger would make a workspace, and nobody would roll that back.
            return
        _expire_due()
        for hold in set(self._live_holds()) - self._holds:
            self._client.release_reservation(hold)
        now = self._balances()
        for unit, before in self._before.items():
            self._move(unit, (before.balance or 0) - (now[unit].balance or 0))

    def _balances(self) -> dict[str, Balance]:
        from .types import Balance

        found = {unit: Balance(unit, 0, 0, 0) for unit in self._credits}
        for account in self._client.get_balances(self._id).balances:
            if account.credit_unit in found:
                found[account.credit_unit] = account
        return found

    def _live_holds(self) -> Iterator[str]:
        from .ledger.models import Hold

        holds = Hold.objects.using(router.db_for_write(Hold)).live()
        return iter(
            holds.filter(
                account__customer__public_id=self._id,
                account__unit__in=self._credits,
            ).values_list("public_id", flat=True)
        )

    def _move(self, unit: str, amount: int) -> None:
        reference = f"{OVERRIDE}{uuid.uuid4()}"
        if amount > 0:
            self._client.add_credits(self._id, amount, unit, reference)
        elif amount < 0:
            self._client.use_credits(self._id, -amount, unit, reference)


# Assertions


class assert_charged(_Block[None]):  # noqa: N801
    """Fail unless a block charges *owner* exactly *amount* credits of *unit*.

    ::

        with assert_charged(user, 25, unit="image_credits"):
            client.post("/posters/")

    *owner* is what ``override_credits`` takes; *unit* defaults to ``DEFAULT_UNIT``.
    What counts is what the ledger has taken when the block ends: the sum of the
    commits and debits. A charge that is decided but not carried out yet fails the
    block, too. The failure names what was charged, and what became of each reservation
    of the block. An exception from the block goes on as it is.
    """

    _ends_after_an_exception = False

    def __init__(self, owner: Any, amount: int, unit: str | None = None) -> None:
        super().__init__()
        self._owner = owner
        self._amount = check_amount(amount, minimum=0)
        self._unit = None if unit is None else check_unit(unit)

    def enable(self) -> None:
        unit = self._unit or units.default()
        if unit is None:
            raise ImproperlyConfigured(
                'Name a unit: assert_charged(user, 25, unit="image_credits"), or set '
                "METERLY['DEFAULT_UNIT']."
            )
        self._begin(unit)

    def _begin(self, unit: str | None) -> None:
        self._counted = unit
        self._client = _embedded(f"{type(self).__name__}()")
        if unit is not None:
            units.check_declared(unit)
        self._payer = self._customer(self._owner)
        self._last = next(_entries(self._client, self._payer), None)
        self._known = dict(self._rows().values_list("pk", "state"))

    def disable(self) -> None:
        self._payer.refresh_from_db(fields=["customer_id"])
        taken = list(self._taken())
        rows = [
            row
            for row in self._rows().order_by("created_at", "pk")
            if self._known.get(row.pk) != row.state
        ]
        charged = sum(-(entry.balance_delta or 0) for entry in taken)
        due = [
            row
            for row in rows
            if row.state in (State.COMMIT_PENDING, State.UNBILLED)
            and self._counts(row.unit)
        ]
        if charged == self._amount and not due:
            return
        raise AssertionError(_story(self._payer, self._wanted(), taken, due, rows))

    def _counts(self, unit: str | None) -> bool:
        return self._counted in (None, unit)

    def _wanted(self) -> str:
        return f"{self._amount} {self._counted}"

    def _rows(self) -> Any:
        return Reservation.objects.using(journal.alias()).filter(customer=self._payer)

    def _taken(self) -> Iterator[LedgerEntry]:
        for entry in _entries(self._client, self._payer):
            if self._last is not None and entry.entry_id == self._last.entry_id:
                return
            if (
                (entry.balance_delta or 0) < 0
                and self._counts(entry.unit)
                and not (entry.reference or "").startswith(OVERRIDE)
            ):
                yield entry


class assert_not_charged(assert_charged):  # noqa: N801
    """Fail if a block charges *owner* anything, in *unit* or, without one, in any unit.

    ::

        with assert_not_charged(user):
            client.post("/posters/", {"title": ""})

    Everything else is as in ``assert_charged``.
    """

    def __init__(self, owner: Any, unit: str | None = None) -> None:
        super().__init__(owner, 0, unit)

    def enable(self) -> None:
        self._begin(self._unit)

    def _wanted(self) -> str:
        return "nothing"


def _entries(client: MeterlyClient, customer: Customer) -> Iterator[LedgerEntry]:
    """Return the customer's entries, the newest first."""
    cursor = None
    while customer.customer_id:
        page = client.list_entries(customer.customer_id, cursor=cursor)
        yield from page.entries
        cursor = page.next_cursor
        if cursor is None:
            return


def _story(
    customer: Customer,
    wanted: str,
    taken: Sequence[LedgerEntry],
    due: Sequence[Reservation],
    rows: Sequence[Reservation],
) -> str:
    """Say what was charged instead of what was *wanted*, and why."""
    charged = _sum((entry.unit, -(entry.balance_delta or 0)) for entry in taken)
    owed = _sum((row.unit, row.owed or row.charge or 0) for row in due)
    still = f", and {owed} are due," if owed else ""
    lines = [
        f"{customer} was charged {charged or 'nothing'}{still} instead of {wanted}."
    ]
    lines += [
        f"  {-(entry.balance_delta or 0)} {entry.unit} for {entry.reference}"
        for entry in reversed(taken)
    ]
    lines.append("Reservations of the block:" if rows else "Nothing was reserved.")
    for row in rows:
        decided = "" if row.charge is None else f", charge {row.charge}"
        error = f" ({row.last_error})" if row.last_error else ""
        offered = ", handed off to a task that has not run" if row.is_offered else ""
        lines.append(
            f"  {row.reference}: {row.amount} {row.unit} held, "
            f"{row.state}{decided}{offered}{error}"
        )
    if any(row.state == State.COMMIT_PENDING for row in due):
        lines.append(
            "A charge that is decided is not carried out yet: call sweep() before the "
            "block ends."
        )
    return "\n".join(lines)


def _sum(amounts: Iterable[tuple[str | None, int]]) -> str:
    sums: dict[str | None, int] = {}
    for unit, amount in amounts:
        sums[unit] = sums.get(unit, 0) + amount
    return " and ".join(f"{amount} {unit}" for unit, amount in sums.items())


def assert_books_balance() -> None:
    """Fail unless all work is settled, and journal and ledger agree about it.

    That is: the ledger's entries rebuild its balances (``meterly_ledger_verify``), no
    reservation and no hold is open, no decision waits to be carried out, and for every
    reservation the ledger has taken exactly what the journal says. Debts are allowed.
    The failure lists every difference.
    """
    _embedded("assert_books_balance()")
    found = list(_differences())
    if found:
        raise AssertionError("\n".join(["The books do not balance.", *found]))


def _differences() -> Iterator[str]:
    from .ledger.database import write_alias
    from .ledger.models import Entry, Hold

    output = io.StringIO()
    try:
        call_command("meterly_ledger_verify", stdout=output, stderr=output)
    except CommandError:
        yield output.getvalue().rstrip()
    holds = {
        hold.public_id: hold for hold in Hold.objects.using(write_alias()).current()
    }
    deltas = dict(
        Entry.objects.using(write_alias())
        .filter(balance_delta__lt=0)
        .values_list("idempotency_key", "balance_delta")
    )
    rows = Reservation.objects.using(journal.alias()).select_related("customer")
    for row in rows.order_by("created_at", "pk"):
        hold = holds.pop(row.reservation_id or "", None)
        taken = -sum(deltas.get(row.wire_key(key), 0) for key in ("commit", "debit"))
        status = None if hold is None else hold.present_status
        if problem := _problem(row, status, taken):
            yield f"{row.reference} ({row.amount} {row.unit}, {row.state}) {problem}"
    for hold in holds.values():
        if hold.present_status == Hold.Status.RESERVED:
            yield (
                f"{hold.reference} ({hold.amount} {hold.account.unit}) is held at the "
                "ledger, and the journal does not know it."
            )


def _problem(row: Reservation, hold: str | None, taken: int) -> str | None:
    """Return what is wrong with *row*, whose *hold* has a status; ``None`` if nothing.

    The ledger has *taken* so many credits for it.
    """
    if row.is_offered:
        return "was handed off to a task that has not run."
    if row.state in State.open():
        return "is still open: end its work, or let it lapse by sweep()."
    if row.is_noted or row.state in (State.RELEASE_PENDING, State.COMMIT_PENDING):
        why = f" ({row.last_error})" if row.last_error else ""
        return f"is decided, and not carried out yet: call sweep().{why}"
    if row.state == State.CONFLICT:
        return "was released by the journal, and committed at the ledger."
    if hold == "reserved":
        return "is over, but its hold is open at the ledger."
    if row.state in (State.COMMITTED, State.UNBILLED):
        # Without a charge it was committed at the ledger before anybody recorded it.
        right = taken if row.charge is None else row.charge - (row.owed or 0)
    else:
        right = 0
    return None if taken == right else f"costs {right}, but the ledger took {taken}."


# Time


def lapse_leases() -> None:
    """Let every lease of the journal lapse, and every decision come due, right now.

    As if a day had passed for the journal since its rows were written. For example,
    the sweeper then takes work that is still running for dead.
    """
    rows = Reservation.objects.using(journal.alias())
    past = from_now(-LONG_AGO)
    rows.filter(lease_until__isnull=False).update(lease_until=past)
    rows.filter(next_attempt_at__isnull=False).update(next_attempt_at=past)


def expire_holds() -> None:
    """Let every hold at the embedded ledger expire, right now.

    The credits return to their customers. Work that succeeds later is charged by a
    direct debit. Raises ``MeterlyUsageError`` if the ledger is not the embedded one.
    """
    _embedded("expire_holds()")
    from .ledger.models import Hold

    holds = Hold.objects.using(router.db_for_write(Hold)).live()
    holds.update(expires_at=from_now(-LONG_AGO))
    _expire_due()


def sweep() -> tuple[int, int]:
    """Let everything lapse and come due as ``lapse_leases`` does, and run the sweeper.

    That is what ``meterly_settle`` does. Returns how many reservations have lapsed, and
    how many decisions were carried out or tried.
    """
    lapse_leases()
    swept = journal.sweep(get_client())
    grants.settle_due(get_client())
    return swept


def _expire_due() -> None:
    call_command("meterly_ledger_expire", stdout=io.StringIO())


# A ledger that fails


@dataclass(frozen=True)
class Altered:
    """A fault: the call is carried out, and its answer goes through *change*."""

    change: Callable[[dict[str, Any]], Any]


Word = Literal["unsent", "lost", "unanswered"]
Fault = Word | BaseException | type[BaseException] | Callable[[], Any] | Altered | None
#: What may stand for a fault, as a text.
WORDS = ("unsent", "lost", "unanswered")


class faults(_Block["faults"]):  # noqa: N801
    """Let calls to the ledger fail in a block of a test.

    ::

        with faults(commit_reservation="unanswered") as line:
            client.post("/posters/")      # charged, but nobody has heard of it
        sweep()                           # the sweeper asks again

    Each argument is a method of ``MeterlyClient`` (or ``everything``, which stands for
    the methods that are not named) and what its calls meet: one fault for all of them,
    or a list of faults for the next ones, one each. A fault is

    - ``"unsent"``: the call never reaches the ledger, and that is known. The ledger is
      down.
    - ``"lost"``: a time-out. The call never reaches the ledger, but nobody knows that.
    - ``"unanswered"``: a time-out, too. The call is carried out; its answer is lost.
    - an exception of ``django_meterly.errors``: a refusal. It is raised, and the call
      is not carried out.
    - a function without arguments, which runs before the call is carried out, for
      example ``expire_holds``.
    - ``Altered``, to change the answer.
    - ``None``: nothing is wrong.

    Meanwhile the ledger is what ``TRANSPORT`` names, but it behaves like a remote one:
    no movement is part of the journal's transaction. The block yields an object with
    ``calls``, all calls that were to be sent, ``operations()``, their names, and
    ``meet()``, which adds faults. Blocks may be nested. Raises ``TypeError`` for an
    unknown method, and ``ValueError`` for an unknown fault.
    """

    def __init__(
        self, everything: Fault = None, **operations: Fault | Sequence[Fault]
    ) -> None:
        super().__init__()
        self._everything = _checked(everything)
        self._script = {
            _operation(name): _listed(value) for name, value in operations.items()
        }

    def enable(self) -> faults:
        self.calls: list[Call] = []
        self._always: dict[str, Fault] = {}
        self._waiting: dict[str, deque[Fault]] = {}
        for operation, value in self._script.items():
            if isinstance(value, list):
                self.meet(operation, *value)
            else:
                self._always[operation] = value
        self._override: override_meterly | None = None
        transport = meterly_settings.TRANSPORT
        if not issubclass(transport, FaultyTransport):
            FaultyTransport.far_end = transport
            self._override = override_meterly(TRANSPORT=FaultyTransport)
            self._override.enable()
        FaultyTransport.lines.append(self)
        return self

    def disable(self) -> None:
        FaultyTransport.lines.remove(self)
        if self._override is not None:
            self._override.disable()
            FaultyTransport.far_end = LEDGER_TRANSPORT
            # Made for this far end. The next block may have the same settings.
            clients._current = None

    def meet(self, operation: str, *faults: Fault) -> None:
        """Let the next calls of *operation* meet *faults*, one each."""
        waiting = self._waiting.setdefault(_operation(operation), deque())
        waiting.extend(map(_checked, faults))

    def operations(self) -> list[str]:
        """Return the names of the calls that were to be sent, in order."""
        return [call.operation for call in self.calls]

    def _next(self, call: Call) -> Fault:
        self.calls.append(call)
        if waiting := self._waiting.get(call.operation):
            return waiting.popleft()
        named = call.operation in self._script
        return self._always.get(call.operation, None if named else self._everything)


class FaultyTransport(Transport):
    """The ledger at the far end of a bad line. ``faults`` says what its calls meet.

    As ``METERLY["TRANSPORT"]`` it is the embedded ledger, but it behaves like a remote
    one. To have another ledger at the far end, set *far_end* in a subclass to its
    transport, or to the dotted path of that.
    """

    far_end: ClassVar[type[Transport] | str] = LEDGER_TRANSPORT
    #: The blocks that are entered, the outermost first.
    lines: ClassVar[list[faults]] = []

    def __init__(self, ledger: Transport) -> None:
        self.ledger = ledger
        self.partial_commit = ledger.partial_commit
        self.thread_sensitive = ledger.thread_sensitive

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ledger!r})"

    @classmethod
    def from_settings(cls, settings: Any) -> FaultyTransport:
        return cls(cls._transport().from_settings(settings))

    @classmethod
    def longest_hold(cls) -> int:
        return cls._transport().longest_hold()

    @classmethod
    def _transport(cls) -> type[Transport]:
        far_end: Any = cls.far_end
        if isinstance(far_end, str):
            far_end = import_string(far_end)
        return far_end  # type: ignore[no-any-return]

    def send(self, call: Call) -> dict[str, Any]:
        met = [line._next(call) for line in self.lines]
        # The innermost block decides, if it has something for this call.
        fault = next((one for one in reversed(met) if one is not None), None)
        if fault == "unsent":
            raise MeterlyNotSentError("refused")
        if fault == "lost":
            raise MeterlyUnknownOutcomeError("read time-out")
        if isinstance(fault, BaseException | type):
            raise fault
        if callable(fault):
            fault()
        answer = self.ledger.send(call)
        if fault == "unanswered":
            raise MeterlyUnknownOutcomeError("read time-out")
        if isinstance(fault, Altered):
            altered: dict[str, Any] = fault.change(answer)
            return altered
        return answer

    def close(self) -> None:
        self.ledger.close()


def _operation(name: str) -> str:
    if name not in ROUTES:
        raise TypeError(
            f"There is no call {name!r}: name a method of MeterlyClient."
            f"{suggestion(name, ROUTES)}"
        )
    return name


def _listed(value: Fault | Sequence[Fault]) -> Fault | list[Fault]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_checked(one) for one in value]
    return _checked(value)


def _checked(fault: Any) -> Fault:
    if isinstance(fault, str) and fault not in WORDS:
        raise ValueError(
            f"A fault is one of {', '.join(WORDS)}, an exception, a function or "
            f"Altered, not {fault!r}."
        )
    if isinstance(fault, type):
        known = issubclass(fault, BaseException)
    else:
        known = isinstance(fault, str | BaseException | Altered | None)
        known = known or callable(fault)
    if not known:
        raise ValueError(f"{fault!r} is not a fault.")
    return cast("Fault", fault)


def _embedded(name: str) -> MeterlyClient:
    """Return a client of the embedded ledger that meets no faults.

    Raises ``MeterlyUsageError``, which says what *name* needs, if the ledger is another
    one: nothing is ever sent to it.
    """
    transport = meterly_settings.TRANSPORT
    if apps.is_installed("django_meterly.ledger"):
        from .ledger.transport import LedgerTransport

        if issubclass(transport, FaultyTransport):
            transport = transport._transport()
        if issubclass(transport, LedgerTransport):
            return MeterlyClient(transport=transport.from_settings(meterly_settings))
    raise MeterlyUsageError(
        f"{name} works on the embedded ledger, and METERLY['TRANSPORT'] is "
        f"{transport.__qualname__}. "
        "In the settings of your tests, add 'django_meterly.ledger' to INSTALLED_APPS "
        f"and set METERLY['TRANSPORT'] to {LEDGER_TRANSPORT!r}. Every call, result and "
        "error is the same there."
    )
