"""Every state change of a ``Reservation``, and the sweeper that finishes them.

The journal is what makes the promise good: a row is written before the ledger
is asked, a decision is recorded before the ledger hears of it, and whoever
finds a decided row may carry it out, because every call is sent with the key
that belongs to the row. Each transition is one conditional UPDATE; the number
of rows it changed says whether it happened::

     intent ──────────┬────────► denied
       │ reserve      ├────────► failed
       ▼              └─(lease lapsed)──┐
     reserved ── work failed ───────────► release_pending ──► released | conflict
       │   └──── lease lapsed ──────────┘        │               │
       └──────── work succeeded ◄── late success ┴───────────────┘
                     ▼
                commit_pending ──► committed
                     └─ hold gone ► one direct debit ► committed | unbilled
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    connections,
    router,
    transaction,
)
from django.db.models import F
from django.utils import timezone

from . import signals
from .conf import meterly_settings
from .db import DatabaseNow, from_now
from .errors import (
    OUTAGE,
    MeterlyApiError,
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyIdempotencyInProgressError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyNotFoundError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
    MeterlyUnavailableError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)
from .models import Reservation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from django.dispatch import Signal

    from .client import MeterlyClient
    from .models import Customer
    from .types import Balance
    from .types import Reservation as Held

logger = logging.getLogger(__name__)
T = TypeVar("T")
State = Reservation.State

#: Seconds a settlement may take inside a request: the row is durable, and the
#: sweeper follows.
SETTLE_TIMEOUT = 2.0
#: Back-off of a settlement that could not be carried out: 5 s, doubled to 1 h.
BACKOFF_FIRST, BACKOFF_MOST = 5.0, 3600.0
#: How often a debt is tried again.
UNBILLED_INTERVAL = 6 * 3600.0
#: Rows the sweeper looks up at a time.
BATCH = 200


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


def refuse_open_transaction(client: MeterlyClient) -> None:
    """Raise ``MeterlyUsageError`` when a transaction is open on a database we write to.

    That is the journal's, and the embedded ledger's if it has another.
    """
    for using in {alias(), *client.transport.aliases()}:
        if in_transaction(using):
            raise MeterlyUsageError(_IN_TRANSACTION.format(using))


_IN_TRANSACTION = (
    "A guard cannot reserve inside an open transaction (on the database {!r}): a "
    "rollback would take the reservation's record with it. Move guard() outside the "
    "atomic() block, or pass durable=False to let the reservation live and die with "
    "the transaction. Put meterly_guard around as_view(), above every decorator that "
    "opens a transaction, and have the decorators above it use functools.wraps. If it "
    "guards a handler of a class-based view, put MeterlyGuardMixin first among the "
    "bases of the class: it keeps ATOMIC_REQUESTS from opening the transaction early."
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
    work: str = "",
) -> tuple[Reservation, Balance]:
    """Write the intent, ask the ledger to hold *amount*, and record its answer.

    Without a *key*, a random one is used. *work* names the view or the task.
    Returns the row, which is ``reserved``, and the balance after the hold. With a
    ledger in the journal's own database, row and hold are one transaction. Raises
    ``MeterlyInsufficientCreditsError`` (row ``denied``),
    ``MeterlyUnavailableError`` (the work must not run; a hold that may exist is
    released by the sweeper), ``MeterlyDuplicateError`` when *key* was used, and
    ``MeterlyIdempotencyMismatchError`` when it was used for something else.
    """
    using = alias()
    deadline = meterly_settings.DEADLINE
    # A customer's first reserve is two calls, and they share the one deadline.
    limited = client.within(deadline)
    try:
        customer.register(limited, meterly_settings.DEFAULT_UNIT or unit)
    except OUTAGE as exc:
        raise _unavailable(exc) from exc
    row = Reservation(
        customer=customer,
        unit=unit,
        amount=amount,
        reference=reference,
        work=work,
        key=key or str(uuid.uuid4()),
        ttl_seconds=ttl_seconds,
        lease_until=from_now(deadline + meterly_settings.LEASE_GRACE),
    )
    if key:
        row.attempt = _next_attempt(using, row)
    with client.transport.unit_of_work(using):
        try:
            with transaction.atomic(using=using):
                row.save(force_insert=True, using=using)
        except IntegrityError as exc:
            # Somebody else opened this attempt in between: theirs runs, not ours.
            _next_attempt(using, row)
            raise MeterlyDuplicateError(
                f"The idempotency key {key!r} is in use right now.", in_progress=True
            ) from exc
        answer = _ask(client, limited, row)
    # Outside the block, so that a refusal is recorded and not rolled back.
    if isinstance(answer, MeterlyError):
        raise answer
    return row, answer


def _next_attempt(using: str, row: Reservation) -> int:
    """Return the number of the attempt that *row* would be; its key may be tried.

    Raises ``MeterlyDuplicateError`` and ``MeterlyIdempotencyMismatchError``.
    """
    last = (
        Reservation.objects.using(using)
        .filter(customer=row.customer, key=row.key)
        .order_by("-attempt")
        .first()
    )
    if last is None:
        return 1
    given_up = (*State.free(), State.RELEASE_PENDING)
    # Nothing came of an attempt that was given up: the next may cost another amount.
    if (
        last.work != row.work
        or last.unit != row.unit
        or (last.amount != row.amount and last.state not in given_up)
    ):
        raise MeterlyIdempotencyMismatchError(
            f"The idempotency key {row.key!r} was used for something else before: "
            f"{last.amount} {last.unit} for {last.work or 'guard()'!r}, and not "
            f"{row.amount} {row.unit} for {row.work or 'guard()'!r}."
        )
    if last.state not in State.free():
        raise _duplicate(last)
    return last.attempt + 1


def _duplicate(row: Reservation) -> MeterlyDuplicateError:
    in_progress = row.state in (*State.open(), State.RELEASE_PENDING)
    return MeterlyDuplicateError(
        f"The idempotency key {row.key!r} "
        + ("is in use right now" if in_progress else "was used already")
        + f" (reservation {row.state}).",
        state=row.state,
        reference=row.reference,
        in_progress=in_progress,
    )


def _ask(
    client: MeterlyClient, limited: MeterlyClient, row: Reservation
) -> Balance | MeterlyError:
    """Send the reserve, by the *limited* client, and record what came of it."""
    try:
        held = _hold(limited, row)
    except MeterlyInsufficientCreditsError as exc:
        _move(row, [State.INTENT], State.DENIED, lease_until=None)
        return exc
    except (MeterlyUnknownOutcomeError, MeterlyIdempotencyInProgressError) as exc:
        # There may be a hold. The row keeps its lease; the sweeper sends the
        # same reserve again to learn the hold's id, and releases it.
        return _unavailable(exc)
    except MeterlyError as exc:
        _move(
            row,
            [State.INTENT],
            State.FAILED,
            lease_until=None,
            last_error=str(exc),
        )
        if isinstance(exc, MeterlyNotFoundError):
            # Another ledger than the one this customer was registered at, or a
            # registration that was rolled back: the next use registers again.
            row.customer.forget_registration()
            return _unavailable(exc)
        return _unavailable(exc) if isinstance(exc, OUTAGE) else exc
    if held.status != "reserved":
        # A key from before the journal was lost or restored: that hold is over.
        over = State.COMMITTED if held.status == "committed" else State.RELEASED
        _move(row, [State.INTENT], over, lease_until=None)
        return MeterlyDuplicateError(
            f"The ledger knows the idempotency key {row.key!r} already: its "
            f"reservation is {held.status}.",
            state=held.status,
        )
    if not _move(
        row,
        [State.INTENT],
        State.RESERVED,
        reservation_id=held.reservation_id,
        # From the moment the intent was written: the hold cannot be older.
        lease_until=F("lease_until")
        + dt.timedelta(seconds=row.ttl_seconds - meterly_settings.DEADLINE),
    ):
        # The sweeper may have been told that there is no hold, before there was.
        try:
            client.within(SETTLE_TIMEOUT, attempts=1).release_reservation(
                held.reservation_id, idempotency_key=row.wire_key("release")
            )
        except MeterlyError as exc:
            logger.warning("Reservation %s ends with its time: %s", row.pk, exc)
        return MeterlyUnavailableError(
            "The ledger answered after the reservation had been given up."
        )
    row.reservation_id = held.reservation_id
    return held.balance


def _hold(client: MeterlyClient, row: Reservation) -> Held:
    """Send the reserve of *row*: the same key and body whoever sends it."""
    return client.reserve_credits(
        row.customer.register(client, row.unit),
        row.amount,
        unit=row.unit,
        reference=row.reference,
        idempotency_key=row.wire_key("reserve"),
        ttl_seconds=row.ttl_seconds,
    )


def _unavailable(exc: MeterlyError) -> MeterlyUnavailableError:
    logger.warning("The ledger cannot be asked for credits: %s", exc)
    unavailable = MeterlyUnavailableError(f"The ledger cannot be asked: {exc}")
    unavailable.__cause__ = exc
    return unavailable


# Decisions


def record_success(row: Reservation, charge: int) -> bool:
    """Record that the work succeeded and *charge* credits are owed.

    Also after the lease has lapsed, and after the release: work that was done
    is paid for. Returns whether the row took the decision.
    """
    return _move(
        row,
        [State.RESERVED, State.RELEASE_PENDING, State.RELEASED],
        State.COMMIT_PENDING,
        charge=charge,
        lapsed=False,
        **_decided(),
    )


def record_failure(row: Reservation) -> bool:
    """Record that the work failed, or is to cost nothing.

    Returns whether the row took the decision; if not, the row has another one,
    which stands.
    """
    return _move(row, [State.RESERVED], State.RELEASE_PENDING, **_decided())


def record_lapsed() -> int:
    """Give up every open row whose lease has run out; return how many."""
    return (
        Reservation.objects.using(alias())
        .lapsed()
        .update(
            state=State.RELEASE_PENDING,
            lapsed=True,
            **_decided(next_attempt_at=DatabaseNow()),
        )
    )


def _decided(**fields: Any) -> dict[str, Any]:
    # Whoever decides settles at once; the sweeper leaves them the time for it.
    return {
        "lease_until": None,
        "next_attempt_at": from_now(meterly_settings.DEADLINE),
        "decided_at": DatabaseNow(),
        # The ledger may have refused the decision before this one.
        "stuck_at": None,
        "refusals": 0,
        **fields,
    }


def _move(row: Reservation, sources: Iterable[str], target: str, **fields: Any) -> bool:
    """Move *row* from one of *sources* to *target* by one conditional UPDATE."""
    using = alias()
    changed = on_live_connection(
        using,
        lambda: (
            Reservation.objects.using(using)
            .filter(pk=row.pk, state__in=list(sources))
            .update(state=target, **fields)
        ),
    )
    if changed:
        row.state = target
        if "charge" in fields:
            row.charge = fields["charge"]
    return bool(changed)


def on_live_connection(using: str, query: Callable[[], T]) -> T:
    """Run *query*, once more on a new connection if the present one is dead.

    Only outside a transaction: inside one the lost connection took the
    transaction's other changes with it.
    """
    connection = connections[using]
    before = connection.connection
    try:
        return query()
    except (OperationalError, InterfaceError):
        if connection.in_atomic_block:
            raise
        # Leaving an atomic block, Django has replaced a dead connection already.
        replaced = before is not None and connection.connection is not before
        if not replaced:
            if connection.connection is not None and connection.is_usable():
                raise
            connection.close()
        return query()


# Carrying decisions out


def commit_unrecorded(client: MeterlyClient, row: Reservation, charge: int) -> None:
    """Commit at a remote ledger although the success cannot be recorded.

    For when the database is down: the row's lease will lapse, and its release
    finds the hold committed. Never the direct debit, which no row would know of.
    """
    key = row.wire_key("commit")
    logger.error(
        "The success of reservation %s (hold %s) could not be recorded. It is "
        "committed at the ledger all the same, for %d, with the idempotency key %s.",
        row.pk,
        row.reservation_id,
        charge,
        key,
    )
    held = min(charge, row.amount)
    try:
        client.within(SETTLE_TIMEOUT, attempts=1).commit_reservation(
            str(row.reservation_id),
            amount=None if held == row.amount else held,
            idempotency_key=key,
        )
    except MeterlyError:
        logger.exception("Reservation %s could not be committed either", row.pk)


def settle(client: MeterlyClient, row: Reservation, *, timeout: float | None) -> None:
    """Carry out the decision that *row* records, once, and record the outcome.

    Anything that stands in the way is recorded and left to the sweeper; nothing
    is raised but database errors. With a *timeout*, each call is tried once, and
    all of them together may take that many seconds.
    """
    if row.state not in State.pending():
        return
    if timeout is not None:
        client = client.within(timeout, attempts=1)
    try:
        if row.state == State.RELEASE_PENDING:
            _settle_release(client, row)
        else:
            _settle_commit(client, row)
    except OUTAGE as exc:
        _postpone(row, exc, refused=False)
    except MeterlyApiError as exc:
        _postpone(row, exc, refused=True)


def _settle_release(client: MeterlyClient, row: Reservation) -> None:
    if not _find_hold(client, row):
        _finish(row, State.RELEASED)
        return
    assert row.reservation_id is not None
    try:
        client.release_reservation(
            row.reservation_id,
            idempotency_key=row.wire_key("release"),
        )
    except (MeterlyReservationExpiredError, MeterlyReservationReleasedError):
        _finish(row, State.RELEASED)
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


def _settle_commit(client: MeterlyClient, row: Reservation) -> None:
    assert row.charge is not None
    owed = row.charge
    if _find_hold(client, row):
        assert row.reservation_id is not None
        held = min(row.charge, row.amount)
        try:
            client.commit_reservation(
                row.reservation_id,
                amount=None if held == row.amount else held,
                idempotency_key=row.wire_key("commit"),
            )
        except (MeterlyReservationExpiredError, MeterlyReservationReleasedError):
            pass
        else:
            owed -= held
    if owed:
        # What the hold did not cover. Whether the hold was committed or lost is
        # final at the ledger, so a replay comes to the same amount.
        try:
            client.use_credits(
                row.customer.register(client, row.unit),
                owed,
                row.unit,
                row.reference,
                idempotency_key=row.wire_key("debit"),
            )
        except MeterlyInsufficientCreditsError as exc:
            _record_debt(row, exc)
            return
    _finish(row, State.COMMITTED)


def _find_hold(client: MeterlyClient, row: Reservation) -> bool:
    """Return whether the row has a hold at the ledger, asking by its key if need be.

    The reserve whose answer was lost is sent again; a refusal means that it
    never came to a hold.
    """
    if row.reservation_id:
        return True
    try:
        held = _hold(client, row)
    except MeterlyInsufficientCreditsError:
        return False
    Reservation.objects.using(alias()).filter(pk=row.pk, reservation_id=None).update(
        reservation_id=held.reservation_id
    )
    row.reservation_id = held.reservation_id
    return True


def _finish(row: Reservation, outcome: str, **fields: Any) -> bool:
    # A late success may have taken a pending release over meanwhile: then this
    # outcome is no longer the row's, and the commit finds out what is owed.
    sources = {row.state}
    if outcome == State.COMMITTED and row.state != State.RELEASE_PENDING:
        sources |= {State.COMMIT_PENDING, State.UNBILLED}
    return _move(
        row,
        sources,
        outcome,
        next_attempt_at=None,
        stuck_at=None,
        settled_at=DatabaseNow(),
        **fields,
    )


def _record_debt(row: Reservation, exc: MeterlyError) -> None:
    first = row.state == State.COMMIT_PENDING
    recorded = _move(
        row,
        [State.COMMIT_PENDING, State.UNBILLED],
        State.UNBILLED,
        next_attempt_at=from_now(UNBILLED_INTERVAL * random.uniform(0.8, 1.2)),  # noqa: S311
        last_error=str(exc),
    )
    logger.warning("Reservation %s could not be billed: %s", row.pk, exc)
    if recorded and first:
        _announce(signals.reservation_unbilled, row)


def _postpone(row: Reservation, exc: MeterlyError, *, refused: bool) -> None:
    delay = min(BACKOFF_FIRST * 2 ** min(row.settle_attempts, 20), BACKOFF_MOST)
    refusals = row.refusals + refused
    stuck = refused and refusals >= meterly_settings.MAX_SETTLE_ATTEMPTS
    changed = (
        Reservation.objects.using(alias())
        .filter(pk=row.pk, state=row.state)
        .update(
            next_attempt_at=from_now(delay * random.uniform(0.5, 1.0)),  # noqa: S311
            refusals=F("refusals") + int(refused),
            stuck_at=DatabaseNow() if stuck else None,
            last_error=str(exc),
        )
    )
    logger.warning("Reservation %s is still %s: %s", row.pk, row.state, exc)
    if changed and stuck:
        _announce(signals.reservation_stuck, row)


def _announce(signal: Signal, row: Reservation) -> None:
    # Once the fact is durable, and whatever the receivers do.
    transaction.on_commit(
        lambda: signal.send_robust(sender=Reservation, reservation=row),
        using=alias(),
        robust=True,
    )


# The sweeper


def settle_due(client: MeterlyClient, *, limit: int | None = None) -> int:
    """Carry out the decisions that are due; return how many rows were taken up.

    May run in any number of processes at once. A row is claimed by moving its
    next attempt into the future, so a settler that dies delays it, no more.
    """
    using = alias()
    taken = 0
    while limit is None or taken < limit:
        due = list(
            Reservation.objects.using(using)
            .due()
            .order_by("next_attempt_at")
            .values_list("pk", flat=True)[:BATCH]
        )
        # Sweepers side by side are not to wait for each other row by row, and a
        # row that ends its settler is not to be everybody's first.
        random.shuffle(due)
        for pk in due[: None if limit is None else limit - taken]:
            taken += _sweep_row(client, using, pk)
        if len(due) < BATCH:
            break
    return taken


def _sweep_row(client: MeterlyClient, using: str, pk: Any) -> bool:
    try:
        # Claimed inside: with a ledger in the same database all of it is one
        # transaction, which begins with a write.
        with client.transport.unit_of_work(using):
            row = _claim(using, pk)
            if row is not None:
                _settle_claimed(client, row)
    except Exception:
        # Whatever is wrong with one row, it must not stop the others.
        logger.exception("Reservation %s could not be settled", pk)
        row = _claim(using, pk)
    return row is not None


def _claim(using: str, pk: Any) -> Reservation | None:
    claimed = (
        Reservation.objects.using(using)
        .due()
        .filter(pk=pk)
        .update(
            next_attempt_at=from_now(
                meterly_settings.DEADLINE * 3 + meterly_settings.LEASE_GRACE
            ),
            settle_attempts=F("settle_attempts") + 1,
        )
    )
    if not claimed:
        return None
    return Reservation.objects.using(using).select_related("customer").get(pk=pk)


def _settle_claimed(client: MeterlyClient, row: Reservation) -> None:
    retention = dt.timedelta(seconds=meterly_settings.JOURNAL_RETENTION)
    decided_at = row.decided_at or row.created_at
    if row.state == State.UNBILLED and timezone.now() - decided_at > retention:
        stuck = Reservation.objects.using(alias()).filter(pk=row.pk, state=row.state)
        if stuck.update(stuck_at=DatabaseNow()):
            _announce(signals.reservation_stuck, row)
    else:
        settle(client, row, timeout=None)


def sweep(client: MeterlyClient, *, limit: int | None = None) -> tuple[int, int]:
    """Give up lapsed rows, then settle what is due; return both numbers."""
    return record_lapsed(), settle_due(client, limit=limit)
