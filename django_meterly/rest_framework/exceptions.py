"""The guard's refusals in Django REST framework's own format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_framework import status
from rest_framework.exceptions import APIException, NotAuthenticated

from .. import responses
from ..resolvers import request_user

if TYPE_CHECKING:
    from rest_framework.response import Response

__all__ = [
    "Debt",
    "Duplicate",
    "GuardException",
    "InsufficientCredits",
    "InvalidKey",
    "KeyMismatch",
    "NoCustomer",
    "NotAuthenticated",
    "Unavailable",
    "counterpart",
    "exception_handler",
    "nobody_pays",
]


class GuardException(APIException):
    """A refusal. Its *detail* is a dict: ``detail``, ``code``, and what belongs to it.

    Numbers stay numbers, and ``None`` stays ``null``.
    """

    detail: Any
    #: Seconds for ``Retry-After``, in DRF's word; ``None`` for no such header.
    wait: int | None = None

    def __init__(self, detail: str, **extra: Any) -> None:
        self.message = detail
        self.detail = {"detail": detail, "code": self.default_code, **extra}

    def __str__(self) -> str:
        return self.message

    def get_codes(self) -> str:
        return self.default_code

    def get_full_details(self) -> dict[str, Any]:
        return {**self.detail, "message": self.message}


class InsufficientCredits(GuardException):
    status_code = status.HTTP_402_PAYMENT_REQUIRED
    default_code = "insufficient_credits"


class Debt(InsufficientCredits):
    default_code = "debt"


class NoCustomer(GuardException):
    status_code = status.HTTP_403_FORBIDDEN
    default_code = "no_customer"


class Unavailable(GuardException):
    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "unavailable"


class Duplicate(GuardException):
    status_code = status.HTTP_409_CONFLICT
    default_code = "duplicate"


class InvalidKey(GuardException):
    status_code = status.HTTP_400_BAD_REQUEST
    default_code = "invalid_idempotency_key"


class KeyMismatch(GuardException):
    status_code = status.HTTP_422_UNPROCESSABLE_ENTITY
    default_code = "idempotency_mismatch"


def counterpart(exc: Exception) -> GuardException:
    """Return the DRF exception for what the guard raises and an edge renders.

    Raises ``TypeError`` for any other exception.
    """
    problem = responses.problem(exc)
    answer = _CLASSES[problem.code](problem.detail, **problem.extra)
    answer.wait = problem.retry_after
    return answer


def nobody_pays(request: Any) -> APIException:
    """Return the exception for a *request* for whose user no customer is known."""
    if request_user(request) is None:
        return NotAuthenticated()
    return NoCustomer(responses.no_customer().detail)


_CLASSES: dict[str, type[GuardException]] = {
    cls.default_code: cls
    for cls in (
        InsufficientCredits,
        Debt,
        Unavailable,
        Duplicate,
        InvalidKey,
        KeyMismatch,
    )
}


def exception_handler(exc: Exception, context: dict[str, Any]) -> Response | None:
    """Render what ``guard()`` raises inside a view, too.

    For ``REST_FRAMEWORK["EXCEPTION_HANDLER"]``, or to be called by your own. A
    guarded view needs no handler: its refusals are DRF's exceptions already.
    """
    # It reads the project's settings, which may name what stands in this package.
    from rest_framework.views import exception_handler as default

    if not isinstance(exc, responses.RENDERED):
        return default(exc, context)
    response = default(counterpart(exc), context)
    if response is not None:
        response["Cache-Control"] = responses.UNSHARED
    return response
