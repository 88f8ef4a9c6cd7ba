"""The seam between the client and a ledger: one call in, one answer out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..wire import MAX_TTL_SECONDS, ROUTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from django.core.checks import CheckMessage


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the wire contract, on its way to a ledger.

    *operation* is a key of ``ROUTES``. *arguments* have their names on the wire
    (camelCase), those of the path included. Every POST has an *idempotency_key*.
    *timeout* is the number of seconds that the whole call may take, and *attempts* is
    how often it may be sent meanwhile; the transport decides where they are ``None``.
    Only a ``JoinedTransport`` carries a *statement*. For example::

        call = Call("commit_reservation", {"reservationId": "res_1", "amount": 5}, "k1")
        call.method, call.path  # "POST", "/v1/reservations/res_1/commit"
        call.payload            # {"amount": 5}
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
        """The arguments that are not in the path."""
        template = ROUTES[self.operation][1]
        return {
            name: value
            for name, value in self.arguments.items()
            if f"{{{name}}}" not in template
        }


class Transport:
    """Carries calls to a ledger.

    A transport raises the exceptions of ``django_meterly.errors`` and no others.
    Several threads may use it at once. It only decodes answers, because the client
    checks each of them. For example::

        class MyTransport(Transport):
            def send(self, call):
                status, body = my_gateway(call.method, call.path, call.payload)
                if status < 400:
                    return body
                raise api_error(status, body["error"]["code"])
    """

    #: Whether a commit may name less than the hold. If not, the client commits all of
    #: the hold and adds the rest again.
    partial_commit = True
    #: Whether ``async`` code has to call the transport on the thread that Django keeps
    #: for synchronous code. Everything that uses Django's connections needs it.
    thread_sensitive = False
    #: Added to the message of an error if an answer cannot be a ledger's.
    advice = ""
    #: Whether the ledger answered this process the last time. The client sets it.
    reachable = True

    @classmethod
    def from_settings(cls, settings: Any) -> Transport:
        """Return a transport set up by *settings* (``django_meterly.conf``)."""
        return cls()

    @classmethod
    def check(cls, settings: Any) -> list[CheckMessage]:
        """Return what ``manage.py check`` reports about this transport.

        *settings* are those of ``from_settings``; each value is valid by itself. For
        example::

            if settings.API_KEY is None:
                return [Error("The gateway needs METERLY['API_KEY'].", id="shop.E001")]
        """
        return []

    @classmethod
    def longest_hold(cls) -> int:
        """Return the longest time that the ledger holds credits for, in seconds."""
        return MAX_TTL_SECONDS

    def send(self, call: Call) -> dict[str, Any]:
        """Carry out *call* and return the answer's body, with its wire names.

        The body is a ``dict`` of JSON values: texts, whole numbers, lists and ``dict``.
        It has ``"replayed": True`` if the ledger says that an earlier call had the same
        key. Raises

        - ``MeterlyApiError`` if the ledger said no,
        - ``MeterlyNotSentError`` if the call provably never reached it,
        - ``MeterlyUnknownOutcomeError`` if it may or may not have been applied.
        """
        raise NotImplementedError

    def name_of(self, call: Call) -> str:
        """Return the name of *call* for error messages: its method and path."""
        return f"{call.method} {call.path}"

    def joins(self, using: str) -> bool:
        """Return whether a transaction on *using* contains the ledger's movements.

        False for every ledger but that of a ``JoinedTransport``.
        """
        return False

    def unit_of_work(self, using: str) -> AbstractContextManager[Any]:
        """Return a block in which calls and rows of *using* stand or fall together.

        This is an ``atomic`` block if the ledger joins it, and a null context if not.
        """
        if not self.joins(using):
            return nullcontext()
        from django.db import transaction

        return transaction.atomic(using=using)

    def close(self) -> None:
        """Give back what the transport holds open."""


class JoinedTransport(Transport):
    """Carries calls to a ledger in a database of this project.

    If that is the journal's database, then the journal's rows and the ledger's
    movements share their transactions. ``LedgerTransport`` is one. For example::

        class MyTransport(JoinedTransport):
            def alias(self):
                return "default"

            def send(self, call):
                ...  # as in Transport, with Django's connection to "default"
    """

    thread_sensitive = True

    def alias(self) -> str:
        """Return the database that the ledger writes movements to."""
        raise NotImplementedError

    def joins(self, using: str) -> bool:
        return self.alias() == using

    def carries_statements(self, using: str) -> bool:
        """Return whether a call's ``Statement`` on *using* is part of its movement.

        That is for ``reserve_credits``, ``commit_reservation`` and
        ``release_reservation``. The caller's row is written if, and only if, the call
        moves credits; both have happened when the call returns. The database's errors
        are raised unchanged. A transport that replaces calls by others on the way has
        to pass the statement on, or to return false.
        """
        return False


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL of the caller that becomes one statement with a movement.

    *source* is a SELECT of the one row that the movement depends on. For example, it
    locks the journal's row, or it finds the customer who pays. If it finds no row,
    nothing is done, and ``NothingFound`` is raised. Otherwise the values of its columns
    are in *found*, even if the ledger refuses the call.

    *sql* writes a row. It may read two relations: ``source``, and ``movement``, which
    has one row if the call moved credits, and none if it did not. The column
    ``movement.reservation_id`` is the id of the hold.

    For ``reserve_credits`` the source finds the customer. Its first column,
    ``payer_id``, replaces the ``FOUND`` of the call; its second column, ``scope``, is
    put before the call's idempotency key.
    """

    sql: str
    parameters: tuple[Any, ...]
    source: str
    source_parameters: tuple[Any, ...] = ()
    found: list[Any] = field(default_factory=list)


#: The ``customer_id`` of a reserve whose ``Statement`` finds the customer.
FOUND = "found"


class NothingFound(Exception):
    """The source of a ``Statement`` found no row, and so nothing was done."""
