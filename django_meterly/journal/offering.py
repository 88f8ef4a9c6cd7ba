"""Work that another process takes over: offer, claim, withdraw, and the beat.

A view offers its work to a Celery task, and the worker claims it. The row's *fence*
says who may decide; ``journal`` explains it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..conf import meterly_settings
from ..db import DatabaseNow, from_now
from ..models import Customer, Reservation
from . import calls, deciding
from .rows import SETTLE_TIMEOUT, State, alias, decided, move
from .settling import settle

if TYPE_CHECKING:
    from ..client import MeterlyClient


def offer(
    row: Reservation, *, fence: int, lease: float | None = None, **fields: Any
) -> bool:
    """Offer the work of *row*; return whether the row was still this process's.

    The process that claims the work decides. The offer lapses after *lease* seconds, by
    default with the row's lease.
    """
    if lease is not None:
        fields["lease_until"] = from_now(lease)
    return move(row, [State.RESERVED], State.RESERVED, fence, fence=fence + 1, **fields)


def withdraw(client: MeterlyClient, reservation_id: str) -> None:
    """Release work that was offered, unless a process has claimed it."""
    row = Reservation.objects.using(alias()).filter(pk=reservation_id).first()
    if (
        row is not None
        and row.is_offered
        and deciding.record_failure(row, fence=row.fence)
    ):
        settle(client, row, timeout=SETTLE_TIMEOUT)


def claim(client: MeterlyClient, customer: Customer, key: str) -> Reservation | None:
    """Claim the work of *key* that was offered, or whose worker has died.

    Returns the row, with a fence that belongs to the caller now. Returns ``None`` if
    the last attempt at the key does not exist, is decided, or has a lease that still
    runs. If its hold has ended, the attempt is released, and the result is ``None``,
    too."""
    using = alias()
    row = (
        Reservation.objects.using(using)
        .select_related("customer")
        .filter(customer=customer, key=key)
        .annotate(now=DatabaseNow())
        .order_by("-attempt")
        .first()
    )
    if row is None or row.state != State.RESERVED:
        return None
    offered = row.is_offered
    free = Reservation.objects.using(using).filter(
        pk=row.pk, state=State.RESERVED, fence=row.fence, charge=None
    )
    if not offered:
        free = free.lapsed()
    fence = row.fence + (1 if offered else 2)
    if not free.update(fence=fence, lease_until=from_now(meterly_settings.LEASE_GRACE)):
        return None
    row.fence = fence
    age = (row.now - row.created_at).total_seconds()  # type: ignore[attr-defined]
    # A hold that was offered a moment ago exists. The hold of a worker that has died
    # may have been charged while the database was down, so the ledger is asked.
    if (offered and age < row.ttl_seconds / 2) or calls.extend(client, row, f"{fence}"):
        return row
    # Without a hold the work would be paid by a debit, which may find too few credits.
    # A new attempt reserves first.
    if move(
        row, [State.RESERVED], State.RELEASE_PENDING, fence, lapsed=True, **decided()
    ):
        row.lapsed = True
        settle(client, row, timeout=SETTLE_TIMEOUT)
    return None


def beat(row: Reservation, *, fence: int) -> bool:
    """Renew the lease of *row* to ``LEASE_GRACE``; return whether *fence* is its fence.

    Work that beats is still running, so a beat takes a presumed charge back.
    """
    return move(
        row,
        [State.RESERVED],
        State.RESERVED,
        fence,
        lease_until=from_now(meterly_settings.LEASE_GRACE),
        charge=None,
    )
