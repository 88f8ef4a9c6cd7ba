"""What the ledger has to say, for assertions."""

from __future__ import annotations

from typing import Any

from django_meterly import get_client, grants
from django_meterly.ledger.models import Entry
from django_meterly.models import Customer, Reservation


def fund(owner: Any, amount: int = 100, unit: str = "image_credits") -> Customer:
    """Grant credits to *owner* and return the customer, registered."""
    customer = Customer.objects.resolve(owner)
    reference = f"fund-{Entry.objects.count()}"
    # The ledger's call, which also makes the customer: most tests begin with this.
    granted = get_client().grant_credits(customer.external_id, amount, unit, reference)
    customer.customer_id = granted.grant.customer_id
    customer.save(update_fields=["customer_id"])
    return customer


def fund_by_grant(
    owner: Any, amount: int = 100, unit: str = "image_credits"
) -> Customer:
    """Grant credits to *owner* as the admin does, with a grant on record."""
    customer = Customer.objects.resolve(owner)
    customer.register(get_client(), unit)
    reference = f"fund-{Entry.objects.count()}"
    grants.grant(
        get_client(), customer, amount, unit, reason="test", reference=reference
    )
    return customer


def balance(customer: Customer, unit: str = "image_credits") -> tuple[int, int]:
    """Return the balance and what of it is held."""
    for account in get_client().get_balances(str(customer.customer_id)).balances:
        if account.credit_unit == unit:
            return account.balance, account.reserved
    return 0, 0


def movements() -> list[str]:
    """Return the kinds of the ledger's entries since the funding, in order."""
    return [
        kind.removeprefix("credits_")
        for kind in Entry.objects.order_by("pk").values_list("kind", flat=True)
        if kind != "credits_granted"
    ]


def states() -> list[str]:
    """Return the states of the journal's rows, in order of creation."""
    return list(
        Reservation.objects.order_by("created_at").values_list("state", flat=True)
    )
