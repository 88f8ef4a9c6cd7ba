"""Which HTTP methods cost something, and for which a guarded function never runs."""

from __future__ import annotations

from functools import partial
from inspect import getclosurevars
from typing import TYPE_CHECKING, Any

from django.http import HttpResponse, HttpResponseNotAllowed
from django.views import View
from django.views.decorators import http

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: All other methods cost something, also unknown ones.
FREE = frozenset({"GET", "HEAD", "OPTIONS"})
#: A guarded function does not run for these, so ``methods`` cannot name them.
NEVER_RUN = frozenset({"OPTIONS", "TRACE"})
ALL_BUT_TRACE = [
    name.upper() for name in View.http_method_names if name.upper() != "TRACE"
]


def check_methods(methods: Iterable[str], name: str = "methods") -> frozenset[str]:
    """Return *methods* in upper case; GET includes HEAD.

    For example, ``check_methods(["get"])`` returns GET and HEAD. Raises ``TypeError``
    for anything but a list of texts, and ``ValueError`` for OPTIONS and TRACE.
    """
    try:
        names = None if isinstance(methods, str) else list(methods)
    except TypeError:
        names = None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{name} is a list of HTTP methods, not {methods!r}.")
    checked = {name.upper() for name in names}
    if unfit := sorted(checked & NEVER_RUN):
        raise ValueError(
            f"{name} cannot name {' or '.join(unfit)}: guarded functions do not run "
            "for OPTIONS and TRACE. Name GET or HEAD; all other methods always cost."
        )
    if "GET" in checked:
        # Otherwise HEAD would do the work of GET for free.
        checked.add("HEAD")
    return frozenset(checked)


def costs(method: str | None, named: Iterable[str] | None) -> bool:
    """Return whether *method* costs something if the option ``methods`` is *named*."""
    return method not in FREE or method in (named or ())


def answer(method: str | None, allowed: Iterable[str]) -> HttpResponse | None:
    """Return the guard's own answer to OPTIONS or TRACE; ``None`` for other methods.

    *allowed* is the value of ``Allow``.
    """
    if method == "TRACE":
        return HttpResponseNotAllowed(allowed)
    if method == "OPTIONS":
        # As django.views.View.options() answers.
        headers = {"Allow": ", ".join(allowed), "Content-Length": "0"}
        return HttpResponse(headers=headers)
    return None


def required(view: Any) -> list[str] | None:
    """Return the methods that ``require_http_methods`` lets through to *view*.

    Also for ``require_GET`` and the like. ``None`` if *view* has no such decorator.
    """
    found: list[str] | None = None
    for layer in layers(view):
        # wraps() replaces a wrapper's name and module, but not its globals.
        if getattr(layer, "__globals__", None) is vars(http):
            names = getclosurevars(layer).nonlocals.get("request_method_list")
            if names is not None:
                found = [n for n in (names if found is None else found) if n in names]
    return found


def layers(view: Any) -> Iterator[Any]:
    """Yield *view*, and the functions below its ``wraps()`` and ``partial()``."""
    while view is not None:
        yield view
        view = (
            view.func
            if isinstance(view, partial)
            else getattr(view, "__wrapped__", None)
        )
