"""Notes of a guarded class-based view for the handler that it is going to call.

``classes`` makes a ``Dispatch`` when the request comes, ``install_guards`` in the same
module reads it when the handler is known, and ``functions`` takes the transactions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.http.response import HttpResponseBase

from ..errors import MeterlyUsageError

if TYPE_CHECKING:
    from django.http import HttpRequest

    from ..lifecycle import Lifecycle
    from .admission import Admission


class Dispatch:
    """One request on its way from ``as_view()`` to the handler."""

    def __init__(self, request: HttpRequest) -> None:
        self.request = request
        #: The databases on which the guarded handler opens transactions.
        self.aliases: list[str] = []
        #: The guards around the view that have not begun, the outermost first.
        self.waiting: list[Admission] = []
        self.begun: list[Lifecycle] = []
        #: Whether ``install_guards`` has run: dispatch() cannot miss the guards.
        self.installed = False

    @staticmethod
    def of(request: Any) -> Dispatch | None:
        dispatch: Dispatch | None = request.__dict__.get("_meterly_dispatch")
        return dispatch

    @classmethod
    def prepare(
        cls, request: Any, admission: Admission | None, aliases: list[str]
    ) -> Dispatch:
        """Leave *admission*, if the request costs something, and *aliases*."""
        dispatch = cls.of(request) or cls(request)
        request._meterly_dispatch = dispatch
        dispatch.aliases += aliases
        if admission is not None and admission.costs(request):
            dispatch.waiting.append(admission)
        return dispatch

    @classmethod
    def take_aliases(cls, request: Any, handler: Any) -> list[str]:
        """Return the databases on which the guard of *handler* opens transactions.

        The innermost guard opens them. A guard around it must not: the inner one would
        then reserve inside the transaction.
        """
        if getattr(handler, "meterly_guarded", False):
            return []
        dispatch = request.__dict__.pop("_meterly_dispatch", None)
        return dispatch.aliases if dispatch else []

    def refuse_bypass(self, response: Any, *, rest: bool) -> None:
        """Raise ``MeterlyUsageError`` for work that went past its guard.

        A *response* that did not succeed is fine. So is one of a Django view whose
        guards were installed: its ``dispatch()`` may answer without the handler, for
        example with a log-in page.
        """
        if not self.waiting or (self.installed and not rest):
            return
        admission = self.waiting[0]
        options = admission.options_for(self.request)
        if (
            options is not None
            and isinstance(response, HttpResponseBase)
            and options.succeeded(response)
        ):
            raise MeterlyUsageError(_PAST_THE_GUARD.format(admission.name))

    def abandon(self) -> None:
        """Release what the handler's guards have reserved and not concluded."""
        for lifecycle in self.begun:
            lifecycle.cancel()

    def leave(self) -> None:
        self.request.__dict__.pop("_meterly_dispatch", None)


_PAST_THE_GUARD = (
    "{} answered without calling the handler that is guarded, so nothing was charged. "
    "If its class overrides dispatch(), setup() or initial(), call super() there."
)
