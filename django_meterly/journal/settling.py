"""Carrying out the decision that a row records: commit, release or debit.

The process that decided calls ``settle`` at once. If that fails, the sweeper calls it
again.
"""

from __future__ import annotations

import logging
import random
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

from django.db import transaction
from django.db.models import F

from .. import signals
from ..conf import meterly_settings
from ..db import DatabaseNow, from_now, refused_by_database, was_locked
from ..errors import (
    MAX_MESSAGE_LENGTH,
    OUTAGE,
    MeterlyApiError,
    MeterlyError,
    MeterlyInsufficientCreditsError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
)
from ..models import Customer, Reservation
from ..wire import clean_text
from . import calls, deciding
from .low_balance import watch_balance
from .rows import NO_HOLD, OUTCOMES, SETTLE_TIMEOUT, State, alias, announce, move

if TYPE_CHECKING:
    from ..client import MeterlyClient

logger = logging.getLogger(__name__)


#: Back-off of a settlement that could not be carried out: 5 s, doubled to 1 h.
BACKOFF_FIRST, BACKOFF_MOST = 5.0, 3600.0


#: How often a debt is tried again.
UNBILLED_INTERVAL = 6 * 3600.0


def commit_unrecorded(client: MeterlyClient, row: Reservation, charge: int) -> None:
    """Commit at a remote ledger although the success cannot be recorded.

    This is for a journal whose database is down. The row's lease lapses later, and its
    release finds the hold committed. A direct debit is never sent here: without a
    record nobody would know of it.
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
        calls.commit(client.within(SETTLE_TIMEOUT, attempts=1), row, charge)
    except MeterlyError:
        logger.exception("Reservation %s could not be committed either", row.pk)


class Outcome(Enum):
    """The outcome of one attempt to settle a row."""

    #: The ledger has answered. The row is final now, or a debt.
    ANSWERED = "answered"
    #: The ledger has refused, for a reason that may pass.
    REFUSED = "refused"
    #: The ledger could not be asked.
    UNREACHED = "unreached"
    #: The database refuses to change the row, or somebody has locked the row or its
    #: account. The row is unchanged.
    LEFT = "left"


def settle(
    client: MeterlyClient, row: Reservation, *, timeout: float | None
) -> Outcome:
    """Carry out the decision that *row* records, once, and record the outcome.

    An error of the ledger is recorded, and the sweeper tries again; only database
    errors are raised. With a *timeout*, each call is tried once, and all calls together
    may take that many seconds.
    """
    if row.is_noted and row.charge is not None:
        deciding.record_late_success(row, row.charge, row.fence)
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
            return postpone(row, refusal, Outcome.REFUSED)
        locked = was_locked(exc, handled)
        return postpone(row, exc, Outcome.LEFT if locked else Outcome.UNREACHED)
    except MeterlyApiError as exc:
        return postpone(row, exc, Outcome.REFUSED)
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
    """Commit the hold of *row*, and debit the rest of its charge."""
    assert row.charge is not None
    owed = row.charge
    held = _find_hold(client, row)
    if held:
        try:
            owed -= calls.commit(client, row, row.charge)
        except (MeterlyReservationExpiredError, MeterlyReservationReleasedError):
            held = False
    if owed:
        # A replay debits the same amount: whether a hold existed is on record, and how
        # it ended is final at the ledger.
        try:
            movement = client.use_credits(
                calls.customer_id(client, row),
                owed,
                row.unit,
                row.reference,
                idempotency_key=row.wire_key("debit"),
            )
        except MeterlyInsufficientCreditsError as exc:
            _record_debt(row, owed, exc)
            return
        watch_balance(row, movement.balance, owed)
    # The ledger remembers a committed hold by the key of its reserve. Without a hold,
    # only this row says that the key was charged.
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


def _find_hold(client: MeterlyClient, row: Reservation) -> bool:
    """Return whether the row has a hold at the ledger, which is asked if need be.

    If the answer of the reserve was lost, the same reserve is sent again. A refusal
    means that no hold was made. The result is recorded once and for good, before
    anything else is done. Otherwise a top-up could let the same reserve make a hold
    later, and work that a debit has paid for would be paid for twice.
    """
    if row.reservation_id is not None:
        return bool(row.reservation_id)
    held = None
    try:
        held = calls.hold(client, row)
    except MeterlyInsufficientCreditsError:
        pass
    found = NO_HOLD if held is None else held.reservation_id
    using = alias()
    unknown = Reservation.objects.using(using).filter(pk=row.pk, reservation_id=None)
    if unknown.update(reservation_id=found):
        row.reservation_id = found
        if held is not None and row.state == State.COMMIT_PENDING:
            watch_balance(row, held.balance, row.amount)
    else:
        # Another process has recorded its answer before, and that answer counts.
        row.refresh_from_db(using=using, fields=["reservation_id"])
        if held is not None and row.reservation_id == NO_HOLD:
            calls.give_back(client, row, held)
    return bool(row.reservation_id)


def _finish(row: Reservation, outcome: str, **fields: Any) -> bool:
    """Record the final *outcome* and announce it; return whether the row took it."""
    # A late success may have replaced a pending release meanwhile. Then this outcome
    # does not count, and the commit finds out how much is owed.
    sources = {row.state}
    if outcome == State.COMMITTED and row.state != State.RELEASE_PENDING:
        sources |= {State.COMMIT_PENDING, State.UNBILLED}
    finished = move(
        row, sources, outcome, next_attempt_at=None, stuck_at=None, **fields
    )
    if finished and outcome in OUTCOMES:
        announce(OUTCOMES[outcome], row)
    return finished


def _record_debt(
    row: Reservation, owed: int, exc: MeterlyInsufficientCreditsError
) -> None:
    first = row.state == State.COMMIT_PENDING
    using = alias()
    row.shortage = exc
    recorded = move(
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
        # After the COMMIT: a reserve locks the customer before the account, so that
        # locking them here in the other order could deadlock.
        transaction.on_commit(
            lambda: customers.filter(owes=False).update(owes=True),
            using=using,
            robust=True,
        )
    logger.warning("Reservation %s could not be billed: %s", row.pk, exc)
    if recorded and first:
        announce(signals.reservation_unbilled, row)


def postpone(row: Reservation, exc: Exception, outcome: Outcome) -> Outcome:
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
        announce(signals.reservation_stuck, row)
    return outcome
