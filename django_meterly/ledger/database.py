"""The database of the ledger: its alias, and how an operation is repeated there.

Every operation in ``customers``, ``grants``, ``spending`` and ``expiry`` is decorated
with ``retried``.
"""

from __future__ import annotations

import functools
import random
import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from django.db import DatabaseError, connections, router

from ..db import gave_way
from .models import Account

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

_RETRY_SECONDS = 10.0
_LONGEST_PAUSE = 0.5


def write_alias() -> str:
    """Return the alias of the ledger's database.

    The ledger reads there, too: a replica may lag behind the balance.
    """
    return router.db_for_write(Account)


def retried(operation: Callable[P, R]) -> Callable[P, R]:
    """Repeat *operation* when the database rolled it back in favour of another one.

    For example, two transactions that wait for each other's rows are a deadlock, and
    the database ends one of them. Inside a caller's transaction the error is raised:
    only the caller can repeat that transaction.
    """

    @functools.wraps(operation)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        until = time.monotonic() + _RETRY_SECONDS
        pause = 0.01
        while True:
            try:
                return operation(*args, **kwargs)
            except DatabaseError as exc:
                connection = connections[write_alias()]
                if (
                    not gave_way(exc)
                    or time.monotonic() > until
                    or connection.in_atomic_block
                    or not connection.get_autocommit()
                ):
                    raise
            # The pause is random, so that two calls that met once do not meet again.
            pause = min(2 * pause, _LONGEST_PAUSE)
            time.sleep(random.uniform(0, pause))  # noqa: S311

    return wrapper
