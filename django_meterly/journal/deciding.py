"""Recording how the work ended, before the ledger hears of it.

``settling`` carries the recorded decision out.
"""

from __future__ import annotations

from django.db import transaction
from django.db.models import Case, F, When

from ..conf import meterly_settings
from ..db import from_now
from ..models import Reservation
from . import attempts
from .rows import State, alias, decided, move


def record_success(row: Reservation, charge: int, *, fence: int | None = None) -> bool:
    """Record that the work succeeded and costs *charge* credits.

    A success counts even if the lease has lapsed or the row was released: finished work
    is charged. It does not count if another process has moved the *fence*. Returns
    whether the row took the decision.
    """
    owed = decided(charge=charge)
    return move(
        row, [State.RESERVED], State.COMMIT_PENDING, fence, **owed
    ) or record_late_success(row, charge, fence)


def record_late_success(row: Reservation, charge: int, fence: int | None) -> bool:
    """Record the success of an attempt that was given up; return if it is owed now.

    A key is charged once. If another attempt is charged, this success is dropped. While
    another attempt is open, or waits to be released, this success is noted: the sweeper
    decides later.
    """
    using = alias()
    late = [State.RELEASE_PENDING, State.RELEASED]
    with transaction.atomic(using=using):
        others = attempts.standing(using, row)
        charged = any(other.state in State.charged() for other in others)
        waits = any(
            other.state in State.open()
            or (other.state == State.RELEASE_PENDING and other.stuck_at is None)
            for other in others
        )
        if not charged and not waits:
            owed = decided(charge=charge)
            return move(row, late, State.COMMIT_PENDING, fence, **owed)
        again = None if charged else from_now(meterly_settings.LEASE_GRACE)
        rows = Reservation.objects.using(using).filter(pk=row.pk, state__in=late)
        if fence is not None:
            rows = rows.filter(fence=fence)
        rows.update(
            charge=None if charged else charge,
            # A row that waits for its release keeps its time for that.
            next_attempt_at=Case(
                When(state=State.RELEASED, then=again), default=F("next_attempt_at")
            ),
        )
    return False


def record_failure(row: Reservation, *, fence: int | None = None) -> bool:
    """Record that the work failed, or is free.

    Returns whether the row took the decision. If not, the row keeps an earlier
    decision, or another process has moved the *fence*.
    """
    return move(
        row,
        [State.RESERVED],
        State.RELEASE_PENDING,
        fence,
        **decided(charge=None),
    )


def presume(row: Reservation, charge: int, *, fence: int, lease: float) -> bool:
    """Record that the handler has returned, and that *charge* is presumed to be owed.

    This is for work whose response is not rendered or sent yet. If nobody decides
    within *lease* seconds, the sweeper charges it. If the lease has lapsed before, this
    is a late success: the charge is decided now. Returns whether the row took it.
    """
    return move(
        row,
        [State.RESERVED],
        State.RESERVED,
        fence,
        charge=charge,
        lease_until=from_now(lease),
    ) or record_success(row, charge, fence=fence)
