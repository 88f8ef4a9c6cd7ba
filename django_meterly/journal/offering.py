"""Work that another process takes over: offer, claim, withdraw, and the beat."""

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
    """Offer the work of *row*: the process that claims it decides.

    The offer lasts *lease* seconds, or as long as the row's lease. Then it lapses.
    """
    if lease is not None:
        fields["lease_until"] = from_now(lease)
    return move(row, [State.RESERVED], State.RESERVED, fence, fence=fence + 1, **fields)


def withdraw(client: MeterlyClient, reservation_id: str) -> None:
    """Release what was offered, unless it was claimed."""
    row = Reservation.objects.using(alias()).filter(pk=reservation_id).first()
    if (
        row is not None
        and row.is_offered
        and deciding.record_failure(row, fence=row.fence)
    ):
        settle(client, row, timeout=SETTLE_TIMEOUT)


def claim(client: MeterlyClient, customer: Customer, key: str) -> Reservation | None:
    """Claim the work of *key* that was offered, or whose worker has died.

    The row's fence is then the caller's. Returns ``None`` if there is nothing to
    claim: the last attempt has a good lease, or is decided, or does not exist. If
    its hold is gone, the attempt is released, and there is nothing to claim either.
    """
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
    # A hold that was offered a moment ago is there. One whose worker has died may
    # have been charged while the database was down.
    if (offered and age < row.ttl_seconds / 2) or calls.extend(client, row, f"{fence}"):
        return row
    # It would be paid for by a debit, which may find nothing: rather try again.
    if move(
        row, [State.RESERVED], State.RELEASE_PENDING, fence, lapsed=True, **decided()
    ):
        row.lapsed = True
        settle(client, row, timeout=SETTLE_TIMEOUT)
    return None


def beat(row: Reservation, *, fence: int) -> bool:
    """Renew the lease of *row* to ``LEASE_GRACE``; return whether it is still ours.

    Work that beats is not done: if it was presumed to be, it is not any more.
    """
    return move(
        row,
        [State.RESERVED],
        State.RESERVED,
        fence,
        lease_until=from_now(meterly_settings.LEASE_GRACE),
        charge=None,
    )
