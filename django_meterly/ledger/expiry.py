"""Expire holds whose time has run out, so that their credits are available again.

A hold expires in one of two ways:

* ``spending`` needs its credits, or closes it: ``expire_matching`` expires it first.
* The sweep finds it: ``expire_due``, called by ``manage.py meterly_ledger_expire`` and
  by the Celery task. It needs no traffic on the account.

Both set the hold's status, lower the account's ``reserved`` and write the entry
``credits_expired``, in one transaction. Holds are locked (in the order of their primary
keys) before their account, as in every movement. The database's clock decides.
"""

from __future__ import annotations

import logging
import sys
from itertools import groupby
from operator import attrgetter
from typing import Any

from django.db import DatabaseError, transaction
from django.db.models import F

from ..db import DatabaseNow, bound_waits, refuses_rows, unlocked, was_locked
from .database import retried, write_alias
from .models import Account, Entry, Hold

logger = logging.getLogger("django_meterly.ledger")


@retried
def expire_due(batch_size: int = 1000) -> int:
    """Expire every hold whose time has run out, and return how many there were.

    Several sweeps may run at once, and commits may race them. Holds are read
    *batch_size* at a time. If the database refuses to expire a hold, the hold is
    logged and left, and the sweep goes on with the others.
    """
    using = write_alias()
    holds = Hold.objects.using(using).due().order_by("expires_at")
    expired = 0
    broken: list[int] = []
    while True:
        with transaction.atomic(using=using):
            batch = list(unlocked(holds.exclude(pk__in=broken))[:batch_size])
        before = expired, len(broken)
        batch.sort(key=attrgetter("account_id", "pk"))
        for account_id, group in groupby(batch, attrgetter("account_id")):
            expired += _expire_or_leave(account_id, list(group), broken)
        if (expired, len(broken)) == before:
            # Nothing is due, another sweep has the rows, or the caller's snapshot is
            # old.
            return expired


def _expire_or_leave(account_id: int, holds: list[Hold], left: list[int]) -> int:
    """Expire *holds* and return how many expired; add the refused ones to *left*."""
    handled = sys.exception()
    try:
        return _expire_soon(account_id, holds)
    except DatabaseError as exc:
        if not refuses_rows(write_alias(), exc):
            raise
        if len(holds) > 1 and not was_locked(exc, handled):
            # The database refuses one of the holds, or the account's row.
            return sum(_expire_or_leave(account_id, [hold], left) for hold in holds)
        pks = [hold.pk for hold in holds]
        logger.exception("The holds %s of account %s do not expire.", pks, account_id)
        left += pks
        return 0


@retried
def _expire_soon(account_id: int, holds: list[Hold]) -> int:
    """Do as ``_expire``, but give up if a row stays locked."""
    using = write_alias()
    with transaction.atomic(using=using):
        bound_waits(using)
        return _expire(account_id, holds)


def expire_matching(**lookup: Any) -> int:
    """Expire the due holds, of one account, that match *lookup*."""
    due = Hold.objects.using(write_alias()).due().filter(**lookup)
    holds = list(due.order_by("pk"))
    return _expire(holds[0].account_id, holds) if holds else 0


@retried
def _expire(account_id: int, holds: list[Hold]) -> int:
    """Expire those of *holds* that are still due, and return how many.

    They all belong to the account, and are in primary key order.
    """
    using = write_alias()
    with transaction.atomic(using=using):
        expired = [
            hold
            for hold in holds
            # Still due: a call may have extended it since it was read.
            if Hold.objects.using(using)
            .due()
            .filter(pk=hold.pk)
            .update(status=Hold.Status.EXPIRED, closed_at=DatabaseNow())
        ]
        if expired:
            total = sum(hold.amount for hold in expired)
            accounts = Account.objects.using(using).filter(pk=account_id)
            accounts.update(reserved=F("reserved") - total)
            account = accounts.select_related("customer").get()
            Entry.objects.using(using).bulk_create(_lines(account, expired, total))
    return len(expired)


def _lines(account: Account, expired: list[Hold], total: int) -> list[Entry]:
    """Return an entry for each hold; together they have taken *total* off."""
    reserved = account.reserved + total
    lines = []
    for hold in expired:
        reserved -= hold.amount
        lines.append(
            Entry(
                workspace_id=account.customer.workspace_id,
                account=account,
                hold=hold,
                kind=Entry.Kind.EXPIRED,
                amount=hold.amount,
                balance_delta=0,
                reserved_delta=-hold.amount,
                balance_after=account.balance,
                reserved_after=reserved,
                reference=hold.reference,
            )
        )
    return lines
