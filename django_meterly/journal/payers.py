"""Who pays: a customer who is found before the reserve, or by its statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..db import on_live_connection
from ..models import Customer
from .rows import alias

if TYPE_CHECKING:
    from collections.abc import Sequence


class Payer:
    """The payer of one reservation.

    *named* is the caller's name for them: for example, a user, or an external id.
    *customer* is the ``Customer``, once it is found.
    """

    def __init__(self, named: Any) -> None:
        self.named = named
        self.customer: Customer | None = None

    def resolve(self) -> Customer:
        """Return the customer, as ``CustomerQuerySet.resolve`` does."""
        if self.customer is None:
            # The first statement of many guards: it may meet a dead connection.
            self.customer = on_live_connection(
                alias(), lambda: Customer.objects.resolve(self.named)
            )
        return self.customer

    def found(self, using: str, columns: Sequence[Any]) -> Customer:
        """Return the customer that a statement on *using* has found.

        *columns* are those of ``models.select_sql``.
        """
        if isinstance(self.named, Customer) and self.named.fits(using):
            self.customer = self.named
        else:
            self.customer = Customer.from_columns(using, columns)
        return self.customer
