"""The guard's refusals in Django REST framework's own format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_framework import status
from rest_framework.exceptions import APIException, ErrorDetail, NotAuthenticated

from .. import responses
from ..resolvers import request_user

if TYPE_CHECKING:
    from collections.abc import Callable

    from rest_framework.response import Response
    from rest_framework.views import APIView

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
    """A refusal. Its *detail* is a text with a code, as that of DRF's own errors.

    What else belongs to it is in *extra*. For example, ``{"required": 25, "available":
    3, "top_up_url": None, ...}``. An answer in DRF's own format has that, too.
    """

    extra: dict[str, Any]
    #: Seconds for ``Retry-After``, in DRF's word; ``None`` for no such header.
    wait: int | None = None

    def __init__(self, detail: str, **extra: Any) -> None:
        self.detail = _Detail(detail, self.default_code)
        self.extra = extra


class _Detail(ErrorDetail):
    """A text that is also found by ``exc.detail["detail"]``, as some handlers do."""

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
    if isinstance(exc, responses.RENDERED):
        exc = counterpart(exc)
    response = _default(exc, context)
    if response is not None and isinstance(exc, GuardException):
        response["Cache-Control"] = responses.UNSHARED
        _complete(response, exc)
    return response


def complete_answers(view: APIView) -> None:
    """Have *view* answer a refusal with all that belongs to it.

    The project's exception handler renders it. If its answer has DRF's own format,
    what the ``GuardException`` has in *extra* is added. If it has no answer, DRF's
    handler gives one.
    """
    choose = view.get_exception_handler

    def chosen() -> Callable[[Exception, dict[str, Any]], Response | None]:
        handler = choose()

        def handle(exc: Exception, context: dict[str, Any]) -> Response | None:
            response: Response | None = handler(exc, context)
            if isinstance(exc, GuardException):
                response = response or _default(exc, context)
                _complete(response, exc)
            return response

        return handle

    view.get_exception_handler = chosen  # type: ignore[method-assign]


def _default(exc: Exception, context: dict[str, Any]) -> Response | None:
    # It reads the project's settings, which may name what stands in this package.
    from rest_framework.views import exception_handler as default

    response: Response | None = default(exc, context)
    return response


def _complete(response: Response | None, exc: GuardException) -> None:
    data = getattr(response, "data", None)
    # Another format is its author's: there the text was copied or wrapped.
    if isinstance(data, dict) and data.get("detail") is exc.detail:
        for name, value in {"code": exc.default_code, **exc.extra}.items():
            data.setdefault(name, value)
