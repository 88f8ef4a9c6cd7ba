"""The guard's refusals in Django REST framework's own format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.utils.translation import gettext as _
from rest_framework import status
from rest_framework.exceptions import APIException, NotAuthenticated

from ..conf import meterly_settings
from ..errors import (
    MeterlyDuplicateError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidKeyError,
    MeterlyUnavailableError,
)

if TYPE_CHECKING:
    from rest_framework.response import Response

    from ..errors import MeterlyError

__all__ = [
    "Duplicate",
    "GuardException",
    "InsufficientCredits",
    "InvalidKey",
    "KeyMismatch",
    "NotAuthenticated",
    "Unavailable",
    "counterpart",
    "exception_handler",
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


def counterpart(exc: MeterlyError) -> GuardException:
    """Return the DRF exception for what the guard raises and an edge renders.

    Raises ``TypeError`` for any other exception.
    """
    answer: GuardException
    if isinstance(exc, MeterlyInsufficientCreditsError):
        return InsufficientCredits(
            _(
                "Your running work holds the credits this needs. "
                "Try again when it is done."
            )
            if exc.held_by_running_work
            else _("This needs %(required)d %(unit)s, and %(available)d are available.")
            % {
                "required": exc.required,
                "unit": exc.unit,
                "available": exc.available,
            },
            required=exc.required,
            available=exc.available,
            reserved=exc.reserved,
            unit=exc.unit,
            top_up_url=meterly_settings.TOP_UP_URL,
            held_by_running_work=exc.held_by_running_work,
        )
    if isinstance(exc, MeterlyUnavailableError):
        answer = Unavailable(
            _("Nothing was charged. Please try again in a moment."),
        )
        answer.wait = exc.retry_after
        return answer
    if isinstance(exc, MeterlyInvalidKeyError):
        return InvalidKey(
            _("It must be up to 200 visible ASCII characters, without spaces.")
        )
    if isinstance(exc, MeterlyDuplicateError):
        answer = Duplicate(
            _("The same request is being worked on right now.")
            if exc.in_progress
            else _("The same request was carried out before; it was not run again."),
            state=exc.state,
        )
        answer.wait = 5 if exc.in_progress else None
        return answer
    if isinstance(exc, MeterlyIdempotencyMismatchError):
        return KeyMismatch(_("This idempotency key came with another request before."))
    raise TypeError(f"The guard does not raise {exc!r} as a refusal.")


def exception_handler(exc: Exception, context: dict[str, Any]) -> Response | None:
    """Render what ``guard()`` raises inside a view, too.

    For ``REST_FRAMEWORK["EXCEPTION_HANDLER"]``, or to be called by your own. A
    guarded view needs no handler: its refusals are DRF's exceptions already.
    """
    if isinstance(exc, _REFUSALS):
        exc = counterpart(exc)
    # It reads the project's settings, which may name what stands in this package.
    from rest_framework.views import exception_handler as default

    return default(exc, context)


_REFUSALS = (
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyDuplicateError,
    MeterlyInvalidKeyError,
    MeterlyIdempotencyMismatchError,
)
