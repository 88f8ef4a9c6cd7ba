"""The credits of the caller of a DRF view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import db, journal
from ..client import get_client
from ..errors import OUTAGE, MeterlyUnavailableError
from ..models import Customer
from ..resolvers import payer_of
from .exceptions import refuse

if TYPE_CHECKING:
    from ..types import Balance


def balances_of(request: Any) -> tuple[Balance, ...] | None:
    """Return the balances of the caller, or ``None`` when nobody is known to pay.

    ``CUSTOMER_RESOLVER`` names the caller. The tuple is empty for a customer whom the
    ledger does not know yet. Raises ``Unavailable`` if the ledger or the database
    cannot be asked.
    """
    payer = payer_of(request)
    if payer is None:
        return None
    try:
        with db.serving():
            customer = db.on_live_connection(
                journal.alias(), lambda: Customer.objects.resolve(payer)
            )
            if customer.customer_id is None:
                return ()
            return get_client().get_balances(customer.customer_id).balances
    except OUTAGE as exc:
        refuse(request, MeterlyUnavailableError(str(exc)))
