"""What the client returns: frozen results, amounts in whole credits, times in UTC."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from .transports.base import check_identifier

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


def _time(value: str) -> dt.datetime:
    return dt.datetime.fromisoformat(value)


@dataclass(frozen=True, slots=True)
class CustomerResult:
    """Who pays with credits, as the ledger knows them."""

    customer_id: str
    customer_external_id: str
    credit_unit: str
    created_at: dt.datetime

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> CustomerResult:
        return cls(
            customer_id=check_identifier(data["customerId"], "customerId"),
            customer_external_id=data["customerExternalId"],
            credit_unit=data["creditUnit"],
            created_at=_time(data["createdAt"]),
        )


@dataclass(frozen=True, slots=True)
class Balance:
    """One account: *available* is *balance* less *reserved*."""

    credit_unit: str
    balance: int
    reserved: int
    available: int

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Balance:
        return cls(
            credit_unit=data["creditUnit"],
            balance=data["balance"],
            reserved=data["reserved"],
            available=data["available"],
        )


@dataclass(frozen=True, slots=True)
class Balances:
    """Every account of a customer."""

    customer_id: str
    balances: tuple[Balance, ...]

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> Balances:
        return cls(
            customer_id=data["customerId"],
            balances=tuple(Balance.from_wire(item) for item in data["balances"]),
        )


@dataclass(frozen=True, slots=True)
class GrantedCredits:
    """Credits added once per *reference*."""

    grant_id: str
    customer_id: str
    credit_amount: int
    credit_unit: str
    reference: str
    description: str
    created_at: dt.datetime

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> GrantedCredits:
        return cls(
            grant_id=data["grantId"],
            customer_id=data["customerId"],
            credit_amount=data["creditAmount"],
            credit_unit=data["creditUnit"],
            reference=data["reference"],
            description=data["description"],
            created_at=_time(data["createdAt"]),
        )


@dataclass(frozen=True, slots=True)
class GrantResult:
    """A grant, and the balance right after it."""

    grant: GrantedCredits
    balance: Balance

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> GrantResult:
        return cls(
            grant=GrantedCredits.from_wire(data["grant"]),
            balance=Balance.from_wire(data["balance"]),
        )


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the ledger. Deltas are signed, *amount* is not."""

    entry_id: str
    kind: str
    amount: int
    balance_delta: int
    reserved_delta: int
    balance_after: int
    reserved_after: int
    unit: str
    reference: str
    created_at: dt.datetime

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> LedgerEntry:
        return cls(
            entry_id=data["entryId"],
            kind=data["kind"],
            amount=data["amount"],
            balance_delta=data["balanceDelta"],
            reserved_delta=data["reservedDelta"],
            balance_after=data["balanceAfter"],
            reserved_after=data["reservedAfter"],
            unit=data["unit"],
            reference=data["reference"],
            created_at=_time(data["createdAt"]),
        )


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Some of a customer's entries; *next_cursor* asks for more, ``None`` ends."""

    entries: tuple[LedgerEntry, ...]
    next_cursor: str | None

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> EntryPage:
        return cls(
            entries=tuple(LedgerEntry.from_wire(item) for item in data["entries"]),
            next_cursor=data["nextCursor"],
        )


@dataclass(frozen=True, slots=True)
class MovementResult:
    """Credits added or used: the ledger's entry, and the balance right after it."""

    entry: LedgerEntry
    balance: Balance

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> MovementResult:
        return cls(
            entry=LedgerEntry.from_wire(data["entry"]),
            balance=Balance.from_wire(data["balance"]),
        )


@dataclass(frozen=True, slots=True)
class ReservationResult:
    """Credits held for work in progress.

    *status* is ``reserved``, ``committed``, ``released`` or ``expired``, as of
    this answer; *balance* is the account right after the movement.
    """

    reservation_id: str
    customer_id: str
    unit: str
    amount: int
    status: str
    reference: str
    expires_at: dt.datetime
    balance: Balance

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> ReservationResult:
        return cls(
            reservation_id=check_identifier(data["reservationId"], "reservationId"),
            customer_id=data["customerId"],
            unit=data["unit"],
            amount=data["amount"],
            status=data["status"],
            reference=data["reference"],
            expires_at=_time(data["expiresAt"]),
            balance=Balance.from_wire(data["balance"]),
        )
