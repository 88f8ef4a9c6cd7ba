"""The calls of a row at the ledger: the same key and body in every process."""

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
    """Have *send* send the reserve of *row*; return what the ledger answers.

    That is the answer, and the state it brings *row* to; what else is to be on
    record of it is set on *row*. Raises ``OUTAGE``, and
    ``MeterlyIdempotencyMismatchError``, of which nothing is to be on record.
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
    # A key from before the journal was lost or restored: that hold is over.
    over = State.COMMITTED if held.status == "committed" else State.RELEASED
    duplicate = MeterlyDuplicateError(
        f"The ledger knows the idempotency key {row.key!r} already: its "
        f"reservation is {held.status}.",
        state=str(held.status),
    )
    return duplicate, over


def give_back(client: MeterlyClient, row: Reservation, held: ReservationResult) -> None:
    """Release a hold that the row knows nothing of."""
    try:
        client.within(SETTLE_TIMEOUT, attempts=1).release_reservation(
            held.reservation_id, idempotency_key=row.wire_key("release")
        )
    except MeterlyError as exc:
        logger.warning("Reservation %s ends with its time: %s", row.pk, exc)


def hold(client: MeterlyClient, row: Reservation) -> ReservationResult:
    """Send the reserve of *row*: the same key and body whoever sends it."""
    return client.reserve_credits(
        customer_id(client, row),
        row.amount,
        unit=row.unit,
        reference=row.reference,
        idempotency_key=row.wire_key("reserve"),
        ttl_seconds=row.ttl_seconds,
    )


def customer_id(client: MeterlyClient, row: Reservation) -> str:
    unit = meterly_settings.DEFAULT_UNIT or row.unit
    return row.customer.ensure_registered(client, unit)


def extend(
    client: MeterlyClient, row: Reservation, name: str, seconds: int | None = None
) -> bool:
    """Let the hold of *row* last for *seconds* from now, where the ledger allows it.

    That is ``ttl_seconds`` again by default. *name* tells this extension from the
    others. Returns whether there may still be a hold; when the ledger does not know
    the call, or cannot be asked, there may.
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
    """Commit what the hold of *row* covers of *charge*; return how much that is."""
    assert row.reservation_id is not None
    held = min(charge, row.amount)
    client.commit_reservation(
        row.reservation_id,
        amount=None if held == row.amount else held,
        idempotency_key=row.wire_key("commit"),
    )
    return held
