"""A hold, and what it leaves of the balance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_meterly.ledger import customers, spending

if TYPE_CHECKING:
    from django_meterly.ledger.models import Workspace


def reserve(
    workspace: Workspace,
    customer: str,
    amount: int = 40,
    key: str = "reserve",
    **options: Any,
) -> Any:
    return spending.reserve(
        workspace.pk,
        customer,
        amount=amount,
        reference="job-1",
        idempotency_key=key,
        **options,
    )


def numbers(workspace: Workspace, customer: str) -> tuple[int, int]:
    """Return the balance and what of it is held."""
    account = customers.default_balance(workspace.pk, customer)
    return account.balance, account.reserved
