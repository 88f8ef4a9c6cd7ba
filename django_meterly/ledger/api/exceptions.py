"""Exceptions as JSON: every error of a view has the form of the wire contract."""

from __future__ import annotations

import logging
from typing import Any

from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.http import Http404
from rest_framework import exceptions
from rest_framework.response import Response

from ...db import is_outage
from ...errors import MeterlyApiError, MeterlyInvalidRequestError, api_error

logger = logging.getLogger(__name__)

# Any other exception of DRF keeps its status, with the code "invalid_request": for
# example, 405 for a method that the contract does not have.
_CODES: dict[type[Exception], str] = {
    exceptions.NotAuthenticated: "unauthenticated",
    exceptions.AuthenticationFailed: "unauthenticated",
    exceptions.PermissionDenied: "forbidden",
    exceptions.NotFound: "not_found",
    exceptions.Throttled: "rate_limited",
}


def exception_handler(exc: Exception, context: dict[str, Any]) -> Response:
    """Return the wire contract's answer to any exception of a view."""
    error = _as_api_error(exc)
    if error.status >= 500:
        logger.error(
            "The ledger could not serve a request.",
            exc_info=exc,
            extra={"request_id": context["view"].request_id},
        )
    headers = {}
    if challenge := getattr(exc, "auth_header", None):
        headers["WWW-Authenticate"] = challenge
    if wait := getattr(exc, "wait", None):
        headers["Retry-After"] = str(int(wait))
    return Response(
        {
            "error": {"code": error.code, "message": error.message, **error.details},
            "requestId": context["view"].request_id,
        },
        status=error.status,
        headers=headers,
    )


def wrong_field(name: str, message: str) -> MeterlyInvalidRequestError:
    """Return the contract's 400 that names the field."""
    return MeterlyInvalidRequestError(
        f"{name}: {message}", details={"fields": {name: [message]}}
    )


def _as_api_error(exc: Exception) -> MeterlyApiError:
    if isinstance(exc, MeterlyApiError):
        return exc
    if isinstance(exc, Http404):
        exc = exceptions.NotFound()
    elif isinstance(exc, PermissionDenied):
        exc = exceptions.PermissionDenied()
    elif isinstance(exc, SuspiciousOperation):
        # For example, a body above DATA_UPLOAD_MAX_MEMORY_SIZE.
        exc = exceptions.ParseError("The request is not acceptable.")
    if isinstance(exc, exceptions.APIException):
        code = _CODES.get(type(exc), "invalid_request")
        return api_error(exc.status_code, code, str(exc.detail))
    if is_outage(exc):
        return api_error(503, "unavailable", "The ledger's database is unavailable.")
    # The exception's text may name tables or hosts, so it is only logged.
    return api_error(500, "internal_error", "The ledger failed.")
