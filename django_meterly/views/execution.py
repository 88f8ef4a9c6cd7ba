"""Run an admitted view and conclude: charge for it, or release the credits.

``functions`` calls ``Execution.run`` for sync views and ``arun`` for async ones. The
response decides when to conclude:

============================ ===================================================
The view                     The guard
============================ ===================================================
raises, or does not succeed  fails at once
returns a finished response  succeeds at once
returns a response that is   presumes success, then succeeds after rendering
still to be rendered         (``patches.extend_render``)
returns a stream             presumes success, then succeeds after the last chunk
                             (``streams.Stream``)
============================ ===================================================

Under ``ATOMIC_REQUESTS``, a success is the last statement of the view's transaction.
"""

from __future__ import annotations

import asyncio
import logging
from inspect import isawaitable, iscoroutine
from typing import TYPE_CHECKING, Any

from django.db import Error, connections
from django.http.response import HttpResponseBase
from django.utils.functional import SimpleLazyObject

from .. import journal
from ..guards import Guard
from ..lifecycle import to_the_end
from . import patches, responses
from .atomic import atomic
from .streams import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..lifecycle import Lifecycle
    from ..policies import ViewOptions

logger = logging.getLogger(__name__)


class Execution:
    """One run of a guarded view; *head* for a HEAD request."""

    def __init__(
        self, lifecycle: Lifecycle, options: ViewOptions, *, head: bool = False
    ) -> None:
        self.lifecycle = lifecycle
        self.options = options
        self._head = head

    def run(self, work: Callable[[], Any], aliases: list[str]) -> Any:
        """Run the view by *work()*, in the transactions of *aliases*, and conclude."""
        recorded = False
        try:
            with atomic(aliases):
                response = work()
                good = self.is_good(response, aliases)
                if good and journal.alias() in aliases:
                    # The last statement inside: work and decision commit together.
                    recorded = True
                    if self._is_late(response):
                        self._presume(response)
                    else:
                        self.lifecycle.decide()
        except BaseException:
            # If the COMMIT raised, only the row knows whether it took place.
            self.lifecycle.fail()
            raise
        self.conclude(response, good, recorded=recorded)
        return response

    async def arun(self, work: Callable[[], Any]) -> Any:
        """Run the async view by *work()*, and conclude, even if it is cancelled."""
        try:
            response = await work()
            good = self.is_good(response)
        except GeneratorExit:
            # A coroutine that is being closed cannot await: the lease releases.
            raise
        except asyncio.CancelledError:
            await to_the_end(
                self.disconnect if _is_cancelled() else self.lifecycle.fail
            )
            raise
        except BaseException:
            await to_the_end(self.lifecycle.fail)
            raise
        await to_the_end(self.conclude, response, good)
        return response

    def disconnect(self) -> None:
        """Conclude work whose reader has left, as ``on_disconnect`` says."""
        if self._on_disconnect == "charge":
            self.lifecycle.succeed()
        else:
            self.lifecycle.cancel()

    @property
    def _on_disconnect(self) -> str:
        policy: str = self.options.value("on_disconnect")
        return policy

    def is_good(self, response: Any, aliases: Sequence[str] = ()) -> bool:
        """Return whether the work succeeded, and its transactions will be committed."""
        refuse_unless_response(response)
        return self.options.succeeded(response) and not any(
            connections[alias].needs_rollback for alias in aliases
        )

    def _is_late(self, response: HttpResponseBase) -> bool:
        """Return whether *response* decides later, when it is rendered or sent.

        If the work was handed off, the task decides, and the response does not matter.
        """
        return not self.lifecycle.is_handed_off and is_unfinished(response)

    def _presume(self, response: HttpResponseBase) -> None:
        # The work of a stream is its chunks. If none was sent, its reader has left.
        if not response.streaming or self._on_disconnect == "charge":
            self.lifecycle.presume()

    def conclude(self, response: Any, good: bool, *, recorded: bool = False) -> None:
        """Decide by *response*, or let its rendering or its last chunk decide.

        With *recorded*, the view's transaction holds the decision, or presumes it.
        """
        if isinstance(response, HttpResponseBase):
            responses.keep_private(response)
        if not good:
            self.lifecycle.fail()
            return
        if not self._is_late(response):
            self.lifecycle.succeed()
            return
        if not recorded:
            try:
                self._presume(response)
            except Error:
                logger.exception(
                    "The return of %s is not recorded", self.lifecycle.reference
                )
        if response.streaming:
            Stream(self, response, head=self._head).replace()
        else:
            patches.extend_render(
                response, self.lifecycle.succeed, self.lifecycle.cancel
            )


class OffExecution:
    """One run of a view whose guard is off.

    Nothing is held, so the execution is only made by *begin* once the view uses its
    guard. Otherwise a guard that is off would cost much more than the decorators of
    feature flags do.
    """

    def __init__(self, request: Any, begin: Callable[[], Execution | None]) -> None:
        self._request = request
        self._begin = begin
        self._execution: Execution | None = None

    def run(self, work: Callable[[], Any], aliases: list[str]) -> Any:
        """Run the view by *work()*, in the transactions of *aliases*."""
        self._request.meterly = SimpleLazyObject(self._guard)
        with atomic(aliases):
            response = work()
            refuse_unless_response(response)
            if is_unfinished(response):
                # Its chunks may still hand the work off.
                self._guard()
            execution = self._execution
            good = execution is not None and execution.is_good(response, aliases)
        if execution is None:
            responses.keep_private(response)
        else:
            execution.conclude(response, good)
        return response

    async def arun(self, work: Callable[[], Any]) -> Any:
        """Run the async view by *work()*."""
        # An async view cannot make its guard, which may ask sync functions.
        self._request.meterly = await to_the_end(self._guard)
        assert self._execution is not None
        return await self._execution.arun(work)

    def _guard(self) -> Guard:
        execution = self._execution or self._begin()
        # There is none if nobody pays, and here nobody has to.
        assert execution is not None
        self._execution = execution
        return Guard(execution.lifecycle)


def refuse_unless_response(response: Any) -> None:
    """Raise ``TypeError`` if the return value of a view is not a response."""
    if isinstance(response, HttpResponseBase):
        return
    if isawaitable(response):
        if iscoroutine(response):
            response.close()
        raise TypeError(
            "meterly_guard cannot guard a view that returns a coroutine: it "
            "would be charged before it ran."
        )
    # A decorator above may make a response of it, and the work would be free.
    raise TypeError(_NO_RESPONSE.format(type(response).__name__))


def is_unfinished(response: HttpResponseBase) -> bool:
    """Return whether *response* is still to be rendered, or sent as a stream."""
    return response.streaming or not getattr(response, "is_rendered", True)


def _is_cancelled() -> bool:
    """Return whether this task was cancelled, and the view did not just raise it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_NO_RESPONSE = (
    "meterly_guard guards a view that returns an HttpResponse, and this one has "
    "returned {}. Nothing is charged. If a decorator above makes a response of it, "
    "guard what that decorator makes. With django-ninja, for example, put "
    "@decorate_view(meterly_guard(...)) below @api.post(...)."
)
