"""Every state change of a ``Reservation``, and the sweeper that finishes them.

The journal is what makes the promise good: a row is written before the ledger
is asked, a decision is recorded before the ledger hears of it, and any process that
finds a decided row may carry it out, because every call is sent with the key
that belongs to the row. When the ledger shares the journal's transaction, each step
commits with its outcome: ``intent`` and pending states are visible only after a
failure. Each transition is one conditional UPDATE; the number of rows it changed
says whether it happened::

     intent ──────────┬────────► denied
       │ reserve      ├────────► failed
       ▼              └─(lease lapsed)──┐
     reserved ── work failed ───────────► release_pending ──► released | conflict
       │ │ └──── lease lapsed ──────────┘        │               │
       │ └────── lapsed, but presumed done ──┐   │               │
       └──────── work succeeded ◄── late success ┴───────────────┘
                     ▼
                commit_pending ──► committed
                     └─ hold gone ► one direct debit ► committed | unbilled

A row that runs *on trust* (``ON_UNAVAILABLE``) is ``reserved`` without a
reservation id. That column is written once: with the hold's id, or with
``NO_HOLD`` when the ledger has refused the reserve. Only the hold that stands there
is committed, and only a row with ``NO_HOLD`` is charged without one.

A ``reserved`` row with a ``charge`` is *presumed*: its work has returned well, and its
response is still to be rendered or sent. It lapses to commit, not to release.

The row's *fence* says who may decide. An even number belongs to the process that
works under it. An odd number means that the work is offered and not yet claimed. To
offer, to claim and to withdraw are conditional UPDATEs, too.

A key may have several *attempts*, and is charged once. An attempt that lapsed may
still succeed while a later one is at work. Then the row stays ``released`` and notes
its ``charge``, and the sweeper asks again: the charge is owed if the later attempt
comes to nothing, and dropped if that one is charged.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import random
import sys
import time
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import (
    DataError,
    Error,
    IntegrityError,
    connections,
    router,
    transaction,
)
from django.db.models import Case, Count, F, Q, Sum, Value, When
from django.db.models.functions import Coalesce

from . import signals, units
from .conf import meterly_settings
from .db import (
    DatabaseNow,
    bound_waits,
    causes,
    change_in_batches,
    error_codes,
    from_now,
    gave_way,
    is_outage,
    is_read_only,
    reconnect,
    refuses_rows,
    unlocked,
    was_locked,
)
from .errors import (
    MAX_MESSAGE_LENGTH,
    OUTAGE,
    MeterlyApiError,
    MeterlyDebtError,
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyIdempotencyInProgressError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyNotFoundError,
    MeterlyRateLimitedError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
    MeterlyUnavailableError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)
from .models import Customer, LowBalance, Reservation
from .transports.base import JoinedTransport, NothingLocked, Statement
from .wire import clean_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from django.dispatch import Signal

    from .client import MeterlyClient
    from .models import ReservationQuerySet
    from .types import Balance, ReservationResult

logger = logging.getLogger(__name__)
T = TypeVar("T")
State = Reservation.State

#: Seconds a settlement may take inside a request: the row is durable, and the
#: sweeper follows.
SETTLE_TIMEOUT = 2.0
#: Seconds between two tries at most.
_PAUSE = 0.1
#: Back-off of a settlement that could not be carried out: 5 s, doubled to 1 h.
BACKOFF_FIRST, BACKOFF_MOST = 5.0, 3600.0
#: How long a row is kept that was denied: a day. There may be many.
DENIED_RETENTION = 86400.0
#: When a row that could not be deleted is tried again.
KEPT = 86400.0
#: How often a debt is tried again.
UNBILLED_INTERVAL = 6 * 3600.0
#: Rows the sweeper takes at a time, and of how many it chooses them.
BATCH, WINDOW = 200, 2000
#: Rows in a row that find the ledger out of reach, after which a round ends.
OUTAGE_AFTER = 3
#: The ``reservation_id`` of a row that is known to have no hold; ``None`` is one
#: of which that is not known.
NO_HOLD = ""


def alias() -> str:
    """Return the database the journal is written to."""
    return router.db_for_write(Reservation)


# Opening a row


def in_transaction(using: str) -> bool:
    """Return whether a transaction is open on the database *using*.

    The one that Django's ``TestCase`` wraps around a test does not count.
    """
    connection = connections[using]
    if not connection.in_atomic_block:
        return not connection.get_autocommit()
    try:
        # Django knows its TestCase's block; no query is sent by this one.
        with transaction.atomic(using=using, savepoint=False, durable=True):
            return False
    except RuntimeError:
        return True


@contextmanager
def serving() -> Iterator[None]:
    """Raise ``MeterlyUnavailableError`` where a database cannot serve."""
    try:
        yield
    except Error as exc:
        if not is_outage(exc):
            raise
        logger.warning("The database cannot serve: %s", exc)
        raise MeterlyUnavailableError(f"The database failed: {exc}") from exc


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
    customer: Customer,
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
    """Ask the ledger to hold *amount*; return the row that it is on record in.

    Without a *key*, a random one is used. *name* is that of the view or task. *lease*
    is how many seconds the work may take without a ``beat``; *ttl_seconds* by
    default. Returns the row, which is ``reserved``, and the balance after the hold.

    There are two ways. The row's INSERT and the hold are one statement, where the
    ledger can do that and the row has no *key*. Else the row is written before the
    ledger is asked, as an intent: in the transaction that holds the credits, if the
    ledger joins it, and else in one that is committed first.

    With *on_unavailable* ``"allow"`` and a ledger that cannot be asked, the row is on
    trust as far as ``UNAVAILABLE_CAP`` goes, and there is no balance. Raises
    ``MeterlyInsufficientCreditsError`` (row ``denied``), ``MeterlyDebtError`` when the
    customer owes credits of *unit* and cannot pay them now (no row),
    ``MeterlyUnavailableError`` (the work must not run; a hold that may exist is
    released by the sweeper), ``MeterlyDuplicateError`` when *key* was used, and
    ``MeterlyIdempotencyMismatchError`` when it was used for something else.
    """
    using = alias()
    lease = ttl_seconds if lease is None else lease
    # A customer's first reserve is two calls, and they share the one deadline.
    limited = client.within(meterly_settings.DEADLINE)
    row = Reservation(
        customer=customer,
        unit=unit,
        amount=amount,
        reference=reference,
        name=name,
        key=key or str(uuid.uuid4()),
        ttl_seconds=ttl_seconds,
    )
    if key:
        _number_attempt(using, row)
    if customer.owes and meterly_settings.ON_DEBT == "deny":
        _refuse_debtor(limited, customer, amount, unit)
    try:
        if not customer.customer_id:
            customer.ensure_registered(limited, units.default() or unit)
        if not key and fits_one_statement(client, using):
            answer = _reserve_in_one_statement(using, client, row, lease)
        else:
            answer = _reserve_by_intent(using, client, limited, row, lease)
    except OUTAGE as exc:
        # Nobody gets work for nothing by sending too many requests.
        trusts = on_unavailable == "allow" and not isinstance(
            exc, MeterlyRateLimitedError
        )
        if trusts and _trust(using, row, lease):
            logger.info("Reservation %s runs on trust: %s", row.pk, exc)
            return row, None
        _give_up(row, exc, lapses=on_unavailable != "allow")
        raise _unavailable(exc) from exc
    if isinstance(answer, MeterlyNotFoundError):
        # Another ledger than the one this customer was registered at, or a
        # registration that was rolled back: the next use finds it registered.
        customer.register_again(limited, meterly_settings.DEFAULT_UNIT or unit)
        raise _unavailable(answer) from answer
    if isinstance(answer, MeterlyError):
        raise answer
    _announce(signals.credits_reserved, row)
    _watch_balance(row, answer.balance, row.amount)
    return row, answer.balance


@contextmanager
def _opened(using: str, row: Reservation) -> Iterator[None]:
    """Write *row* as an intent, in a transaction that commits after the block.

    Raises ``MeterlyDuplicateError`` when somebody was faster; then nothing of it
    was done.
    """
    try:
        with transaction.atomic(using=using):
            standing = [] if row.attempt == 1 else _standing(using, row)
            if standing:
                # It succeeded after all, in the last moment.
                raise _duplicate(standing[-1])
            seconds = meterly_settings.DEADLINE + meterly_settings.LEASE_GRACE
            row.lease_until = from_now(seconds)
            # An earlier try was rolled back when its COMMIT failed, with what it had
            # recorded.
            row.state, row.reservation_id = State.INTENT, None
            row.save(force_insert=True, using=using)
            yield
    except IntegrityError as exc:
        # Somebody else opened this attempt in between: theirs runs, not ours.
        _number_attempt(using, row)
        raise MeterlyDuplicateError(
            f"The idempotency key {row.key!r} is in use right now.", in_progress=True
        ) from exc


def _number_attempt(using: str, row: Reservation) -> None:
    """Let *row* be the next attempt at its key, with a fence above the last one's.

    Raises ``MeterlyDuplicateError`` and ``MeterlyIdempotencyMismatchError``.
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
    # Nothing came of an attempt that was given up: the next may cost another amount.
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
        raise _duplicate(last)
    row.attempt = last.attempt + 1
    row.fence = last.fence - last.fence % 2 + 2


def _standing(using: str, row: Reservation) -> list[Reservation]:
    """Lock the attempts at the key of *row*; return the others that stand.

    Part of the transaction that is open. Until it ends, no attempt at this key is
    opened, and none of those that were released is charged.
    """
    attempts = (
        Reservation.objects.using(using)
        .filter(customer=row.customer_id, key=row.key)
        # Of these nothing ever comes, and there may be many.
        .exclude(state__in=[State.DENIED, State.FAILED])
    )
    # This locks them on every database, and on SQLite before anything is read.
    attempts.update(fence=F("fence"))
    others = attempts.standing().exclude(pk=row.pk).order_by("attempt")
    # Locked once more: MySQL reads what is true now, not when the transaction began.
    return list(others.select_for_update())


def is_tried_again(row: Reservation) -> bool:
    """Return whether there is a later attempt at the key of *row*."""
    later = Reservation.objects.using(alias()).filter(
        customer=row.customer_id, key=row.key, attempt__gt=row.attempt
    )
    return later.exists()


def in_the_way(customer: Customer, key: str) -> MeterlyDuplicateError | None:
    """Return why *key* cannot be tried now; ``None`` if nothing came of it yet."""
    rows = Reservation.objects.using(alias()).filter(customer=customer, key=key)
    row = rows.standing().order_by("-attempt").first()
    return None if row is None else _duplicate(row)


def _duplicate(row: Reservation) -> MeterlyDuplicateError:
    # One that was released stands for a success that is noted.
    in_progress = row.state in (*State.open(), State.RELEASE_PENDING, State.RELEASED)
    return MeterlyDuplicateError(
        f"The idempotency key {row.key!r} "
        + ("is in use right now" if in_progress else "was used already")
        + f" (reservation {row.state}).",
        state=row.state,
        reference=row.reference,
        in_progress=in_progress,
    )


def fits_one_statement(client: MeterlyClient, using: str) -> bool:
    """Return whether a movement and its row can be one statement in autocommit.

    In a transaction of the caller's they need a savepoint: a statement that failed
    would end it.
    """
    connection = connections[using]
    return (
        carries_statements(client, using)
        and not connection.in_atomic_block
        and connection.get_autocommit()
    )


def carries_statements(client: MeterlyClient, using: str) -> bool:
    """Return whether a movement and its row on *using* can be one statement."""
    transport = client.transport
    return isinstance(transport, JoinedTransport) and transport.carries_statements(
        using
    )


def _reserve_in_one_statement(
    using: str, client: MeterlyClient, row: Reservation, lease: float
) -> ReservationResult | MeterlyError:
    """Ask a ledger that writes *row* in the statement that holds the credits."""
    insert = _insert(using, row, lease + meterly_settings.LEASE_GRACE)
    try:
        answer, row.state = _ask(client.carrying(insert), row)
    except Error as exc:
        if not is_outage(exc):
            raise
        connection = connections[using]
        # Leaving an atomic block, Django would have replaced a dead connection.
        if not connection.is_usable():
            reconnect(connection)
        # There may be a hold and its row, which lapse: what follows is another row.
        row.pk = uuid.uuid4()
        row.key = str(row.pk)
        raise MeterlyUnknownOutcomeError(f"The database failed: {exc}") from exc
    if row.state == State.RESERVED:
        row._state.adding = False
        row._state.db = using
    else:
        row.settled_at = DatabaseNow()
        if row.state == State.DENIED:
            row.next_attempt_at = from_now(DENIED_RETENTION)
        row.save(force_insert=True, using=using)
    return answer


def _insert(using: str, row: Reservation, lease: float) -> Statement:
    """Return the INSERT of *row*, with its hold's id and a lease of *lease* seconds."""
    sql, fields = _insert_sql(using)
    connection = connections[using]
    values = (
        field.get_db_prep_save(field.pre_save(row, add=True), connection)
        for field in fields
    )
    return Statement(sql, (*values, dt.timedelta(seconds=lease)))


@functools.cache
def _insert_sql(using: str) -> tuple[str, list[Any]]:
    """Return the text of that INSERT, and the fields whose values it takes."""
    quote = connections[using].ops.quote_name
    values = {
        "state": f"'{State.RESERVED.value}'",
        "reservation_id": "movement.reservation_id",
        "lease_until": "STATEMENT_TIMESTAMP() + %s",
    }
    fields = [f for f in Reservation._meta.concrete_fields if f.attname not in values]
    columns = ", ".join(quote(str(f.column)) for f in fields)
    sql = (
        f"INSERT INTO {quote(Reservation._meta.db_table)} "  # noqa: S608
        f"({columns}, {', '.join(values)}) "
        f"SELECT {'%s, ' * len(fields)}{', '.join(values.values())} FROM movement"
    )
    return sql, fields


def _ask(
    limited: MeterlyClient, row: Reservation
) -> tuple[ReservationResult | MeterlyError, str]:
    """Send the reserve, by the *limited* client; return what it comes to.

    That is the answer, and the state it brings *row* to; what else is to be on
    record of it is set on *row*. Raises ``OUTAGE``, and
    ``MeterlyIdempotencyMismatchError``, of which nothing is to be on record.
    """
    try:
        held = _hold(limited, row)
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


def _reserve_by_intent(
    using: str,
    client: MeterlyClient,
    limited: MeterlyClient,
    row: Reservation,
    lease: float,
) -> ReservationResult | MeterlyError:
    """Write *row* as an intent, ask the ledger, and record what it answered.

    A ledger that joins is asked in the transaction that writes the row. Rows are
    locked before accounts: a second caller with the same key waits for the row, and
    does not hold the account's lock meanwhile. Raises ``OUTAGE``; with a ledger that
    joins, that rolls the row back.
    """
    connection = connections[using]
    ours = not connection.in_atomic_block and connection.get_autocommit()
    until = time.monotonic() + SETTLE_TIMEOUT
    handled = sys.exception()
    while True:
        try:
            with _opened(using, row):
                if client.transport.joins(using):
                    return _ask_and_record(client, limited, row, lease)
            break
        except (Error, MeterlyUnknownOutcomeError) as exc:
            # The ledger may have reported it as an outcome that is not known. It was
            # rolled back.
            gave = any(map(gave_way, causes(exc, handled)))
            if not gave or not ours or time.monotonic() > until:
                raise
        # Jitter: those who met once are not to meet again.
        time.sleep(random.uniform(0, _PAUSE))  # noqa: S311
    try:
        return _ask_and_record(client, limited, row, lease)
    except MeterlyIdempotencyMismatchError:
        # The key was used before the journal's rows of it were deleted or lost. It
        # stays used: without a row there is no next attempt, and so no other key.
        Reservation.objects.using(using).filter(pk=row.pk, state=State.INTENT).delete()
        raise


def _ask_and_record(
    client: MeterlyClient, limited: MeterlyClient, row: Reservation, lease: float
) -> ReservationResult | MeterlyError:
    answer, state = _ask(limited, row)
    # From the moment the intent was written: the hold cannot be older.
    seconds = dt.timedelta(seconds=lease - meterly_settings.DEADLINE)
    recorded = _move(
        row,
        [State.INTENT],
        state,
        reservation_id=row.reservation_id,
        last_error=row.last_error,
        lease_until=F("lease_until") + seconds if state == State.RESERVED else None,
        # It has an index: then the sweeper comes back to delete the row.
        next_attempt_at=(from_now(DENIED_RETENTION) if state == State.DENIED else None),
    )
    if not recorded and not isinstance(answer, MeterlyError):
        # The sweeper may have been told that there is no hold, before there was.
        _give_back(client, row, answer)
        return MeterlyUnavailableError(
            "The ledger answered after the reservation had been given up."
        )
    return answer


def _trust(using: str, row: Reservation, lease: float) -> bool:
    """Let the work of *row* run on trust, if ``UNAVAILABLE_CAP`` has room for it.

    What the customer has had on trust in this unit, and not paid for yet, counts.
    """

    def written() -> bool:
        return Reservation.objects.using(using).filter(pk=row.pk).exists()

    @transaction.atomic(using=using)
    def trust() -> bool:
        # Locks the customer on every database: two that see the same room would
        # both take it.
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
        return _move(
            row,
            [State.INTENT],
            State.RESERVED,
            lease_until=from_now(lease + meterly_settings.LEASE_GRACE),
        )

    if not on_live_connection(using, written):
        # The outage has rolled the intent back, or came before it was written.
        with _opened(using, row):
            pass
    return on_live_connection(using, trust)


def _give_up(row: Reservation, exc: MeterlyError, *, lapses: bool) -> None:
    """Record that the work does not run, for the ledger could not be asked."""
    if not isinstance(
        exc, MeterlyUnknownOutcomeError | MeterlyIdempotencyInProgressError
    ):
        _move(row, [State.INTENT], State.FAILED, lease_until=None, last_error=str(exc))
    elif not lapses:
        # Or it would count as work on trust that has outlived its lease.
        _move(row, [State.INTENT], State.RELEASE_PENDING, **_decided())
    # Else there may be a hold. The row keeps its lease; the sweeper sends the
    # same reserve again to learn the hold's id, and releases it.


def _give_back(
    client: MeterlyClient, row: Reservation, held: ReservationResult
) -> None:
    """Release a hold that the row knows nothing of."""
    try:
        client.within(SETTLE_TIMEOUT, attempts=1).release_reservation(
            held.reservation_id, idempotency_key=row.wire_key("release")
        )
    except MeterlyError as exc:
        logger.warning("Reservation %s ends with its time: %s", row.pk, exc)


def _hold(client: MeterlyClient, row: Reservation) -> ReservationResult:
    """Send the reserve of *row*: the same key and body whoever sends it."""
    return client.reserve_credits(
        _customer_id(client, row),
        row.amount,
        unit=row.unit,
        reference=row.reference,
        idempotency_key=row.wire_key("reserve"),
        ttl_seconds=row.ttl_seconds,
    )


def _customer_id(client: MeterlyClient, row: Reservation) -> str:
    unit = meterly_settings.DEFAULT_UNIT or row.unit
    return row.customer.ensure_registered(client, unit)


def _unavailable(exc: MeterlyError) -> MeterlyUnavailableError:
    # At INFO: the client says at WARNING when an outage begins.
    logger.info("The ledger cannot be asked for credits: %s", exc)
    return MeterlyUnavailableError(f"The ledger cannot be asked: {exc}")


# Offering work, and the lease of work that beats


def offer(
    row: Reservation, *, fence: int, lease: float | None = None, **fields: Any
) -> bool:
    """Offer the work of *row*: the process that claims it decides.

    The offer lasts *lease* seconds, or as long as the row's lease. Then it lapses.
    """
    if lease is not None:
        fields["lease_until"] = from_now(lease)
    return _move(
        row, [State.RESERVED], State.RESERVED, fence, fence=fence + 1, **fields
    )


def withdraw(client: MeterlyClient, reservation_id: str) -> None:
    """Release what was offered, unless it was claimed."""
    row = Reservation.objects.using(alias()).filter(pk=reservation_id).first()
    if row is not None and row.is_offered and record_failure(row, fence=row.fence):
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
    if (offered and age < row.ttl_seconds / 2) or extend(client, row, f"{fence}"):
        return row
    # It would be paid for by a debit, which may find nothing: rather try again.
    if _move(
        row, [State.RESERVED], State.RELEASE_PENDING, fence, lapsed=True, **_decided()
    ):
        row.lapsed = True
        settle(client, row, timeout=SETTLE_TIMEOUT)
    return None


def beat(row: Reservation, *, fence: int) -> bool:
    """Renew the lease of *row* to ``LEASE_GRACE``; return whether it is still ours.

    Work that beats is not done: if it was presumed to be, it is not any more.
    """
    return _move(
        row,
        [State.RESERVED],
        State.RESERVED,
        fence,
        lease_until=from_now(meterly_settings.LEASE_GRACE),
        charge=None,
    )


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


# Decisions


def record_success(row: Reservation, charge: int, *, fence: int | None = None) -> bool:
    """Record that the work succeeded and *charge* credits are owed.

    Also after the lease has lapsed, and after the release: work that was done
    is paid for; but not when somebody else has the *fence*. Returns whether the
    row took the decision.
    """
    decided = _decided(charge=charge)
    return _move(
        row, [State.RESERVED], State.COMMIT_PENDING, fence, **decided
    ) or _record_late_success(row, charge, fence)


def _record_late_success(row: Reservation, charge: int, fence: int | None) -> bool:
    """Record the success of an attempt that was given up; return whether it is owed.

    Its key is charged once. The success is dropped if another attempt is charged, and
    noted while another one is open, or is not released yet.
    """
    using = alias()
    late = [State.RELEASE_PENDING, State.RELEASED]
    with transaction.atomic(using=using):
        others = _standing(using, row)
        charged = any(other.state in State.charged() for other in others)
        waits = any(
            other.state in State.open()
            or (other.state == State.RELEASE_PENDING and other.stuck_at is None)
            for other in others
        )
        if not charged and not waits:
            owed = _decided(charge=charge)
            return _move(row, late, State.COMMIT_PENDING, fence, **owed)
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
    return _move(
        row,
        [State.RESERVED],
        State.RELEASE_PENDING,
        fence,
        **_decided(charge=None),
    )


def presume(row: Reservation, charge: int, *, fence: int, lease: float) -> bool:
    """Record that the work has returned well, and owes *charge* if it lapses.

    For work whose response is still to be rendered or sent. If nobody decides within
    *lease* seconds, the sweeper charges it. Returns whether the row took it: when the
    lease had lapsed before, this is a late success, and the charge is decided now.
    """
    return _move(
        row,
        [State.RESERVED],
        State.RESERVED,
        fence,
        charge=charge,
        lease_until=from_now(lease),
    ) or record_success(row, charge, fence=fence)


def decide_in_one_statement(
    client: MeterlyClient, row: Reservation, charge: int | None, *, fence: int
) -> bool:
    """Decide and settle *row* in one statement, if that is all there is to it.

    A success costs *charge*, and ``None`` is a failure. Returns whether it was done.
    If not, something is out of the ordinary, and nothing was. Raises what the
    database raises; then it may have been done.
    """
    if row.state != State.RESERVED or not row.reservation_id:
        return False
    if charge is not None and charge > row.amount:
        return False
    outcome = State.RELEASED if charge is None else State.COMMITTED
    using = alias()
    connection = connections[using]
    table = connection.ops.quote_name(Reservation._meta.db_table)
    # In the work's own transaction, only where a busy account does not make it fail.
    allowed = f" AND {_READS_COMMITTED}" if connection.in_atomic_block else ""
    carrying = client.carrying(
        Statement(
            f"UPDATE {table} SET state = %s, charge = %s, lease_until = NULL, "  # noqa: S608
            "decided_at = STATEMENT_TIMESTAMP(), settled_at = STATEMENT_TIMESTAMP() "
            "FROM movement WHERE id = %s",
            (outcome.value, charge, row.pk),
            lock=f"SELECT id FROM {table} "  # noqa: S608
            f"WHERE id = %s AND state = %s AND fence = %s{allowed} FOR NO KEY UPDATE",
            lock_parameters=(row.pk, State.RESERVED.value, fence),
        )
    )
    try:
        if charge is None:
            carrying.release_reservation(
                row.reservation_id, idempotency_key=row.wire_key("release")
            )
        else:
            _commit(carrying, row, charge)
    except (MeterlyError, NothingLocked):
        return False
    row.state, row.charge = outcome, charge
    _announce(_OUTCOMES[outcome], row)
    return True


_READS_COMMITTED = (
    "current_setting('transaction_isolation') IN ('read committed', 'read uncommitted')"
)


def reads_committed(using: str) -> bool:
    """Return whether the transaction on *using* sees what others commit meanwhile.

    The server knows: the level may be set there, for the database, for the role, or by
    a statement.
    """
    connection: Any = connections[using]
    if connection.vendor == "postgresql":
        sql = f"SELECT {_READS_COMMITTED}"
    elif connection.vendor == "mysql":
        # MariaDB has this name in every version, and MySQL the other.
        name = "tx" if connection.mysql_is_mariadb else "transaction"
        sql = f"SELECT @@{name}_isolation IN ('READ-COMMITTED', 'READ-UNCOMMITTED')"
    else:
        # SQLite has one writer at a time.
        return True
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return bool(cursor.fetchone()[0])


def record_lapsed(*, older_than: float = 0.0, seconds: float | None = None) -> int:
    """Decide the open rows whose lease has run out; return how many.

    They are released, but for presumed ones, which are charged. One UPDATE decides
    both: between two, a row that lapses to commit could be released.
    Only those whose lease ended *older_than* seconds ago, and for *seconds* at
    most; the rest is left to the next call.
    """
    return change_in_batches(
        Reservation.objects.using(alias()).lapsed(older_than),
        lambda rows: rows.update(
            # Due since then. Before lease_until: MySQL assigns from left to right.
            next_attempt_at=F("lease_until"),
            lease_until=None,
            state=Case(
                When(charge=None, then=Value(State.RELEASE_PENDING.value)),
                default=Value(State.COMMIT_PENDING.value),
            ),
            lapsed=True,
            decided_at=DatabaseNow(),
            stuck_at=None,
            refusals=0,
        ),
        size=BATCH,
        until=_until(seconds),
    )


def _decided(**fields: Any) -> dict[str, Any]:
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


def _move(
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


def on_live_connection(
    using: str, query: Callable[[], T], *, patience: float = 0.0
) -> T:
    """Run *query*, once more on a new connection if the present one is dead.

    If the database cannot serve for another reason, or cannot be reached, *query* is
    tried again for *patience* seconds; for two if it had to give way to another. Only
    outside a transaction: inside one the lost connection took the transaction's other
    changes with it.
    """
    connection = connections[using]
    begun = time.monotonic()
    replaced = False
    while True:
        before = None
        try:
            connection.ensure_connection()
            before = connection.connection
            return query()
        except Error as exc:
            if connection.in_atomic_block or not is_outage(exc):
                raise
            dead = before is not None and (
                # Leaving an atomic block, Django has closed a dead one already.
                connection.connection is not before
                or is_read_only(exc)
                or not connection.is_usable()
            )
            if gave_way(exc):
                patience = max(patience, SETTLE_TIMEOUT)
            if (replaced or not dead) and time.monotonic() - begun >= patience:
                raise
        if dead:
            reconnect(connection)
        if replaced or not dead:
            # Jitter: those who met once are not to meet again.
            time.sleep(random.uniform(0, _PAUSE))  # noqa: S311
        replaced = replaced or dead


# Carrying decisions out


def commit_unrecorded(client: MeterlyClient, row: Reservation, charge: int) -> None:
    """Commit at a remote ledger although the success cannot be recorded.

    For when the database is down: the row's lease will lapse, and its release
    finds the hold committed. Never the direct debit, which no row would know of.
    """
    if not row.reservation_id:
        logger.error(
            "The success of reservation %s could not be recorded. It ran on trust, "
            "and will not be charged for its %d.",
            row.pk,
            charge,
        )
        return
    key = row.wire_key("commit")
    logger.error(
        "The success of reservation %s (hold %s) could not be recorded. It is "
        "committed at the ledger all the same, for %d, with the idempotency key %s.",
        row.pk,
        row.reservation_id,
        charge,
        key,
    )
    try:
        _commit(client.within(SETTLE_TIMEOUT, attempts=1), row, charge)
    except MeterlyError:
        logger.exception("Reservation %s could not be committed either", row.pk)


class Outcome(Enum):
    """What became of one attempt to settle a row."""

    #: The ledger has answered, and the row says what: it is final, or a debt.
    ANSWERED = "answered"
    #: The ledger has refused, for a reason that may pass.
    REFUSED = "refused"
    #: The ledger could not be asked.
    UNREACHED = "unreached"
    #: The database refuses to change the row, or somebody has locked it, or its
    #: account: it is as it was.
    LEFT = "left"


def settle(
    client: MeterlyClient, row: Reservation, *, timeout: float | None
) -> Outcome:
    """Carry out the decision that *row* records, once, and record the outcome.

    Anything that stands in the way is recorded and left to the sweeper; nothing
    is raised but database errors. With a *timeout*, each call is tried once, and
    all of them together may take that many seconds.
    """
    if row.is_noted and row.charge is not None:
        _record_late_success(row, row.charge, row.fence)
    if row.state not in State.pending():
        return Outcome.ANSWERED
    if timeout is not None:
        client = client.within(timeout, attempts=1)
    handled = sys.exception()
    try:
        if row.state == State.RELEASE_PENDING:
            _settle_release(client, row)
        else:
            _settle_commit(client, row)
    except OUTAGE as exc:
        if refusal := refused_by_database(exc, handled):
            return _postpone(row, refusal, Outcome.REFUSED)
        locked = was_locked(exc, handled)
        return _postpone(row, exc, Outcome.LEFT if locked else Outcome.UNREACHED)
    except MeterlyApiError as exc:
        return _postpone(row, exc, Outcome.REFUSED)
    return Outcome.ANSWERED


def _settle_release(client: MeterlyClient, row: Reservation) -> None:
    try:
        _release(client, row)
    except MeterlyReservationCommittedError as exc:
        if row.lapsed:
            _finish(row, State.COMMITTED)
        else:
            _finish(row, State.CONFLICT, last_error=str(exc))
            logger.error(
                "Reservation %s was to be released, but the ledger has it as "
                "committed.",
                row.pk,
            )
    else:
        _finish(row, State.RELEASED)


def _release(client: MeterlyClient, row: Reservation) -> None:
    if not _find_hold(client, row):
        return
    assert row.reservation_id is not None
    try:
        client.release_reservation(
            row.reservation_id,
            idempotency_key=row.wire_key("release"),
        )
    except (MeterlyReservationExpiredError, MeterlyReservationReleasedError):
        pass


def _settle_commit(client: MeterlyClient, row: Reservation) -> None:
    """Commit the hold of *row*, and debit what it did not cover."""
    assert row.charge is not None
    owed = row.charge
    held = _find_hold(client, row)
    if held:
        try:
            owed -= _commit(client, row, row.charge)
        except (MeterlyReservationExpiredError, MeterlyReservationReleasedError):
            held = False
    if owed:
        # Whether there was a hold is on record, whether it was committed or lost is
        # final at the ledger: a replay comes to the same amount.
        try:
            movement = client.use_credits(
                _customer_id(client, row),
                owed,
                row.unit,
                row.reference,
                idempotency_key=row.wire_key("debit"),
            )
        except MeterlyInsufficientCreditsError as exc:
            _record_debt(row, owed, exc)
            return
        _watch_balance(row, movement.balance, owed)
    # The ledger remembers a hold that was committed by the key of its reserve.
    # Without one, only this row knows that the key was charged.
    if not _finish(row, State.COMMITTED, owed=None, lapsed=not held) and owed:
        row.refresh_from_db(using=alias())
        if row.state == State.COMMITTED and row.owed:
            logger.error(
                "Reservation %s was written off while its debit was under way: %d %s "
                "were taken.",
                row.pk,
                owed,
                row.unit,
            )


def _commit(client: MeterlyClient, row: Reservation, charge: int) -> int:
    """Commit what the hold of *row* covers of *charge*; return how much that is."""
    assert row.reservation_id is not None
    held = min(charge, row.amount)
    client.commit_reservation(
        row.reservation_id,
        amount=None if held == row.amount else held,
        idempotency_key=row.wire_key("commit"),
    )
    return held


def _find_hold(client: MeterlyClient, row: Reservation) -> bool:
    """Return whether the row has a hold at the ledger, asking by its key if need be.

    The reserve whose answer was lost is sent again; a refusal means that it
    never came to a hold. What comes of it is recorded once, for good, and before
    anything is done about it: after a top-up the same reserve would come to a
    hold, and work that was paid for by a debit would be paid for again.
    """
    if row.reservation_id is not None:
        return bool(row.reservation_id)
    held = None
    try:
        held = _hold(client, row)
    except MeterlyInsufficientCreditsError:
        pass
    found = NO_HOLD if held is None else held.reservation_id
    using = alias()
    unknown = Reservation.objects.using(using).filter(pk=row.pk, reservation_id=None)
    if unknown.update(reservation_id=found):
        row.reservation_id = found
        if held is not None and row.state == State.COMMIT_PENDING:
            _watch_balance(row, held.balance, row.amount)
    else:
        # Another settler was faster, and its answer stands.
        row.refresh_from_db(using=using, fields=["reservation_id"])
        if held is not None and row.reservation_id == NO_HOLD:
            _give_back(client, row, held)
    return bool(row.reservation_id)


def _finish(row: Reservation, outcome: str, **fields: Any) -> bool:
    # A late success may have taken a pending release over meanwhile: then this
    # outcome is no longer the row's, and the commit finds out what is owed.
    sources = {row.state}
    if outcome == State.COMMITTED and row.state != State.RELEASE_PENDING:
        sources |= {State.COMMIT_PENDING, State.UNBILLED}
    finished = _move(
        row, sources, outcome, next_attempt_at=None, stuck_at=None, **fields
    )
    if finished and outcome in _OUTCOMES:
        _announce(_OUTCOMES[outcome], row)
    return finished


_OUTCOMES: dict[str, Signal] = {
    State.COMMITTED: signals.credits_committed,
    State.RELEASED: signals.credits_released,
}


def _record_debt(
    row: Reservation, owed: int, exc: MeterlyInsufficientCreditsError
) -> None:
    first = row.state == State.COMMIT_PENDING
    using = alias()
    row.shortage = exc
    recorded = _move(
        row,
        [State.COMMIT_PENDING, State.UNBILLED],
        State.UNBILLED,
        owed=owed,
        next_attempt_at=from_now(UNBILLED_INTERVAL * random.uniform(0.8, 1.2)),  # noqa: S311
        last_error=str(exc),
    )
    if recorded:
        customers = Customer.objects.using(using).filter(pk=row.customer_id)
        row.customer.owes = True
        # After the commit: a reserve locks the customer before the account.
        transaction.on_commit(
            lambda: customers.filter(owes=False).update(owes=True),
            using=using,
            robust=True,
        )
    logger.warning("Reservation %s could not be billed: %s", row.pk, exc)
    if recorded and first:
        _announce(signals.reservation_unbilled, row)


def _postpone(row: Reservation, exc: Exception, outcome: Outcome) -> Outcome:
    refused = outcome is Outcome.REFUSED
    delay = min(BACKOFF_FIRST * 2 ** min(row.settle_attempts, 20), BACKOFF_MOST)
    refusals = row.refusals + refused
    stuck = row.stuck_at is None and (
        refused and refusals >= meterly_settings.MAX_SETTLE_ATTEMPTS
    )
    changed = (
        Reservation.objects.using(alias())
        .filter(pk=row.pk, state=row.state)
        .update(
            next_attempt_at=from_now(delay * random.uniform(0.5, 1.0)),  # noqa: S311
            refusals=F("refusals") + int(refused),
            **({"stuck_at": DatabaseNow()} if stuck else {}),
            last_error=clean_text(str(exc) or repr(exc), MAX_MESSAGE_LENGTH),
        )
    )
    level = logging.WARNING if refused else logging.INFO
    logger.log(level, "Reservation %s is still %s: %s", row.pk, row.state, exc)
    if changed and stuck:
        _announce(signals.reservation_stuck, row)
    return outcome


def announce(signal: Signal, sender: Any, *, using: str, **facts: Any) -> None:
    """Send *signal* once the transaction on *using* is committed, if there is one.

    Whatever the receivers do, it hurts nobody.
    """
    if not signal.has_listeners(sender):
        return
    send = functools.partial(signal.send_robust, sender=sender, **facts)
    if connections[using].in_atomic_block:
        transaction.on_commit(send, using=using, robust=True)
    else:
        # Without asking a database that may be out of reach.
        send()


def _announce(signal: Signal, row: Reservation) -> None:
    announce(signal, Reservation, using=alias(), reservation=row)


def _watch_balance(row: Reservation, balance: Balance | None, moved: int) -> None:
    """Announce that *moved* credits took the balance below ``LOW_BALANCE``."""
    if balance is None:
        # The ledger did not tell it.
        return
    threshold = meterly_settings.LOW_BALANCE.get(row.unit)
    available = balance.available
    if threshold is None or not available < threshold <= available + moved:
        return
    using = alias()

    def announce_once() -> None:
        known, _ = LowBalance.objects.using(using).get_or_create(
            customer=row.customer, unit=row.unit
        )
        cooldown = meterly_settings.LOW_BALANCE_COOLDOWN
        if (
            LowBalance.objects.using(using)
            .filter(
                Q(announced_at=None) | Q(announced_at__lt=from_now(-cooldown)),
                pk=known.pk,
            )
            .update(announced_at=DatabaseNow())
        ):
            announce(
                signals.low_balance,
                Customer,
                using=using,
                customer=row.customer,
                unit=row.unit,
                available=available,
                threshold=threshold,
            )

    if signals.low_balance.has_listeners(Customer):
        # Afterwards: no movement is to wait for this, or to fail with it.
        transaction.on_commit(announce_once, using=using, robust=True)


# Debts


def collect(client: MeterlyClient, customer: Customer, unit: str) -> list[Reservation]:
    """Debit what *customer* owes in *unit*, the oldest debt first.

    Stops at the first debt for which there are too few credits. Stuck ones are
    tried, too. Returns the debts that are left, each with what is *owed*; the first
    knows its *shortage*. Raises ``MeterlyUnavailableError`` when the ledger cannot be
    asked.
    """
    using = alias()
    debts = Reservation.objects.using(using).debts().filter(customer=customer)
    handled = sys.exception()
    for row in debts.filter(unit=unit).select_related("customer"):
        try:
            with client.transport.unit_of_work(using):
                # The row before its account: so does everybody.
                if not debts.filter(pk=row.pk).update(
                    settle_attempts=F("settle_attempts") + 1
                ):
                    continue
                outcome = settle(client, row, timeout=SETTLE_TIMEOUT)
        except Error as exc:
            refusal = refused_by_database(exc, handled)
            if refusal is None:
                raise MeterlyUnavailableError(f"The database failed: {exc}") from exc
            outcome = _postpone(row, refusal, Outcome.REFUSED)
        if outcome in {Outcome.UNREACHED, Outcome.LEFT}:
            raise MeterlyUnavailableError(f"The debt {row.pk} cannot be asked for.")
        if row.state == State.UNBILLED:
            left = debts.filter(unit=unit).exclude(pk=row.pk)
            return [row, *left]
    _clear_owing(using, customer)
    return []


def _clear_owing(using: str, customer: Customer) -> None:
    """Let *customer* owe nothing, unless there is a debt, in whatever unit."""
    customers = Customer.objects.using(using).filter(pk=customer.pk)
    with transaction.atomic(using=using):
        # Locks the customer: a debt that is being recorded is seen, or waits.
        customers.update(owes=True)
        debts = Reservation.objects.using(using).debts().filter(customer=customer)
        # Locked: MySQL reads what is true now, not when the transaction began.
        if debts.select_for_update().first() is None:
            customers.update(owes=False)
            customer.owes = False


def _refuse_debtor(
    client: MeterlyClient, customer: Customer, amount: int, unit: str
) -> None:
    """Raise ``MeterlyDebtError`` if *customer* owes credits of *unit* after all."""
    debts = collect(client, customer, unit)
    if not debts:
        return
    owed = sum(row.owed or 0 for row in debts)
    shortage = debts[0].shortage
    available = shortage.available if shortage else 0
    raise MeterlyDebtError(
        f"{customer} owes {owed} credits of {unit!r}, {available} are available.",
        details={
            "required": owed + amount,
            "available": available,
            "reserved": shortage.reserved if shortage else 0,
            "unit": unit,
            "owed": owed,
        },
    )


def write_off(row: Reservation) -> bool:
    """Let the debt *row* be: it is committed, and nothing more is charged for it.

    What it *owed* stays on record. Returns whether it was a debt.
    """
    written_off = _move(
        row,
        [State.UNBILLED],
        State.COMMITTED,
        # Only this row knows that its key was charged.
        lapsed=True,
        next_attempt_at=None,
        stuck_at=None,
    )
    if written_off:
        _clear_owing(alias(), row.customer)
    return written_off


# The sweeper


@dataclass
class Round:
    """What one round of the sweeper came to.

    *taken* rows were tried, and *settled* of them are final now. After an
    *outage* it ended early: the ledger could not be reached.
    """

    taken: int = 0
    settled: int = 0
    outage: bool = False


def settle_due(
    client: MeterlyClient,
    *,
    limit: int | None = None,
    older_than: float = 0.0,
    seconds: float | None = None,
    on_row: Callable[[int], None] | None = None,
) -> Round:
    """Carry out the decisions that are due, one after the other.

    At most *limit* rows, only those that are due for *older_than* seconds, and
    for *seconds* at most. *on_row* is called with the number of rows tried so far.
    May run in any number of processes at once. A row is taken by moving its
    next attempt into the future, so a settler that dies delays it, no more.
    """
    using = alias()
    done = Round()
    until = _until(seconds)
    unreached = 0
    left: list[uuid.UUID] = []
    while True:
        rows = Reservation.objects.using(using)
        due = list(
            rows.due(older_than)
            .exclude(pk__in=left)
            .order_by("next_attempt_at")
            .values_list("pk", flat=True)[:WINDOW]
        )
        # At random: sweepers side by side are not to go for the same rows, and a
        # row that ends its settler is not to be everybody's first.
        chosen = random.sample(due, min(BATCH, len(due)))
        # Nobody waits for a row that somebody else has locked, for however long.
        with transaction.atomic(using=using):
            free = unlocked(rows.filter(pk__in=chosen)).values_list("pk", flat=True)
            batch_pks = set(free)
        left += set(chosen) - batch_pks
        batch = list(rows.select_related("customer").filter(pk__in=batch_pks))
        random.shuffle(batch)
        for row in batch:
            if done.taken == limit or time.monotonic() >= until:
                return done
            outcome = _sweep_row(client, using, row)
            if outcome in (None, Outcome.LEFT):
                left.append(row.pk)
            if outcome is None:
                continue
            done.taken += 1
            done.settled += row.state in State.final()
            if on_row is not None:
                on_row(done.taken)
            if outcome is not Outcome.LEFT:
                unreached = unreached + 1 if outcome is Outcome.UNREACHED else 0
            if unreached == OUTAGE_AFTER:
                # What was not tried stays due, and is as it was when the ledger is
                # back: one row after the other, for each sweeper.
                logger.warning("The ledger is out of reach; the sweeper ends its round")
                done.outage = True
                return done
        if len(due) <= BATCH:
            return done


@contextmanager
def taking(
    client: MeterlyClient, using: str, take: Callable[[], bool]
) -> Iterator[bool]:
    """Call *take*, which writes to a row of *using*; yield what it returns.

    With a ledger in *using*, the block is one transaction, which begins with that
    write. With another, the write is a transaction of its own. Neither waits for ever.
    """
    transport = client.transport
    joins = transport.joins(using)
    with transport.unit_of_work(using):
        with nullcontext() if joins else transaction.atomic(using=using):
            bound_waits(using)
            taken = take()
        yield taken


def _sweep_row(client: MeterlyClient, using: str, row: Reservation) -> Outcome | None:
    """Try *row*; return what became of it, or ``None`` if it is somebody else's."""
    handled = sys.exception()
    try:
        with taking(client, using, lambda: _take(using, row)) as taken:
            return _settle_taken(client, row) if taken else None
    except Exception as exc:
        # Whatever is wrong with one row, it must not stop the others.
        logger.exception("Reservation %s could not be settled", row.pk)
        if was_locked(exc, handled):
            return Outcome.LEFT
        refusal = refused_by_database(exc, handled)
        try:
            with transaction.atomic(using=using):
                bound_waits(using)
                row.refresh_from_db(using=using)
                # The rollback may have given the row back.
                taken = _take(using, row)
                if isinstance(exc, Error) and refusal is None:
                    return Outcome.UNREACHED if taken else None
                return _postpone(row, refusal or exc, Outcome.REFUSED)
        except Reservation.DoesNotExist:
            return None
        except Error as again:
            if not refuses_rows(using, again):
                raise
            logger.exception("Reservation %s cannot be changed", row.pk)
            return Outcome.LEFT


def refused_by_database(
    exc: BaseException | None, handled: BaseException | None
) -> Exception | None:
    """Return what *exc* comes from if a database in reach refuses what a row asks.

    A constraint or a trigger on an account, for example. See ``causes`` for *handled*.
    """
    for each in causes(exc, handled):
        sqlstate, number = error_codes(each)
        # RAISE EXCEPTION in PostgreSQL, and SIGNAL in MySQL.
        raised = sqlstate == "P0001" or number == 1644
        if raised or isinstance(each, IntegrityError | DataError):
            return each
    return None


def _take(using: str, row: Reservation) -> bool:
    """Take *row* to settle it, unless somebody has changed it since it was read."""
    taken = (
        Reservation.objects.using(using)
        .due()
        .filter(pk=row.pk, state=row.state, settle_attempts=row.settle_attempts)
        .update(
            next_attempt_at=from_now(
                meterly_settings.DEADLINE * 3 + meterly_settings.LEASE_GRACE
            ),
            settle_attempts=F("settle_attempts") + 1,
        )
    )
    row.settle_attempts += taken
    return bool(taken)


def _settle_taken(client: MeterlyClient, row: Reservation) -> Outcome:
    outcome = settle(client, row, timeout=None)
    if row.state != State.UNBILLED or outcome in {Outcome.UNREACHED, Outcome.LEFT}:
        return outcome
    over = from_now(-meterly_settings.JOURNAL_RETENTION)
    debt = Reservation.objects.using(alias()).filter(
        Q(decided_at__lt=over) | Q(decided_at=None, created_at__lt=over),
        pk=row.pk,
        state=row.state,
    )
    if debt.update(stuck_at=DatabaseNow()):
        _announce(signals.reservation_stuck, row)
    return outcome


def sweep(client: MeterlyClient, *, limit: int | None = None) -> tuple[int, int]:
    """Give up lapsed rows, then settle what is due; return both numbers."""
    return record_lapsed(), settle_due(client, limit=limit).taken


def retry_stuck(rows: ReservationQuerySet) -> int:
    """Let the stuck ones of *rows* be tried again, from now; return how many."""
    return change_in_batches(
        rows.using(alias()).stuck().unsettled().order_by().select_related(None),
        lambda some: some.update(
            stuck_at=None, refusals=0, next_attempt_at=DatabaseNow()
        ),
        size=BATCH,
    )


def prune(*, seconds: float | None = None) -> int:
    """Delete what was settled ``JOURNAL_RETENTION`` ago; return how many rows.

    What was denied is deleted after a day. For *seconds* at most. Nothing that is
    open, due, owed or stuck is deleted. A row that cannot be deleted, for example
    because the project protects it by a foreign key, is tried again after a day.
    """
    return change_in_batches(
        prunable(),
        lambda rows: rows.delete()[1].get(Reservation._meta.label, 0),
        size=BATCH,
        until=_until(seconds),
        otherwise=lambda rows: rows.update(next_attempt_at=from_now(KEPT)),
    )


def prunable() -> ReservationQuerySet:
    """Return the rows that ``prune`` deletes.

    A key that was charged stays charged. The ledger remembers the hold of a first
    attempt for ever; what was charged in another way is only known from its row.
    """
    rows = Reservation.objects.using(alias())
    charged = Q(state__in=State.charged())
    denied = rows.filter(state=State.DENIED, next_attempt_at__lte=DatabaseNow())
    # One that could not be deleted has a next attempt.
    tried = Q(next_attempt_at__gt=DatabaseNow())
    return denied | rows.settled(meterly_settings.JOURNAL_RETENTION).exclude(
        tried | charged & (Q(attempt__gt=1) | Q(lapsed=True))
    )


@dataclass(frozen=True)
class Backlog:
    """What waits for the sweeper, and for people.

    *lapsed* rows are to be given up, *due* ones to be carried out; *by_state*
    counts both. *oldest_due_seconds* is how long the one that has waited longest
    has waited, ``None`` if none does. *unbilled* are debts, due or not; *stuck*
    rows are not tried any more.
    """

    by_state: dict[str, int]
    lapsed: int
    due: int
    oldest_due_seconds: float | None
    unbilled: int
    stuck: int


def backlog(older_than: float = 0.0) -> Backlog:
    """Count what has waited for *older_than* seconds or more; change nothing."""
    rows = Reservation.objects.using(alias())
    by_state: dict[str, int] = {}
    waited = []
    for waiting, since in (
        (rows.lapsed(older_than), "lease_until"),
        (rows.due(older_than), "next_attempt_at"),
    ):
        by_state |= dict(
            waiting.order_by("state").values_list("state").annotate(Count("pk"))
        )
        oldest = (
            waiting.order_by(since).annotate(now=DatabaseNow()).values(since, "now")
        ).first()
        if oldest is not None:
            waited.append((oldest["now"] - oldest[since]).total_seconds())
    lapsed = sum(by_state.get(state, 0) for state in State.open())
    return Backlog(
        by_state=by_state,
        lapsed=lapsed,
        due=sum(by_state.values()) - lapsed,
        oldest_due_seconds=round(max(waited), 1) if waited else None,
        unbilled=rows.filter(state=State.UNBILLED).count(),
        stuck=rows.stuck().count(),
    )


def _until(seconds: float | None) -> float:
    return float("inf") if seconds is None else time.monotonic() + seconds
