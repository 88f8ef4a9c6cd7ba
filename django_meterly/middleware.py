"""``MeterlyMiddleware``: guards for views you cannot edit, answers for ``guard()``."""

from __future__ import annotations

import sys
from inspect import isclass
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.utils.module_loading import import_string

from .conf import meterly_settings
from .errors import MeterlyUsageError
from .views import responses
from .views.admission import NoGuard
from .views.introspection import is_guarded
from .views.patterns import guard_urlconf, options_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from django.http import HttpRequest, HttpResponse
    from django.http.response import HttpResponseBase


class MeterlyMiddleware:
    """Guard the views that ``METERLY["GUARDED_VIEWS"]`` names.

    Its keys are URL names with their namespace, or namespaces. Its values are dicts of
    ``meterly_guard``'s arguments::

        "GUARDED_VIEWS": {
            "posters:render": {"unit": "image_credits", "amount": 25},
            "reports:": {"unit": "report_credits"},
        }

    The guard belongs to the URL pattern, so CSRF protection and every other middleware
    come first. A view that has a guard in the code keeps that guard.

    If ``guard()`` raises inside any view, the middleware answers as the decorator does.
    On a view without a guard, using ``request.meterly`` raises ``MeterlyUsageError``.
    Put this middleware below the one that sets ``request.urlconf``.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._seen: set[Any] = set()
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(
        self, request: HttpRequest
    ) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        self._prepare(request)
        response: HttpResponseBase | Awaitable[HttpResponseBase]
        response = self.get_response(request)
        return response

    def process_view(
        self, request: HttpRequest, view: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        """Refuse to run a view that ``GUARDED_VIEWS`` names and that has no guard.

        A middleware below this one has chosen its URLconf, which is too late.
        """
        if options_for(request) is not None and not is_guarded(view):
            raise MeterlyUsageError(_TOO_LATE)

    def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> HttpResponse | None:
        """Answer what ``guard()`` raised in a view."""
        if isinstance(exception, responses.RENDERED):
            return responses.render(request, exception)
        return None

    def _prepare(self, request: HttpRequest) -> None:
        request.meterly = NoGuard(_UNGUARDED)  # type: ignore[attr-defined]
        urlconf = getattr(request, "urlconf", None) or settings.ROOT_URLCONF
        names = frozenset(meterly_settings.GUARDED_VIEWS)
        if names and (urlconf, names) not in self._seen:
            guard_urlconf(urlconf)
            self._seen.add((urlconf, names))


def is_installed() -> bool:
    """Return whether ``MIDDLEWARE`` names this middleware, or a subclass of it."""
    return any(
        isclass(each) and issubclass(each, MeterlyMiddleware) for each in _installed()
    )


def _installed() -> Iterator[Any]:
    for path in settings.MIDDLEWARE:
        try:
            yield import_string(path)
        except ImportError:
            # Django reports it when it loads the middleware.
            continue


def explain_unanswered(sender: Any, **kwargs: Any) -> None:
    """Add a note to a refusal by ``guard()`` that becomes a 500.

    For the signal ``got_request_exception``: no middleware has answered it.
    """
    exc = sys.exception()
    if isinstance(exc, responses.RENDERED) and not is_installed():
        exc.add_note(_UNANSWERED)


#: As ``MIDDLEWARE`` names it.
MIDDLEWARE = f"{MeterlyMiddleware.__module__}.{MeterlyMiddleware.__qualname__}"
_UNANSWERED = (
    "guard() has raised this in a view, and nothing answers it but a 500. Add "
    f"{MIDDLEWARE!r} to MIDDLEWARE to have it answered as @meterly_guard does."
)
_UNGUARDED = (
    "This view is not guarded: put @meterly_guard on it, or name it in "
    "METERLY['GUARDED_VIEWS']."
)
_TOO_LATE = (
    "METERLY['GUARDED_VIEWS'] names this view, but a middleware below "
    "MeterlyMiddleware has chosen its URLconf. Put MeterlyMiddleware below the one "
    "that sets request.urlconf."
)
