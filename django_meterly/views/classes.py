"""Guard the handlers of a class-based view: ``MeterlyGuardMixin``, and all of DRF.

Around ``as_view()`` it is too early to reserve, because ``dispatch()`` still checks
log-in, permissions and throttles. One request takes these steps:

1. The wrapper of ``guard_class`` leaves a ``Dispatch`` at the request.
2. ``setup()`` of the mixin, or ``initial()`` of Django REST framework, calls
   ``install_guards``.
3. ``dispatch()`` calls a handler, which ``guard_function`` has wrapped: reserve, run,
   conclude.
4. The wrapper looks at the response: did it go past the guard?
"""

from __future__ import annotations

import asyncio
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from ..lifecycle import to_the_end
from . import patches
from .admission import Call
from .atomic import AtomicTakeover, atomic, unspoiled
from .dispatch import Dispatch
from .functions import guard_function
from .introspection import class_of, handlers, is_async, is_guarded, is_rest

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase
    from django.views import View as DjangoView

    from .admission import Admission, View

    Costs = Callable[[HttpRequest], bool]


def guard_class(view: View, admission: Admission | None) -> View:
    """Return *view*, made by ``as_view()``, with *admission* on its handlers.

    ``None`` leaves it to the handlers that have a guard in the code. For a request that
    a guarded handler answers, the handler's guard opens the transactions of
    ``ATOMIC_REQUESTS``; for other requests, the wrapper opens them.
    """
    cls = class_of(view)
    if is_rest(cls):
        patches.extend_initial(cls, install_guards)
    costs = any_costs(
        None if admission is None else admission.costs,
        getattr(view, "meterly_costs", partial(_handler_costs, view)),
    )
    guard = _guard_async if is_async(view) else _guard_sync
    guarded: Any = guard(view, admission, costs)
    guarded.meterly_guarded = admission is not None or is_guarded(view)
    guarded.meterly_costs = costs
    return guarded  # type: ignore[no-any-return]


def _guard_sync(view: View, admission: Admission | None, costs: Costs) -> View:
    takeover = AtomicTakeover(view)
    rest = is_rest(class_of(view))

    @wraps(view)
    def _view_wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
        aliases = takeover.aliases()
        work = partial(view, request, *args, **kwargs)
        # If a wrapper above has left a dispatch, the handler opens the transactions.
        if not (Dispatch.of(request) or costs(request)):
            answer = _answer_free(view, admission, request, args, kwargs)
            if answer is not None:
                return answer
            with atomic(aliases):
                return work()
        dispatch = Dispatch.prepare(request, admission, aliases)
        try:
            with unspoiled(aliases):
                response = work()
            dispatch.refuse_bypass(response, rest=rest)
        except BaseException:
            dispatch.abandon()
            raise
        finally:
            dispatch.leave()
        return response

    _view_wrapper._non_atomic_requests = takeover  # type: ignore[attr-defined]
    return _view_wrapper


def _guard_async(view: View, admission: Admission | None, costs: Costs) -> View:
    rest = is_rest(class_of(view))

    @wraps(view)
    async def _view_wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
        work = partial(view, request, *args, **kwargs)
        if not (Dispatch.of(request) or costs(request)):
            answer = _answer_free(view, admission, request, args, kwargs)
            return await work() if answer is None else answer
        dispatch = Dispatch.prepare(request, admission, [])
        try:
            response = await work()
            dispatch.refuse_bypass(response, rest=rest)
        except (GeneratorExit, asyncio.CancelledError):
            # The handler has decided, also about a reader who left.
            raise
        except BaseException:
            await to_the_end(dispatch.abandon)
            raise
        finally:
            dispatch.leave()
        return response

    return _view_wrapper


def _answer_free(
    view: View, admission: Admission | None, request: Any, args: Any, kwargs: Any
) -> HttpResponseBase | None:
    """Return the guard's own answer to a request that costs nothing, if it has one."""
    if admission is None:
        return None
    admitted: Any = admission.admit(Call(view, (request, *args), kwargs))
    return admitted  # type: ignore[no-any-return]


def install_guards(view: DjangoView, request: Any) -> None:
    """Guard the handler that ``dispatch()`` is going to call, on this *view* only.

    The handler may differ from the one that *request* names now. For example, a
    ``dispatch()`` may let a form turn its POST into a DELETE.
    """
    dispatch = Dispatch.of(getattr(request, "_request", request))
    if dispatch is None or dispatch.installed:
        return
    dispatch.installed = True
    if dispatch.waiting:
        patches.replace_handlers(view, partial(_guard_handler, dispatch))


def _guard_handler(dispatch: Dispatch, handler: View) -> View:
    for admission in reversed(dispatch.waiting):
        handler = guard_function(handler, partial(_admit, dispatch, admission))
    return handler


def _admit(dispatch: Dispatch, admission: Admission, call: Call) -> Any:
    # A dispatch() may call its handler once more: that is another piece of work.
    if admission in dispatch.waiting:
        dispatch.waiting.remove(admission)
    return admission.admit(call)


def any_costs(*costs: Costs | None) -> Costs:
    """Return a function that tells whether a request costs something by any of them.

    Guarded views carry it as ``meterly_costs``, for the wrappers around them.
    """
    return lambda request: any(each(request) for each in costs if each is not None)


def _handler_costs(view: View, request: HttpRequest) -> bool:
    handler = handlers(view).get((request.method or "").lower())
    costs = getattr(handler, "meterly_costs", None)
    return costs is not None and costs(request)
