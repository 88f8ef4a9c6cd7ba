"""What a movement is asked, and what it answers, whichever way it is made.

``portable`` and ``postgresql`` both have the functions ``spend`` and ``close``, which
take a ``Spending`` or a ``Closing`` and answer with a ``Spent`` or a ``Closed``. The
answer's *code* is one of these words, and ``operations`` turns it into an error:

============  ===================================================================
moved         This call has moved the credits.
replayed      An earlier call with the same key has.
already       An earlier call with another key has closed the hold in the same way.
mismatch      An earlier call with the same key asked for something else.
not_found     The workspace has no such customer, or no such hold.
insufficient  Fewer credits than the amount are available.
due           Holds whose time is over are in the way. Expire them, and call again.
too_much      The charge is more than the hold.
closed        The hold was closed in another way, or has expired.
invalid       The amount is below 1, or the charge below 0.
============  ===================================================================

The numbers of an account are those after the movement if there was one, else those of
this moment. A ``mismatch``, a ``not_found`` and an ``invalid`` have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import datetime as dt


#: Stands for what only the database knows of a call that a ``Statement`` completes: the
#: scope of its key, and its customer. They are the first two in the call's text.
UNKNOWN = "*"


class Spending(NamedTuple):
    """Credits to use, or to reserve if there is a *hold_id*.

    *workspace* is a primary key or a name. Without a *unit* it is the customer's own.
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
    """Credits that were used or reserved, or why not.

    Only *moved* and *replayed* have an entry, and a hold if credits were reserved. The
    *customer_id* is there if a ``Statement`` has found it.
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
    """A hold to commit or release: *charged* of it, or all of it."""

    workspace: int | str
    idempotency_key: str
    fingerprint: str
    hold_id: str
    status: str
    charged: int | None
    entry_id: str


class Closed(NamedTuple):
    """A hold that was committed or released, or why not."""

    code: str
    customer_id: str = ""
    unit: str = ""
    balance: int = 0
    reserved: int = 0
    amount: int = 0
    reference: str = ""
    status: str = ""
    expires_at: dt.datetime | None = None
