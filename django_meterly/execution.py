"""Running a view under a guard: sync or async, whatever it returns."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from inspect import isawaitable, isclass, iscoroutine
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction
from django.db import connections, transaction
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from . import journal, responses
from .guards import Guard, to_the_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from .options import GuardOptions

    View = Callable[..., Any]


def guard_view(
    view: View, options_for: Callable[[HttpRequest], GuardOptions | None]
) -> View:
    """Return *view*, guarded as *options_for* says at the time of each request.

    ``None`` for a request means that it is not guarded. Raises ``TypeError`` for
    what cannot be guarded.
    """
    _refuse(view)
    # as_view() names all views alike, and a partial has no name of its own.
    named = getattr(view, "view_class", None) or getattr(view, "cls", view)
    name = getattr(named, "__qualname__", type(view).__qualname__)
    guarded = (_guard_async if _is_async(view) else _guard_sync)(
        view, partial(_begin, name, options_for)
    )
    guarded.meterly_guarded = True  # type: ignore[attr-defined]
    return guarded


def _begin(
    name: str,
    options_for: Callable[[HttpRequest], GuardOptions | None],
    request: HttpRequest,
    args: Any,
    kwargs: Any,
) -> Work | HttpResponseBase | None:
    """Reserve; return what is to be concluded, or the answer that refuses.

    A request that costs nothing has neither.
    """
    if not isinstance(request, HttpRequest):
        raise TypeError(_NOT_A_VIEW.format(type(request).__name__))
    options = options_for(request)
    if options is None or not options.costs(request.method):
        return None
    try:
        work = options.guard(name, request, *args, **kwargs)
        if work is None:
            return responses.login_required(request)
        work.reserve()
    except responses.RENDERED as exc:
        return responses.render(request, exc)
    request.meterly = work  # type: ignore[attr-defined]
    return Work(work, options, head=request.method == "HEAD")


def _guard_sync(view: View, begin: Callable[..., Any]) -> View:
    # What the view exempts itself from. A copy: ``wraps`` hands the very set on,
    # and ours is about to say something else.
    exempt = set(getattr(view, "_non_atomic_requests", ()))
    taken_over = _TakenOver(connections)

    @wraps(view)
    def _view_wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        begun = begin(request, args, kwargs)
        if isinstance(begun, HttpResponseBase):
            return begun
        aliases = _atomic_aliases(exempt | taken_over.exempted)
        call = partial(view, request, *args, **kwargs)
        if begun is None:
            with _atomic(aliases):
                return call()
        return begun.run(call, aliases)

    _view_wrapper._non_atomic_requests = taken_over  # type: ignore[attr-defined]
    return _view_wrapper


def _guard_async(view: View, begin: Callable[..., Any]) -> View:
    # Without a takeover: Django refuses async views under ATOMIC_REQUESTS.

    @wraps(view)
    async def _view_wrapper(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            begun = await to_the_end(begin, request, args, kwargs)
        except asyncio.CancelledError:
            if work := getattr(request, "meterly", None):
                await to_the_end(work.abandon)
            raise
        if isinstance(begun, HttpResponseBase):
            return begun
        call = partial(view, request, *args, **kwargs)
        return await (call() if begun is None else begun.arun(call))

    return _view_wrapper


class Work:
    """A view at work under its guard."""

    def __init__(
        self, guard: Guard, options: GuardOptions, *, head: bool = False
    ) -> None:
        self.guard = guard
        self.options = options
        # Servers read the whole stream that answers a HEAD, and drop it.
        self._head = head
        self._sending = False

    def run(self, call: View, aliases: list[str]) -> Any:
        """Run the view by *call*, in the transactions of *aliases*, and conclude."""
        decided = False
        try:
            with _atomic(aliases):
                response = call()
                good = self._is_good(response) and not any(
                    connections[alias].needs_rollback for alias in aliases
                )
                if good and _finished(response) and journal.alias() in aliases:
                    # The last statement inside: work and decision commit together.
                    self.guard.decide()
                    decided = True
        except BaseException:
            # Whether the COMMIT took place only the row knows.
            self.guard.fail()
            raise
        if decided:
            self.guard.confirm()
        else:
            self._conclude(response, good)
        return response

    async def arun(self, call: View) -> Any:
        """Run the async view by *call*, and conclude, even if it is cancelled."""
        try:
            response = await call()
            good = self._is_good(response)
        except GeneratorExit:
            # A coroutine that is being closed cannot await: the lease releases.
            raise
        except BaseException:
            await to_the_end(self.guard.fail)
            raise
        await to_the_end(self._conclude, response, good)
        return response

    def _is_good(self, response: Any) -> bool:
        if isawaitable(response):
            if iscoroutine(response):
                response.close()
            raise TypeError(
                "meterly_guard cannot guard a view that returns a coroutine: it "
                "would be charged before it ran."
            )
        # What is no response is left to Django, which says so.
        return isinstance(response, HttpResponseBase) and self.options.succeeded(
            response
        )

    def _conclude(self, response: Any, good: bool) -> None:
        if not good:
            self.guard.fail()
        elif _finished(response):
            self.guard.succeed()
        elif not response.streaming:
            self._conclude_after_rendering(response)
        else:
            # The last chunk decides.
            chunks = response.streaming_content
            response.streaming_content = (
                self._asend(chunks) if response.is_async else self._send(chunks)
            )
            response._resource_closers.append(self._close)

    def _conclude_after_rendering(self, response: Any) -> None:
        render = response.render

        def render_and_conclude() -> Any:
            # Once: the rendered response must be picklable again.
            response.__dict__.pop("render", None)
            try:
                rendered = render()
            except BaseException:
                self.guard.fail()
                raise
            self.guard.succeed()
            return rendered

        response.render = render_and_conclude

    def _close(self) -> None:
        # A stream that is never begun runs no code of ours, and an async one that
        # is abandoned may be finalized any time later.
        if self._sending:
            self.guard.disconnect(self.options.on_disconnect)
        else:
            self.guard.abandon()

    def _send(self, chunks: Iterable[Any]) -> Iterator[Any]:
        if self._head:
            return
        self._sending = True
        try:
            yield from chunks
        except GeneratorExit:
            self.guard.disconnect(self.options.on_disconnect)
            raise
        except BaseException:
            self.guard.fail()
            raise
        self.guard.succeed()

    async def _asend(self, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
        if self._head:
            return
        self._sending = True
        try:
            async for chunk in chunks:
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            await to_the_end(self.guard.disconnect, self.options.on_disconnect)
            raise
        except BaseException:
            await to_the_end(self.guard.fail)
            raise
        await to_the_end(self.guard.succeed)


class _TakenOver(set[str]):
    """Every alias, so that Django opens no transaction around the guard.

    Django's ``non_atomic_requests`` applied on top adds to this set: those
    aliases are the ones the view is to run without.
    """

    def __init__(self, aliases: Iterable[str]) -> None:
        super().__init__(aliases)
        self.exempted: set[str] = set()

    def add(self, alias: str) -> None:
        self.exempted.add(alias)
        super().add(alias)


_NOT_A_VIEW = (
    "meterly_guard got a {} where a view gets its HttpRequest. Put the guard around "
    "as_view() in the URLconf, or above @api_view, not on a method."
)


def _refuse(view: View) -> None:
    """Raise ``TypeError`` for what cannot be guarded."""
    if isclass(view):
        raise TypeError(
            f"meterly_guard guards a view function. Guard {view.__name__}.as_view() "
            "in the URLconf instead of the class."
        )
    if not callable(view):
        raise TypeError(f"meterly_guard guards a view function, not {view!r}.")


def _is_async(view: Any) -> bool:
    while isinstance(view, partial):
        view = view.func
    return iscoroutinefunction(view) or iscoroutinefunction(
        getattr(type(view), "__call__", None)  # noqa: B004
    )


def _atomic_aliases(exempt: set[str]) -> list[str]:
    """Return the aliases whose transaction Django would have opened, ours first."""
    aliases = [
        alias
        for alias, options in connections.settings.items()
        if options["ATOMIC_REQUESTS"] and alias not in exempt
    ]
    # Outermost: its COMMIT comes last, when the others' are through.
    return sorted(aliases, key=lambda alias: alias != journal.alias())


@contextmanager
def _atomic(aliases: list[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for alias in aliases:
            stack.enter_context(transaction.atomic(using=alias))
        yield


def _finished(response: HttpResponseBase) -> bool:
    """Return whether nothing of *response* remains to be produced."""
    return not response.streaming and getattr(response, "is_rendered", True)
