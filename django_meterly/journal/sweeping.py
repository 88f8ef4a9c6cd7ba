"""The sweeper: it decides lapsed rows, settles due ones and deletes old ones."""

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


#: When a row that could not be deleted is tried again.
KEPT = 86400.0


#: Rows the sweeper takes at a time, and of how many it chooses them.
BATCH, WINDOW = 200, 2000


#: Rows in a row that find the ledger out of reach, after which a round ends.
OUTAGE_AFTER = 3


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
