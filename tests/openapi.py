"""Generate the ledger's OpenAPI document from its code.

::

    python -m tests.openapi

writes ``django_meterly/ledger/api/openapi.json``. drf-spectacular walks the URLs;
parameters and bodies are those of ``ledger.service``, which checks them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()

from drf_spectacular.generators import EndpointEnumerator, SchemaGenerator
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.settings import patched_settings

import django_meterly
from django_meterly import wire
from django_meterly.errors import _BY_CODE
from django_meterly.ledger import service, urls
from django_meterly.ledger.authentication import SCOPES
from django_meterly.ledger.models import Entry, Hold
from django_meterly.wire import ROUTES

PATH = Path(django_meterly.__file__).parent / "ledger" / "api" / "openapi.json"

# Every check of an argument, as a JSON schema. A field with another one fails.
CHECKS: dict[Any, dict[str, Any]] = {
    wire.check_amount: {"type": "integer", "minimum": 1, "maximum": wire.MAX_AMOUNT},
    service._zero_or_more: {
        "type": "integer",
        "minimum": 0,
        "maximum": wire.MAX_AMOUNT,
    },
    service._ttl: {
        "type": "integer",
        "minimum": 1,
        "maximum": wire.MAX_TTL_SECONDS,
        "description": "Seconds. A server may allow fewer.",
    },
    wire.check_identifier: {
        "type": "string",
        "pattern": f"^{wire._IDENTIFIER.pattern}$",
    },
    wire.check_text: {
        "type": "string",
        "pattern": f"^{wire._TEXT.pattern}$",
        "maxLength": wire.MAX_TEXT_LENGTH,
    },
    wire.check_unit: {"type": "string", "pattern": f"^{wire._UNIT.pattern}$"},
    wire.check_description: {
        "type": "string",
        "pattern": "^[^\\u0000]*$",
        "maxLength": wire.MAX_DESCRIPTION_LENGTH,
    },
}

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_TIME = {"type": "string", "format": "date-time"}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(name)}


SCHEMAS: dict[str, Any] = {
    "Customer": _object(
        customerId=_TEXT, customerExternalId=_TEXT, creditUnit=_TEXT, createdAt=_TIME
    ),
    "Customers": _object(customers=_list("Customer")),
    "Account": _object(
        creditUnit=_TEXT, balance=_WHOLE, reserved=_WHOLE, available=_WHOLE
    ),
    "Balance": _object(
        customerId=_TEXT,
        creditUnit=_TEXT,
        balance=_WHOLE,
        reserved=_WHOLE,
        available=_WHOLE,
    ),
    "Balances": _object(customerId=_TEXT, balances=_list("Account")),
    "Grant": _object(
        grantId=_TEXT,
        customerId=_TEXT,
        creditAmount=_WHOLE,
        creditUnit=_TEXT,
        reference=_TEXT,
        description=_TEXT,
        createdAt=_TIME,
    ),
    "Granted": _object(grant=_ref("Grant"), balance=_ref("Balance")),
    "Entry": _object(
        entryId=_TEXT,
        kind={"type": "string", "enum": Entry.Kind.values},
        amount=_WHOLE,
        balanceDelta=_WHOLE,
        reservedDelta=_WHOLE,
        balanceAfter=_WHOLE,
        reservedAfter=_WHOLE,
        unit=_TEXT,
        reference=_TEXT,
        createdAt=_TIME,
    ),
    "Entries": _object(entries=_list("Entry"), nextCursor={"type": ["string", "null"]}),
    "Movement": _object(entry=_ref("Entry"), balance=_ref("Balance")),
    "Reservation": _object(
        reservationId=_TEXT,
        customerId=_TEXT,
        unit=_TEXT,
        amount=_WHOLE,
        status={"type": "string", "enum": Hold.Status.values},
        reference=_TEXT,
        expiresAt=_TIME,
        balance=_ref("Balance"),
    ),
    "Health": _object(status={"const": "ok"}),
}

# operation -> (summary, status of a success, its schema, codes of its refusals).
_CLOSED = ["reservation_committed", "reservation_expired", "reservation_released"]
OPERATIONS: dict[str, tuple[str, int, str, list[str]]] = {
    "create_customer": (
        "Register a customer, once per external id.",
        201,
        "Customer",
        ["customer_exists"],
    ),
    "find_customer": ("Find a customer by your own id.", 200, "Customers", []),
    "grant_credits": (
        "Grant credits, once per reference; a new customer is created.",
        201,
        "Granted",
        ["reference_conflict"],
    ),
    "get_balance": ("The customer's default account.", 200, "Balance", ["not_found"]),
    "get_balances": ("All accounts of the customer.", 200, "Balances", ["not_found"]),
    "add_credits": (
        "Add credits, once per reference.",
        201,
        "Movement",
        ["not_found", "reference_conflict"],
    ),
    "use_credits": (
        "Use credits at once, without a hold.",
        201,
        "Movement",
        ["insufficient_credits", "not_found"],
    ),
    "reserve_credits": (
        "Hold credits for work in progress.",
        201,
        "Reservation",
        ["insufficient_credits", "not_found"],
    ),
    "get_reservation": (
        "A reservation as it is now.",
        200,
        "Reservation",
        ["not_found"],
    ),
    "commit_reservation": (
        "Charge a reservation: all of it, or a smaller amount.",
        200,
        "Reservation",
        ["not_found", "reservation_expired", "reservation_released"],
    ),
    "release_reservation": (
        "Give the held credits back.",
        200,
        "Reservation",
        ["not_found", "reservation_committed", "reservation_expired"],
    ),
    "extend_reservation": (
        "Let a live hold last that many seconds from now.",
        200,
        "Reservation",
        ["not_found", *_CLOSED],
    ),
    "list_entries": (
        "The lines of the ledger, newest first.",
        200,
        "Entries",
        ["not_found"],
    ),
    "health": ("Whether the ledger and its database answer.", 200, "Health", []),
}

_DETAILS: dict[str, dict[str, Any]] = {
    "invalid_request": {
        "fields": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": _TEXT},
        }
    },
    "insufficient_credits": {
        "required": _WHOLE,
        "available": _WHOLE,
        "reserved": _WHOLE,
        "unit": _TEXT,
    },
    "customer_exists": {"customerId": _TEXT},
}
_HEADERS = {
    "X-Request-Id": {
        "description": "The caller's, if it sent a sane one.",
        "required": True,
        "schema": _TEXT,
    },
    "Idempotency-Replayed": {
        "description": "An earlier call with this key had done it already.",
        "schema": {"const": "true"},
    },
    "Retry-After": {
        "description": "Seconds.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
    },
    "WWW-Authenticate": {"required": True, "schema": _TEXT},
    "Cache-Control": {"required": True, "schema": {"const": "no-store, private"}},
}
_PARAMETERS = {
    "Idempotency-Key": {
        "name": "Idempotency-Key",
        "in": "header",
        "required": True,
        "description": "The retry-safe name of this call: the same key with the "
        "same method, path and body never moves credits twice.",
        "schema": {
            "type": "string",
            "pattern": f"^{wire._VISIBLE.pattern}$",
            "maxLength": wire.MAX_KEY_LENGTH,
        },
    },
    "X-Request-Id": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Comes back with the answer if it is 1 to 64 letters, digits, "
        "'.', '_' or '-'; any other is replaced.",
        "schema": _TEXT,
    },
}
_SECURITY_SCHEMES = {
    "bearerKey": {"type": "http", "scheme": "bearer", "bearerFormat": "mk_live_..."},
    "hmacKey": {
        "type": "http",
        "scheme": "METERLY-HMAC-SHA256",
        "description": "keyId=<key id>, timestamp=<unix seconds>, signature=<hex of "
        'HMAC-SHA256>. Signed are, each on a line: "v1", the timestamp, the method, '
        "the path with its query as sent, the host in lower case without a default "
        "port, the idempotency key or nothing, and the hex SHA-256 of the body.",
    },
}


def _refusals(name: str) -> dict[int, list[str]]:
    """Return the codes of an operation's refusals, by status."""
    refusals: dict[int, list[str]] = {500: ["internal_error"], 503: ["unavailable"]}
    codes = OPERATIONS[name][3]
    if name in ROUTES:
        codes = ["invalid_request", "unauthenticated", "rate_limited", *codes]
        if ROUTES[name][0] == "POST":
            codes = ["forbidden", "idempotency_mismatch", *codes]
            # The same code for another media type.
            refusals[415] = ["invalid_request"]
    for code in codes:
        refusals.setdefault(_BY_CODE[code].status, []).append(code)
    if name in ROUTES and "{" in ROUTES[name][1]:
        # A path with a text that cannot be an id is not a path of the contract.
        refusals[404].append("unknown_path")
    return {status: sorted(refusals[status]) for status in sorted(refusals)}


def _name(codes: list[str]) -> str:
    return "_or_".join(codes)


def _error(status: int, codes: list[str]) -> dict[str, Any]:
    properties: dict[str, Any] = {"code": {"enum": codes}, "message": _TEXT}
    for code in codes:
        properties.update(_DETAILS.get(code, {}))
    error = {**_object(**properties), "required": ["code", "message"]}
    headers = {401: ["WWW-Authenticate"], 429: ["Retry-After"]}.get(status, [])
    return _answer(", ".join(codes), _object(error=error, requestId=_TEXT), headers)


def _answer(
    description: str, schema: dict[str, Any], headers: list[str]
) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {
            name: {"$ref": f"#/components/headers/{name}"}
            for name in ["X-Request-Id", "Cache-Control", *headers]
        },
        "content": {"application/json": {"schema": schema}},
    }


class OperationSchema(AutoSchema):
    def get_operation(
        self, path: str, path_regex: str, path_prefix: str, method: str, registry: Any
    ) -> dict[str, Any]:
        name = self.view.operations[method]
        summary, success, schema, _ = OPERATIONS[name]
        writes, public = method == "POST", not self.view.authentication_classes
        operation: dict[str, Any] = {
            "operationId": name,
            "summary": summary,
            "parameters": [{"$ref": "#/components/parameters/X-Request-Id"}],
            "responses": {
                str(success): _answer(
                    "Done.", _ref(schema), ["Idempotency-Replayed"] if writes else []
                ),
                **{
                    str(status): {"$ref": f"#/components/responses/{_name(codes)}"}
                    for status, codes in _refusals(name).items()
                },
            },
            "security": [],
        }
        if not public:
            scope = SCOPES[name].value
            operation["description"] = f'Needs a key with the scope "{scope}".'
            # OpenAPI 3.1 lists roles where OAuth has scopes.
            operation["security"] = [{"bearerKey": [scope]}, {"hmacKey": [scope]}]
        if writes:
            operation["parameters"].append(
                {"$ref": "#/components/parameters/Idempotency-Key"}
            )
        body = {}
        required = []
        for field, (_, check, is_required) in self._fields(name).items():
            if f"{{{field}}}" in path:
                operation["parameters"].append(_parameter(field, "path", check, True))
            elif not writes:
                operation["parameters"].append(
                    _parameter(field, "query", check, is_required)
                )
            else:
                body[field] = CHECKS[check]
                if is_required:
                    required.append(field)
        if writes:
            operation["requestBody"] = {
                "required": bool(required),
                "content": {
                    "application/json": {
                        "schema": {**_object(**body), "required": required}
                    }
                },
            }
        return operation

    def _fields(self, name: str) -> dict[str, Any]:
        return {} if name == "health" else service._OPERATIONS[name].fields


def _parameter(name: str, place: str, check: Any, required: bool) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": CHECKS[check]}


class _Endpoints(EndpointEnumerator):
    def get_allowed_methods(self, callback: Any) -> list[str]:
        return list(callback.view_initkwargs.get("operations", callback.cls.operations))


class _Generator(SchemaGenerator):
    endpoint_inspector_cls = _Endpoints

    def create_view(self, callback: Any, method: str, request: Any = None) -> Any:
        view = super().create_view(callback, method, request)
        self._set_schema_to_view(view, OperationSchema())
        return view


def document() -> dict[str, Any]:
    """Return the OpenAPI document of the ledger's REST API."""
    settings = {
        "OAS_VERSION": "3.1.0",
        "TITLE": "Meterly ledger",
        # Of the contract, not of the package.
        "VERSION": "1",
        "DESCRIPTION": "Prepaid usage credits. Amounts are whole numbers of credits.",
        "SERVERS": [{"url": ".", "description": "Where this document is served."}],
        "SORT_OPERATIONS": False,
        "POSTPROCESSING_HOOKS": [],
        "APPEND_COMPONENTS": {
            "schemas": SCHEMAS,
            "headers": _HEADERS,
            "responses": {
                _name(codes): _error(status, codes)
                for name in OPERATIONS
                for status, codes in _refusals(name).items()
            },
            "parameters": _PARAMETERS,
            "securitySchemes": _SECURITY_SCHEMES,
        },
    }
    with patched_settings(settings):
        schema: dict[str, Any] = _Generator(patterns=urls.urlpatterns).get_schema(
            public=True
        )
    return schema


def text() -> str:
    """Return the document as it is written to its file."""
    return json.dumps(document(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")
