"""The calls of a row at the ledger.

Every process derives the same idempotency key and the same body from the row. So the
ledger applies a call once, even if two processes send it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..conf import meterly_settings
from ..errors import (
    OUTAGE,
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
)
from .rows import SETTLE_TIMEOUT, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client import MeterlyClient
    from ..models import Reservation
    from ..types import ReservationResult

logger = logging.getLogger(__name__)


def ask(
    row: Reservation, send: Callable[[], ReservationResult]
) -> tuple[ReservationResult | MeterlyError, str]:
    """Ask for the hold of *row* by *send*; return the answer and the new state.

    Sets ``reservation_id`` or ``last_error`` on *row*, for the caller to record.
    Raises the errors in ``OUTAGE``, and ``MeterlyIdempotencyMismatchError``, which
    leaves nothing to record.
    """
    try:
        held = send()
    except MeterlyInsufficientCreditsError as exc:
        return exc, State.DENIED
    except (*OUTAGE, MeterlyIdempotencyMismatchError):
        raise
    except MeterlyError as exc:
        row.last_error = str(exc)
        return exc, State.FAILED
    if held.is_held:
        row.reservation_id = held.reservation_id
        return held, State.RESERVED
    # The journal was lost or restored since this key was used, and its hold has ended.
    over = State.COMMITTED if held.status == "committed" else State.RELEASED
    duplicate = MeterlyDuplicateError(
        f"The ledger knows the idempotency key {row.key!r} already: its "
        f"reservation is {held.status}.",
        state=str(held.status),
    )
    return duplicate, over


def give_back(client: MeterlyClient, row: Reservation, held: ReservationResult) -> None:
    """Release *held*, which the row does not name."""
    try:
        client.within(SETTLE_TIMEOUT, attempts=1).release_reservation(
            held.reservation_id, idempotency_key=row.wire_key("release")
        )
    except MeterlyError as exc:
        logger.warning("Reservation %s ends with its time: %s", row.pk, exc)


def hold(client: MeterlyClient, row: Reservation) -> ReservationResult:
    """Send the reserve of *row*."""
    return client.reserve_credits(
        customer_id(client, row),
        row.amount,
        unit=row.unit,
        reference=row.reference,
        idempotency_key=row.wire_key("reserve"),
        ttl_seconds=row.ttl_seconds,
    )


def customer_id(client: MeterlyClient, row: Reservation) -> str:
    """Return the ledger's id of the customer, who is registered there if need be."""
    unit = meterly_settings.DEFAULT_UNIT or row.unit
    return row.customer.ensure_registered(client, unit)


def extend(
    client: MeterlyClient, row: Reservation, name: str, seconds: int | None = None
) -> bool:
    """Extend the hold of *row* to *seconds* from now, by default to ``ttl_seconds``.

    *name* is part of the idempotency key: each extension needs another one. Returns
    ``False`` if the ledger says that the hold has ended. If the ledger cannot be asked,
    or does not support the call, the hold may still exist: that is ``True``.
    """
    if not row.reservation_id:
        return True
    try:
        extended = client.within(SETTLE_TIMEOUT, attempts=1).extend_reservation(
            row.reservation_id,
            row.ttl_seconds if seconds is None else seconds,
            idempotency_key=row.wire_key(f"extend-{name}"),
        )
        return extended.is_held
    except (
        MeterlyReservationExpiredError,
        MeterlyReservationReleasedError,
        MeterlyReservationCommittedError,
    ):
        return False
    except MeterlyError as exc:
        logger.warning("The hold of reservation %s is not extended: %s", row.pk, exc)
    return True


def commit(client: MeterlyClient, row: Reservation, charge: int) -> int:
    """Commit *charge* or the whole hold of *row*, the smaller one; return how much."""
    assert row.reservation_id is not None
    held = min(charge, row.amount)
    client.commit_reservation(
        row.reservation_id,
        amount=None if held == row.amount else held,
        idempotency_key=row.wire_key("commit"),
    )
    return held
