"""Debts: work that was done and could not be charged (state ``unbilled``)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from django.db import Error, transaction
from django.db.models import F

from ..conf import meterly_settings
from ..db import refused_by_database
from ..errors import MeterlyDebtError, MeterlyUnavailableError
from ..models import Customer, Reservation
from .rows import SETTLE_TIMEOUT, State, alias, move
from .settling import Outcome, postpone, settle

if TYPE_CHECKING:
    from ..client import MeterlyClient


def collect(client: MeterlyClient, customer: Customer, unit: str) -> list[Reservation]:
    """Debit the debts of *customer* in *unit*, the oldest debt first.

    Stuck debts are tried, too. Stops at the first debt for which there are too few
    credits. Returns the debts that are left: each says how much is *owed*, and the
    first one has a *shortage*. Raises ``MeterlyUnavailableError`` if the ledger cannot
    be asked.
    """
    using = alias()
    debts = Reservation.objects.using(using).debts().filter(customer=customer)
    handled = sys.exception()
    for row in debts.filter(unit=unit).select_related("customer"):
        try:
            with client.transport.unit_of_work(using):
                # Everybody locks the row before its account.
                if not debts.filter(pk=row.pk).update(
                    settle_attempts=F("settle_attempts") + 1
                ):
                    continue
                outcome = settle(client, row, timeout=SETTLE_TIMEOUT)
        except Error as exc:
            refusal = refused_by_database(exc, handled)
            if refusal is None:
                raise MeterlyUnavailableError(f"The database failed: {exc}") from exc
            outcome = postpone(row, refusal, Outcome.REFUSED)
        if outcome in {Outcome.UNREACHED, Outcome.LEFT}:
            raise MeterlyUnavailableError(f"The debt {row.pk} cannot be asked for.")
        if row.state == State.UNBILLED:
            left = debts.filter(unit=unit).exclude(pk=row.pk)
            return [row, *left]
    _clear_owing(using, customer)
    return []


def _clear_owing(using: str, customer: Customer) -> None:
    """Clear ``customer.owes``, unless a debt is left in any unit."""
    customers = Customer.objects.using(using).filter(pk=customer.pk)
    with transaction.atomic(using=using):
        # This locks the customer: another process that records a debt now waits.
        customers.update(owes=True)
        debts = Reservation.objects.using(using).debts().filter(customer=customer)
        # FOR UPDATE makes MySQL read the present rows and not its older snapshot.
        if debts.select_for_update().first() is None:
            customers.update(owes=False)
            customer.owes = False


def refuse_debtor(client: MeterlyClient, row: Reservation) -> None:
    """Raise ``MeterlyDebtError`` if the customer of *row* owes credits of its unit.

    The debts are collected first. ``ON_DEBT = "allow"`` refuses nobody.
    """
    customer, unit = row.customer, row.unit
    if not customer.owes or meterly_settings.ON_DEBT == "allow":
        return
    debts = collect(client, customer, unit)
    if not debts:
        return
    owed = sum(row.owed or 0 for row in debts)
    shortage = debts[0].shortage
    available = shortage.available if shortage else 0
    raise MeterlyDebtError(
        f"{customer} owes {owed} credits of {unit!r}, {available} are available.",
        details={
            "required": owed + row.amount,
            "available": available,
            "reserved": shortage.reserved if shortage else 0,
            "unit": unit,
            "owed": owed,
        },
    )


def write_off(row: Reservation) -> bool:
    """Write off the debt *row*: it is committed, and nothing more is charged for it.

    The row keeps the amount it *owed*. Returns whether it was a debt.
    """
    written_off = move(
        row,
        [State.UNBILLED],
        State.COMMITTED,
        # Keeps the row for ever: only it says that the key was charged.
        lapsed=True,
        next_attempt_at=None,
        stuck_at=None,
    )
    if written_off:
        _clear_owing(alias(), row.customer)
    return written_off
