"""``MeterlyClient``: the SDK's methods, in Python.

It needs no configured Django settings: ``MeterlyClient(api_key=...)`` works in
a plain script. In a project, ``get_client()`` returns the one the settings
describe.
"""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .errors import MeterlyError, MeterlyNotSentError, MeterlyUnknownOutcomeError
from .transports.base import (
    MAX_KEY_LENGTH,
    Call,
    check_amount,
    check_description,
    check_identifier,
    check_key,
    check_text,
    check_ttl,
    check_unit,
)
from .types import Balance, Balances, Customer, GrantResult, Movement, Reservation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType

    from .transports.base import Transport

__all__ = ["MeterlyClient", "get_client"]

T = TypeVar("T")


class MeterlyClient:
    """A ledger's methods, over HTTP with *api_key*, or over any *transport*.

    *options* go to ``HttpTransport`` (``base_url``, ``read_timeout``,
    ``deadline``, ...). One client may be shared by many threads.

    Every method that changes something takes an *idempotency_key*: the same key
    with the same arguments never moves credits twice. Without one, a random key
    is used for that one call. Amounts are positive integers; anything else is a
    ``ValueError`` before anything is sent. Every method raises
    ``MeterlyApiError`` when the ledger says no, ``MeterlyNotSentError`` when it
    was never reached, and ``MeterlyUnknownOutcomeError`` when it cannot be known
    whether the call was applied.

    The methods and their arguments are those of the published SDK guide.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        transport: Transport | None = None,
        **options: Any,
    ) -> None:
        if transport is None:
            from .transports import HttpTransport

            transport = HttpTransport(api_key, **options)
        elif api_key is not None or options:
            raise TypeError(
                "Give MeterlyClient an api_key (and its options) or a transport, "
                "not both."
            )
        self.transport = transport

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

    def close(self) -> None:
        """Close the transport's connections."""
        self.transport.close()

    # Customers and credits

    def create_customer(
        self,
        customer_external_id: str,
        credit_unit: str,
        *,
        idempotency_key: str | None = None,
    ) -> Customer:
        """Register a customer under *your* stable id, with a default unit.

        Raises ``MeterlyCustomerExistsError`` (with the existing ``customer_id``)
        when the external id is taken with another unit.
        """
        return self._post(
            "create_customer",
            Customer.from_wire,
            {
                "customerExternalId": check_text(
                    customer_external_id, "customer_external_id"
                ),
                "creditUnit": check_unit(credit_unit, "credit_unit"),
            },
            idempotency_key,
        )

    def find_customer(self, customer_external_id: str) -> Customer | None:
        """Return the customer with *your* id, or ``None``."""
        return self._send(
            Call(
                "find_customer",
                {"externalId": check_text(customer_external_id, "external_id")},
            ),
            _first_customer,
        )

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

        Raises ``MeterlyReferenceConflictError`` when *reference* was used with
        other values for this customer and unit.
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
        return self._post(
            "grant_credits", GrantResult.from_wire, arguments, idempotency_key
        )

    def get_balance(self, customer_id: str) -> Balance:
        """Return the customer's default account."""
        return self._send(
            Call("get_balance", {"customerId": _customer(customer_id)}),
            Balance.from_wire,
        )

    def get_balances(
        self, customer_id: str, *, timeout: float | None = None
    ) -> Balances:
        """Return every account of the customer.

        *timeout* is the number of seconds the whole call may take.
        """
        return self._send(
            Call(
                "get_balances",
                {"customerId": _customer(customer_id)},
                timeout=timeout,
            ),
            Balances.from_wire,
        )

    def add_credits(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = None,
        reference: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Movement:
        """Add credits, once per *reference* (a random one when not given)."""
        return self._move(
            "add_credits", customer_id, amount, unit, reference, idempotency_key
        )

    def use_credits(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = None,
        reference: str | None = None,
        *,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Movement:
        """Use credits at once, without a hold; *reference* is a label.

        Raises ``MeterlyInsufficientCreditsError`` when too few are available.
        """
        return self._move(
            "use_credits",
            customer_id,
            amount,
            unit,
            reference,
            idempotency_key,
            timeout,
        )

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
        timeout: float | None = None,
    ) -> Reservation:
        """Hold credits for *ttl_seconds* (1 to 86400; the ledger's default else).

        Replaying a key returns the same reservation with its present *status*,
        so look at it before relying on the hold. *timeout* is the number of
        seconds the whole call may take. Raises
        ``MeterlyInsufficientCreditsError`` when too few are available.
        """
        arguments: dict[str, Any] = {
            "customerId": _customer(customer_id),
            "amount": check_amount(amount),
            "reference": _reference(reference),
        }
        if unit is not None:
            arguments["unit"] = check_unit(unit)
        if ttl_seconds is not None:
            arguments["ttlSeconds"] = check_ttl(ttl_seconds)
        return self._post(
            "reserve_credits",
            Reservation.from_wire,
            arguments,
            idempotency_key,
            timeout,
        )

    def get_reservation(self, reservation_id: str) -> Reservation:
        """Return a reservation as it is now."""
        return self._send(
            Call("get_reservation", {"reservationId": _reservation(reservation_id)}),
            Reservation.from_wire,
        )

    def commit_reservation(
        self,
        reservation_id: str,
        *,
        amount: int | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Reservation:
        """Charge a reservation: all of it, or *amount* (0 charges nothing).

        What is not charged is available again. Committing a committed
        reservation succeeds without a second movement. Raises
        ``MeterlyReservationExpiredError`` or ``MeterlyReservationReleasedError``.
        """
        arguments: dict[str, Any] = {"reservationId": _reservation(reservation_id)}
        if amount is not None:
            arguments["amount"] = check_amount(amount, minimum=0)
        return self._post(
            "commit_reservation",
            Reservation.from_wire,
            arguments,
            idempotency_key,
            timeout,
        )

    def release_reservation(
        self,
        reservation_id: str,
        *,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Reservation:
        """Give the held credits back.

        Releasing a released reservation succeeds. Raises
        ``MeterlyReservationExpiredError`` or ``MeterlyReservationCommittedError``.
        """
        return self._post(
            "release_reservation",
            Reservation.from_wire,
            {"reservationId": _reservation(reservation_id)},
            idempotency_key,
            timeout,
        )

    @overload
    def guard(
        self,
        customer_id: str,
        amount: int,
        unit: str | None = ...,
        reference: str | None = ...,
        idempotency_key: str | None = ...,
        ttl_seconds: int | None = ...,
    ) -> AbstractContextManager[Reservation]: ...

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

        With *callback* the work is run here and its result returned; without, a
        context manager is returned. A reserve whose outcome is unknown runs
        nothing. A commit whose outcome is unknown releases nothing: it raises
        ``MeterlyUnknownOutcomeError`` with the work's ``result`` and the
        ``idempotency_key`` of the commit.

        There is no journal behind this guard: a process that dies between the
        two calls leaves the hold to its time to live, and the work uncharged.
        ``django_meterly.guard`` keeps one.
        """
        key = str(uuid.uuid4())
        if idempotency_key is not None:
            # Room for the keys that are derived from it: found too long only
            # then, it would end in a ValueError after the work.
            key = check_key(idempotency_key, length=MAX_KEY_LENGTH - len(":release"))
        held = self._guarded(customer_id, amount, unit, reference, key, ttl_seconds)
        if callback is None:
            return held
        result = None
        try:
            with held:
                result = callback()
        except MeterlyUnknownOutcomeError as exc:
            if exc.idempotency_key == f"{key}:commit":
                exc.result = result
            raise
        return result

    @contextmanager
    def _guarded(
        self,
        customer_id: str,
        amount: int,
        unit: str | None,
        reference: str | None,
        key: str,
        ttl_seconds: int | None,
    ) -> Iterator[Reservation]:
        reservation = self.reserve_credits(
            customer_id,
            amount,
            unit=unit,
            reference=reference,
            idempotency_key=key,
            ttl_seconds=ttl_seconds,
        )
        if reservation.status != "reserved":
            raise MeterlyUnknownOutcomeError(
                f"The reservation of idempotency key {key!r} is "
                f"{reservation.status} already. Use a new key for new work."
            )
        try:
            yield reservation
        except BaseException:
            # The work's own exception is the one to report; a hold that cannot
            # be released now ends with its time to live.
            try:
                self.release_reservation(
                    reservation.reservation_id, idempotency_key=f"{key}:release"
                )
            except MeterlyError:
                pass
            raise
        # Outside the try: the work is done, so nothing here may release it.
        try:
            self.commit_reservation(
                reservation.reservation_id, idempotency_key=f"{key}:commit"
            )
        except (MeterlyUnknownOutcomeError, MeterlyNotSentError) as exc:
            unknown = MeterlyUnknownOutcomeError(
                "The work is done, but whether it was charged is unknown. Commit "
                f"reservation {reservation.reservation_id} again with idempotency "
                f"key {key}:commit."
            )
            unknown.idempotency_key = f"{key}:commit"
            raise unknown from exc

    # Sending

    def _move(
        self,
        operation: str,
        customer_id: str,
        amount: int,
        unit: str | None,
        reference: str | None,
        idempotency_key: str | None,
        timeout: float | None = None,
    ) -> Movement:
        arguments: dict[str, Any] = {
            "customerId": _customer(customer_id),
            "amount": check_amount(amount),
            "reference": _reference(reference),
        }
        if unit is not None:
            arguments["unit"] = check_unit(unit)
        return self._post(
            operation, Movement.from_wire, arguments, idempotency_key, timeout
        )

    def _post(
        self,
        operation: str,
        read: Callable[[dict[str, Any]], T],
        arguments: dict[str, Any],
        idempotency_key: str | None,
        timeout: float | None = None,
    ) -> T:
        key = (
            str(uuid.uuid4()) if idempotency_key is None else check_key(idempotency_key)
        )
        return self._send(Call(operation, arguments, key, timeout), read)

    def _send(self, call: Call, read: Callable[[dict[str, Any]], T]) -> T:
        try:
            data = self.transport.send(call)
        except MeterlyUnknownOutcomeError as exc:
            exc.idempotency_key = call.idempotency_key
            raise
        try:
            return read(data)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            unknown = MeterlyUnknownOutcomeError(
                f"The answer to {call.method} {call.path} does not have the "
                f"expected shape: {exc!r}."
            )
            unknown.idempotency_key = call.idempotency_key
            raise unknown from exc


def _customer(value: object) -> str:
    return check_identifier(value, "customer_id")


def _reservation(value: object) -> str:
    return check_identifier(value, "reservation_id")


def _reference(value: str | None) -> str:
    return str(uuid.uuid4()) if value is None else check_text(value, "reference")


def _first_customer(data: dict[str, Any]) -> Customer | None:
    customers = [Customer.from_wire(item) for item in data["customers"]]
    return customers[0] if customers else None


_current: tuple[Any, MeterlyClient] | None = None


def get_client() -> MeterlyClient:
    """Return the client that ``settings.METERLY`` describes.

    The same one as long as the settings stay the same (``override_settings``
    gives another); a forked process gets its own.
    """
    global _current
    from django.utils.module_loading import import_string

    from .conf import meterly_settings

    configuration = (os.getpid(), meterly_settings.as_dict())
    current = _current
    if current is None or current[0] != configuration:
        transport = import_string(meterly_settings.TRANSPORT)
        current = (
            deepcopy(configuration),
            MeterlyClient(transport=transport.from_settings(meterly_settings)),
        )
        _current = current
    return current[1]
