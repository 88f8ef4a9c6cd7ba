"""The sweeper: it decides lapsed rows, settles due ones and deletes old ones.

``tasks.settle_reservations`` (Celery) and ``manage.py meterly_settle`` call it. It
finishes the rows of processes that have died, and of ledgers that did not answer.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from django.db import Error, transaction
from django.db.models import Case, Count, F, Q, Value, When

from .. import signals
from ..conf import meterly_settings
from ..db import (
    DatabaseNow,
    bound_waits,
    change_in_batches,
    from_now,
    refused_by_database,
    refuses_rows,
    unlocked,
    was_locked,
)
from ..models import Reservation
from .rows import State, alias, announce
from .settling import Outcome, postpone, settle

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator

    from ..client import MeterlyClient
    from ..models import ReservationQuerySet

logger = logging.getLogger(__name__)


#: After how many seconds ``prune`` tries a row again that could not be deleted.
KEPT = 86400.0


#: The sweeper takes at most BATCH rows at a time, at random out of the WINDOW rows that
#: have waited longest.
BATCH, WINDOW = 200, 2000


#: A round ends after so many rows one after the other have not reached the ledger.
OUTAGE_AFTER = 3


def record_lapsed(*, older_than: float = 0.0, seconds: float | None = None) -> int:
    """Decide the open rows whose lease has lapsed; return how many.

    A presumed row is charged, every other row is released. One UPDATE decides both:
    between two of them, a row could become presumed and be released all the same. Only
    rows whose lease lapsed *older_than* seconds ago are decided. The call stops after
    *seconds*, and leaves the rest to the next call.
    """
    return change_in_batches(
        Reservation.objects.using(alias()).lapsed(older_than),
        lambda rows: rows.update(
            # The row was due when its lease lapsed. This assignment comes first,
            # because MySQL assigns from left to right.
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


@dataclass
class Round:
    """The result of one round of the sweeper.

    The round tried *taken* rows, and *settled* of them are final now. *outage* says
    that it ended early because the ledger could not be reached.
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

    The round tries at most *limit* rows, only those that have been due for *older_than*
    seconds, and ends after *seconds*. It calls *on_row* with the number of rows tried
    so far. Any number of processes may run it at once. A sweeper takes a row by moving
    its next attempt into the future, so a sweeper that dies only delays the row.
    """
    using = alias()
    done = Round()
    until = _until(seconds)
    unreached = 0
    left: list[uuid.UUID] = []
    while True:
        batch, is_last = _batch(using, older_than, left)
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
                # The other rows stay due, as they are, until the ledger is back.
                logger.warning("The ledger is out of reach; the sweeper ends its round")
                done.outage = True
                return done
        if is_last:
            return done


def _batch(
    using: str, older_than: float, left: list[uuid.UUID]
) -> tuple[list[Reservation], bool]:
    """Return up to ``BATCH`` rows that are due, and whether they are the last ones.

    Rows in *left* are not chosen. Rows that another process has locked are added to it,
    because nobody waits for them.
    """
    rows = Reservation.objects.using(using)
    due = list(
        rows.due(older_than)
        .exclude(pk__in=left)
        .order_by("next_attempt_at")
        .values_list("pk", flat=True)[:WINDOW]
    )
    # At random: two sweepers should not choose the same rows, and a row that kills its
    # sweeper should not be the first of every round.
    chosen = random.sample(due, min(BATCH, len(due)))
    with transaction.atomic(using=using):
        free = set(unlocked(rows.filter(pk__in=chosen)).values_list("pk", flat=True))
    left += set(chosen) - free
    batch = list(rows.select_related("customer").filter(pk__in=free))
    random.shuffle(batch)
    return batch, len(due) <= BATCH


@contextmanager
def taking(
    client: MeterlyClient, using: str, take: Callable[[], bool]
) -> Iterator[bool]:
    """Call *take*, which writes to a row of *using*; yield its result.

    If the ledger is in *using*, the whole block is one transaction, which begins with
    that write. Otherwise only the write is in a transaction. A row that somebody has
    locked ends the wait with an error (``bound_waits``).
    """
    transport = client.transport
    joins = transport.joins(using)
    with transport.unit_of_work(using):
        with nullcontext() if joins else transaction.atomic(using=using):
            bound_waits(using)
            taken = take()
        yield taken


def _sweep_row(client: MeterlyClient, using: str, row: Reservation) -> Outcome | None:
    """Settle *row*; return the outcome, or ``None`` if another sweeper has taken it."""
    handled = sys.exception()
    try:
        with taking(client, using, lambda: _take(using, row)) as taken:
            return _settle_taken(client, row) if taken else None
    except Exception as exc:
        # An error in one row must not stop the other rows.
        logger.exception("Reservation %s could not be settled", row.pk)
        if was_locked(exc, handled):
            return Outcome.LEFT
        refusal = refused_by_database(exc, handled)
        try:
            with transaction.atomic(using=using):
                bound_waits(using)
                row.refresh_from_db(using=using)
                # The rollback may have undone _take().
                taken = _take(using, row)
                if isinstance(exc, Error) and refusal is None:
                    return Outcome.UNREACHED if taken else None
                return postpone(row, refusal or exc, Outcome.REFUSED)
        except Reservation.DoesNotExist:
            return None
        except Error as again:
            if not refuses_rows(using, again):
                raise
            logger.exception("Reservation %s cannot be changed", row.pk)
            return Outcome.LEFT


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
        announce(signals.reservation_stuck, row)
    return outcome


def sweep(client: MeterlyClient, *, limit: int | None = None) -> tuple[int, int]:
    """Decide lapsed rows, then settle due ones; return how many of each."""
    return record_lapsed(), settle_due(client, limit=limit).taken


def retry_stuck(rows: ReservationQuerySet) -> int:
    """Make the stuck ones of *rows* due again, now; return how many."""
    return change_in_batches(
        rows.using(alias()).stuck().unsettled().order_by().select_related(None),
        lambda some: some.update(
            stuck_at=None, refusals=0, next_attempt_at=DatabaseNow()
        ),
        size=BATCH,
    )


def prune(*, seconds: float | None = None) -> int:
    """Delete rows that were settled ``JOURNAL_RETENTION`` ago; return how many.

    Denied rows are deleted after a day. Open, due, owed and stuck rows are kept. The
    call stops after *seconds*. A row that cannot be deleted, for example because a
    foreign key of the project protects it, is tried again after a day.
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

    A key that was charged must stay charged. The ledger remembers the hold of a first
    attempt for ever. Other charges (a later attempt, a direct debit) are only known
    from their row, so such a row is kept.
    """
    rows = Reservation.objects.using(alias())
    charged = Q(state__in=State.charged())
    denied = rows.filter(state=State.DENIED, next_attempt_at__lte=DatabaseNow())
    # prune() gives a row a next attempt if it could not be deleted.
    tried = Q(next_attempt_at__gt=DatabaseNow())
    return denied | rows.settled(meterly_settings.JOURNAL_RETENTION).exclude(
        tried | charged & (Q(attempt__gt=1) | Q(lapsed=True))
    )


@dataclass(frozen=True)
class Backlog:
    """The rows that wait for the sweeper, and for people.

    *lapsed* rows wait for a decision, *due* rows for the ledger; *by_state* counts
    both. *oldest_due_seconds* is the longest wait among them (``None`` without any).
    *unbilled* rows are debts, due or not. *stuck* rows wait for a person.
    """

    by_state: dict[str, int]
    lapsed: int
    due: int
    oldest_due_seconds: float | None
    unbilled: int
    stuck: int


def backlog(older_than: float = 0.0) -> Backlog:
    """Count the rows that have waited for *older_than* seconds; change nothing."""
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
