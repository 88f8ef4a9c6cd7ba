"""Check the books, let leases and holds end, and run the sweeper."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from django.core.management import CommandError, call_command
from django.db import router

from .. import grants, journal
from ..client import get_client
from ..db import from_now
from ..models import Reservation
from .failures import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

State = Reservation.State

#: How many seconds in the past a lease or hold ends that a test ends now.
LONG_AGO = 86400.0


def assert_books_balance() -> None:
    """Fail unless all work is settled, and journal and ledger agree about it.

    It checks that

    - the ledger's entries rebuild its balances (``meterly_ledger_verify``),
    - no reservation and no hold is open,
    - no decision waits to be carried out,
    - the ledger has taken exactly the charge of each reservation in the journal.

    Debts are allowed. The failure lists every difference.
    """
    embedded("assert_books_balance()")
    found = list(_differences())
    if found:
        raise AssertionError("\n".join(["The books do not balance.", *found]))


def _differences() -> Iterator[str]:
    from ..ledger.database import write_alias
    from ..ledger.models import Entry, Hold

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
    """Return what is wrong with *row*, or ``None``.

    *hold* is the status of its hold, and *taken* the credits that the ledger has taken.
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
        # Without a charge, it was committed before the journal recorded the decision.
        right = taken if row.charge is None else row.charge - (row.owed or 0)
    else:
        right = 0
    return None if taken == right else f"costs {right}, but the ledger took {taken}."


def lapse_leases() -> None:
    """Let every lease of the journal lapse, and every decision come due, right now.

    The journal then looks as if a day had passed. For example, the sweeper treats work
    that is still running as dead.
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
    embedded("expire_holds()")
    from ..ledger.models import Hold

    holds = Hold.objects.using(router.db_for_write(Hold)).live()
    holds.update(expires_at=from_now(-LONG_AGO))
    expire_due()


def sweep() -> tuple[int, int]:
    """Call ``lapse_leases``, then run the sweeper like ``meterly_settle``.

    Returns how many reservations have lapsed, and how many decisions were carried out
    or tried.
    """
    lapse_leases()
    swept = journal.sweep(get_client())
    grants.settle_due(get_client())
    return swept


def expire_due() -> None:
    call_command("meterly_ledger_expire", stdout=io.StringIO())
