"""Guard one callable: a view function, or a handler of a class-based view.

The wrapper takes the same steps for both, at each call::

    call = Call(view, args, kwargs)       # admission: the arguments, sorted
    admitted = admit(call)                # admission: reserve, or answer instead
    admitted.run(work, aliases)           # execution: run the view, then conclude
"""

from __future__ import annotations

import asyncio
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from django.http.response import HttpResponseBase

from ..guards import Guard
from ..lifecycle import to_the_end
from .admission import Call
from .atomic import AtomicTakeover, atomic
from .dispatch import Dispatch
from .introspection import is_async

if TYPE_CHECKING:
    from collections.abc import Callable

    from .admission import View
    from .execution import Execution, OffExecution

    Admit = Callable[[Call], Execution | OffExecution | HttpResponseBase | None]


def guard_function(view: View, admit: Admit) -> View:
    """Return *view*, which runs once *admit* has admitted the call."""
    guarded: Any = (_guard_async if is_async(view) else _guard_sync)(view, admit)
    guarded.meterly_guarded = True
    return guarded  # type: ignore[no-any-return]


def _guard_sync(view: View, admit: Admit) -> View:
    takeover = AtomicTakeover(view)

    @wraps(view)
    def _view_wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call(view, args, kwargs)
        admitted = admit(call)
        if isinstance(admitted, HttpResponseBase):
            return admitted
        if call.dispatched:
            aliases = Dispatch.take_aliases(call.request, view)
        else:
            aliases = takeover.aliases()
        work = partial(view, *args, **kwargs)
        if admitted is None:
            with atomic(aliases):
                return work()
        return admitted.run(work, aliases)

    # wraps() has copied the view's own set, which the takeover has read.
    _view_wrapper._non_atomic_requests = takeover  # type: ignore[attr-defined]
    return _view_wrapper


def _guard_async(view: View, admit: Admit) -> View:
    @wraps(view)
    async def _view_wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call(view, args, kwargs)
        try:
            admitted = await to_the_end(admit, call)
        except asyncio.CancelledError:
            if isinstance(guard := getattr(call.request, "meterly", None), Guard):
                await to_the_end(guard.lifecycle.cancel)
            raise
        if isinstance(admitted, HttpResponseBase):
            return admitted
        work = partial(view, *args, **kwargs)
        return await (work() if admitted is None else admitted.arun(work))

    return _view_wrapper
