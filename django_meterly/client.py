"""``MeterlyClient``: the SDK's methods, in Python.

``MeterlyClient(api_key=...)`` works in a plain script, without Django settings. In a
project, ``get_client()`` returns the client that the settings describe.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from copy import deepcopy
from dataclasses import replace
from functools import partial, wraps
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    ParamSpec,
    TypeVar,
    overload,
)

from asgiref.sync import sync_to_async

from . import answers, signals, wire
from .client_guard import ClientGuard
from .errors import (
    OUTAGE,
    MeterlyAuthenticationError,
    MeterlyError,
    MeterlyForbiddenError,
    MeterlyIdempotencyInProgressError,
    MeterlyInvalidRequestError,
    MeterlyRateLimitedError,
    MeterlyUnknownOutcomeError,
)
from .transports.base import Call
from .transports.signing import Secret
from .wire import MAX_CALLER_KEY_LENGTH

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from types import TracebackType

    from .transports.base import Statement, Transport
    from .types import (
        Balance,
        Balances,
        CustomerResult,
        EntryPage,
        GrantResult,
        MovementResult,
        ReservationResult,
    )

    Reader = Callable[[dict[str, Any], Mapping[str, Any]], "T"]

__all__ = ["MeterlyClient", "get_client"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")


def _twin(
    method: Callable[Concatenate[MeterlyClient, P], T],
) -> Callable[Concatenate[MeterlyClient, P], Coroutine[Any, Any, T]]:
    """Return *method* for ``async`` code: the same, run in a thread."""

    @wraps(method)
    async def twin(self: MeterlyClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        sensitive = self.transport.thread_sensitive
        run = sync_to_async(method, thread_sensitive=sensitive)
        return await run(self, *args, **kwargs)

    twin.__name__ = f"a{method.__name__}"
    twin.__qualname__ = f"MeterlyClient.{twin.__name__}"
    return twin


class MeterlyClient:
    """A ledger's methods, over HTTP with *api_key*, or over any *transport*.

    *options* go to ``HttpTransport`` (``base_url``, ``read_timeout``, ``deadline``,
    ``signer``, ...). Threads may share a client, and use it after a fork. Each method
    has a twin for ``async`` code, which does the same in a thread. For example::

        client.use_credits("cus_1", 5, "tokens", "chat-7", idempotency_key="chat-7")
        await client.ause_credits("cus_1", 5, "tokens", "chat-7")

    Each method that changes something takes an *idempotency_key*. The same key with
    the same arguments never moves credits twice. The default is a random key for this
    one call. Amounts are positive integers. Each method raises

    - ``MeterlyInvalidRequestError`` (a ``ValueError``, too) for an invalid argument,
      before anything is sent,
    - ``MeterlyApiError`` if the ledger says no,
    - ``MeterlyNotSentError`` if the call never reached the ledger,
    - ``MeterlyUnknownOutcomeError`` if nobody knows whether the call was applied.

    The methods and their arguments are those of the published SDK guide.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        transport: Transport | None = None,
        **options: Any,
    ) -> None:
        # A debug page would show the plain key with the frame of an error.
        api_key = Secret(api_key) if isinstance(api_key, str) else api_key
        if transport is None:
            from .transports import HttpTransport

            transport = HttpTransport(api_key, **options)
        elif api_key is not None or options:
            raise TypeError(
                "Give MeterlyClient an api_key (and its options) or a transport, "
                "not both."
            )
        self.transport = transport
        self._ends_at: float | None = None
        self._attempts: int | None = None
        self._statement: Statement | None = None

    def __repr__(self) -> str:
        return f"MeterlyClient({self.transport!r})"

    def __enter__(self) -> MeterlyClient:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> MeterlyClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def close(self) -> None:
        """Close the transport's connections."""
        self.transport.close()

    aclose = _twin(close)

    def within(self, seconds: float, *, attempts: int | None = None) -> MeterlyClient:
        """Return a client whose calls must all end within *seconds* from now.

        Each call is sent at most *attempts* times, and ``None`` leaves that to the
        transport. The new client shares this one's transport and limits.
        """
        limited = MeterlyClient(transport=self.transport)
        limited._ends_at = time.monotonic() + seconds
        if self._ends_at is not None:
            limited._ends_at = min(limited._ends_at, self._ends_at)
        limited._attempts = attempts or self._attempts
        return limited

    def carrying(self, statement: Statement) -> MeterlyClient:
        """Return a client whose next call carries *statement*.

        That needs a ``JoinedTransport`` whose ``carries_statements`` is true. The new
        client shares it.
        """
        carrying = MeterlyClient(transport=self.transport)
        carrying._statement = statement
        return carrying

    # Customers and credits

    def create_customer(
        self,
        customer_external_id: str,
        credit_unit: str,
        *,
        idempotency_key: str | None = None,
    ) -> CustomerResult:
        """Register a customer under *your* stable id, with a default unit.

        Raises ``MeterlyCustomerExistsError``, with the existing ``customer_id``, if the
        external id is taken. The same call with the same *idempotency_key* returns the
        customer that it created.
        """
        return self._post(
            "create_customer",
            answers.customer,
            {
                "customerExternalId": check_text(
                    customer_external_id, "customer_external_id"
                ),
                "creditUnit": check_unit(credit_unit, "credit_unit"),
            },
            idempotency_key,
        )

    acreate_customer = _twin(create_customer)

    def find_customer(self, customer_external_id: str) -> CustomerResult | None:
        """Return the customer with *your* id, or ``None``."""
        return self._send(
            "find_customer",
            answers.found_customer,
            {"externalId": check_text(customer_external_id, "external_id")},
        )

    afind_customer = _twin(find_customer)

    def grant_credits(
        self,
        external_customer_id: str,
        credit_amount: int,
        credit_unit: str,
        reference: str,
        description: str = "",
        *,
        idempotency_key: str | None = None,
    ) -> GrantResult:
        """Grant credits, once per *reference*; a new customer is created.

        Raises ``MeterlyReferenceConflictError`` if *reference* was used with other
        values for this customer and unit.
        """
        arguments: dict[str, Any] = {
            "externalCustomerId": check_text(
                external_customer_id, "external_customer_id"
            ),
            "creditAmount": check_amount(credit_amount, "credit_amount"),
            "creditUnit": check_unit(credit_unit, "credit_unit"),
            "reference": check_text(reference, "reference"),
        }
        if description:
            arguments["description"] = check_description(description)
        return self._post("grant_credits", answers.grant, arguments, idempotency_key)

    agrant_credits = _twin(grant_credits)

    def get_balance(self, customer_id: str) -> Balance:
        """Return the customer's default account."""
        return self._send(
            "get_balance", answers.balance, {"customerId": _customer(customer_id)}
        )

    aget_balance = _twin(get_balance)

    def get_balances(self, customer_id: str) -> Balances:
        """Return every account of the customer."""
        return self._send(
            "get_balances", answers.balances, {"customerId": _customer(customer_id)}
        )

    aget_balances = _twin(get_balances)

    def list_entries(
        self, customer_id: str, unit: str | None = None, *, cursor: str | None = None
    ) -> EntryPage:
        """Return a page of the customer's ledger entries, the newest first.

        Without *unit*, the entries of all units are returned. For the next page, give
        this page's ``next_cursor`` as *cursor*. It is ``None`` on the last page.
        """
        arguments = {"customerId": _customer(customer_id)}
        if unit is not None:
            arguments["unit"] = check_unit(unit)
        if cursor is not None:
            arguments["cursor"] = check_text(cursor, "cursor")
        return self._send("list_entries", answers.entries, arguments)

    alist_entries = _twin(list_entries)

    def add_credits(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = None,
        reference: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> MovementResult:
        """Add credits, once per *reference* (by default the *idempotency_key*)."""
        return self._move(
            "add_credits", customer_id, amount, unit, reference, idempotency_key
        )

    aadd_credits = _twin(add_credits)

    def use_credits(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = None,
        reference: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> MovementResult:
        """Use credits at once, without a hold; *reference* is a label.

        Raises ``MeterlyInsufficientCreditsError`` if too few are available.
        """
        return self._move(
            "use_credits", customer_id, amount, unit, reference, idempotency_key
        )

    ause_credits = _twin(use_credits)

    # Reservations

    def reserve_credits(
        self,
        customer_id: str,
        amount: int,
        *,
        unit: str | None = None,
        reference: str | None = None,
        idempotency_key: str | None = None,
        ttl_seconds: int | None = None,
    ) -> ReservationResult:
        """Hold credits for *ttl_seconds* (1 to 86400, or the ledger's default).

        *reference* is by default the *idempotency_key*. A replayed key returns the same
        reservation with its present *status*, so check ``is_held`` before you rely on
        the hold. Raises ``MeterlyInsufficientCreditsError`` if too few are available.
        """
        arguments: dict[str, Any] = {
            "customerId": _customer(customer_id),
            "amount": check_amount(amount),
        }
        if unit is not None:
            arguments["unit"] = check_unit(unit)
        if ttl_seconds is not None:
            arguments["ttlSeconds"] = check_ttl(ttl_seconds)
        return self._post_named(
            "reserve_credits", answers.reserved, arguments, reference, idempotency_key
        )

    areserve_credits = _twin(reserve_credits)

    def get_reservation(self, reservation_id: str) -> ReservationResult:
        """Return a reservation as it is now."""
        return self._send(
            "get_reservation",
            answers.reservation,
            {"reservationId": _reservation(reservation_id)},
        )

    aget_reservation = _twin(get_reservation)

    def commit_reservation(
        self,
        reservation_id: str,
        *,
        amount: int | None = None,
        idempotency_key: str | None = None,
    ) -> ReservationResult:
        """Charge a reservation: all of it, or *amount* (0 charges nothing).

        The rest of the hold is available again. A second commit of the same
        reservation succeeds and moves nothing. If the transport has no
        ``partial_commit``, all of the hold is committed, and the rest is added again
        with the reference ``refund:<reservation_id>``. Raises
        ``MeterlyReservationExpiredError`` or ``MeterlyReservationReleasedError``.
        """
        arguments: dict[str, Any] = {"reservationId": _reservation(reservation_id)}
        if amount is not None:
            check_amount(amount, minimum=0)
            if not self.transport.partial_commit:
                return self._commit_and_refund(reservation_id, amount, idempotency_key)
            arguments["amount"] = amount
        return self._post(
            "commit_reservation",
            answers.committed,
            arguments,
            idempotency_key,
        )

    acommit_reservation = _twin(commit_reservation)

    def _commit_and_refund(
        self, reservation_id: str, amount: int, idempotency_key: str | None
    ) -> ReservationResult:
        """Charge *amount* at a ledger that can only commit a hold as a whole."""
        held = self.get_reservation(reservation_id)
        if held.amount is None or held.customer_id is None or held.unit is None:
            raise MeterlyUnknownOutcomeError(
                f"The ledger does not say what reservation {reservation_id} holds, and "
                "for whom. It is not committed, because the rest could not be returned."
            )
        if amount > held.amount:
            raise MeterlyInvalidRequestError(
                f"amount must be at most the {held.amount} credits held, not {amount}."
            )
        committed = self.commit_reservation(
            reservation_id, idempotency_key=idempotency_key
        )
        if amount == held.amount:
            return committed
        # Derived from the reservation, so that a replay of the pair adds nothing twice.
        name = f"refund:{reservation_id}"
        try:
            movement = self.add_credits(
                held.customer_id,
                held.amount - amount,
                held.unit,
                name,
                idempotency_key=name,
            )
        except OUTAGE as exc:
            unknown = MeterlyUnknownOutcomeError(
                f"Reservation {reservation_id} is committed, but the rest of its hold "
                f"may not be added again yet: {exc}"
            )
            unknown.idempotency_key = idempotency_key
            raise unknown from exc
        return replace(committed, balance=movement.balance)

    def release_reservation(
        self, reservation_id: str, *, idempotency_key: str | None = None
    ) -> ReservationResult:
        """Give the held credits back.

        A second release of the same reservation succeeds. Raises
        ``MeterlyReservationExpiredError`` or ``MeterlyReservationCommittedError``.
        """
        return self._post(
            "release_reservation",
            answers.released,
            {"reservationId": _reservation(reservation_id)},
            idempotency_key,
        )

    arelease_reservation = _twin(release_reservation)

    def extend_reservation(
        self,
        reservation_id: str,
        ttl_seconds: int,
        *,
        idempotency_key: str | None = None,
    ) -> ReservationResult:
        """Hold the credits for *ttl_seconds* (1 to 86400) from now.

        This sets the time to live and never adds to it, so a replay does no harm.
        Raises ``MeterlyReservationExpiredError``,
        ``MeterlyReservationCommittedError`` or ``MeterlyReservationReleasedError``.
        """
        return self._post(
            "extend_reservation",
            answers.reservation,
            {
                "reservationId": _reservation(reservation_id),
                "ttlSeconds": check_ttl(ttl_seconds),
            },
            idempotency_key,
        )

    aextend_reservation = _twin(extend_reservation)

    @overload
    def guard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = ...,
        reference: str | None = ...,
        idempotency_key: str | None = ...,
        ttl_seconds: int | None = ...,
    ) -> AbstractContextManager[ReservationResult]: ...

    @overload
    def guard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = ...,
        reference: str | None = ...,
        idempotency_key: str | None = ...,
        ttl_seconds: int | None = ...,
        *,
        callback: Callable[[], T],
    ) -> T: ...

    def guard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = None,
        reference: str | None = None,
        idempotency_key: str | None = None,
        ttl_seconds: int | None = None,
        callback: Callable[[], Any] | None = None,
    ) -> Any:
        """Reserve, run the work, then commit; release when the work raises.

        This returns a context manager or, with a *callback*, runs it and returns its
        result. For example::

            with client.guard("cus_1", 25, "image_credits", "render-42"):
                render()

        If the outcome of the reserve is unknown, the work does not run. If that of the
        commit is unknown, nothing is released: ``MeterlyUnknownOutcomeError`` has the
        work's ``result`` and the ``idempotency_key`` of the commit.

        An *idempotency_key* (1 to 200 visible ASCII characters) runs the work once. The
        same call later

        - raises ``MeterlyDuplicateError`` after a success, and while the hold is live
          (then with ``in_progress``),
        - is a new attempt after a failure, or when the hold has expired. Its key on the
          wire is ``<key>~2``, then ``<key>~3``,
        - raises ``MeterlyIdempotencyMismatchError`` if its arguments are others.

        This guard keeps no journal. If the process dies between the two calls, the hold
        expires and the work is not charged. ``django_meterly.guard`` keeps a journal.
        """
        held = self._guard(
            customer_id, amount, unit, reference, idempotency_key, ttl_seconds
        )
        if callback is None:
            return held
        with held:
            held.result = callback()
        return held.result

    @overload
    def aguard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = ...,
        reference: str | None = ...,
        idempotency_key: str | None = ...,
        ttl_seconds: int | None = ...,
    ) -> AbstractAsyncContextManager[ReservationResult]: ...

    @overload
    def aguard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = ...,
        reference: str | None = ...,
        idempotency_key: str | None = ...,
        ttl_seconds: int | None = ...,
        *,
        callback: Callable[[], Awaitable[T]],
    ) -> Coroutine[Any, Any, T]: ...

    def aguard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = None,
        reference: str | None = None,
        idempotency_key: str | None = None,
        ttl_seconds: int | None = None,
        callback: Callable[[], Awaitable[Any]] | None = None,
    ) -> Any:
        """Guard ``async`` work as ``guard`` does: with ``async with``, or awaited.

        If the task is cancelled during the work, the hold is released. If it is
        cancelled during the commit, the commit is finished first.
        """
        held = self._guard(
            customer_id, amount, unit, reference, idempotency_key, ttl_seconds
        )
        return held if callback is None else held.arun(callback)

    def _guard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None,
        reference: str | None,
        idempotency_key: str | None,
        ttl_seconds: int | None,
    ) -> ClientGuard[Any]:
        # Shorter than other keys: those of the commit and the release are derived from
        # it, and the work is done when they are needed.
        key = _key(idempotency_key, MAX_CALLER_KEY_LENGTH)
        reserve = partial(
            self.reserve_credits,
            customer_id,
            amount,
            unit=unit,
            # The same for each attempt, because they are for the same piece of work.
            reference=key if reference is None else reference,
            ttl_seconds=ttl_seconds,
        )
        return ClientGuard(self, reserve, key, is_random=idempotency_key is None)

    # Sending

    def _move(
        self,
        operation: str,
        customer_id: str,
        amount: int,
        unit: str | None,
        reference: str | None,
        idempotency_key: str | None,
    ) -> MovementResult:
        arguments: dict[str, Any] = {
            "customerId": _customer(customer_id),
            "amount": check_amount(amount),
        }
        if unit is not None:
            arguments["unit"] = check_unit(unit)
        return self._post_named(
            operation, answers.movement, arguments, reference, idempotency_key
        )

    def _post_named(
        self,
        operation: str,
        reader: Reader[T],
        arguments: dict[str, Any],
        reference: str | None,
        idempotency_key: str | None,
    ) -> T:
        key = _key(idempotency_key)
        # A random reference would make a repeated call another request.
        reference = key if reference is None else reference
        arguments["reference"] = check_text(reference, "reference")
        return self._send(operation, reader, arguments, key)

    def _post(
        self,
        operation: str,
        reader: Reader[T],
        arguments: dict[str, Any],
        idempotency_key: str | None,
    ) -> T:
        return self._send(operation, reader, arguments, _key(idempotency_key))

    def _send(
        self,
        operation: str,
        reader: Reader[T],
        arguments: dict[str, Any],
        idempotency_key: str | None = None,
    ) -> T:
        timeout = None
        if self._ends_at is not None:
            timeout = max(self._ends_at - time.monotonic(), 0.0)
        call = Call(
            operation,
            arguments,
            idempotency_key,
            timeout,
            self._attempts,
            self._statement,
        )
        try:
            answer = answers.read(
                reader, call, self.transport.send(call), self.transport
            )
        except MeterlyError as exc:
            _reached(self.transport, exc)
            answers.complete_refusal(call, exc)
            if isinstance(exc, MeterlyUnknownOutcomeError):
                exc.idempotency_key = call.idempotency_key
            raise
        if not self.transport.reachable:
            _reached(self.transport)
        return answer


def _refusing(check: Callable[P, T]) -> Callable[P, T]:
    """Return *check*, but raising the error that a ledger would answer."""

    @wraps(check)
    def refuse(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return check(*args, **kwargs)
        except ValueError as exc:
            error = MeterlyInvalidRequestError(str(exc))
        raise error

    return refuse


check_amount = _refusing(wire.check_amount)
check_description = _refusing(wire.check_description)
check_identifier = _refusing(wire.check_identifier)
check_key = _refusing(wire.check_key)
check_text = _refusing(wire.check_text)
check_ttl = _refusing(wire.check_ttl)
check_unit = _refusing(wire.check_unit)


_reachable_lock = threading.Lock()


def _reached(transport: Transport, error: MeterlyError | None = None) -> None:
    """Announce once that the ledger stopped answering, and once that it answers."""
    if isinstance(error, MeterlyIdempotencyInProgressError | MeterlyRateLimitedError):
        return  # The ledger answers, only not to this call yet.
    reachable = not isinstance(error, OUTAGE)
    with _reachable_lock:
        if transport.reachable == reachable:
            return
        transport.reachable = reachable
    if reachable:
        logger.info("The ledger answers again.")
        signals.ledger_reachable.send_robust(sender=type(transport))
    else:
        if isinstance(error, MeterlyAuthenticationError | MeterlyForbiddenError):
            logger.warning(
                'The ledger refused the API key (METERLY["API_KEY"]): %s', error
            )
        else:
            logger.warning("The ledger cannot be reached: %s", error)
        signals.ledger_unreachable.send_robust(sender=type(transport), error=error)


def _customer(value: object) -> str:
    return check_identifier(value, "customer_id")


def _reservation(value: object) -> str:
    return check_identifier(value, "reservation_id")


def _key(value: str | None, length: int = wire.MAX_KEY_LENGTH) -> str:
    return str(uuid.uuid4()) if value is None else check_key(value, length=length)


class _Configured:
    """The client that the settings described, and those settings.

    This is not a tuple, because debug pages would show the key in it.
    """

    __slots__ = ("_pid", "_settings", "client")

    def __init__(self) -> None:
        from .conf import meterly_settings

        self._pid = os.getpid()
        # All settings: a server may run without system checks, and no credits may move
        # by invalid settings.
        meterly_settings.check()
        transport = meterly_settings.TRANSPORT.from_settings(meterly_settings)
        self._settings = deepcopy(meterly_settings.as_dict())
        self.client = MeterlyClient(transport=transport)

    def is_current(self) -> bool:
        from .conf import meterly_settings

        return self._pid == os.getpid() and self._settings == meterly_settings.as_dict()


_current: _Configured | None = None


def get_client() -> MeterlyClient:
    """Return the client that ``settings.METERLY`` describes.

    This is the same client until the settings change (by ``override_settings``, for
    example) or the process forks. Raises ``ImproperlyConfigured`` if any setting is
    invalid.
    """
    global _current
    current = _current
    if current is None or not current.is_current():
        current = _current = _Configured()
    return current.client
