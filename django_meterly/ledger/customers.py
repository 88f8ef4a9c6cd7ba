"""Workspaces, customers, and what their accounts hold.

``service`` calls the functions that read and create customers. ``grants`` makes the
account that it adds to with ``ensure_customer`` and ``ensure_account``. Nothing here
moves credits.
"""

from __future__ import annotations

from typing import Any

from ..errors import MeterlyCustomerExistsError
from .database import retried, write_alias
from .idempotency import Request
from .models import Account, Entry, LedgerCustomer, Workspace
from .refusals import invalid, no_customer
from .results import AccountBalance, CustomerRecord, EntryRecord

PAGE_SIZE = 100


@retried
def ensure_workspace(name: str, *, is_test: bool = False) -> Workspace:
    """Return the workspace called *name*; create it if it does not exist.

    *is_test* applies to a new workspace only: an existing one never changes its kind.
    """
    workspaces = Workspace.objects.using(write_alias())
    workspace = workspaces.filter(name=name).first()
    if workspace is None:
        workspaces.bulk_create(
            [Workspace(name=name, is_test=is_test)], ignore_conflicts=True
        )
        workspace = workspaces.get(name=name)
    return workspace


# Customers


@retried
def create_customer(
    workspace_id: int, *, external_id: str, credit_unit: str, idempotency_key: str
) -> CustomerRecord:
    """Register a customer, once per *external_id*.

    Raises ``MeterlyCustomerExistsError`` when it exists, whatever its unit. The same
    call again, with the same key, returns the customer that it created.
    """
    request = Request.of(
        workspace_id,
        idempotency_key,
        "create_customer",
        external_id=external_id,
        credit_unit=credit_unit,
    )
    recorded = request.recorded()
    customer, created = ensure_customer(workspace_id, external_id, credit_unit)
    if not created and recorded is None:
        # Another call with this key may have created it since the first look.
        recorded = request.recorded()
    if not created and recorded is None:
        raise MeterlyCustomerExistsError(
            f"Customer {external_id!r} exists with credit unit "
            f"{customer.credit_unit!r}.",
            details={"customerId": customer.public_id},
        )
    if recorded is None:
        request.remember()
    return CustomerRecord.of(customer, replayed=not created)


@retried
def find_customer(workspace_id: int, *, external_id: str) -> CustomerRecord | None:
    """Return the customer with this external id, or ``None``."""
    customer = _customers(workspace_id).filter(external_id=external_id).first()
    return None if customer is None else CustomerRecord.of(customer)


def get_customer(workspace_id: int, customer_id: str) -> LedgerCustomer:
    """Return a customer's row. Raises ``MeterlyNotFoundError``."""
    customer: LedgerCustomer | None = (
        _customers(workspace_id).filter(public_id=customer_id).first()
    )
    if customer is None:
        raise no_customer(customer_id)
    return customer


def ensure_customer(
    workspace_id: int, external_id: str, credit_unit: str
) -> tuple[LedgerCustomer, bool]:
    """Return the customer, and whether this call created it."""
    customers = _customers(workspace_id)
    customer = customers.filter(external_id=external_id).first()
    if customer is not None:
        return customer, False
    new = LedgerCustomer(
        workspace_id=workspace_id, external_id=external_id, credit_unit=credit_unit
    )
    customers.bulk_create([new], ignore_conflicts=True)
    customer = customers.get(external_id=external_id)
    ensure_account(customer, customer.credit_unit)
    return customer, customer.public_id == new.public_id


def ensure_account(customer: LedgerCustomer, unit: str) -> Account:
    """Return the customer's account in *unit*; create it if it does not exist."""
    accounts = Account.objects.using(write_alias())
    account = accounts.filter(customer=customer, unit=unit).first()
    if account is None:
        accounts.bulk_create(
            [Account(customer=customer, unit=unit)], ignore_conflicts=True
        )
        account = accounts.get(customer=customer, unit=unit)
    return account


def _customers(workspace_id: int) -> Any:
    return LedgerCustomer.objects.using(write_alias()).filter(workspace_id=workspace_id)


# Balances and entries


@retried
def balances(workspace_id: int, customer_id: str) -> list[AccountBalance]:
    """Return the balance of every account of the customer, by unit."""
    return _balances(get_customer(workspace_id, customer_id))


@retried
def default_balance(workspace_id: int, customer_id: str) -> AccountBalance:
    """Return the balance of the account the customer was created with."""
    customer = get_customer(workspace_id, customer_id)
    for account in _balances(customer, unit=customer.credit_unit):
        return account
    # A crash may have left a new customer without this account.
    return AccountBalance(customer_id, customer.credit_unit, 0, 0)


def _balances(customer: LedgerCustomer, **lookup: Any) -> list[AccountBalance]:
    """Return the balances of this moment: credits of expired holds are available."""
    accounts = Account.objects.using(write_alias()).filter(customer=customer, **lookup)
    return [
        AccountBalance(
            customer.public_id, account.unit, account.balance, account.present_reserved
        )
        for account in accounts.current().order_by("unit")
    ]


@retried
def entries(
    workspace_id: int,
    customer_id: str,
    *,
    unit: str | None = None,
    before: str | None = None,
) -> list[EntryRecord]:
    """Return up to ``PAGE_SIZE`` entries of the customer, the newest first.

    *before* is the id of the last entry on the previous page. For example, the second
    page is ``entries(workspace_id, customer_id, before=page[-1].entry_id)``. Raises
    ``MeterlyInvalidRequestError`` when the customer does not have this entry.
    """
    customer = get_customer(workspace_id, customer_id)
    page = Entry.objects.using(write_alias()).filter(account__customer=customer)
    if before is not None:
        last = page.filter(public_id=before).values_list("pk", flat=True).first()
        if last is None:
            raise invalid("cursor", "There is no such page.")
        page = page.filter(pk__lt=last)
    if unit is not None:
        page = page.filter(account__unit=unit)
    rows = page.select_related("account__customer").order_by("-pk")
    return [EntryRecord.of(entry) for entry in rows[:PAGE_SIZE]]
