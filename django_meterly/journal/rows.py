"""A reservation's row: its database, and the conditional UPDATE that moves it."""

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


#: Seconds a settlement may take inside a request: the row is durable, and the
#: sweeper follows.
SETTLE_TIMEOUT = 2.0


#: How long a row is kept that was denied: a day. There may be many.
DENIED_RETENTION = 86400.0


#: The ``reservation_id`` of a row that is known to have no hold; ``None`` is one
#: of which that is not known.
NO_HOLD = ""


def alias() -> str:
    """Return the database the journal is written to."""
    return router.db_for_write(Reservation)


def decided(**fields: Any) -> dict[str, Any]:
    return {
        # Whoever decides settles at once; the sweeper leaves them the time for it.
        "next_attempt_at": from_now(meterly_settings.DEADLINE),
        "lease_until": None,
        "decided_at": DatabaseNow(),
        # The ledger may have refused the decision before this one.
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

    With the fence that the caller *held*, only if it is still the row's.
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
    signals.announce(signal, Reservation, using=alias(), reservation=row)
