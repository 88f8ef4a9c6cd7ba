"""Every state change of a ``Reservation``, and the sweeper that finishes them.

The journal keeps the promise that no credit is lost, spent twice or given away. A row
is written before the ledger is asked. A decision is recorded before the ledger hears of
it. Any process that finds a decided row may carry it out, because every call is sent
with an idempotency key that belongs to the row. When the ledger shares the journal's
transaction, each step commits with its outcome: ``intent`` and pending states are
visible only after a failure. Each transition is one conditional UPDATE; the number of
rows it changed says whether it happened::

     intent ──────────┬────────► denied
       │ reserve      ├────────► failed
       ▼              └─(lease lapsed)──┐
     reserved ── work failed ───────────► release_pending ──► released | conflict
       │ │ └──── lease lapsed ──────────┘        │               │
       │ └────── lapsed, but presumed done ──┐   │               │
       └──────── work succeeded ◄── late success ┴───────────────┘
                     ▼
                commit_pending ──► committed
                     └─ hold gone ► one direct debit ► committed | unbilled

A row that runs *on trust* (``ON_UNAVAILABLE``) is ``reserved`` without a
reservation id. That column is written once: with the hold's id, or with
``NO_HOLD`` when the ledger has refused the reserve. Only the hold with that id is
committed, and only a row with ``NO_HOLD`` is charged by a direct debit alone.

A ``reserved`` row with a ``charge`` is *presumed*: its handler has returned, but its
response is not rendered or sent yet. Its lease lapses to commit, not to release.

The row's *fence* says who may decide. A process that works on the row holds an even
fence. An odd fence means that the work is offered, and that nobody has claimed it yet.
For example, a view reserves with fence 0, offers its work with fence 1, and the worker
claims it with fence 2. Each of these steps is a conditional UPDATE, too.

A key may have several *attempts*, and is charged once. An attempt that lapsed may still
succeed while a later one is running. Then its row stays ``released`` and notes its
``charge``. Later the sweeper decides: if the later attempt is charged, the noted charge
is dropped; otherwise it is owed.

The modules: ``opening`` reserves, ``deciding`` records how the work ended, ``settling``
carries that out at the ledger, ``offering`` hands work to another process, ``debts``
collects what could not be charged, and ``sweeping`` does all of this for processes that
died. ``statements`` does a step and its movement in one statement of PostgreSQL. These
use ``payers``, ``attempts``, ``calls`` and ``rows``. The rest of the package calls the
journal by the names below.
"""

from __future__ import annotations

from .attempts import in_the_way, is_tried_again
from .calls import extend
from .debts import collect, write_off
from .deciding import presume, record_failure, record_success
from .offering import beat, claim, offer, withdraw
from .opening import refuse_open_transaction, reserve
from .payers import Payer
from .rows import NO_HOLD, SETTLE_TIMEOUT, alias
from .settling import Outcome, commit_unrecorded, settle
from .statements import (
    carries_statements,
    decide_in_one_statement,
    fits_one_statement,
)
from .sweeping import (
    OUTAGE_AFTER,
    backlog,
    prunable,
    prune,
    record_lapsed,
    retry_stuck,
    settle_due,
    sweep,
    taking,
)

__all__ = [
    "NO_HOLD",
    "OUTAGE_AFTER",
    "SETTLE_TIMEOUT",
    "Outcome",
    "Payer",
    "alias",
    "backlog",
    "beat",
    "carries_statements",
    "claim",
    "collect",
    "commit_unrecorded",
    "decide_in_one_statement",
    "extend",
    "fits_one_statement",
    "in_the_way",
    "is_tried_again",
    "offer",
    "presume",
    "prunable",
    "prune",
    "record_failure",
    "record_lapsed",
    "record_success",
    "refuse_open_transaction",
    "reserve",
    "retry_stuck",
    "settle",
    "settle_due",
    "sweep",
    "taking",
    "withdraw",
    "write_off",
]
