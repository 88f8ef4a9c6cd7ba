"""The attempts at one idempotency key: at most one of them is charged."""

from __future__ import annotations

from django.db.models import F

from ..errors import MeterlyDuplicateError, MeterlyIdempotencyMismatchError
from ..models import Customer, Reservation
from .rows import State, alias


def number(using: str, row: Reservation) -> None:
    """Make *row* the next attempt at its key, with a fence above the last one's.

    Raises ``MeterlyDuplicateError`` if the last attempt may still be charged, and
    ``MeterlyIdempotencyMismatchError`` if the key was used for something else.
    """
    last = (
        Reservation.objects.using(using)
        .filter(customer=row.customer, key=row.key)
        .order_by("-attempt")
        .first()
    )
    if last is None:
        return
    given_up = (*State.free(), State.RELEASE_PENDING)
    # A given-up attempt charged nothing, so the next one may cost another amount.
    if (
        last.name != row.name
        or last.unit != row.unit
        or (last.amount != row.amount and last.state not in given_up)
    ):
        raise MeterlyIdempotencyMismatchError(
            f"The idempotency key {row.key!r} was used for something else before: "
            f"{last.amount} {last.unit} for {last.name or 'guard()'!r}, and not "
            f"{row.amount} {row.unit} for {row.name or 'guard()'!r}."
        )
    if last.state not in State.free():
        raise refusal(last)
    row.attempt = last.attempt + 1
    row.fence = last.fence - last.fence % 2 + 2


def standing(using: str, row: Reservation) -> list[Reservation]:
    """Lock the attempts at the key of *row*; return the others that may be charged.

    The locks last until the open transaction ends. Until then nobody opens another
    attempt at this key, and nobody charges one that was released.
    """
    attempts = (
        Reservation.objects.using(using)
        .filter(customer=row.customer_id, key=row.key)
        # These are never charged, and there may be many.
        .exclude(state__in=[State.DENIED, State.FAILED])
    )
    # An UPDATE locks them on every database, and on SQLite before the first read.
    attempts.update(fence=F("fence"))
    others = attempts.standing().exclude(pk=row.pk).order_by("attempt")
    # FOR UPDATE makes MySQL read the present rows and not its older snapshot.
    return list(others.select_for_update())


def is_tried_again(row: Reservation) -> bool:
    """Return whether there is a later attempt at the key of *row*."""
    later = Reservation.objects.using(alias()).filter(
        customer=row.customer_id, key=row.key, attempt__gt=row.attempt
    )
    return later.exists()


def is_opened(using: str, row: Reservation) -> bool:
    """Return whether the attempt that *row* is about to open is in the journal."""
    attempt = Reservation.objects.using(using).filter(
        customer=row.customer_id, key=row.key, attempt=row.attempt
    )
    return attempt.exists()


def in_the_way(customer: Customer, key: str) -> MeterlyDuplicateError | None:
    """Return why *key* cannot be tried now; ``None`` if it is free."""
    rows = Reservation.objects.using(alias()).filter(customer=customer, key=key)
    row = rows.standing().order_by("-attempt").first()
    return None if row is None else refusal(row)


def refusal(row: Reservation) -> MeterlyDuplicateError:
    """Return the error for a key that the attempt *row* uses."""
    # A released attempt that may be charged has noted a late success.
    in_progress = row.state in (*State.open(), State.RELEASE_PENDING, State.RELEASED)
    return MeterlyDuplicateError(
        f"The idempotency key {row.key!r} "
        + ("is in use right now" if in_progress else "was used already")
        + f" (reservation {row.state}).",
        state=row.state,
        reference=row.reference,
        in_progress=in_progress,
    )
