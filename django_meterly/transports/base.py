"""The seam between the client and a ledger: one call in, one answer out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..wire import MAX_TTL_SECONDS, ROUTES

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL of the caller's that is to be one statement with a movement.

    *sql* writes a row. It may read the relation ``movement``, which has one row if
    the call moved credits, and none if it did not; its column ``reservation_id`` is
    the hold's. *lock* is a SELECT that locks a row which the movement depends on:
    if it finds no row, nothing is done, and ``NothingLocked`` is raised.
    """

    sql: str
    parameters: tuple[Any, ...] = ()
    lock: str = ""
    lock_parameters: tuple[Any, ...] = ()


class NothingLocked(Exception):
    """The lock of a ``Statement`` found no row, and so nothing was done."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the wire contract, on its way to a ledger.

    *operation* is a key of ``ROUTES``. *arguments* have their names on the wire
    (camelCase), those of the path included. *idempotency_key* is set on every
    POST. *timeout* is the number of seconds the whole call may take, and
    *attempts* how often it may be sent in them; ``None`` leaves either to the
    transport. A *statement* is for transports with ``carries_statements``.
    """

    operation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None
    timeout: float | None = None
    attempts: int | None = None
    statement: Statement | None = None

    @property
    def method(self) -> str:
        return ROUTES[self.operation][0]

    @property
    def path(self) -> str:
        """The path below the base URL, with its parameters filled in."""
        return ROUTES[self.operation][1].format_map(self.arguments)

    @property
    def payload(self) -> dict[str, Any]:
        """The arguments that do not stand in the path."""
        template = ROUTES[self.operation][1]
        return {
            name: value
            for name, value in self.arguments.items()
            if f"{{{name}}}" not in template
        }


class Transport:
    """Carries calls to a ledger.

    A transport raises the exceptions of ``django_meterly.errors`` and no others,
    and may be used from several threads at once. The client checks every answer, so a
    transport only has to decode it. For example::

        class MyTransport(Transport):
            def send(self, call):
                status, body = my_gateway(call.method, call.path, call.payload)
                if status < 400:
                    return body
                raise api_error(status, body["error"]["code"])
    """

    #: Whether a commit may name less than the hold. Where not, the client commits
    #: all of it and adds the rest again.
    partial_commit = True
    #: Whether ``async`` code has to call it on the thread that Django keeps for
    #: synchronous code, as whatever uses Django's database connections has to be.
    thread_sensitive = False
    #: What to look at when the answers are not a ledger's, for error messages.
    advice = ""
    #: Whether the ledger answered this process the last time; kept by the client.
    reachable = True

    @classmethod
    def from_settings(cls, settings: Any) -> Transport:
        """Return a transport set up by *settings* (``django_meterly.conf``)."""
        return cls()

    @classmethod
    def longest_hold(cls) -> int:
        """Return for how many seconds the ledger holds credits at most."""
        return MAX_TTL_SECONDS

    def send(self, call: Call) -> dict[str, Any]:
        """Carry out *call* and return the answer's body, with its wire names.

        The body is a ``dict`` of what JSON can say: texts, whole numbers, lists and
        ``dict``. Raises ``MeterlyApiError`` when the ledger said no,
        ``MeterlyNotSentError`` when the call provably never reached it, and
        ``MeterlyUnknownOutcomeError`` when it may or may not have been applied.

        If the ledger says that an earlier call had the same key, the body has
        ``"replayed": True``.
        """
        raise NotImplementedError

    def name_of(self, call: Call) -> str:
        """Return what *call* is named in error messages: its method and path."""
        return f"{call.method} {call.path}"

    def aliases(self) -> tuple[str, ...]:
        """Return the databases of this project that movements are written to."""
        return ()

    def joins(self, using: str) -> bool:
        """Return whether movements can be part of a transaction on *using*."""
        return False

    def carries_statements(self, using: str) -> bool:
        """Return whether a call's ``Statement`` on *using* is one with its movement.

        That is for ``reserve_credits``, ``commit_reservation`` and
        ``release_reservation``. The caller's row is written if, and only if, credits
        are moved; when the call returns, they are. The errors of the database, which
        is the caller's own, are raised as they are. A transport that makes calls anew
        on their way has to pass the statement on, or to say that it carries none.
        """
        return False

    def unit_of_work(self, using: str) -> AbstractContextManager[Any]:
        """Return a block in which calls and rows of *using* stand or fall together.

        A null context where the ledger does not share that database.
        """
        return nullcontext()

    def close(self) -> None:
        """Give back what the transport holds open."""
