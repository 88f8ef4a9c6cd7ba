"""Spend credits: use them at once, or reserve, commit, release and extend a hold.

``service`` calls these functions, for the in-process transport and for the REST API. A
reserve, for example, goes this way:

1. ``reserve`` puts what the caller asks for into a ``Spending``.
2. ``postgresql`` or ``portable`` moves the credits and answers with a code. See
   ``movements`` for the codes, and for the reason why there are two ways.
3. If the code is ``due``, expired holds still count as reserved. ``expiry`` expires
   them, and step 2 is repeated.
4. ``refusals`` makes an error of any other code that is not a success.
5. The answer becomes a ``HoldRecord``.

Locks are taken in one order everywhere: holds (by primary key), then accounts. Two
movements therefore never wait for each other. Times are the database's.

*workspace* is a primary key or a name: PostgreSQL finds a workspace by its name in the
same round trip. A *statement* is carried out together with the movement, and only
PostgreSQL can do that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from django.db import IntegrityError, transaction

from ..db import DatabaseNow, from_now
from ..errors import MeterlyReservationExpiredError
from . import expiry, portable, postgresql, refusals
from .conf import ledger_settings
from .customers import ensure_workspace
from .database import retried, write_alias
from .idempotency import Request, fingerprint_of, text_of
from .models import Entry, Hold, entry_id, hold_id
from .movements import UNKNOWN, Closed, Closing, Spending, Spent
from .results import AccountBalance, EntryRecord, HoldRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..transports.base import Statement
    from .movements import Way

AnswerT = TypeVar("AnswerT", Spent, Closed)

DEFAULT_TTL_SECONDS = 300

#: Each try expires all holds that are due and in the way. A third try is rare.
_MOST_TRIES = 20


# Spending


@retried
def use(
    workspace: int | str,
    customer_id: str,
    *,
    amount: int,
    unit: str | None = None,
    reference: str,
    description: str = "",
    idempotency_key: str,
) -> EntryRecord:
    """Take credits of *unit* (or the customer's default one) at once, without a hold.

    Raises ``MeterlyNotFoundError``, ``MeterlyInsufficientCreditsError`` and
    ``MeterlyInvalidRequestError`` (an amount below 1).
    """
    asked: dict[str, Any] = {
        "customer_id": customer_id,
        "amount": amount,
        "unit": unit,
        "reference": reference,
        "description": description,
    }
    spending = Spending(
        workspace=workspace,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint_of("use_credits", idempotency_key, **asked),
        **asked,
        entry_id=entry_id(),
    )
    answer = _spend(spending)
    assert answer.entry_id is not None
    assert answer.created_at is not None
    return EntryRecord(
        entry_id=answer.entry_id,
        kind=Entry.Kind.USED.value,
        amount=amount,
        balance_delta=-amount,
        reserved_delta=0,
        account=AccountBalance.after(answer, customer_id),
        reference=reference,
        description=description,
        created_at=answer.created_at,
        replayed=answer.code == "replayed",
    )


@retried
def reserve(
    workspace: int | str,
    customer_id: str,
    *,
    amount: int,
    unit: str | None = None,
    reference: str,
    ttl_seconds: int | None = None,
    idempotency_key: str,
    statement: Statement | None = None,
) -> HoldRecord:
    """Hold credits of *unit* (or the customer's default one) for *ttl_seconds*.

    The default is 300 seconds, or ``METERLY_LEDGER["MAX_TTL"]`` if that is less. Raises
    ``MeterlyNotFoundError``, ``MeterlyInsufficientCreditsError`` and
    ``MeterlyInvalidRequestError`` (an amount below 1).

    A *statement* is for PostgreSQL: it finds the customer and the scope of the key.
    """
    asked: dict[str, Any] = {
        "customer_id": customer_id,
        "amount": amount,
        "unit": unit,
        "reference": reference,
    }
    if statement is None:
        fingerprint = fingerprint_of(
            "reserve_credits", idempotency_key, **asked, ttl_seconds=ttl_seconds
        )
    else:
        # PostgreSQL digests this text once it has found the customer.
        told = {**asked, "customer_id": UNKNOWN, "ttl_seconds": ttl_seconds}
        fingerprint = text_of("reserve_credits", UNKNOWN + idempotency_key, **told)
    spending = Spending(
        workspace=workspace,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        **asked,
        description="",
        entry_id=entry_id(),
        hold_id=hold_id(),
        ttl_seconds=ttl_seconds or min(DEFAULT_TTL_SECONDS, ledger_settings.MAX_TTL),
    )
    answer = _spend(spending, statement)
    assert answer.hold_id is not None
    assert answer.status is not None
    assert answer.expires_at is not None
    return HoldRecord(
        reservation_id=answer.hold_id,
        amount=amount,
        status=answer.status,
        reference=reference,
        expires_at=answer.expires_at,
        account=AccountBalance.after(answer, customer_id),
        replayed=answer.code == "replayed",
    )


def _spend(spending: Spending, statement: Statement | None = None) -> Spent:
    """Return the success of this call, or of an earlier one with the key.

    The answer leaves out what *spending* says: an earlier call asked for the same.
    """
    using = write_alias()
    way = _way(using)
    answer = _answer(
        lambda: way.spend(using, spending, statement),
        lambda answer: {"account_id": answer.account_id},
    )
    if error := refusals.of_spending(spending, answer):
        raise error
    return answer


# Closing a hold


@retried
def commit(
    workspace: int | str,
    reservation_id: str,
    *,
    amount: int | None = None,
    idempotency_key: str,
    statement: Statement | None = None,
) -> HoldRecord:
    """Charge a hold: all of it, or only *amount* credits, which may be 0.

    If *amount* is below the hold, the remainder is available again. A second commit of
    the same hold moves nothing. Raises ``MeterlyNotFoundError``,
    ``MeterlyInvalidRequestError`` (more than the hold, or less than 0),
    ``MeterlyReservationExpiredError`` and ``MeterlyReservationReleasedError``.
    """
    fingerprint = fingerprint_of(
        "commit_reservation",
        idempotency_key,
        reservation_id=reservation_id,
        amount=amount,
    )
    closing = Closing(
        workspace,
        idempotency_key,
        fingerprint,
        reservation_id,
        Hold.Status.COMMITTED.value,
        amount,
        entry_id(),
    )
    return _close(closing, statement)


@retried
def release(
    workspace: int | str,
    reservation_id: str,
    *,
    idempotency_key: str,
    statement: Statement | None = None,
) -> HoldRecord:
    """Give the held credits back.

    A second release of the same hold moves nothing. Raises ``MeterlyNotFoundError``,
    ``MeterlyReservationExpiredError`` and ``MeterlyReservationCommittedError``.
    """
    fingerprint = fingerprint_of(
        "release_reservation", idempotency_key, reservation_id=reservation_id
    )
    closing = Closing(
        workspace,
        idempotency_key,
        fingerprint,
        reservation_id,
        Hold.Status.RELEASED.value,
        0,
        entry_id(),
    )
    return _close(closing, statement)


def _close(closing: Closing, statement: Statement | None) -> HoldRecord:
    """Return the hold, closed by this call or by an earlier one."""
    using = write_alias()
    way = _way(using)
    answer = _answer(
        lambda: way.close(using, closing, statement),
        lambda answer: {"public_id": closing.hold_id},
    )
    if error := refusals.of_closing(closing, answer):
        raise error
    if answer.code == "already":
        workspace = closing.workspace
        if isinstance(workspace, str):
            workspace = ensure_workspace(workspace).pk
        key, fingerprint = closing.idempotency_key, closing.fingerprint
        Request(using, workspace, key, fingerprint).remember()
    assert answer.expires_at is not None
    return HoldRecord(
        reservation_id=closing.hold_id,
        amount=answer.amount,
        status=answer.status,
        reference=answer.reference,
        expires_at=answer.expires_at,
        account=AccountBalance.after(answer, answer.customer_id),
        replayed=answer.code != "moved",
    )


# Both movements


def _way(using: str) -> Way:
    return postgresql if postgresql.serves(using) else portable


def _answer(
    call: Callable[[], AnswerT], due: Callable[[AnswerT], dict[str, Any]]
) -> AnswerT:
    """Return the answer of *call*; repeat it while expired holds are in its way.

    *due* returns a lookup of those holds. If another call expires them first, their
    credits are available all the same.
    """
    for _try in range(_MOST_TRIES):
        answer = call()
        if answer.code != "due":
            break
        expiry.expire_matching(**due(answer))
    return answer


# Reading and extending a hold


@retried
def get_reservation(workspace_id: int, reservation_id: str) -> HoldRecord:
    """Return a reservation as it is now."""
    return HoldRecord.of(_hold(workspace_id, reservation_id))


@retried
def extend(
    workspace_id: int, reservation_id: str, *, ttl_seconds: int, idempotency_key: str
) -> HoldRecord:
    """Let a live hold expire *ttl_seconds* from now.

    That may be earlier than before: with 60 seconds a hold that had 300 left has 60.
    Raises ``MeterlyNotFoundError``, ``MeterlyReservationExpiredError``,
    ``MeterlyReservationCommittedError`` and ``MeterlyReservationReleasedError``.
    """
    request = Request.of(
        workspace_id,
        idempotency_key,
        "extend_reservation",
        reservation_id=reservation_id,
        ttl_seconds=ttl_seconds,
    )
    for _try in range(_MOST_TRIES):
        recorded = request.recorded()
        hold = _hold(workspace_id, reservation_id)
        if recorded is not None:
            return HoldRecord.of(hold, replayed=True)
        if hold.status != Hold.Status.RESERVED:
            raise refusals.closed(hold.status)
        if _extended(request, hold, ttl_seconds):
            return HoldRecord.of(_hold(workspace_id, reservation_id))
        # The hold has expired, or the key was recorded meanwhile, or another call has
        # extended the hold just before it expired. The next round tells which.
        expiry.expire_matching(pk=hold.pk)
    raise MeterlyReservationExpiredError


def _extended(request: Request, hold: Hold, ttl_seconds: int) -> bool:
    """Extend the hold, unless it has expired or the key was recorded before."""
    live = Hold.objects.using(request.using).live().filter(pk=hold.pk)
    try:
        with transaction.atomic(using=request.using):
            if not live.filter(expires_at__gt=DatabaseNow()).update(
                expires_at=from_now(ttl_seconds)
            ):
                return False
            request.record()
    except IntegrityError:
        if request.recorded() is None:
            raise
        return False
    return True


def _hold(workspace_id: int, reservation_id: str) -> Hold:
    holds = Hold.objects.using(write_alias()).filter(
        public_id=reservation_id, account__customer__workspace=workspace_id
    )
    hold = holds.current().first()
    if hold is None:
        raise refusals.no_reservation(reservation_id)
    return hold
