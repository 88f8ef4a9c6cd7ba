"""A reservation's row: its database, and the conditional UPDATE that moves it.

Every transition of the state machine is a call of ``move``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import router

from .. import signals
from ..conf import meterly_settings
from ..db import DatabaseNow, from_now, on_live_connection
from ..models import Reservation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.dispatch import Signal


State = Reservation.State


#: Seconds that a settlement may take inside a request. The decision is on record, so
#: the sweeper can finish it.
SETTLE_TIMEOUT = 2.0


#: Denied rows are kept for a day: there may be many of them.
DENIED_RETENTION = 86400.0


#: The ``reservation_id`` of a row whose reserve the ledger has refused. ``None`` means
#: that it is not known whether a hold exists.
NO_HOLD = ""


def alias() -> str:
    """Return the database the journal is written to."""
    return router.db_for_write(Reservation)


def decided(**fields: Any) -> dict[str, Any]:
    """Return the columns that every decision sets, and *fields*."""
    return {
        # The process that decides settles at once. The sweeper waits that long for it.
        "next_attempt_at": from_now(meterly_settings.DEADLINE),
        "lease_until": None,
        "decided_at": DatabaseNow(),
        # The ledger may have refused an earlier decision.
        "stuck_at": None,
        "refusals": 0,
        **fields,
    }


def move(
    row: Reservation,
    sources: Iterable[str],
    target: str,
    held: int | None = None,
    /,
    **fields: Any,
) -> bool:
    """Move *row* from one of *sources* to *target* by one conditional UPDATE.

    If the caller *held* a fence, the row moves only while that is still its fence.
    Returns whether the row was moved. For example, a success is
    ``move(row, [State.RESERVED], State.COMMIT_PENDING, fence, **decided(charge=5))``.
    """
    if target in State.final():
        fields["settled_at"] = DatabaseNow()
    using = alias()
    rows = Reservation.objects.using(using).filter(pk=row.pk, state__in=list(sources))
    if held is not None:
        rows = rows.filter(fence=held)
    changed = on_live_connection(using, lambda: rows.update(state=target, **fields))
    if changed:
        row.state = target
        for name in fields.keys() & {"charge", "fence", "owed"}:
            setattr(row, name, fields[name])
    return bool(changed)


OUTCOMES: dict[str, Signal] = {
    State.COMMITTED: signals.credits_committed,
    State.RELEASED: signals.credits_released,
}


def announce(signal: Signal, row: Reservation) -> None:
    """Send *signal* with *row* once the open transaction is committed."""
    signals.announce(signal, Reservation, using=alias(), reservation=row)
