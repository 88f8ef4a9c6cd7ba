"""The wire contract's calls, carried out: checked, performed and rendered.

The in-process transport and the REST API both go through ``perform``, so that
they cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..db import in_utc
from ..errors import MeterlyInvalidRequestError
from ..wire import (
    ROUTES,
    check_amount,
    check_description,
    check_identifier,
    check_key,
    check_text,
    check_ttl,
    check_unit,
)
from . import operations
from .conf import ledger_settings

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Mapping

    from ..transports.base import Statement
    from .models import Workspace
    from .operations import AccountBalance, CustomerRecord, EntryRecord, HoldRecord


@dataclass(frozen=True, slots=True)
class Answer:
    """A success: the *body* of the wire contract, and the *status* it goes with.

    *replayed* tells that an earlier call had done it already.
    """

    body: dict[str, Any]
    status: int = 200
    replayed: bool = False


#: Where a workspace's name will do, and saves a round trip on PostgreSQL.
_BY_NAME = {
    "use_credits",
    "reserve_credits",
    "commit_reservation",
    "release_reservation",
}


def perform(
    workspace: Workspace | str,
    operation: str,
    arguments: Mapping[str, Any],
    idempotency_key: str | None = None,
    statement: Statement | None = None,
) -> Answer:
    """Carry out *operation*, a key of ``ROUTES``, for *workspace*.

    A workspace given by its name is made when first needed.
    *arguments* have their names on the wire, those of the path included. A *statement*
    is for the movements that ``LedgerTransport`` carries one with. Raises
    ``MeterlyApiError``; ``MeterlyInvalidRequestError`` has what is wrong in its
    ``fields``, by name.
    """
    handle, specification = _OPERATIONS[operation]
    checked: dict[str, Any] = {}
    errors: dict[str, list[str]] = {}
    for name in arguments:
        if name not in specification:
            errors[name] = ["There is no such field."]
    for name, field in specification.items():
        if name in arguments:
            try:
                checked[field.name] = field.check(arguments[name], name)
            except ValueError as exc:
                errors[name] = [str(exc)]
        elif field.required:
            errors[name] = ["This field is required."]
    if ROUTES[operation][0] == "POST":
        try:
            key = check_key(idempotency_key, "Idempotency-Key")
        except ValueError as exc:
            errors["Idempotency-Key"] = [str(exc)]
        else:
            checked["idempotency_key"] = key
    if errors:
        raise MeterlyInvalidRequestError(
            " ".join(f"{name}: {texts[0]}" for name, texts in errors.items()),
            details={"fields": errors},
        )
    if statement is not None:
        checked["statement"] = statement
    if not isinstance(workspace, str):
        return handle(workspace.pk, **checked)
    if operation in _BY_NAME:
        return handle(workspace, **checked)
    return handle(operations.ensure_workspace(workspace).pk, **checked)


class _Field(NamedTuple):
    """How an argument is checked, and what ``operations`` call it."""

    name: str
    check: Callable[[Any, str], Any]
    required: bool = True


def _zero_or_more(value: Any, name: str) -> int:
    return check_amount(value, name, minimum=0)


def _ttl(value: Any, name: str) -> int:
    seconds = check_ttl(value, name)
    if seconds > ledger_settings.MAX_TTL:
        raise ValueError(
            f"{name} must be at most {ledger_settings.MAX_TTL} here, not {seconds}."
        )
    return seconds


# What is answered


def _create_customer(workspace_id: int, **arguments: Any) -> Answer:
    record = operations.create_customer(workspace_id, **arguments)
    return Answer(_customer(record), 201, not record.created)


def _find_customer(workspace_id: int, **arguments: Any) -> Answer:
    record = operations.find_customer(workspace_id, **arguments)
    return Answer({"customers": [] if record is None else [_customer(record)]})


def _grant_credits(workspace_id: int, **arguments: Any) -> Answer:
    movement = operations.grant(workspace_id, **arguments)
    body = {
        "grant": {
            "grantId": movement.entry_id,
            "customerId": movement.account.customer_id,
            "creditAmount": movement.amount,
            "creditUnit": movement.account.unit,
            "reference": movement.reference,
            "description": movement.description,
            "createdAt": _time(movement.created_at),
        },
        "balance": _balance(movement.account),
    }
    return Answer(body, 201, movement.replayed)


def _get_balance(workspace_id: int, **arguments: Any) -> Answer:
    return Answer(_balance(operations.default_balance(workspace_id, **arguments)))


def _get_balances(workspace_id: int, customer_id: str) -> Answer:
    accounts = operations.balances(workspace_id, customer_id)
    return Answer(
        {"customerId": customer_id, "balances": [_credits(item) for item in accounts]}
    )


def _add_credits(workspace_id: int, **arguments: Any) -> Answer:
    return _moved(operations.add(workspace_id, **arguments))


def _use_credits(workspace: int | str, **arguments: Any) -> Answer:
    return _moved(operations.use(workspace, **arguments))


def _reserve_credits(workspace: int | str, **arguments: Any) -> Answer:
    return _held(operations.reserve(workspace, **arguments), 201)


def _get_reservation(workspace_id: int, **arguments: Any) -> Answer:
    return _held(operations.get_reservation(workspace_id, **arguments))


def _commit_reservation(workspace: int | str, **arguments: Any) -> Answer:
    return _held(operations.commit(workspace, **arguments))


def _release_reservation(workspace: int | str, **arguments: Any) -> Answer:
    return _held(operations.release(workspace, **arguments))


def _extend_reservation(workspace_id: int, **arguments: Any) -> Answer:
    return _held(operations.extend(workspace_id, **arguments))


def _list_entries(workspace_id: int, **arguments: Any) -> Answer:
    page = operations.entries(workspace_id, **arguments)
    more = len(page) == operations.PAGE_SIZE
    return Answer(
        {
            "entries": [_entry(item) for item in page],
            "nextCursor": page[-1].entry_id if more else None,
        }
    )


def _moved(movement: EntryRecord) -> Answer:
    body = {"entry": _entry(movement), "balance": _balance(movement.account)}
    return Answer(body, 201, movement.replayed)


def _held(reservation: HoldRecord, status: int = 200) -> Answer:
    body = {
        "reservationId": reservation.reservation_id,
        "customerId": reservation.account.customer_id,
        "unit": reservation.account.unit,
        "amount": reservation.amount,
        "status": reservation.status,
        "reference": reservation.reference,
        "expiresAt": _time(reservation.expires_at),
        "balance": _balance(reservation.account),
    }
    return Answer(body, status, reservation.replayed)


def _customer(record: CustomerRecord) -> dict[str, Any]:
    return {
        "customerId": record.customer_id,
        "customerExternalId": record.external_id,
        "creditUnit": record.credit_unit,
        "createdAt": _time(record.created_at),
    }


def _credits(account: AccountBalance) -> dict[str, Any]:
    return {
        "creditUnit": account.unit,
        "balance": account.balance,
        "reserved": account.reserved,
        "available": account.available,
    }


def _balance(account: AccountBalance) -> dict[str, Any]:
    return {"customerId": account.customer_id, **_credits(account)}


def _entry(movement: EntryRecord) -> dict[str, Any]:
    return {
        "entryId": movement.entry_id,
        "kind": movement.kind,
        "amount": movement.amount,
        "balanceDelta": movement.balance_delta,
        "reservedDelta": movement.reserved_delta,
        "balanceAfter": movement.account.balance,
        "reservedAfter": movement.account.reserved,
        "unit": movement.account.unit,
        "reference": movement.reference,
        "createdAt": _time(movement.created_at),
    }


def _time(value: dt.datetime) -> str:
    return in_utc(value).isoformat().replace("+00:00", "Z")


_CUSTOMER_ID = _Field("customer_id", check_identifier)
_RESERVATION_ID = _Field("reservation_id", check_identifier)
_REFERENCE = _Field("reference", check_text)
_UNIT = _Field("unit", check_unit, required=False)
_DESCRIPTION = _Field("description", check_description, required=False)
_CHANGE = {
    "customerId": _CUSTOMER_ID,
    "amount": _Field("amount", check_amount),
    "unit": _UNIT,
    "reference": _REFERENCE,
    "description": _DESCRIPTION,
}

_OPERATIONS: dict[str, tuple[Callable[..., Answer], dict[str, _Field]]] = {
    "create_customer": (
        _create_customer,
        {
            "customerExternalId": _Field("external_id", check_text),
            "creditUnit": _Field("credit_unit", check_unit),
        },
    ),
    "find_customer": (
        _find_customer,
        {"externalId": _Field("external_id", check_text)},
    ),
    "grant_credits": (
        _grant_credits,
        {
            "externalCustomerId": _Field("external_id", check_text),
            "creditAmount": _Field("amount", check_amount),
            "creditUnit": _Field("credit_unit", check_unit),
            "reference": _REFERENCE,
            "description": _DESCRIPTION,
        },
    ),
    "get_balance": (_get_balance, {"customerId": _CUSTOMER_ID}),
    "get_balances": (_get_balances, {"customerId": _CUSTOMER_ID}),
    "add_credits": (_add_credits, _CHANGE),
    "use_credits": (_use_credits, _CHANGE),
    "reserve_credits": (
        _reserve_credits,
        {
            "customerId": _CUSTOMER_ID,
            "amount": _Field("amount", check_amount),
            "unit": _UNIT,
            "reference": _REFERENCE,
            "ttlSeconds": _Field("ttl_seconds", _ttl, required=False),
        },
    ),
    "get_reservation": (_get_reservation, {"reservationId": _RESERVATION_ID}),
    "commit_reservation": (
        _commit_reservation,
        {
            "reservationId": _RESERVATION_ID,
            "amount": _Field("amount", _zero_or_more, required=False),
        },
    ),
    "release_reservation": (
        _release_reservation,
        {"reservationId": _RESERVATION_ID},
    ),
    "extend_reservation": (
        _extend_reservation,
        {
            "reservationId": _RESERVATION_ID,
            "ttlSeconds": _Field("ttl_seconds", _ttl),
        },
    ),
    "list_entries": (
        _list_entries,
        {
            "customerId": _CUSTOMER_ID,
            "unit": _UNIT,
            "cursor": _Field("before", check_identifier, required=False),
        },
    ),
}
