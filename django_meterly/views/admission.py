"""Admit a request: reserve what it costs, or answer in the view's place.

The wrappers in ``functions`` make a ``Call`` of the arguments and pass it to
``Admission.admit``. That returns an ``execution.Execution``, which runs the view.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from django.http import HttpRequest
from django.views import View as DjangoView

from .. import db
from ..errors import MeterlyUsageError
from ..guards import Guard
from ..lifecycle import for_request
from . import introspection, methods, responses
from .dispatch import Dispatch
from .execution import Execution, OffExecution

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http.response import HttpResponseBase

    from ..policies import ViewOptions

    View = Callable[..., Any]
    OptionsFor = Callable[[HttpRequest], ViewOptions | None]


class Call:
    """The arguments of a guarded view or handler, sorted."""

    def __init__(self, view: View, args: tuple[Any, ...], kwargs: Any) -> None:
        #: Whether a class's ``dispatch()`` called it.
        self.dispatched = introspection.is_bound(view)
        if args and isinstance(args[0], DjangoView):
            self.dispatched, args = True, args[1:]
        #: The view's own argument: Django's request, or the one that DRF makes of it.
        self.given: Any = args[0] if args else kwargs.get("request")
        self.request: Any = getattr(self.given, "_request", self.given)
        if not isinstance(self.request, HttpRequest):
            raise TypeError(_NOT_A_VIEW.format(type(self.given).__name__))
        if self.dispatched and getattr(view, "__name__", "") == "dispatch":
            refuse_dispatch()
        self.rest = self.request is not self.given
        self.dispatched = self.dispatched or self.rest
        self.args = args[1:]
        self.kwargs = {key: kwargs[key] for key in kwargs if args or key != "request"}


class Admission:
    """The guard of one *view*, for all its requests.

    *options_for* returns the options for a request, or ``None`` if that request is not
    guarded.
    """

    def __init__(self, view: View, options_for: OptionsFor) -> None:
        #: The name for people; the journal keeps it with its module.
        self.name, self.full_name = introspection.names_of(view)
        self.options_for = options_for
        #: The ``Allow`` header, if the guard answers OPTIONS and TRACE itself.
        self._allowed = (
            None
            if introspection.answers_options(view)
            else introspection.allowed_methods(view)
        )

    def costs(self, request: HttpRequest) -> bool:
        options = self.options_for(request)
        return options is not None and options.costs(request.method)

    def admit(self, call: Call) -> Execution | OffExecution | HttpResponseBase | None:
        """Reserve, and return what runs the view.

        Or return the response that refuses the request (in Django REST framework, raise
        its exception), or ``None`` for a request that costs nothing.
        """
        request = call.request
        options = self.options_for(request)
        if options is None:
            return None
        if self._allowed is not None and (
            answer := methods.answer(request.method, self._allowed)
        ):
            return answer
        if not options.costs(request.method):
            if not isinstance(getattr(request, "meterly", None), Guard):
                why = _FREE if request.method == "OPTIONS" else _FREE + _NAME_IT
                request.meterly = NoGuard(why.format(*[request.method] * 2))
            return None
        if options.value("enforcement") == "off":
            return OffExecution(request, partial(self._reserve, call, options))
        try:
            execution = self._reserve(call, options)
        except responses.RENDERED as exc:
            return _refuse(call, exc)
        if execution is None:
            return _refuse(call, None)
        request.meterly = Guard(execution.lifecycle)
        if dispatch := Dispatch.of(request):
            dispatch.begun.append(execution.lifecycle)
        return execution

    def _reserve(self, call: Call, options: ViewOptions) -> Execution | None:
        """Return what runs the view on credits that are held; ``None`` for no payer."""
        with db.serving():
            # CUSTOMER_RESOLVER and functions among the options may use it, too.
            lifecycle = for_request(
                options, self.name, call.given, *call.args, **call.kwargs
            )
        if lifecycle is None:
            return None
        lifecycle.name = self.full_name
        lifecycle.reserve()
        return Execution(lifecycle, options, head=call.request.method == "HEAD")


def _refuse(call: Call, exc: Exception | None) -> HttpResponseBase:
    """Return the response for *exc*; ``None`` says that nobody is known to pay."""
    if call.rest:
        from ..rest_framework.exceptions import refuse

        refuse(call.given, exc)
    if exc is None:
        return responses.nobody_pays(call.request)
    return responses.render(call.request, exc)


def refuse_dispatch() -> NoReturn:
    """Raise the ``TypeError`` for a guard on ``dispatch()``."""
    raise TypeError(_NOT_ON_DISPATCH)


class NoGuard:
    """``request.meterly`` while nothing is guarded: every use raises, and says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __repr__(self) -> str:
        return f"<NoGuard: {self._why}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # A protocol asks, for example copy(), and not somebody who wants a guard.
            raise AttributeError(name)
        raise MeterlyUsageError(
            f"request.meterly.{name} cannot be used here. {self._why}"
        )


_NOT_A_VIEW = (
    "meterly_guard got a {} where a view gets its request. It guards view functions, "
    "what as_view() returns, and the handlers of class-based views: post() and the "
    "like, or an @action."
)
_NOT_ON_DISPATCH = (
    "meterly_guard cannot guard dispatch(): it runs before it is known who asks, and "
    "it also answers requests that are free. Set guard_options on the class and let it "
    "inherit from MeterlyGuardMixin, or guard as_view() in the URLconf, or a handler, "
    "for example post()."
)
_FREE = "{} costs nothing on this view."
_NAME_IT = ' To charge for it, name it: meterly_guard(..., methods=["{}"]).'
