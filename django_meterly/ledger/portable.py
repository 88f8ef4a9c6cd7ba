"""Movements by Django's ORM, on every database.

A movement is one guarded ``UPDATE`` of an account, with its hold and its entry, in
one transaction. The conditions are in the ``UPDATE``'s ``WHERE``: if no row matches,
the movement is refused.

The key is looked up *before* the transaction, so that the transaction's first
statement is a write: on SQLite a transaction that has read cannot wait for the write
lock. Inside, the unique constraint decides between two calls with one key, and the
second one's transaction is rolled back. The key is looked up *after* it once more, so
that the second call answers as the first one did.

``postgresql`` has the same functions, each in one round trip. See ``movements``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from django.db import IntegrityError, transaction
from django.db.models import F

from ..db import DatabaseNow, from_now
from ..errors import MeterlyUsageError
from .idempotency import Request
from .models import Account, Entry, Hold, LedgerCustomer, Workspace
from .movements import Closed, Closing, Spending, Spent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..transports.base import Statement
    from .models import Record


def spend(using: str, spending: Spending, statement: Statement | None = None) -> Spent:
    """Use or reserve credits. A *statement* is only for PostgreSQL."""
    if spending.amount < 1:
        return Spent("invalid")
    request = _request(using, spending, statement)
    if request is None:
        return Spent("not_found")
    if (known := request.known()) is not None:
        return _spent(spending, known)
    account = _account(request, spending.customer_id, spending.unit)
    if isinstance(account, Spent):
        return account
    reserving = spending.hold_id is not None
    with _movement(request):
        code, account = _take(account, spending.amount, reserving)
        if code == "moved":
            write_entry(
                request,
                account,
                Entry.Kind.RESERVED if reserving else Entry.Kind.USED,
                spending.amount,
                entry_id=spending.entry_id,
                balance_delta=0 if reserving else -spending.amount,
                reserved_delta=spending.amount if reserving else 0,
                reference=spending.reference,
                description=spending.description,
                hold=_new_hold(account, spending),
            )
    # After a refusal, too: a call with this key may have taken the last credits. The
    # call that follows a "due" looks for itself.
    if code != "due" and (known := request.known()) is not None:
        return _spent(spending, known)
    return Spent(code, account.pk, account.unit, account.balance, account.reserved)


def _account(request: Request, customer_id: str, unit: str | None) -> Account | Spent:
    """Return the account to spend from, or the answer ``not_found``."""
    accounts = Account.objects.using(request.using).filter(
        customer__workspace=request.workspace_id, customer__public_id=customer_id
    )
    account = accounts.filter(unit=unit or F("customer__credit_unit")).first()
    if account is not None:
        return account
    customers = LedgerCustomer.objects.using(request.using)
    customer = customers.filter(
        workspace=request.workspace_id, public_id=customer_id
    ).first()
    if customer is None:
        return Spent("not_found")
    return Spent("insufficient", unit=unit or customer.credit_unit)


def _take(account: Account, amount: int, reserving: bool) -> tuple[str, Account]:
    """Take the credits if they are available; return a code and the new account."""
    accounts = Account.objects.using(account._state.db).filter(pk=account.pk)
    affording = accounts.affording(amount)
    change = (
        {"reserved": F("reserved") + amount}
        if reserving
        else {"balance": F("balance") - amount}
    )
    moved = affording.update(**change)
    account = accounts.select_for_update().get()
    if not moved and account.available >= amount:
        # Credits arrived between the two statements. Now the row is locked.
        moved = affording.update(**change)
        account = accounts.get()
    if moved:
        return "moved", account
    due = Hold.objects.using(account._state.db).due().filter(account=account)
    return "due" if due.exists() else "insufficient", account


def _new_hold(account: Account, spending: Spending) -> Hold | None:
    if spending.hold_id is None or spending.ttl_seconds is None:
        return None
    return Hold.objects.using(account._state.db).create(
        public_id=spending.hold_id,
        account=account,
        amount=spending.amount,
        reference=spending.reference,
        expires_at=from_now(spending.ttl_seconds),
    )


def _spent(spending: Spending, known: Entry | Record) -> Spent:
    """Answer with the entry of the key, of this call or of an earlier one."""
    if not isinstance(known, Entry) or known.fingerprint != spending.fingerprint:
        return Spent("mismatch")
    return Spent(
        "moved" if known.public_id == spending.entry_id else "replayed",
        known.account_id,
        known.account.unit,
        known.balance_after,
        known.reserved_after,
        known.public_id,
        known.created_at,
        known.hold.public_id if known.hold else None,
        known.hold_status,
        known.hold.expires_at if known.hold else None,
    )


def close(using: str, closing: Closing, statement: Statement | None = None) -> Closed:
    """Commit or release a hold. A *statement* is only for PostgreSQL."""
    if (closing.charged or 0) < 0:
        return Closed("invalid")
    request = _request(using, closing, statement)
    if request is None:
        return Closed("not_found")
    known = request.known()
    if known is not None and (answer := _closed_before(closing, known)):
        return answer
    holds = Hold.objects.using(using).filter(
        public_id=closing.hold_id, account__customer__workspace=request.workspace_id
    )
    hold = holds.current().first()
    if hold is None:
        return Closed("not_found")
    if (closing.charged or 0) > hold.amount:
        return _closed("too_much", hold)
    if hold.status != hold.present_status:
        return _closed("due", hold)
    if hold.status == Hold.Status.RESERVED:
        with _movement(request):
            _end(request, closing, hold)
    known = request.known()
    if known is not None and (answer := _closed_before(closing, known)):
        return answer
    hold = holds.current().get()
    alike = "already" if known is None else "replayed"
    codes = {Hold.Status.RESERVED.value: "due", closing.status: alike}
    return _closed(codes.get(hold.status, "closed"), hold)


def _end(request: Request, closing: Closing, hold: Hold) -> None:
    """Commit or release the hold, unless it has expired or was closed."""
    live = Hold.objects.using(request.using).live().filter(pk=hold.pk)
    if not live.filter(expires_at__gt=DatabaseNow()).update(
        status=closing.status, closed_at=DatabaseNow()
    ):
        return
    taken = hold.amount if closing.charged is None else closing.charged
    committed = closing.status == Hold.Status.COMMITTED
    accounts = Account.objects.using(request.using).filter(pk=hold.account_id)
    accounts.update(balance=F("balance") - taken, reserved=F("reserved") - hold.amount)
    write_entry(
        request,
        accounts.get(),
        Entry.Kind.COMMITTED if committed else Entry.Kind.RELEASED,
        taken if committed else hold.amount,
        entry_id=closing.entry_id,
        balance_delta=-taken,
        reserved_delta=-hold.amount,
        reference=hold.reference,
        hold=hold,
    )


def _closed_before(closing: Closing, known: Entry | Record) -> Closed | None:
    """Answer with the entry of the key, of this call or of an earlier one.

    A record says only that an earlier call asked for the same, and moved nothing.
    """
    if known.fingerprint != closing.fingerprint:
        return Closed("mismatch")
    if not isinstance(known, Entry):
        return None
    assert known.hold is not None
    return Closed(
        "moved" if known.public_id == closing.entry_id else "replayed",
        known.account.customer.public_id,
        known.account.unit,
        known.balance_after,
        known.reserved_after,
        known.hold.amount,
        known.hold.reference,
        known.hold_status or "",
        known.hold.expires_at,
    )


def _closed(code: str, hold: Hold) -> Closed:
    """Answer with the hold and its account as they are now."""
    return Closed(
        code,
        hold.account.customer.public_id,
        hold.account.unit,
        hold.account.balance,
        hold.present_reserved,
        hold.amount,
        hold.reference,
        hold.present_status,
        hold.expires_at,
    )


# What both movements do


def _request(
    using: str, movement: Spending | Closing, statement: Statement | None
) -> Request | None:
    """Return the movement's request, or ``None`` if the workspace does not exist."""
    if statement is not None:
        raise MeterlyUsageError("Only PostgreSQL carries a statement with a movement.")
    workspace = movement.workspace
    if isinstance(workspace, str):
        named = Workspace.objects.using(using).filter(name=workspace).first()
        if named is None:
            return None
        workspace = named.pk
    return Request(using, workspace, movement.idempotency_key, movement.fingerprint)


@contextmanager
def _movement(request: Request) -> Iterator[None]:
    """Open the transaction of a movement.

    If another call with the key was first, everything is taken back.
    """
    try:
        with transaction.atomic(using=request.using):
            yield
    except IntegrityError:
        if request.known() is None:
            raise


def write_entry(
    request: Request,
    account: Account,
    kind: Entry.Kind,
    amount: int,
    *,
    entry_id: str,
    balance_delta: int = 0,
    reserved_delta: int = 0,
    reference: str,
    description: str = "",
    unique_reference: str | None = None,
    hold: Hold | None = None,
) -> None:
    """Write the entry of a movement, which has left the *account* as it is now."""
    Entry.objects.using(request.using).create(
        public_id=entry_id,
        workspace_id=request.workspace_id,
        account=account,
        hold=hold,
        kind=kind,
        amount=amount,
        balance_delta=balance_delta,
        reserved_delta=reserved_delta,
        balance_after=account.balance,
        reserved_after=account.reserved,
        reference=reference,
        description=description,
        unique_reference=unique_reference,
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
    )
