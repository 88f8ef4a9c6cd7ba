"""What an operation of the ledger returns: a customer, a balance, an entry or a hold.

``service`` renders these values as the JSON of the wire. They are not database rows:
the balance in a result is the balance right after its movement, also when the account
has changed since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datetime as dt

    from .models import Entry, Hold, LedgerCustomer
    from .movements import Closed, Spent


@dataclass(frozen=True, slots=True)
class CustomerRecord:
    """A customer; *replayed* when an earlier call created it."""

    customer_id: str
    external_id: str
    credit_unit: str
    created_at: dt.datetime
    replayed: bool = False

    @classmethod
    def of(cls, customer: LedgerCustomer, replayed: bool = False) -> CustomerRecord:
        return cls(
            customer_id=customer.public_id,
            external_id=customer.external_id,
            credit_unit=customer.credit_unit,
            created_at=customer.created_at,
            replayed=replayed,
        )


@dataclass(frozen=True, slots=True)
class AccountBalance:
    """A customer's credits in *unit*, as of now or right after a movement.

    Right after a movement the numbers are those of its entry, so that a replay answers
    with the same ones. *reserved* then includes expired holds that no sweep has
    recorded yet.
    """

    customer_id: str
    unit: str
    balance: int
    reserved: int

    @property
    def available(self) -> int:
        return self.balance - self.reserved

    @classmethod
    def after(cls, answer: Spent | Closed, customer_id: str) -> AccountBalance:
        """Return the balance that the answer to a movement tells."""
        return cls(customer_id, answer.unit, answer.balance, answer.reserved)


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """One line of the ledger; *replayed* when an earlier call wrote it."""

    entry_id: str
    kind: str
    amount: int
    balance_delta: int
    reserved_delta: int
    account: AccountBalance
    reference: str
    description: str
    created_at: dt.datetime
    replayed: bool = False

    @classmethod
    def of(cls, entry: Entry, replayed: bool = False) -> EntryRecord:
        return cls(
            entry_id=entry.public_id,
            kind=entry.kind,
            amount=entry.amount,
            balance_delta=entry.balance_delta,
            reserved_delta=entry.reserved_delta,
            account=AccountBalance(
                entry.account.customer.public_id,
                entry.account.unit,
                entry.balance_after,
                entry.reserved_after,
            ),
            reference=entry.reference,
            description=entry.description,
            created_at=entry.created_at,
            replayed=replayed,
        )


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """A hold as it is now. Its *account* is as it was right after the movement.

    If the call moved no credits, *account* is as it is now, too.
    """

    reservation_id: str
    amount: int
    status: str
    reference: str
    expires_at: dt.datetime
    account: AccountBalance
    replayed: bool = False

    @classmethod
    def of(cls, hold: Hold, replayed: bool = False) -> HoldRecord:
        """Return *hold*, a row of ``Hold.objects.current()``."""
        return cls(
            reservation_id=hold.public_id,
            amount=hold.amount,
            status=hold.present_status,
            reference=hold.reference,
            expires_at=hold.expires_at,
            account=AccountBalance(
                hold.account.customer.public_id,
                hold.account.unit,
                hold.account.balance,
                hold.present_reserved,
            ),
            replayed=replayed,
        )
