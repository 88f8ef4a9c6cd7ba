"""The calls of the wire contract: check the arguments, carry out, render the answer.

``transport`` (in process) and ``api.views`` (REST) both go through ``perform``, so that
a call answers alike over both. For example::

    perform("default", "use_credits", {"customerId": "cus_1", ...}, "key-1")

checks the arguments, calls ``spending.use(...)`` and returns the JSON of its result.

To add an operation, go through these files in this order. Take ``extend_reservation``
as an example of one that moves no credits, ``use_credits`` of one that does:

1. ``ROUTES`` in ``django_meterly/wire.py``: its method and path.
2. ``django_meterly/client.py``: a method of ``MeterlyClient`` and its async twin. The
   result is a class in ``types.py``, and ``answers.py`` reads it from the JSON.
3. The function in ``customers``, ``grants`` or ``spending``. It returns a class of
   ``results``. Make its ``Request`` or fingerprint of every argument. A new movement
   in ``spending`` is written twice: in ``portable`` and in ``sql/postgresql.sql``.
   If it moves credits in a new way, it also needs a kind and its shape in ``models``
   (``Entry.Kind``, ``SHAPES``, with a migration) and a line in ``verification``
   (``_ASKED``). A new code needs a line in ``movements`` and one in ``refusals``.
4. Here: an entry in ``_OPERATIONS`` with its fields and the function that renders it.
   ``urls`` and ``api.views`` follow ``ROUTES`` by themselves.
5. ``authentication.SCOPES``: which keys may call it.
6. ``tests/openapi.py``: its summary, its schema and its refusals. Then run
   ``python -m tests.openapi``, which writes ``api/openapi.json``.
7. ``tests/contract/test_contract.py``: a test of the client. It runs in process and
   over a socket. Then the pages in ``docs/`` and a line in ``CHANGELOG.md``.
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
from . import customers, grants, spending
from .conf import ledger_settings

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Mapping

    from ..transports.base import Statement
    from .models import Workspace
    from .results import AccountBalance, CustomerRecord, EntryRecord, HoldRecord


@dataclass(frozen=True, slots=True)
class Answer:
    """A success: the JSON *body* of the wire contract, and the HTTP *status*.

    *replayed* tells that an earlier call with the key had done it already.
    """

    body: dict[str, Any]
    status: int = 200
    replayed: bool = False


def perform(
    workspace: Workspace | str,
    operation: str,
    arguments: Mapping[str, Any],
    idempotency_key: str | None = None,
    statement: Statement | None = None,
) -> Answer:
    """Carry out *operation*, a key of ``ROUTES``, for *workspace*.

    A workspace given by its name is created when it is first needed.
    *arguments* have their names on the wire, those of the path included. A *statement*
    is carried out with the movement: only ``LedgerTransport`` has one. Raises
    ``MeterlyApiError``; a ``MeterlyInvalidRequestError`` names each wrong field in its
    ``fields``.
    """
    spec = _OPERATIONS[operation]
    changes = ROUTES[operation][0] == "POST"
    checked = _checked(spec.fields, arguments, idempotency_key, needs_key=changes)
    if statement is not None:
        checked["statement"] = statement
    owner: int | str
    if not isinstance(workspace, str):
        owner = workspace.pk
    elif spec.by_name:
        owner = workspace
    else:
        owner = customers.ensure_workspace(workspace).pk
    result = spec.function(owner, **checked)
    return Answer(spec.render(result), spec.status, changes and result.replayed)


def _checked(
    fields: Mapping[str, _Field],
    arguments: Mapping[str, Any],
    idempotency_key: str | None,
    *,
    needs_key: bool,
) -> dict[str, Any]:
    """Return the arguments for the operation's function, under its names for them."""
    checked: dict[str, Any] = {}
    errors: dict[str, list[str]] = {}
    for name in arguments:
        if name not in fields:
            errors[name] = ["There is no such field."]
    for name, field in fields.items():
        if name in arguments:
            try:
                checked[field.name] = field.check(arguments[name], name)
            except ValueError as exc:
                errors[name] = [str(exc)]
        elif field.required:
            errors[name] = ["This field is required."]
    if needs_key:
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
    return checked


class _Operation(NamedTuple):
    """How a call is checked, carried out and rendered."""

    fields: dict[str, _Field]
    function: Callable[..., Any]
    render: Callable[[Any], dict[str, Any]]
    status: int = 200
    #: Whether *function* takes a workspace by its name: that saves PostgreSQL a round
    #: trip.
    by_name: bool = False


class _Field(NamedTuple):
    """How an argument is checked, and its *name* in the operation's function."""

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


# Results as JSON


def _customer(record: CustomerRecord) -> dict[str, Any]:
    return {
        "customerId": record.customer_id,
        "customerExternalId": record.external_id,
        "creditUnit": record.credit_unit,
        "createdAt": _time(record.created_at),
    }


def _found(record: CustomerRecord | None) -> dict[str, Any]:
    return {"customers": [] if record is None else [_customer(record)]}


def _credits(account: AccountBalance) -> dict[str, Any]:
    return {
        "creditUnit": account.unit,
        "balance": account.balance,
        "reserved": account.reserved,
        "available": account.available,
    }


def _balance(account: AccountBalance) -> dict[str, Any]:
    return {"customerId": account.customer_id, **_credits(account)}


def _balances(found: tuple[str, list[AccountBalance]]) -> dict[str, Any]:
    customer_id, accounts = found
    return {
        "customerId": customer_id,
        "balances": [_credits(account) for account in accounts],
    }


def _granted(movement: EntryRecord) -> dict[str, Any]:
    return {
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


def _moved(movement: EntryRecord) -> dict[str, Any]:
    return {"entry": _entry(movement), "balance": _balance(movement.account)}


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


def _entries(page: list[EntryRecord]) -> dict[str, Any]:
    more = len(page) == customers.PAGE_SIZE
    return {
        "entries": [_entry(item) for item in page],
        "nextCursor": page[-1].entry_id if more else None,
    }


def _reservation(hold: HoldRecord) -> dict[str, Any]:
    return {
        "reservationId": hold.reservation_id,
        "customerId": hold.account.customer_id,
        "unit": hold.account.unit,
        "amount": hold.amount,
        "status": hold.status,
        "reference": hold.reference,
        "expiresAt": _time(hold.expires_at),
        "balance": _balance(hold.account),
    }


def _time(value: dt.datetime) -> str:
    return in_utc(value).isoformat().replace("+00:00", "Z")


def _all_balances(
    workspace_id: int, customer_id: str
) -> tuple[str, list[AccountBalance]]:
    # The JSON names the customer even when the list is empty.
    return customer_id, customers.balances(workspace_id, customer_id)


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

_OPERATIONS = {
    "create_customer": _Operation(
        {
            "customerExternalId": _Field("external_id", check_text),
            "creditUnit": _Field("credit_unit", check_unit),
        },
        customers.create_customer,
        _customer,
        status=201,
    ),
    "find_customer": _Operation(
        {"externalId": _Field("external_id", check_text)},
        customers.find_customer,
        _found,
    ),
    "grant_credits": _Operation(
        {
            "externalCustomerId": _Field("external_id", check_text),
            "creditAmount": _Field("amount", check_amount),
            "creditUnit": _Field("credit_unit", check_unit),
            "reference": _REFERENCE,
            "description": _DESCRIPTION,
        },
        grants.grant,
        _granted,
        status=201,
    ),
    "get_balance": _Operation(
        {"customerId": _CUSTOMER_ID}, customers.default_balance, _balance
    ),
    "get_balances": _Operation({"customerId": _CUSTOMER_ID}, _all_balances, _balances),
    "add_credits": _Operation(_CHANGE, grants.add, _moved, status=201),
    "use_credits": _Operation(_CHANGE, spending.use, _moved, status=201, by_name=True),
    "reserve_credits": _Operation(
        {
            "customerId": _CUSTOMER_ID,
            "amount": _Field("amount", check_amount),
            "unit": _UNIT,
            "reference": _REFERENCE,
            "ttlSeconds": _Field("ttl_seconds", _ttl, required=False),
        },
        spending.reserve,
        _reservation,
        status=201,
        by_name=True,
    ),
    "get_reservation": _Operation(
        {"reservationId": _RESERVATION_ID}, spending.get_reservation, _reservation
    ),
    "commit_reservation": _Operation(
        {
            "reservationId": _RESERVATION_ID,
            "amount": _Field("amount", _zero_or_more, required=False),
        },
        spending.commit,
        _reservation,
        by_name=True,
    ),
    "release_reservation": _Operation(
        {"reservationId": _RESERVATION_ID},
        spending.release,
        _reservation,
        by_name=True,
    ),
    "extend_reservation": _Operation(
        {
            "reservationId": _RESERVATION_ID,
            "ttlSeconds": _Field("ttl_seconds", _ttl),
        },
        spending.extend,
        _reservation,
    ),
    "list_entries": _Operation(
        {
            "customerId": _CUSTOMER_ID,
            "unit": _UNIT,
            "cursor": _Field("before", check_identifier, required=False),
        },
        customers.entries,
        _entries,
    ),
}
