"""``GUARDED_VIEWS``: which URL patterns it names, and the guards it gives them.

``MeterlyMiddleware`` calls ``guard_urlconf`` on the first request for a URLconf. The
guards ask ``options_for`` at each request, so that the setting is read at call time.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

from django.urls import URLPattern, get_resolver

from ..conf import meterly_settings
from ..options import read_mapping
from . import patches
from .guarding import guard_view
from .introspection import is_guarded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.http import HttpRequest
    from django.urls import URLResolver

    from ..policies import ViewOptions

_guarding = Lock()


def guard_urlconf(urlconf: Any) -> None:
    """Guard the patterns of *urlconf* that ``GUARDED_VIEWS`` names, once.

    Views that have a guard in the code keep that one.
    """
    with _guarding:
        for name, pattern in named_patterns(get_resolver(urlconf)):
            if (
                key_for(name) is not None
                and not getattr(pattern, "meterly_guarded", False)
                and not is_guarded(pattern.callback)
            ):
                view = guard_view(pattern.callback, options_for)
                patches.replace_match(pattern, view)


def named_patterns(
    resolver: URLResolver, namespaces: tuple[str, ...] = ()
) -> Iterator[tuple[str, URLPattern]]:
    """Yield every pattern below *resolver* with its name: ``"posters:render"``."""
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
    """Return the key of ``GUARDED_VIEWS`` that applies to *view_name*, if one does.

    The most specific one wins. For ``"a:b:view"`` these are, in this order:
    ``"a:b:view"``, ``"a:b:"``, ``"a:"``.
    """
    views = meterly_settings.GUARDED_VIEWS
    key = view_name
    while key:
        if key in views:
            return key
        key = key.rstrip(":").rpartition(":")[0]
        key = f"{key}:" if key else ""
    return None


def options_for(request: HttpRequest) -> ViewOptions | None:
    """Return the options that ``GUARDED_VIEWS`` has for the view of *request*."""
    match = request.resolver_match
    if match is None or not meterly_settings.GUARDED_VIEWS:
        return None
    key = key_for(":".join([*match.namespaces, match.url_name or ""]))
    if key is None:
        return None
    return read_mapping(
        meterly_settings.GUARDED_VIEWS[key], f"METERLY['GUARDED_VIEWS'][{key!r}]"
    )
