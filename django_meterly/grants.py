"""Granting credits, with a record of who granted what, and why."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from django.db import Error, IntegrityError, router, transaction

from . import signals
from .errors import (
    OUTAGE,
    MeterlyApiError,
    MeterlyError,
    MeterlyUnknownOutcomeError,
)
from .journal import announce, collect, in_transaction
from .models import MAX_REASON_LENGTH, Customer, Grant
from .transports.base import check_amount, check_description, check_text, check_unit

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

    Returns the grant and whether it is new; a second call with the same
    reference returns the first one's grant. The record is written before the
    ledger is asked: a grant whose answer was lost stays pending, and is carried
    out by ``settle_due``. With *client* ``None`` it is only recorded. Raises
    ``ValueError`` for arguments out of bounds, and an empty *reason*.
    """
    check_amount(amount)
    check_unit(unit)
    check_text(reference, "reference")
    if not check_description(reason, "reason", length=MAX_REASON_LENGTH).strip():
        raise ValueError("Give a reason: it is kept with the grant.")
    using = router.db_for_write(Grant)
    try:
        with transaction.atomic(using=using):
            row = Grant.objects.using(using).create(
                customer=customer,
                unit=unit,
                amount=amount,
                reason=reason,
                reference=reference,
                actor=actor,
            )
    except IntegrityError:
        first = Grant.objects.using(using).get(
            customer=customer, unit=unit, reference=reference
        )
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


def settle(client: MeterlyClient, row: Grant) -> bool:
    """Ask the ledger for a pending grant, and record its answer.

    Returns whether the ledger could be asked.
    """
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
        _record(row, State.PENDING, str(exc))
        logger.info("Grant %s is still pending: %s", row.pk, exc)
        return False
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
        _collect(client, row)
    return True


def _collect(client: MeterlyClient, row: Grant) -> None:
    """Have what the customer owes paid from the grant."""
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
            announce(signals.credits_granted, Grant, using=using, grant=row)


def settle_due(client: MeterlyClient) -> int:
    """Ask the ledger again for pending grants; return how many were asked for.

    Stops when the ledger is out of reach: the others can wait for the next run.
    """
    pending = (
        Grant.objects.using(router.db_for_write(Grant))
        .filter(state=State.PENDING)
        .select_related("customer")
        # A grant the ledger cannot answer must not stand in the others' way.
        .order_by("?")[:BATCH]
    )
    asked = 0
    for row in pending:
        asked += 1
        if not settle(client, row):
            break
    return asked
