"""``MeterlyMiddleware``: guards for views you cannot edit, answers for ``guard()``."""

from __future__ import annotations

import sys
from inspect import isclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.urls import URLPattern, get_resolver
from django.utils.module_loading import import_string

from . import responses
from .conf import meterly_settings
from .errors import MeterlyUsageError
from .execution import NoGuard, guard_view, is_guarded
from .options import read_mapping

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from django.http import HttpRequest, HttpResponse
    from django.http.response import HttpResponseBase
    from django.urls import ResolverMatch, URLResolver

    from .policies import ViewOptions

_guarding = Lock()


class MeterlyMiddleware:
    """Guard the views that ``METERLY["GUARDED_VIEWS"]`` names.

    Its keys are URL names with their namespace (``"posters:render"``) or namespaces
    (``"reports:"``), its values options by the names of ``meterly_guard``'s arguments.
    The guard is part of the URL pattern, so CSRF and every other middleware do their
    work first. Views that have a guard in the code keep it, and no other.

    What ``guard()`` raises inside any view is answered as the decorator would.
    ``request.meterly`` says, when it is used on a view without a guard, that there is
    none. Put it below middleware that sets ``request.urlconf``.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._seen: set[Any] = set()
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
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
        """Refuse to run a view that is to be guarded, and is not.

        Its URLconf was chosen by a middleware below this one, too late.
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
            # Django says so, and more loudly.
            continue


def explain_unanswered(sender: Any, **kwargs: Any) -> None:
    """Add a note to what ``guard()`` has raised in a view and nobody has answered.

    For the signal ``got_request_exception``: the answer is going to be a 500.
    """
    exc = sys.exception()
    if isinstance(exc, responses.RENDERED) and not is_installed():
        exc.add_note(_UNANSWERED)


def guard_urlconf(urlconf: Any) -> None:
    """Guard the patterns of *urlconf* that ``GUARDED_VIEWS`` names, once."""
    with _guarding:
        for name, pattern in named_patterns(get_resolver(urlconf)):
            if (
                key_for(name) is not None
                and not hasattr(pattern, "_meterly_view")
                and not is_guarded(pattern.callback)
            ):
                _guard_pattern(pattern)


def _guard_pattern(pattern: Any) -> None:
    # Not by another ``callback``: reverse() knows views by it.
    resolve = pattern.resolve
    pattern._meterly_view = guard_view(pattern.callback, options_for)

    def resolve_guarded(path: str) -> ResolverMatch | None:
        match: ResolverMatch | None = resolve(path)
        if match is not None:
            match.func = pattern._meterly_view
        return match

    pattern.resolve = resolve_guarded


def named_patterns(
    resolver: URLResolver, namespaces: tuple[str, ...] = ()
) -> Iterator[tuple[str, URLPattern]]:
    """Yield every pattern below *resolver*, with its name as ``view_name`` gives it."""
    for pattern in resolver.url_patterns:
        if isinstance(pattern, URLPattern):
            name = str(pattern.name or "")
            yield ":".join([*namespaces, name]), pattern
        else:
            inner = pattern.namespace
            yield from named_patterns(
                pattern, (*namespaces, inner) if inner else namespaces
            )


def key_for(view_name: str) -> str | None:
    """Return the key of ``GUARDED_VIEWS`` for a view, the name before a namespace."""
    views = meterly_settings.GUARDED_VIEWS
    key = view_name
    while key:
        if key in views:
            return key
        # "a:b:c" is in "a:b:", which is in "a:".
        key = key.rstrip(":").rpartition(":")[0]
        key = f"{key}:" if key else ""
    return None


def options_for(request: HttpRequest) -> ViewOptions | None:
    """Return what ``GUARDED_VIEWS`` says about the view of *request*."""
    match = request.resolver_match
    if match is None or not meterly_settings.GUARDED_VIEWS:
        return None
    key = key_for(":".join([*match.namespaces, match.url_name or ""]))
    if key is None:
        return None
    return read_mapping(
        meterly_settings.GUARDED_VIEWS[key], f"METERLY['GUARDED_VIEWS'][{key!r}]"
    )


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
