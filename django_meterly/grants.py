"""Granting credits, with a record of who granted what, and why."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import Error, IntegrityError, router, transaction
from django.db.models import F

from . import signals, units
from .db import (
    bound_waits,
    in_transaction,
    refused_by_database,
    refuses_rows,
    unlocked,
    was_locked,
)
from .errors import (
    OUTAGE,
    MeterlyApiError,
    MeterlyError,
    MeterlyReferenceConflictError,
    MeterlyUnknownOutcomeError,
)
from .journal import OUTAGE_AFTER, collect, taking
from .models import MAX_REASON_LENGTH, Customer, Grant
from .wire import check_amount, check_description, check_text, shown

if TYPE_CHECKING:
    from .client import MeterlyClient

logger = logging.getLogger(__name__)
State = Grant.State
#: Rows looked up at a time.
BATCH = 200


def grant(
    client: MeterlyClient | None,
    customer: Customer,
    amount: int,
    unit: str,
    *,
    reason: str,
    reference: str,
    actor: Any = None,
) -> tuple[Grant, bool]:
    """Grant *amount* credits of *unit* to *customer*, once per *reference*.

    Returns the grant and whether it is new. A second call with the same customer,
    unit, reference and amount returns the first one's grant; *reason* and *actor* of
    the first stay. For example, a webhook that is delivered twice grants once.

    The record is written before the ledger is asked, and the grant's ``state`` says
    what came of it: ``granted``, ``refused``, or ``pending`` if the answer was lost;
    then ``settle_due`` carries it out. With *client* ``None`` it is only recorded.

    Raises ``MeterlyReferenceConflictError`` if the reference was used for another
    amount, or if the ledger has refused its grant: that is final, and another grant
    takes another reference. Raises ``ValueError`` for arguments out of bounds, a unit
    that ``UNITS`` does not declare, and an empty *reason*. Raises ``TypeError`` if
    *actor* is neither a user nor ``None``.
    """
    check_amount(amount)
    units.check_declared(unit)
    check_text(reference, "reference")
    if not check_description(reason, "reason", length=MAX_REASON_LENGTH).strip():
        raise ValueError("Give a reason: it is kept with the grant.")
    if actor is not None and not isinstance(actor, get_user_model()):
        raise TypeError(
            f"actor must be the user who grants (a {settings.AUTH_USER_MODEL}) or "
            f"None, not {shown(actor)}."
        )
    customer = Customer.objects.resolve(customer)
    using = router.db_for_write(Grant)
    try:
        with transaction.atomic(using=using):
            row = Grant.objects.using(using).create(
                customer=customer,
                unit=unit,
                amount=amount,
                reason=reason,
                reference=reference,
                actor_id=None if actor is None else actor.pk,
            )
    except IntegrityError as exc:
        first = Grant.objects.using(using).get(
            customer=customer, unit=unit, reference=reference
        )
        if not first.stands_for(amount):
            raise _conflict(first) from exc
        return first, False
    if client is not None:
        if in_transaction(using) and not client.transport.joins(using):
            # The ledger may only hear of it once the record is committed.
            transaction.on_commit(
                partial(settle, client, row), using=using, robust=True
            )
        else:
            settle(client, row)
    return row, True


async def agrant(
    client: MeterlyClient | None,
    customer: Customer,
    amount: int,
    unit: str,
    *,
    reason: str,
    reference: str,
    actor: Any = None,
) -> tuple[Grant, bool]:
    """Do what ``grant`` does, for ``async`` code."""
    return await sync_to_async(grant)(
        client,
        customer,
        amount,
        unit,
        reason=reason,
        reference=reference,
        actor=actor,
    )


def _conflict(first: Grant) -> MeterlyReferenceConflictError:
    state = first.state + (f": {first.last_error}" if first.last_error else "")
    return MeterlyReferenceConflictError(
        f"The reference {first.reference!r} was used before, for the grant of "
        f"{first.amount} {first.unit} to {first.customer} ({state}). Another grant "
        "takes another reference."
    )


def settle(client: MeterlyClient, row: Grant) -> bool:
    """Ask the ledger for a pending grant, and record its answer.

    Returns whether the ledger could be asked, or would have been but for a lock.
    """
    asked = _ask(client, row)
    _collect(client, row)
    return asked


def _ask(client: MeterlyClient, row: Grant) -> bool:
    handled = sys.exception()
    try:
        answer = client.grant_credits(
            row.customer.external_id,
            row.amount,
            row.unit,
            row.reference,
            row.reason,
            idempotency_key=row.wire_key,
        )
    except OUTAGE as exc:
        refusal = refused_by_database(exc, handled)
        _record(row, State.PENDING, str(refusal or exc))
        logger.info("Grant %s is still pending: %s", row.pk, refusal or exc)
        return refusal is not None or was_locked(exc, handled)
    except MeterlyApiError as exc:
        _record(row, State.REFUSED, str(exc))
        logger.warning("Grant %s was refused: %s", row.pk, exc)
        return True
    try:
        # The ledger may have registered a customer it did not know.
        row.customer.learn(answer.grant.customer_id)
    except MeterlyUnknownOutcomeError as exc:
        _record(row, State.PENDING, str(exc))
        logger.warning("Grant %s is still pending: %s", row.pk, exc)
    else:
        _record(row, State.GRANTED, "")
    return True


def _collect(client: MeterlyClient, row: Grant) -> None:
    """Have what the customer owes paid from the grant, if it was granted."""
    if row.state != State.GRANTED:
        return
    try:
        using = router.db_for_write(Customer)
        row.customer.refresh_from_db(using=using, fields=["owes"])
        if row.customer.owes:
            collect(client, row.customer, row.unit)
    except (MeterlyError, Error):
        logger.exception("The debts of %s are left to the sweeper", row.customer)


def _record(row: Grant, state: str, error: str) -> None:
    changed = Grant.objects.filter(pk=row.pk, state=State.PENDING).update(
        state=state, last_error=error
    )
    if changed:
        row.state, row.last_error = state, error
        if state == State.GRANTED:
            using = router.db_for_write(Grant)
            signals.announce(signals.credits_granted, Grant, using=using, grant=row)


def settle_due(client: MeterlyClient) -> int:
    """Ask the ledger again for pending grants; return how many were asked for.

    Stops when the ledger is out of reach for several grants in a row: the others can
    wait for the next run. A grant that cannot be settled is logged, and left.
    """
    using = router.db_for_write(Grant)
    pending = Grant.objects.using(using).filter(state=State.PENDING)
    with transaction.atomic(using=using):
        # A grant the ledger cannot answer must not stand in the others' way.
        free = unlocked(pending).order_by("?").values_list("pk", flat=True)[:BATCH]
        pks = list(free)
    asked = unreached = 0
    handled = sys.exception()
    for row in pending.filter(pk__in=pks).select_related("customer").order_by("?"):
        asked += 1
        try:
            with taking(client, using, partial(_take, row)) as taken:
                reached = not taken or _ask(client, row)
            unreached = 0 if reached else unreached + 1
            # Afterwards: a guard locks the customer before the account.
            _collect(client, row)
        except Exception as exc:
            # Whatever is wrong with one grant, it must not stop the others.
            if not refuses_rows(using, exc):
                raise
            logger.exception("Grant %s could not be settled", row.pk)
            if not was_locked(exc, handled):
                refusal = refused_by_database(exc, handled)
                outage = isinstance(exc, Error) and refusal is None
                unreached = unreached + 1 if outage else 0
                _record_refusal(row, refusal or exc)
        if unreached == OUTAGE_AFTER:
            break
    return asked


def _take(row: Grant) -> bool:
    """Lock *row*; return whether it is still pending."""
    pending = Grant.objects.filter(pk=row.pk, state=State.PENDING)
    return bool(pending.update(last_error=F("last_error")))


def _record_refusal(row: Grant, refusal: Exception) -> None:
    """Record why *row* is still pending: what did so before was rolled back."""
    using = router.db_for_write(Grant)
    try:
        with transaction.atomic(using=using):
            bound_waits(using)
            _record(row, State.PENDING, str(refusal))
    except Error as exc:
        if not refuses_rows(using, exc):
            raise
        logger.exception("Grant %s cannot be changed", row.pk)
