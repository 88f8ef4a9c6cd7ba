"""Opening a row: ``reserve``."""

from __future__ import annotations

import datetime as dt
import logging
import sys
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

from django.db import Error, IntegrityError, connections, transaction
from django.db.models import F, Sum
from django.db.models.functions import Coalesce

from .. import signals, units
from ..conf import meterly_settings
from ..db import causes, from_now, gave_way, in_transaction, on_live_connection, pause
from ..errors import (
    OUTAGE,
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyIdempotencyInProgressError,
    MeterlyIdempotencyMismatchError,
    MeterlyNotFoundError,
    MeterlyRateLimitedError,
    MeterlyUnavailableError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)
from ..models import Customer, Reservation
from ..transports.base import JoinedTransport
from . import attempts, calls, statements
from .debts import refuse_debtor
from .low_balance import watch_balance
from .rows import (
    DENIED_RETENTION,
    SETTLE_TIMEOUT,
    State,
    alias,
    announce,
    decided,
    move,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..client import MeterlyClient
    from ..types import Balance, ReservationResult
    from .payers import Payer

logger = logging.getLogger(__name__)


def refuse_open_transaction(client: MeterlyClient) -> None:
    """Raise ``MeterlyUsageError`` when a transaction is open on a database we write to.

    That is the journal's, and the embedded ledger's if it has another.
    """
    written = {alias()}
    if isinstance(client.transport, JoinedTransport):
        written.add(client.transport.alias())
    for using in written:
        if in_transaction(using):
            raise MeterlyUsageError(_IN_TRANSACTION.format(using))


_IN_TRANSACTION = (
    "A guard cannot reserve inside an open transaction (on the database {!r}): a "
    "rollback would take the reservation's record with it. Move guard() outside the "
    "atomic() block, or pass durable=False to let the reservation live and die with "
    "the transaction. Put meterly_guard around as_view(), above every decorator that "
    "opens a transaction, and have the decorators above it use functools.wraps. If it "
    "guards a handler of a class-based view, put MeterlyGuardMixin first among the "
    "bases of the class: it keeps ATOMIC_REQUESTS from opening the transaction early. "
    "Under ATOMIC_REQUESTS, guard operations of django-ninja by METERLY"
    "['GUARDED_VIEWS'], and not in the code."
)


def reserve(
    client: MeterlyClient,
    payer: Payer,
    amount: int,
    unit: str,
    *,
    reference: str,
    key: str | None,
    ttl_seconds: int,
    name: str = "",
    on_unavailable: str = "deny",
    lease: float | None = None,
) -> tuple[Reservation, Balance | None]:
    """Hold *amount* at the ledger; return the ``reserved`` row and the new balance.

    The *key* is random by default. *name* is that of the view or task. The work may
    take *lease* seconds without a ``beat``, by default *ttl_seconds*.

    There are two ways. If the ledger can do it and the caller has no *key*, one
    statement finds the customer, holds the credits and inserts the row. Otherwise the
    row is written as an intent before the ledger is asked. If the ledger joins the
    transaction, the same transaction holds the credits; if not, it is committed first.

    If the ledger cannot be asked and *on_unavailable* is ``"allow"``, the row is on
    trust, up to ``UNAVAILABLE_CAP``, and the balance is ``None``. Raises

    - ``MeterlyInsufficientCreditsError``: the row is ``denied``,
    - ``MeterlyDebtError``: the customer cannot pay a debt in *unit* (no row),
    - ``MeterlyUnavailableError``: the sweeper releases the hold, if there is one,
    - ``MeterlyDuplicateError``: *key* was used,
    - ``MeterlyIdempotencyMismatchError``: *key* was used for something else.
    """
    using = alias()
    lease = ttl_seconds if lease is None else lease
    # A customer's first reserve is two calls, and they share the one deadline.
    limited = client.within(meterly_settings.DEADLINE)
    row = Reservation(
        unit=unit,
        amount=amount,
        reference=reference,
        name=name,
        key=key or str(uuid.uuid4()),
        ttl_seconds=ttl_seconds,
    )
    try:
        answer = None
        if not key and statements.fits_one_statement(client, using):
            try:
                answer = statements.reserve(using, client, row, payer, lease)
            except OUTAGE:
                # Nobody knows yet who pays, and a debtor does not work on trust.
                row.customer = payer.resolve()
                refuse_debtor(limited, row)
                raise
        if answer is None:
            row.customer = payer.resolve()
            if key:
                attempts.number(using, row)
            refuse_debtor(limited, row)
            if not row.customer.customer_id:
                row.customer.ensure_registered(limited, units.default() or unit)
            answer = _reserve_by_intent(using, client, limited, row, lease)
    except OUTAGE as exc:
        # Sending too many requests must not make the work free.
        trusts = on_unavailable == "allow" and not isinstance(
            exc, MeterlyRateLimitedError
        )
        if trusts and _trust(using, row, lease):
            logger.info("Reservation %s runs on trust: %s", row.pk, exc)
            return row, None
        _give_up(row, exc, lapses=on_unavailable != "allow")
        raise _unavailable(exc) from exc
    if isinstance(answer, MeterlyNotFoundError):
        # The customer was registered at another ledger, or the registration was rolled
        # back. The next use finds the customer registered.
        row.customer.register_again(limited, meterly_settings.DEFAULT_UNIT or unit)
        raise _unavailable(answer) from answer
    if isinstance(answer, MeterlyError):
        raise answer
    announce(signals.credits_reserved, row)
    watch_balance(row, answer.balance, row.amount)
    return row, answer.balance


@contextmanager
def opened(using: str, row: Reservation) -> Iterator[None]:
    """Write *row* as an intent, in a transaction that commits after the block.

    Raises ``MeterlyDuplicateError`` if another process has opened this attempt. Then
    nothing was written.
    """
    try:
        with transaction.atomic(using=using):
            standing = [] if row.attempt == 1 else attempts.standing(using, row)
            if standing:
                # An earlier attempt has succeeded late.
                raise attempts.refusal(standing[-1])
            seconds = meterly_settings.DEADLINE + meterly_settings.LEASE_GRACE
            row.lease_until = from_now(seconds)
            # An earlier try may have set these before its COMMIT failed.
            row.state, row.reservation_id = State.INTENT, None
            row.save(force_insert=True, using=using)
            yield
    except IntegrityError as exc:
        if not attempts.is_opened(using, row):
            # It is another constraint. For example, the customer was deleted meanwhile.
            raise
        # Somebody else has opened this attempt: theirs runs, not ours.
        attempts.number(using, row)
        raise MeterlyDuplicateError(
            f"The idempotency key {row.key!r} is in use right now.", in_progress=True
        ) from exc


def _reserve_by_intent(
    using: str,
    client: MeterlyClient,
    limited: MeterlyClient,
    row: Reservation,
    lease: float,
) -> ReservationResult | MeterlyError:
    """Write *row* as an intent, ask the ledger, and record its answer.

    A ledger that joins is asked in the transaction that writes the row. The row is
    locked before the account: a second caller with the same key waits for the row, and
    does not lock the account meanwhile. Raises the errors in ``OUTAGE``; with a ledger
    that joins, that rolls the row back.
    """
    connection = connections[using]
    ours = not connection.in_atomic_block and connection.get_autocommit()
    until = time.monotonic() + SETTLE_TIMEOUT
    handled = sys.exception()
    while True:
        try:
            with opened(using, row):
                if client.transport.joins(using):
                    return _ask_and_record(client, limited, row, lease)
            break
        except (Error, MeterlyUnknownOutcomeError) as exc:
            # A ledger that joins may report the database's error as an unknown outcome.
            # The transaction was rolled back in any case.
            gave = any(map(gave_way, causes(exc, handled)))
            if not gave or not ours or time.monotonic() > until:
                raise
        pause()
    try:
        return _ask_and_record(client, limited, row, lease)
    except MeterlyIdempotencyMismatchError:
        # The key was used by rows that were deleted or lost. It stays used: without a
        # row, nobody can make a next attempt with another wire key.
        Reservation.objects.using(using).filter(pk=row.pk, state=State.INTENT).delete()
        raise


def _ask_and_record(
    client: MeterlyClient, limited: MeterlyClient, row: Reservation, lease: float
) -> ReservationResult | MeterlyError:
    answer, state = calls.ask(row, lambda: calls.hold(limited, row))
    # Counted from the intent, because the hold cannot be older.
    seconds = dt.timedelta(seconds=lease - meterly_settings.DEADLINE)
    recorded = move(
        row,
        [State.INTENT],
        state,
        reservation_id=row.reservation_id,
        last_error=row.last_error,
        lease_until=F("lease_until") + seconds if state == State.RESERVED else None,
        # The sweeper finds the row by it, to delete it.
        next_attempt_at=(from_now(DENIED_RETENTION) if state == State.DENIED else None),
    )
    if not recorded and not isinstance(answer, MeterlyError):
        # The sweeper has released the row before this hold was made.
        calls.give_back(client, row, answer)
        return MeterlyUnavailableError(
            "The ledger answered after the reservation had been given up."
        )
    return answer


def _trust(using: str, row: Reservation, lease: float) -> bool:
    """Let the work of *row* run on trust, if ``UNAVAILABLE_CAP`` has room for it.

    The cap counts the customer's work on trust in this unit that is not paid for yet.
    """

    def written() -> bool:
        return Reservation.objects.using(using).filter(pk=row.pk).exists()

    @transaction.atomic(using=using)
    def trust() -> bool:
        # This locks the customer on every database. Otherwise two processes could see
        # the same room under the cap, and both take it.
        Customer.objects.using(using).filter(pk=row.customer.pk).update(
            external_id=F("external_id")
        )
        owed = (
            Reservation.objects.using(using)
            .on_trust()
            .filter(customer=row.customer, unit=row.unit)
            .aggregate(sum=Sum(Coalesce("owed", "charge", "amount")))["sum"]
        )
        if (owed or 0) + row.amount > meterly_settings.UNAVAILABLE_CAP:
            return False
        return move(
            row,
            [State.INTENT],
            State.RESERVED,
            lease_until=from_now(lease + meterly_settings.LEASE_GRACE),
        )

    if not on_live_connection(using, written):
        # The outage came before the intent was written, or has rolled it back.
        with opened(using, row):
            pass
    return on_live_connection(using, trust)


def _give_up(row: Reservation, exc: MeterlyError, *, lapses: bool) -> None:
    """Record that the work does not run, because the ledger could not be asked."""
    if not isinstance(
        exc, MeterlyUnknownOutcomeError | MeterlyIdempotencyInProgressError
    ):
        move(row, [State.INTENT], State.FAILED, lease_until=None, last_error=str(exc))
    elif not lapses:
        # An intent would count as work on trust once its lease lapses.
        move(row, [State.INTENT], State.RELEASE_PENDING, **decided())
    # Otherwise a hold may exist. The row keeps its lease: when it lapses, the sweeper
    # sends the same reserve again to learn the hold's id, and releases it.


def _unavailable(exc: MeterlyError) -> MeterlyUnavailableError:
    # At INFO: the client says at WARNING when an outage begins.
    logger.info("The ledger cannot be asked for credits: %s", exc)
    return MeterlyUnavailableError(f"The ledger cannot be asked: {exc}")
