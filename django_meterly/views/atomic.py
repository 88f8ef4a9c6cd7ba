"""``ATOMIC_REQUESTS``: the guard opens the view's transactions instead of Django.

Django opens them before it calls the view, and would have the credits reserved inside.
A crash would then roll the reservation back, although the ledger has heard of it. So a
wrapper tells Django to open none (``AtomicTakeover``), reserves, and runs the view in
``atomic()``. Django refuses async views under ``ATOMIC_REQUESTS``: nothing is to be
taken over from them.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction

from .. import journal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager


class AtomicTakeover(set[str]):
    """The wrapper's ``_non_atomic_requests``: every alias, so that Django opens none.

    It remembers the aliases that the view itself is exempt from: those that *view*
    names already, and those that Django's ``non_atomic_requests`` adds above the guard.
    """

    def __init__(self, view: Any) -> None:
        super().__init__(connections)
        self._exempt = set(getattr(view, "_non_atomic_requests", ()))

    def add(self, alias: str) -> None:
        self._exempt.add(alias)
        super().add(alias)

    def aliases(self) -> list[str]:
        """Return the aliases whose transactions Django would have opened."""
        aliases = [
            alias
            for alias, options in connections.settings.items()
            if options["ATOMIC_REQUESTS"] and alias not in self._exempt
        ]
        # The journal's is the outermost, so that its COMMIT comes last.
        return sorted(aliases, key=lambda alias: alias != journal.alias())


def atomic(aliases: Sequence[str]) -> AbstractContextManager[None]:
    """Open a transaction on each of *aliases*, the first one outermost."""
    return _atomic(aliases) if aliases else nullcontext()


@contextmanager
def _atomic(aliases: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for alias in aliases:
            stack.enter_context(transaction.atomic(using=alias))
        yield


@contextmanager
def unspoiled(aliases: Sequence[str]) -> Iterator[None]:
    """Undo the ``set_rollback()`` of Django REST framework on others' transactions.

    After every error it marks each open transaction of a database with
    ``ATOMIC_REQUESTS``. The guard's transactions have ended by then, so the marked one
    belongs to somebody else: for example, to the test that sent the request.
    """
    spared = [
        connections[alias]
        for alias in aliases
        if connections[alias].in_atomic_block and not connections[alias].needs_rollback
    ]
    try:
        yield
    finally:
        for connection in spared:
            if connection.in_atomic_block:
                connection.set_rollback(False)
