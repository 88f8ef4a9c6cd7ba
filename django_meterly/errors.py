"""Every exception of django-meterly.

::

    MeterlyError
    ├── MeterlyApiError                        the ledger answered, and said no
    │   ├── MeterlyInvalidRequestError           400 invalid_request (a ValueError, too)
    │   ├── MeterlyAuthenticationError           401 unauthenticated
    │   ├── MeterlyInsufficientCreditsError      402 insufficient_credits
    │   │   └── MeterlyDebtError                 402 debt (only the guard says so)
    │   ├── MeterlyForbiddenError                403 forbidden
    │   ├── MeterlyNotFoundError                 404 not_found
    │   ├── MeterlyCustomerExistsError           409 customer_exists
    │   ├── MeterlyReferenceConflictError        409 reference_conflict
    │   ├── MeterlyReservationExpiredError       409 reservation_expired
    │   ├── MeterlyReservationCommittedError     409 reservation_committed
    │   ├── MeterlyReservationReleasedError      409 reservation_released
    │   ├── MeterlyIdempotencyInProgressError    409 idempotency_in_progress
    │   ├── MeterlyIdempotencyMismatchError      422 idempotency_mismatch
    │   ├── MeterlyRateLimitedError              429 rate_limited
    │   └── MeterlyServerError                   5xx (an unknown outcome, too)
    ├── MeterlyNotSentError                    provably never reached the ledger
    ├── MeterlyUnknownOutcomeError             may or may not have been applied
    │   └── MeterlyServerError
    ├── MeterlyUnavailableError                the guard could not reserve in time
    ├── MeterlyDuplicateError                  this key was used, or is in use
    ├── MeterlyInvalidKeyError                 an invalid key (a ValueError, too)
    └── MeterlyUsageError                      the code asks for the impossible

A call has three outcomes: yes, no and unknown. ``MeterlyApiError`` is a no.
``MeterlyNotSentError`` is a no as well, because nothing can have happened.
``MeterlyUnknownOutcomeError`` is neither: send the same call again with the same
idempotency key to learn the outcome.

Messages and details may come from a ledger. They are cleaned here, before anybody can
store, log or show them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeGuard

from .wire import (
    MAX_AMOUNT,
    MAX_TEXT_LENGTH,
    check_amount,
    check_identifier,
    check_unit,
    clean_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "OUTAGE",
    "MeterlyApiError",
    "MeterlyAuthenticationError",
    "MeterlyCustomerExistsError",
    "MeterlyDebtError",
    "MeterlyDuplicateError",
    "MeterlyError",
    "MeterlyForbiddenError",
    "MeterlyIdempotencyInProgressError",
    "MeterlyIdempotencyMismatchError",
    "MeterlyInsufficientCreditsError",
    "MeterlyInvalidKeyError",
    "MeterlyInvalidRequestError",
    "MeterlyNotFoundError",
    "MeterlyNotSentError",
    "MeterlyRateLimitedError",
    "MeterlyReferenceConflictError",
    "MeterlyReservationCommittedError",
    "MeterlyReservationExpiredError",
    "MeterlyReservationReleasedError",
    "MeterlyServerError",
    "MeterlyUnavailableError",
    "MeterlyUnknownOutcomeError",
    "MeterlyUsageError",
    "api_error",
    "is_known",
]


#: The longest message, in characters.
MAX_MESSAGE_LENGTH = 2000
#: The most details of an error, the most fields in one, and the most texts of a field.
MAX_DETAILS = 32
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


class MeterlyError(Exception):
    """The root of every exception of this package."""

    def __init__(self, message: str = "") -> None:
        super().__init__(clean_text(str(message), MAX_MESSAGE_LENGTH))


class MeterlyApiError(MeterlyError):
    """The ledger answered with an error.

    *status* is the HTTP status, also from the embedded ledger. *code* is the stable
    name of the condition; branch on it, or on the class. *details* are further facts,
    such as ``{"required": 5, "available": 2}``. *request_id*, *method* and *path* name
    the call.

    Invalid details are dropped: a ``required`` of ``"5"``, for example, because it is
    not a whole number, and every unknown detail that is a list or an object.
    """

    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        method: str | None = None,
        path: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        message = clean_text(message, MAX_MESSAGE_LENGTH).strip()
        self.message = message or (self.__doc__ or "").partition("\n")[0]
        super().__init__(self.message)
        if status is not None:
            self.status = status
        if _is_code(code):
            self.code = code
        self.request_id = clean_text(request_id, MAX_TEXT_LENGTH) or None
        self.method = method
        self.path = path
        self.details = _clean_details(details)

    def __str__(self) -> str:
        where = f" [{self.method} {self.path}]" if self.method else ""
        which = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.status} {self.code}: {self.message}{where}{which}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments do not survive the default pickling, and
        # Celery pickles the exceptions of its tasks.
        return (_rebuild, (type(self), self.message), self.__dict__)


def _rebuild(cls: type[MeterlyApiError], message: str) -> MeterlyApiError:
    return cls(message)


def _is_code(code: object) -> TypeGuard[str]:
    return isinstance(code, str) and _CODE.fullmatch(code) is not None


def _clean_details(details: object) -> dict[str, Any]:
    """Return the valid ones of an error's *details*."""
    cleaned: dict[str, Any] = {}
    if not isinstance(details, dict):
        return cleaned
    for name, check in _DETAILS.items():
        if name in details:
            try:
                cleaned[name] = check(details[name], name)
            except ValueError:
                pass
    for name, value in details.items():
        if len(cleaned) == MAX_DETAILS:
            break
        if isinstance(value, str):
            value = clean_text(value, MAX_TEXT_LENGTH)
        elif type(value) is not bool and not (
            type(value) is int and -MAX_AMOUNT <= value <= MAX_AMOUNT
        ):
            continue
        if name not in _DETAILS:
            cleaned[clean_text(name, MAX_TEXT_LENGTH)] = value
    return cleaned


def _whole_number(value: object, name: str) -> int:
    return check_amount(value, name, minimum=0)


def _fields(value: object, name: str) -> dict[str, list[str]]:
    fields = value.items() if isinstance(value, dict) else ()
    return {
        clean_text(field, MAX_TEXT_LENGTH): [
            clean_text(text, MAX_TEXT_LENGTH) for text in texts[:MAX_DETAILS]
        ]
        for field, texts in list(fields)[:MAX_DETAILS]
        if isinstance(texts, list)
    }


#: Details that have a meaning, and their checks.
_DETAILS: dict[str, Callable[[Any, str], Any]] = {
    "required": _whole_number,
    "available": _whole_number,
    "reserved": _whole_number,
    "unit": check_unit,
    "customerId": check_identifier,
    "retryAfter": _whole_number,
    "fields": _fields,
}


class MeterlyUnknownOutcomeError(MeterlyError):
    """The ledger may or may not have carried out the call.

    Send the same call with the same *idempotency_key* to learn which. If
    ``MeterlyClient.guard`` raised it, the work is done, and *result* is its result.
    """

    idempotency_key: str | None = None
    result: Any = None


class MeterlyNotSentError(MeterlyError):
    """The call provably never reached the ledger; nothing has moved.

    No attempt did: once one attempt may have arrived, the outcome is unknown.
    """


class MeterlyInvalidRequestError(MeterlyApiError, ValueError):
    """The ledger cannot read this request, or the client has refused to send it.

    If the client refused it, *request_id* is ``None``.
    """

    status, code = 400, "invalid_request"

    @property
    def fields(self) -> dict[str, list[str]]:
        """The errors of each field, by its name on the wire."""
        return dict(self.details.get("fields") or {})


class MeterlyAuthenticationError(MeterlyApiError):
    """The API key is unknown or revoked."""

    status, code = 401, "unauthenticated"


class MeterlyInsufficientCreditsError(MeterlyApiError):
    """There are not enough credits.

    *required* and *available* are credits of *unit*. The customer's running work holds
    the *reserved* ones, which may come back.
    """

    status, code = 402, "insufficient_credits"

    @property
    def required(self) -> int:
        return int(self.details.get("required") or 0)

    @property
    def available(self) -> int:
        return int(self.details.get("available") or 0)

    @property
    def reserved(self) -> int:
        return int(self.details.get("reserved") or 0)

    @property
    def unit(self) -> str:
        return str(self.details.get("unit") or "")

    @property
    def held_by_running_work(self) -> bool:
        """Whether the credits are there, but held by the customer's own work."""
        return self.available < self.required <= self.available + self.reserved


class MeterlyDebtError(MeterlyInsufficientCreditsError):
    """The customer owes credits for earlier work, and has too few to pay for it.

    The guard raises this, never a ledger. *owed* is the debt in credits of *unit*, and
    *required* is the cost of the debt and the new work together.
    """

    code = "debt"

    @property
    def owed(self) -> int:
        return int(self.details.get("owed") or 0)


class MeterlyForbiddenError(MeterlyApiError):
    """The API key may not do this."""

    status, code = 403, "forbidden"


class MeterlyNotFoundError(MeterlyApiError):
    """This workspace does not have this object."""

    status, code = 404, "not_found"


class MeterlyCustomerExistsError(MeterlyApiError):
    """A customer with this external id exists already."""

    status, code = 409, "customer_exists"

    @property
    def customer_id(self) -> str:
        """The existing customer's id; empty if the ledger has not named it."""
        return str(self.details.get("customerId") or "")


class MeterlyReferenceConflictError(MeterlyApiError):
    """The reference was used before, with other values."""

    status, code = 409, "reference_conflict"


class MeterlyReservationExpiredError(MeterlyApiError):
    """The reservation has expired."""

    status, code = 409, "reservation_expired"


class MeterlyReservationCommittedError(MeterlyApiError):
    """The reservation is committed already."""

    status, code = 409, "reservation_committed"


class MeterlyReservationReleasedError(MeterlyApiError):
    """The reservation was released."""

    status, code = 409, "reservation_released"


class MeterlyIdempotencyInProgressError(MeterlyApiError):
    """A call with the same idempotency key is being served right now."""

    status, code = 409, "idempotency_in_progress"


class MeterlyIdempotencyMismatchError(MeterlyApiError):
    """The idempotency key came with another request before."""

    status, code = 422, "idempotency_mismatch"


class MeterlyRateLimitedError(MeterlyApiError):
    """Too many requests."""

    status, code = 429, "rate_limited"


class MeterlyServerError(MeterlyApiError, MeterlyUnknownOutcomeError):
    """The ledger failed while serving the call; its outcome is unknown."""

    status, code = 500, "internal_error"


class MeterlyUnavailableError(MeterlyError):
    """The ledger could not be asked, so the work was not run.

    *retry_after* is the wait to suggest to the caller, in seconds.
    """

    def __init__(self, message: str = "", *, retry_after: int = 5) -> None:
        super().__init__(message or (self.__doc__ or "").partition("\n")[0])
        self.retry_after = retry_after


class MeterlyDuplicateError(MeterlyError):
    """The idempotency key was used before, or is in use right now.

    *state* and *reference* are those of the reservation, if they are known.
    *in_progress* is true while its outcome is open.
    """

    def __init__(
        self,
        message: str = "",
        *,
        state: str = "",
        reference: str = "",
        in_progress: bool = False,
    ) -> None:
        super().__init__(message or (self.__doc__ or "").partition("\n")[0])
        self.state = state
        self.reference = reference
        self.in_progress = in_progress


class MeterlyInvalidKeyError(MeterlyError, ValueError):
    """The idempotency key is invalid; the caller may have chosen it."""


class MeterlyUsageError(MeterlyError):
    """The guard is used where it cannot keep its promise."""


#: The ledger was not asked, or did not answer. Nothing is decided, so ask again.
OUTAGE = (
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    MeterlyAuthenticationError,
    MeterlyForbiddenError,
    MeterlyIdempotencyInProgressError,
    MeterlyRateLimitedError,
)

_BY_CODE: dict[str, type[MeterlyApiError]] = {
    cls.code: cls
    for cls in (
        MeterlyInvalidRequestError,
        MeterlyAuthenticationError,
        MeterlyInsufficientCreditsError,
        MeterlyForbiddenError,
        MeterlyNotFoundError,
        MeterlyCustomerExistsError,
        MeterlyReferenceConflictError,
        MeterlyReservationExpiredError,
        MeterlyReservationCommittedError,
        MeterlyReservationReleasedError,
        MeterlyIdempotencyInProgressError,
        MeterlyIdempotencyMismatchError,
        MeterlyRateLimitedError,
    )
}
_BY_STATUS: dict[int, type[MeterlyApiError]] = {
    cls.status: cls for cls in _BY_CODE.values() if cls.status != 409
}


def is_known(code: object) -> bool:
    """Return whether *code* is an error code of the wire contract."""
    return _is_code(code) and code in _BY_CODE


def api_error(
    status: int,
    code: str | None,
    message: str = "",
    *,
    request_id: str | None = None,
    method: str | None = None,
    path: str | None = None,
    details: dict[str, Any] | None = None,
) -> MeterlyApiError:
    """Return the exception for an error answer.

    *code* decides the class, or *status* if the code is unknown. Every 5xx is an
    unknown outcome. For example::

        raise api_error(402, "insufficient_credits", details={"required": 5})
    """
    if status >= 500:
        cls: type[MeterlyApiError] = MeterlyServerError
    else:
        known = _BY_CODE.get(code) if _is_code(code) else None
        cls = known or _BY_STATUS.get(status, MeterlyApiError)
    return cls(
        message,
        status=status,
        code=code,
        request_id=request_id,
        method=method,
        path=path,
        details=details,
    )
