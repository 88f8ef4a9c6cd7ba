"""Give credits to a test's customers, and check how many were charged."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections, router

from .. import journal, units
from ..errors import MeterlyNotFoundError
from ..models import Customer, Reservation
from ..types import Balance
from ..wire import check_amount, check_unit
from .blocks import Block
from .books import expire_due
from .failures import embedded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..client import MeterlyClient
    from ..types import LedgerEntry

State = Reservation.State

#: Begins the references of the credits that ``override_credits`` moves. The assertions
#: do not count these as charges.
OVERRIDE = "override_credits:"


class override_credits(Block[Customer]):  # noqa: N801
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
        self._client = embedded("override_credits()")
        for unit in self._credits:
            units.check_declared(unit)
        customer = self._customer(self._owner)
        unit = next(iter(self._credits))
        self._id = customer.register(self._client, unit)
        expire_due()
        try:
            self._before = self._balances()
        except MeterlyNotFoundError:
            # The id is from another ledger, for example in a fixture of real data.
            customer.register_again(self._client, unit)
            self._id = str(customer.customer_id)
            self._before = self._balances()
        self._holds = set(self._live_holds())
        for unit, amount in self._credits.items():
            self._move(unit, amount - self._before[unit].available)
        return customer

    def disable(self) -> None:
        from ..ledger.database import write_alias
        from ..ledger.models import LedgerCustomer

        using = write_alias()
        if connections[using].needs_rollback:
            # A statement has failed in the test's transaction. Nothing more can be
            # done in it, and its rollback restores everything.
            return
        if not LedgerCustomer.objects.using(using).filter(public_id=self._id).exists():
            # The tables were emptied, or a class of tests was rolled back. A call would
            # create a workspace at the ledger, which nobody would roll back.
            return
        expire_due()
        for hold in set(self._live_holds()) - self._holds:
            self._client.release_reservation(hold)
        now = self._balances()
        for unit, before in self._before.items():
            self._move(unit, (before.balance or 0) - (now[unit].balance or 0))

    def _balances(self) -> dict[str, Balance]:
        found = {unit: Balance(unit, 0, 0, 0) for unit in self._credits}
        for account in self._client.get_balances(self._id).balances:
            if account.credit_unit in found:
                found[account.credit_unit] = account
        return found

    def _live_holds(self) -> Iterator[str]:
        from ..ledger.models import Hold

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


class assert_charged(Block[None]):  # noqa: N801
    """Fail unless a block charges *owner* exactly *amount* credits of *unit*.

    ::

        with assert_charged(user, 25, unit="image_credits"):
            client.post("/posters/")

    *owner* is the same as for ``override_credits``, and *unit* defaults to
    ``DEFAULT_UNIT``. The ledger's commits and debits count, up to the end of the block.
    A charge that is decided but not carried out yet fails the block, too. The failure
    names the charges and the state of each reservation of the block. An exception from
    the block is raised as it is.
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
        self._client = embedded(f"{type(self).__name__}()")
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

    Otherwise it is the same as ``assert_charged``.
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
    """Return the message that says what was charged and why, and what was *wanted*."""
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
