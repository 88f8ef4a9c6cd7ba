"""The ledger's answers, checked against the call.

Every answer of every transport comes through here. A reader gets the answer's body and
the arguments of the call, both with their names on the wire, and returns a type:

- A field must have its type and keep the limits of the wire contract. For example, an
  ``amount`` of ``true``, ``"5"`` or ``-5`` is invalid.
- A field that the call named must have the same value. For example, the reservation of
  another customer does not answer a reserve.
- Only the fields of the vendor's guide are required: ``customerId`` of a customer and
  of a grant, ``creditUnit`` and ``available`` of a balance, ``reservationId`` of a
  reserve. Any other field may be absent or null. Unknown fields are ignored.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import MeterlyInsufficientCreditsError, MeterlyUnknownOutcomeError
from .types import (
    Balance,
    Balances,
    CustomerResult,
    EntryPage,
    GrantedCredits,
    GrantResult,
    LedgerEntry,
    MovementResult,
    ReservationResult,
)
from .wire import (
    MAX_AMOUNT,
    check_amount,
    check_description,
    check_identifier,
    check_text,
    check_unit,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .errors import MeterlyError
    from .transports.base import Call, Transport

T = TypeVar("T")

_STATUSES = ("reserved", "committed", "released", "expired")
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:Z|[+-]00:00)"
)


def read(
    reader: Callable[[dict[str, Any], Mapping[str, Any]], T],
    call: Call,
    body: object,
    transport: Transport,
) -> T:
    """Return the answer to *call* as *reader* reads it.

    Raises ``MeterlyUnknownOutcomeError`` if the answer is invalid, because nobody knows
    what the ledger has done then. The message has the field's name and its value.
    """
    try:
        return reader(_object(body, "The body"), call.arguments)
    except ValueError as exc:
        error = MeterlyUnknownOutcomeError(
            f"The answer to {transport.name_of(call)} is invalid: {exc}"
            f"{transport.advice}"
        )
    # Outside the except clause: its context would keep the whole answer alive.
    raise error


def complete_refusal(call: Call, error: MeterlyError) -> None:
    """Make the details of a 402 agree with the amount and unit of *call*.

    For example, a refusal of 5 credits requires 5, whatever the ledger says, and an
    ``available`` of 5 or more is dropped.
    """
    if not isinstance(error, MeterlyInsufficientCreditsError):
        return
    for name, argument in (("required", "amount"), ("unit", "unit")):
        if argument in call.arguments:
            error.details[name] = call.arguments[argument]
    if error.available >= error.required:
        error.details.pop("available", None)


# The readers


def customer(body: dict[str, Any], asked: Mapping[str, Any]) -> CustomerResult:
    """Read the answer to ``create_customer``."""
    return _customer(body, asked["customerExternalId"], asked["creditUnit"])


def found_customer(
    body: dict[str, Any], asked: Mapping[str, Any]
) -> CustomerResult | None:
    """Read the answer to ``find_customer``."""
    customers = _objects(body, "customers")
    if len(customers) > 1:
        raise ValueError(f"customers has {len(customers)} items, not one or none.")
    return _customer(customers[0], asked["externalId"], None) if customers else None


def grant(body: dict[str, Any], asked: Mapping[str, Any]) -> GrantResult:
    """Read the answer to ``grant_credits``."""
    fields = _object(body.get("grant"), "grant")
    unit = asked["creditUnit"]
    granted = GrantedCredits(
        grant_id=_optional(fields, "grantId", check_identifier),
        customer_id=_needed(fields, "customerId", check_identifier),
        credit_amount=_optional(
            fields, "creditAmount", check_amount, asked["creditAmount"]
        ),
        credit_unit=_optional(fields, "creditUnit", check_unit, unit),
        reference=_optional(fields, "reference", check_text, asked["reference"]),
        description=_optional(fields, "description", check_description),
        created_at=_optional(fields, "createdAt", _time),
    )
    return GrantResult(granted, _balance_in(body, granted.customer_id, unit))


def balance(body: dict[str, Any], asked: Mapping[str, Any]) -> Balance:
    """Read the answer to ``get_balance``."""
    return _balance(body, asked["customerId"], None)


def balances(body: dict[str, Any], asked: Mapping[str, Any]) -> Balances:
    """Read the answer to ``get_balances``."""
    customer_id = asked["customerId"]
    _optional(body, "customerId", check_identifier, customer_id)
    return Balances(
        customer_id,
        tuple(_balance(item, customer_id, None) for item in _objects(body, "balances")),
    )


def entries(body: dict[str, Any], asked: Mapping[str, Any]) -> EntryPage:
    """Read the answer to ``list_entries``."""
    return EntryPage(
        tuple(
            _entry(item, {"unit": asked.get("unit")})
            for item in _objects(body, "entries")
        ),
        _optional(body, "nextCursor", check_text),
    )


def movement(body: dict[str, Any], asked: Mapping[str, Any]) -> MovementResult:
    """Read the answer to ``add_credits`` and to ``use_credits``."""
    fields = body.get("entry")
    entry = None if fields is None else _entry(_object(fields, "entry"), asked)
    unit = asked.get("unit") or (entry.unit if entry else None)
    return MovementResult(entry, _balance_in(body, asked["customerId"], unit))


def reserved(body: dict[str, Any], asked: Mapping[str, Any]) -> ReservationResult:
    """Read the answer to ``reserve_credits``. A replay has the present status."""
    return _reservation(body, asked, amount=asked["amount"])


def reservation(body: dict[str, Any], asked: Mapping[str, Any]) -> ReservationResult:
    """Read the answer to ``get_reservation`` and to ``extend_reservation``.

    A replayed ``extend_reservation`` has the present status.
    """
    return _reservation(body, asked)


def committed(body: dict[str, Any], asked: Mapping[str, Any]) -> ReservationResult:
    """Read the answer to ``commit_reservation``."""
    answer = _reservation(body, asked, status="committed")
    charged = asked.get("amount", 0)
    if answer.amount is not None and answer.amount < charged:
        raise ValueError(f"amount is {answer.amount}, but {charged} were charged.")
    return answer


def released(body: dict[str, Any], asked: Mapping[str, Any]) -> ReservationResult:
    """Read the answer to ``release_reservation``."""
    return _reservation(body, asked, status="released")


# What they share


def _customer(
    fields: dict[str, Any], external_id: str, unit: str | None
) -> CustomerResult:
    return CustomerResult(
        customer_id=_needed(fields, "customerId", check_identifier),
        customer_external_id=_optional(
            fields, "customerExternalId", check_text, external_id
        ),
        credit_unit=_optional(fields, "creditUnit", check_unit, unit),
        created_at=_optional(fields, "createdAt", _time),
    )


def _balance(
    fields: dict[str, Any], customer_id: str | None, unit: str | None
) -> Balance:
    _optional(fields, "customerId", check_identifier, customer_id)
    return Balance(
        credit_unit=_needed(fields, "creditUnit", check_unit, unit),
        balance=_optional(fields, "balance", _zero_or_more),
        reserved=_optional(fields, "reserved", _zero_or_more),
        available=_needed(fields, "available", _zero_or_more),
    )


def _balance_in(
    body: dict[str, Any], customer_id: str | None, unit: str | None
) -> Balance | None:
    fields = body.get("balance")
    if fields is None:
        return None
    try:
        return _balance(_object(fields, "It"), customer_id, unit)
    except ValueError as exc:
        raise ValueError(f"balance: {exc}") from None


def _entry(fields: dict[str, Any], asked: Mapping[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        entry_id=_optional(fields, "entryId", check_identifier),
        kind=_optional(fields, "kind", check_unit),
        amount=_optional(fields, "amount", _zero_or_more, asked.get("amount")),
        balance_delta=_optional(fields, "balanceDelta", _delta),
        reserved_delta=_optional(fields, "reservedDelta", _delta),
        balance_after=_optional(fields, "balanceAfter", _zero_or_more),
        reserved_after=_optional(fields, "reservedAfter", _zero_or_more),
        unit=_optional(fields, "unit", check_unit, asked.get("unit")),
        reference=_optional(fields, "reference", check_text, asked.get("reference")),
        created_at=_optional(fields, "createdAt", _time),
    )


def _reservation(
    body: dict[str, Any],
    asked: Mapping[str, Any],
    *,
    amount: int | None = None,
    status: str | None = None,
) -> ReservationResult:
    reservation_id = asked.get("reservationId")
    if reservation_id is None:
        reservation_id = _needed(body, "reservationId", check_identifier)
    else:
        _optional(body, "reservationId", check_identifier, reservation_id)
    customer_id = _optional(
        body, "customerId", check_identifier, asked.get("customerId")
    )
    unit = _optional(body, "unit", check_unit, asked.get("unit"))
    return ReservationResult(
        reservation_id=reservation_id,
        customer_id=customer_id,
        unit=unit,
        amount=_optional(body, "amount", check_amount, amount),
        status=_optional(body, "status", _status, status),
        reference=_optional(body, "reference", check_text, asked.get("reference")),
        expires_at=_optional(body, "expiresAt", _time),
        balance=_balance_in(
            body, asked.get("customerId") or customer_id, asked.get("unit") or unit
        ),
        replayed=body.get("replayed") is True,
    )


def _optional(
    fields: dict[str, Any],
    name: str,
    check: Callable[[Any, str], T],
    asked: T | None = None,
) -> T | None:
    """Return a field, or ``None`` if the answer has none.

    Raises ``ValueError`` if *check* refuses the value, or if it differs from *asked*.
    """
    value = fields.get(name)
    if value is None:
        return None
    if asked is None:
        return check(value, name)
    # The call's own checks have passed what was asked.
    if value is asked or (type(value) is type(asked) and value == asked):
        return asked
    if check(value, name) != asked:
        raise ValueError(f"{name} is {shown(value)}, not {shown(asked)}.")
    return asked


def _needed(
    fields: dict[str, Any],
    name: str,
    check: Callable[[Any, str], T],
    asked: T | None = None,
) -> T:
    value = _optional(fields, name, check, asked)
    if value is None:
        raise ValueError(f"{name} is missing.")
    return value


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {shown(value)}.")
    return value


def _objects(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {shown(value)}.")
    return [_object(item, f"An item of {name}") for item in value]


def _zero_or_more(value: object, name: str) -> int:
    return check_amount(value, name, minimum=0)


def _delta(value: object, name: str) -> int:
    return check_amount(value, name, minimum=-MAX_AMOUNT)


def _status(value: object, name: str) -> str:
    if not isinstance(value, str) or value not in _STATUSES:
        raise ValueError(f"{name} must be one of {_STATUSES}, not {shown(value)}.")
    return value


def _time(value: object, name: str) -> dt.datetime:
    if isinstance(value, str) and _TIME.fullmatch(value):
        try:
            return dt.datetime.fromisoformat(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be a UTC time of RFC 3339, not {shown(value)}.")
