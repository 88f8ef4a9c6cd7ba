"""Who pays: found before the reserve, or by the very statement that reserves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..db import on_live_connection
from ..models import Customer
from .rows import alias

if TYPE_CHECKING:
    from collections.abc import Sequence


class Payer:
    """Who is to pay: what the caller has *named*, and the ``Customer`` once found."""

    def __init__(self, named: Any) -> None:
        self.named = named
        self.customer: Customer | None = None

    def resolve(self) -> Customer:
        """Return the customer; see ``CustomerQuerySet.resolve``."""
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
