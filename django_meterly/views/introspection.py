"""Read a view: its class, its handlers, its name, sync or async, guarded or not.

Called when a view is guarded and by the system checks. Nothing here runs a view.
Frameworks are recognised by their types. For example, ``FormView`` and a view of
Django REST framework both have an attribute ``initial``, with different meanings.
"""

from __future__ import annotations

import sys
from functools import partial
from inspect import isclass
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.views import View
from django.views.generic import RedirectView

from . import methods


def names_of(view: Any) -> tuple[str, str]:
    """Return the name of *view*, without its module and with it.

    For example ``("Poster", "studio.views.Poster")``. A class-based view has the name
    of its class.
    """
    # as_view() gives all views one name, and so does ninja: Operation.run.
    named = class_of(view) or _ninja_function(view) or _without_partial(view)
    name = getattr(named, "__qualname__", type(named).__qualname__)
    if isclass(named) and not name.endswith(named.__name__):
        # @api_view gives its class the __name__ of the function, but no __qualname__.
        name = named.__name__
    # The journal keeps 255 characters, and the default reference adds a UUID.
    short, full = (
        text.encode("ascii", "backslashreplace").decode()[:200]
        for text in (name.rpartition("<locals>.")[2], f"{named.__module__}.{name}")
    )
    return short, full


def class_of(view: Any) -> Any:
    """Return the class whose ``as_view()`` made *view*, or ``None``."""
    return _as_view(view)[1]


def _as_view(view: Any) -> tuple[Any, Any]:
    """Return what ``as_view()`` returned, below wrappers and partials, and its class.

    Both are ``None`` for a view function.
    """
    for layer in methods.layers(view):
        for name in ("cls", "view_class"):
            cls = getattr(layer, name, None)
            if isclass(cls) and issubclass(cls, View):
                return layer, cls
    return None, None


def handlers(view: Any) -> dict[str, Any]:
    """Return the handlers of a class-based *view* by HTTP method.

    For example ``{"get": Poster.get, "head": Poster.get, "post": Poster.post}``. A view
    function has none.
    """
    view, cls = _as_view(view)
    if cls is None:
        return {}
    settings = getattr(view, "view_initkwargs", {})
    answered = settings.get("http_method_names", cls.http_method_names)
    # as_view({"post": "render"}) of a view set maps HTTP methods to its own names.
    names = getattr(view, "actions", None) or {}
    found = {
        method: getattr(cls, names.get(method, method))
        for method in answered
        if (method in names or not names) and hasattr(cls, names.get(method, method))
    }
    if "get" in found:
        found.setdefault("head", found["get"])
    return found


def answers_options(view: Any) -> bool:
    """Return whether *view* has a handler that answers OPTIONS and nothing else.

    A function has no handlers, and a class without any works in ``dispatch()``. A
    handler for OPTIONS and POST, for example, would do the work of POST for nothing.
    """
    found = handlers(view)
    options = found.pop("options", None)
    return bool(found) and options not in [RedirectView.options, *found.values()]


def allowed_methods(view: Any) -> list[str]:
    """Return the ``Allow`` header for OPTIONS and TRACE, which the guard answers."""
    names = [name.upper() for name in handlers(view) if name != "trace"]
    if len(names) > 1:
        return names
    required = methods.required(view)
    return methods.ALL_BUT_TRACE if required is None else required


def is_guarded(view: Any) -> bool:
    """Return whether the code of the project guards *view* or a handler of it."""
    return any(
        getattr(each, "meterly_guarded", False)
        for each in (view, *handlers(view).values())
    )


def is_rest(cls: Any) -> bool:
    """Return whether *cls* is a view of Django REST framework, without importing it."""
    rest = sys.modules.get("rest_framework.views")
    return rest is not None and isclass(cls) and issubclass(cls, rest.APIView)


def is_ninja_operation(operation: Any) -> bool:
    """Return whether *operation* belongs to django-ninja, without importing it."""
    ninja = sys.modules.get("ninja.operation")
    return ninja is not None and isinstance(operation, ninja.Operation)


def is_bound(view: Any) -> bool:
    """Return whether *view* is a handler bound to its view, below any decorators."""
    return any(
        isinstance(getattr(layer, "__self__", None), View)
        for layer in methods.layers(view)
    )


def is_async(view: Any) -> bool:
    view = _without_partial(view)
    return iscoroutinefunction(view) or iscoroutinefunction(
        getattr(type(view), "__call__", None)  # noqa: B004
    )


def _ninja_function(view: Any) -> Any:
    """Return the function that *view* runs, if it is ``run()`` of a ninja operation."""
    for layer in methods.layers(view):
        operation: Any = getattr(layer, "__self__", None)
        if is_ninja_operation(operation):
            return operation.view_func
    return None


def _without_partial(view: Any) -> Any:
    while isinstance(view, partial):
        view = view.func
    return view
