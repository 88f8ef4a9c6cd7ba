"""The guard's refusals as exceptions of Django REST framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from rest_framework import status
from rest_framework.exceptions import APIException, ErrorDetail, NotAuthenticated

from ..resolvers import request_user
from ..views import patches, responses

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
    "refuse",
]


class GuardException(APIException):
    """A refusal, with a *detail* and a code like the errors of DRF.

    *extra* holds the facts. For example ``{"required": 25, "available": 3,
    "top_up_url": None, ...}``. An answer in DRF's format includes them.
    """

    extra: dict[str, Any]
    #: Seconds for ``Retry-After``; DRF reads this name. ``None`` omits the header.
    wait: int | None = None

    def __init__(self, detail: str, **extra: Any) -> None:
        self.detail = _Detail(detail, self.default_code)
        self.extra = extra


class _Detail(ErrorDetail):
    """A text for handlers that read ``exc.detail`` or ``exc.detail["detail"]``."""

    def __getitem__(self, key: Any) -> Any:
        return self if key == "detail" else super().__getitem__(key)


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
    """Return the DRF exception for an exception that the guard raises.

    For example ``InsufficientCredits`` for ``MeterlyInsufficientCreditsError``. Raises
    ``TypeError`` for an exception that the guard does not raise.
    """
    problem = responses.problem(exc)
    answer = _CLASSES[problem.code](problem.detail, **problem.extra)
    answer.wait = problem.retry_after
    return answer


def refuse(request: Any, exc: Exception | None) -> NoReturn:
    """Raise the DRF exception for *exc*; ``None`` says that nobody is known to pay.

    The project's exception handler answers it. If its answer has DRF's own format, the
    facts in *extra* are added. If it has no answer, DRF's handler gives one.
    """
    view = request.parser_context.get("view")
    if view is not None:
        patches.extend_error_answers(view, _answer_in_full)
        # DRF adds these headers to the answer of every exception handler. A view has
        # none before dispatch(): schema generators ask its permissions without.
        headers = getattr(view, "headers", None)
        if headers is not None:
            headers["Cache-Control"] = responses.UNSHARED
    if exc is None:
        raise _nobody_pays(request)
    raise counterpart(exc) from exc


def _nobody_pays(request: Any) -> APIException:
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
    """Answer errors as DRF does, and also those that ``guard()`` raises in a view.

    Name it in ``REST_FRAMEWORK["EXCEPTION_HANDLER"]``, or call it from your handler. A
    guarded view does not need it: its refusals are DRF's exceptions already.
    """
    if isinstance(exc, responses.RENDERED):
        exc = counterpart(exc)
    response = _default(exc, context)
    if response is not None and isinstance(exc, GuardException):
        response["Cache-Control"] = responses.UNSHARED
        _complete(response, exc)
    return response


def _answer_in_full(
    response: Response | None, exc: Exception, context: dict[str, Any]
) -> Response | None:
    if isinstance(exc, GuardException):
        response = response or _default(exc, context)
        _complete(response, exc)
    return response


def _default(exc: Exception, context: dict[str, Any]) -> Response | None:
    # Importing it reads the project's settings, which may name this module.
    from rest_framework.views import exception_handler as default

    response: Response | None = default(exc, context)
    return response


def _complete(response: Response | None, exc: GuardException) -> None:
    data = getattr(response, "data", None)
    # A handler with another format has copied or wrapped the text: leave it alone.
    if isinstance(data, dict) and data.get("detail") is exc.detail:
        for name, value in {"code": exc.default_code, **exc.extra}.items():
            data.setdefault(name, value)
