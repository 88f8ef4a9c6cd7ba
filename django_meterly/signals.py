"""Signals: they tell receivers what has happened; the package itself needs none.

Each signal is sent once, after the COMMIT that makes its fact durable. A receiver that
raises is logged, and changes nothing else. ``docs/signals.md`` describes them all.
"""

from __future__ import annotations

import functools
from typing import Any

from django.dispatch import Signal

#: Credits are held, and the work runs. Sends *reservation*.
credits_reserved = Signal()

#: Work was charged. Sends *reservation*.
credits_committed = Signal()

#: A reservation has ended without a charge. Sends *reservation*.
credits_released = Signal()

#: The work did not run: too few credits, or a ledger that could not be asked.
#: Sends *customer* (a ``Customer``, or ``None`` if none was found), *unit*,
#: *amount*, *reference* and the *error*.
credits_denied = Signal()

#: The work ran uncharged, and would not have run if ``ENFORCEMENT`` were
#: ``"enforce"``. Sends the same as ``credits_denied``.
would_deny = Signal()

#: Credits were granted through this project. Sends *grant*.
credits_granted = Signal()

#: A movement took the available credits below ``LOW_BALANCE``. Sends *customer*,
#: *unit*, *available* and *threshold*.
low_balance = Signal()

#: The ledger refused a recorded decision too often. Sends *reservation*.
reservation_stuck = Signal()

#: Work was done, but its credits could not be charged: a debt. Sends *reservation*.
reservation_unbilled = Signal()

#: The ledger does not answer this process any more. Sends the *error*.
ledger_unreachable = Signal()

#: The ledger answers this process again.
ledger_reachable = Signal()


def announce(signal: Signal, sender: Any, *, using: str, **facts: Any) -> None:
    """Send *signal* once the transaction on *using* is committed, if there is one.

    An error of a receiver is logged and not raised.
    """
    if not signal.has_listeners(sender):
        return
    # Only here: clients without a Django project import this module, too.
    from django.db import connections, transaction

    send = functools.partial(signal.send_robust, sender=sender, **facts)
    if connections[using].in_atomic_block:
        transaction.on_commit(send, using=using, robust=True)
    else:
        # Without asking a database that may be out of reach.
        send()
