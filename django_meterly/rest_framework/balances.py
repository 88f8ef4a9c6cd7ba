"""The credits of whoever sent a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import db, journal
from ..client import get_client
from ..models import Customer
from ..options import payer_of

if TYPE_CHECKING:
    from ..types import Balance


def balances_of(request: Any) -> tuple[Balance, ...] | None:
    """Return the balances of the caller, or ``None`` when nobody is known to pay.

    The caller is whom ``CUSTOMER_RESOLVER`` names. A customer whom the ledger does
    not know yet has none. Raises what ``MeterlyClient.get_balances`` raises, and
    ``MeterlyUnavailableError`` if the database cannot serve.
    """
    payer = payer_of(request)
    if payer is None:
        return None
    with db.serving():
        customer = db.on_live_connection(
            journal.alias(), lambda: Customer.objects.resolve(payer)
        )
        if customer.customer_id is None:
            return ()
        return get_client().get_balances(customer.customer_id).balances
