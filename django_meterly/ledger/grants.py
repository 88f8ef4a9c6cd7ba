"""Add credits to an account: ``grant`` by the external id, ``add`` by the customer id.

``service`` calls both. A *reference*, for example ``"invoice-42"``, adds credits to an
account once: the unique constraint on ``Entry.unique_reference`` decides between two
calls at the same time. The call that lost answers with the entry of the other one.
"""

from __future__ import annotations

from typing import NamedTuple

from django.db import IntegrityError, transaction
from django.db.models import F

from ..errors import MeterlyReferenceConflictError
from ..wire import MAX_AMOUNT
from . import portable
from .customers import ensure_account, ensure_customer, get_customer
from .database import retried
from .idempotency import Request
from .models import Account, Entry, entry_id
from .refusals import invalid
from .results import EntryRecord


class _Addition(NamedTuple):
    """Credits to add to *account*. *field* is the name of the amount on the wire."""

    account: Account
    kind: Entry.Kind
    amount: int
    reference: str
    description: str
    field: str


@retried
def grant(
    workspace_id: int,
    *,
    external_id: str,
    amount: int,
    credit_unit: str,
    reference: str,
    description: str = "",
    idempotency_key: str,
) -> EntryRecord:
    """Add credits, once per *reference*; create the customer if it does not exist.

    Raises ``MeterlyReferenceConflictError`` and ``MeterlyInvalidRequestError``
    (a balance past 2**63 - 1).
    """
    request = Request.of(
        workspace_id,
        idempotency_key,
        "grant_credits",
        external_id=external_id,
        amount=amount,
        credit_unit=credit_unit,
        reference=reference,
        description=description,
    )
    if isinstance(entry := request.recorded(), Entry):
        return EntryRecord.of(entry, replayed=True)
    customer, _ = ensure_customer(workspace_id, external_id, credit_unit)
    account = ensure_account(customer, credit_unit)
    kind, field = Entry.Kind.GRANTED, "creditAmount"
    return _add(
        request, _Addition(account, kind, amount, reference, description, field)
    )


@retried
def add(
    workspace_id: int,
    customer_id: str,
    *,
    amount: int,
    unit: str | None = None,
    reference: str,
    description: str = "",
    idempotency_key: str,
) -> EntryRecord:
    """Add credits of *unit*, once per *reference*.

    Without a *unit* it is the customer's default one. Raises ``MeterlyNotFoundError``,
    ``MeterlyReferenceConflictError`` and ``MeterlyInvalidRequestError`` (a balance past
    2**63 - 1).
    """
    request = Request.of(
        workspace_id,
        idempotency_key,
        "add_credits",
        customer_id=customer_id,
        amount=amount,
        unit=unit,
        reference=reference,
        description=description,
    )
    if isinstance(entry := request.recorded(), Entry):
        return EntryRecord.of(entry, replayed=True)
    customer = get_customer(workspace_id, customer_id)
    account = ensure_account(customer, unit or customer.credit_unit)
    kind, field = Entry.Kind.ADDED, "amount"
    return _add(
        request, _Addition(account, kind, amount, reference, description, field)
    )


def _add(request: Request, addition: _Addition) -> EntryRecord:
    """Add the credits, or answer with the entry of an earlier call."""
    if (entry := _referred(request, addition)) is not None:
        request.remember()
        return EntryRecord.of(entry, replayed=True)
    public_id = entry_id()
    try:
        _write(request, addition, public_id)
    except IntegrityError:
        # Another call with the key, or with the reference, was first.
        if (entry := _written(request, addition)) is None:
            raise
    else:
        entry = _written(request, addition)
    if entry is None:
        raise invalid(addition.field, "The balance would exceed 2**63 - 1.")
    if entry.idempotency_key != request.idempotency_key:
        request.remember()
    return EntryRecord.of(entry, replayed=entry.public_id != public_id)


def _write(request: Request, addition: _Addition, public_id: str) -> None:
    """Add the credits and write their entry, unless the balance would get too large."""
    accounts = Account.objects.using(request.using).filter(pk=addition.account.pk)
    affordable = accounts.filter(balance__lte=MAX_AMOUNT - addition.amount)
    with transaction.atomic(using=request.using):
        if affordable.update(balance=F("balance") + addition.amount):
            portable.write_entry(
                request,
                accounts.get(),
                addition.kind,
                addition.amount,
                entry_id=public_id,
                balance_delta=addition.amount,
                reference=addition.reference,
                description=addition.description,
                unique_reference=addition.reference,
            )


def _written(request: Request, addition: _Addition) -> Entry | None:
    """Return the entry of this call, or of an earlier one."""
    entry = request.recorded()
    return entry if isinstance(entry, Entry) else _referred(request, addition)


def _referred(request: Request, addition: _Addition) -> Entry | None:
    """Return the entry of an earlier call with the reference and the same values."""
    entries = Entry.objects.using(request.using).select_related("account__customer")
    entry: Entry | None = entries.filter(
        account=addition.account, unique_reference=addition.reference
    ).first()
    values = addition.kind, addition.amount, addition.description
    if entry and (entry.kind, entry.amount, entry.description) != values:
        raise MeterlyReferenceConflictError(
            f"Reference {addition.reference!r} was used before, with other values."
        )
    return entry
