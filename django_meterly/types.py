"""What the client returns: frozen results, amounts in whole credits, times in UTC.

A field may be ``None`` if the vendor's guide does not show it: a ledger may leave it
out then. The embedded ledger leaves nothing out.
"""

from __future__ import annotations

import datetime as dt  # noqa: TC003 (dataclasses keep their types)
from dataclasses import dataclass, field

__all__ = [
    "Balance",
    "Balances",
    "CustomerResult",
    "EntryPage",
    "GrantResult",
    "GrantedCredits",
    "LedgerEntry",
    "MovementResult",
    "ReservationResult",
]


@dataclass(frozen=True, slots=True)
class CustomerResult:
    """A customer, who pays with credits, as the ledger knows them."""

    customer_id: str
    customer_external_id: str | None
    credit_unit: str | None
    created_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class Balance:
    """One account: *available* is *balance* less *reserved*."""

    credit_unit: str
    balance: int | None
    reserved: int | None
    available: int


@dataclass(frozen=True, slots=True)
class Balances:
    """Every account of a customer."""

    customer_id: str
    balances: tuple[Balance, ...]


@dataclass(frozen=True, slots=True)
class GrantedCredits:
    """Credits added once per *reference*."""

    grant_id: str | None
    customer_id: str
    credit_amount: int | None
    credit_unit: str | None
    reference: str | None
    description: str | None
    created_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class GrantResult:
    """A grant, and the balance right after it."""

    grant: GrantedCredits
    balance: Balance | None


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the ledger. Deltas are signed, *amount* is not."""

    entry_id: str | None
    kind: str | None
    amount: int | None
    balance_delta: int | None
    reserved_delta: int | None
    balance_after: int | None
    reserved_after: int | None
    unit: str | None
    reference: str | None
    created_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class EntryPage:
    """A page of a customer's entries. *next_cursor* is ``None`` on the last page."""

    entries: tuple[LedgerEntry, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class MovementResult:
    """Credits added or used: the ledger's entry, and the balance right after it."""

    entry: LedgerEntry | None
    balance: Balance | None


@dataclass(frozen=True, slots=True)
class ReservationResult:
    """Credits held for work in progress.

    *status* is ``reserved``, ``committed``, ``released`` or ``expired`` at the time of
    this answer. *balance* is the account right after the movement. *replayed* is true
    if an earlier call with the same idempotency key made the movement.
    """

    reservation_id: str
    customer_id: str | None
    unit: str | None
    amount: int | None
    status: str | None
    reference: str | None
    expires_at: dt.datetime | None
    balance: Balance | None
    replayed: bool = field(default=False, compare=False)

    @property
    def is_held(self) -> bool:
        """Whether the credits are held, as far as this answer says."""
        return self.status in (None, "reserved")
