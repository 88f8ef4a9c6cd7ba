"""The two ways to move credits: what they are asked, and what they answer.

``portable`` moves credits with Django's ORM, on every database. ``postgresql`` calls a
PL/pgSQL function that does the same. The function exists because of speed: the ORM
takes eight statements for a movement, each a round trip to the database, and holds the
lock on the account during most of them. The function takes one round trip and is
several times as fast (``docs/performance.md``). The tests make each call in both ways
and compare the answers.

A ``Way`` takes a ``Spending`` or a ``Closing`` and answers with a ``Spent`` or a
``Closed``. The answer's *code* is one of these words, and ``refusals`` turns it into an
error:

============  ===================================================================
moved         This call moved the credits.
replayed      An earlier call with the same key did.
already       An earlier call with another key closed the hold in the same way.
mismatch      An earlier call with the same key asked for something else.
not_found     The workspace has no such customer, or no such hold.
insufficient  Fewer credits than the amount are available.
due           Expired holds are in the way. Expire them, and call again.
too_much      The charge is more than the hold.
closed        The hold was closed in another way, or has expired.
invalid       The amount is below 1, or the charge below 0.
============  ===================================================================

For example, a customer with 100 credits reserves 40. The answer is ``moved`` with the
balance 100 and 40 reserved. Another reserve of 70 is ``insufficient``, with the same
numbers: without a movement they are those of this moment. A ``mismatch``, a
``not_found`` and an ``invalid`` come without numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import datetime as dt

    from ..transports.base import Statement


#: Stands in a call's text for the parts that a ``Statement`` finds in the database:
#: first for the scope of the idempotency key, then for the customer.
UNKNOWN = "*"


class Spending(NamedTuple):
    """Credits to use, or to reserve if there is a *hold_id*.

    *workspace* is a primary key or a name. Without a *unit* the customer's default
    unit is meant.
    With a ``Statement``, which finds the customer, *fingerprint* is the text to digest:
    see ``UNKNOWN``.
    """

    workspace: int | str
    idempotency_key: str
    fingerprint: str
    customer_id: str
    unit: str | None
    amount: int
    reference: str
    description: str
    entry_id: str
    hold_id: str | None = None
    ttl_seconds: int | None = None


class Spent(NamedTuple):
    """Credits that were used or reserved, or the reason why not.

    Only *moved* and *replayed* have an entry, and a hold if credits were reserved.
    *customer_id* is set if a ``Statement`` has found the customer.
    """

    code: str
    account_id: int | None = None
    unit: str = ""
    balance: int = 0
    reserved: int = 0
    entry_id: str | None = None
    created_at: dt.datetime | None = None
    hold_id: str | None = None
    status: str | None = None
    expires_at: dt.datetime | None = None
    customer_id: str | None = None


class Closing(NamedTuple):
    """A hold to commit or release. *charged* is ``None`` to commit all of it."""

    workspace: int | str
    idempotency_key: str
    fingerprint: str
    hold_id: str
    status: str
    charged: int | None
    entry_id: str


class Closed(NamedTuple):
    """A hold that was committed or released, or the reason why not."""

    code: str
    customer_id: str = ""
    unit: str = ""
    balance: int = 0
    reserved: int = 0
    amount: int = 0
    reference: str = ""
    status: str = ""
    expires_at: dt.datetime | None = None


class Way(Protocol):
    """What the modules ``portable`` and ``postgresql`` have in common.

    *using* is the alias of the ledger's database. A *statement* of the caller's is
    carried out together with the movement, by ``postgresql`` only.
    """

    def spend(
        self, using: str, spending: Spending, statement: Statement | None = None
    ) -> Spent:
        """Use or reserve credits."""

    def close(
        self, using: str, closing: Closing, statement: Statement | None = None
    ) -> Closed:
        """Commit or release a hold."""
