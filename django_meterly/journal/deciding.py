"""Recording how the work ended, before the ledger hears of it."""

from __future__ import annotations

from django.db import transaction
from django.db.models import Case, F, When

from ..conf import meterly_settings
from ..db import from_now
from ..models import Reservation
from . import attempts
from .rows import State, alias, decided, move


def record_success(row: Reservation, charge: int, *, fence: int | None = None) -> bool:
    """Record that the work succeeded and *charge* credits are owed.

    Also after the lease has lapsed, and after the release: work that was done
    is paid for; but not when somebody else has the *fence*. Returns whether the
    row took the decision.
    """
    owed = decided(charge=charge)
    return move(
        row, [State.RESERVED], State.COMMIT_PENDING, fence, **owed
    ) or record_late_success(row, charge, fence)


def record_late_success(row: Reservation, charge: int, fence: int | None) -> bool:
    """Record the success of an attempt that was given up; return whether it is owed.

    Its key is charged once. The success is dropped if another attempt is charged, and
    noted while another one is open, or is not released yet.
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
            # One that is not released yet is due for that.
            next_attempt_at=Case(
                When(state=State.RELEASED, then=again), default=F("next_attempt_at")
            ),
        )
    return False


def record_failure(row: Reservation, *, fence: int | None = None) -> bool:
    """Record that the work failed, or is to cost nothing.

    Returns whether the row took the decision; if not, the row has another one,
    which stands, or somebody else has the *fence*.
    """
    return move(
        row,
        [State.RESERVED],
        State.RELEASE_PENDING,
        fence,
        **decided(charge=None),
    )


def presume(row: Reservation, charge: int, *, fence: int, lease: float) -> bool:
    """Record that the work has returned well, and owes *charge* if it lapses.

    For work whose response is still to be rendered or sent. If nobody decides within
    *lease* seconds, the sweeper charges it. Returns whether the row took it: when the
    lease had lapsed before, this is a late success, and the charge is decided now.
    """
    return move(
        row,
        [State.RESERVED],
        State.RESERVED,
        fence,
        charge=charge,
        lease_until=from_now(lease),
    ) or record_success(row, charge, fence=fence)
