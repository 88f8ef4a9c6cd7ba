"""Running a view under a guard: sync or async, whatever it returns."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from inspect import isawaitable, isclass, iscoroutine
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction
from django.db import Error, connections, transaction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.views import View as DjangoView
from django.views.generic import RedirectView

from . import db, journal, methods, responses
from .conf import meterly_settings
from .errors import MeterlyUsageError
from .guards import Guard, to_the_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from .heart import Heart
    from .options import GuardOptions

    View = Callable[..., Any]
    OptionsFor = Callable[[HttpRequest], GuardOptions | None]


logger = logging.getLogger(__name__)


def guard_view(view: View, options_for: OptionsFor) -> View:
    """Return *view*, guarded as *options_for* says at the time of each request.

    ``None`` for a request means that it is not guarded. *view* is a view function,
    what ``as_view()`` returned, or a handler method. A view of Django REST framework
    is guarded where its handler is called: by then it is known who calls. Raises
    ``TypeError`` for what cannot be guarded.
    """
    _refuse(view)
    guard = _ViewGuard(view, options_for)
    if is_rest(class_of(view)):
        return _guard_handlers(view, guard)
    guarded: Any = _guard(view, guard.begin)
    guarded.meterly_costs = _any_costs(
        guard.costs, getattr(view, "meterly_costs", None)
    )
    return guarded  # type: ignore[no-any-return]


def guard_class(view: View, options_for: OptionsFor | None) -> View:
    """Return *view*, which ``as_view()`` made of a class with ``MeterlyGuardMixin``.

    For a request that a guarded handler answers, Django opens no transaction under
    ``ATOMIC_REQUESTS``: the handler's guard does. *options_for* guards whichever
    handler a request selects.
    """
    if getattr(class_of(view).dispatch, "meterly_guarded", False):
        raise TypeError(_NOT_ON_DISPATCH)
    guard = None if options_for is None else _ViewGuard(view, options_for)
    return _guard_handlers(view, guard)


def install_guards(instance: DjangoView, request: Any) -> None:
    """Guard the handler that ``dispatch()`` calls, on *instance* only.

    That need not be the handler that *request* selects now: for example, a class may
    let a form turn its POST into a DELETE. If the handler calls others, they are part
    of its work and not guarded.

    For the hook of a view's class that runs once for a request, before its handler:
    ``setup()`` in Django, ``initial()`` in Django REST framework.
    """
    dispatch = _Dispatch.of(getattr(request, "_request", request))
    if dispatch is None or dispatch.installed:
        return
    dispatch.installed = True
    if not dispatch.waiting:
        return
    plain = {
        method: getattr(instance, method)
        for method in instance.http_method_names
        if method != "options" and hasattr(instance, method)
    }

    guarded: dict[str, Any] = {}

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        if method not in guarded:
            handler = plain.pop(method)
            for guard in reversed(dispatch.waiting):
                handler = _guard(handler, partial(dispatch.begin, guard))
            # Guarded it stays: a dispatch() may try it again.
            guarded[method] = handler
            for name, other in {**plain, method: handler}.items():
                setattr(instance, name, other)
        return guarded[method](*args, **kwargs)

    for method, handler in plain.items():
        setattr(instance, method, wraps(handler)(partial(call, method)))


def handlers(view: Any) -> dict[str, Any]:
    """Return the handlers of a class-based *view*, by HTTP method in lower case."""
    cls = class_of(view)
    if cls is None:
        return {}
    view = _as_view(view)
    settings = getattr(view, "view_initkwargs", {})
    answered = settings.get("http_method_names", cls.http_method_names)
    # A view set's as_view() was told which of its methods answer what.
    names = getattr(view, "actions", None) or {}
    found = {
        method: getattr(cls, names.get(method, method))
        for method in answered
        if (method in names or not names) and hasattr(cls, names.get(method, method))
    }
    if "get" in found:
        found.setdefault("head", found["get"])
    return found


def _answers_options(view: Any) -> bool:
    """Return whether *view* has a handler that answers OPTIONS and nothing else.

    Functions have none, and a class without any handler does its work in
    ``dispatch()``. A handler that also answers POST, for example, would do the work of
    POST for nothing.
    """
    found = handlers(view)
    own = found.pop("options", None)
    return bool(found) and own not in [RedirectView.options, *found.values()]


def _allowed(view: Any) -> list[str]:
    """Return what ``Allow`` says where the guard of *view* answers instead of it."""
    names = [name.upper() for name in handlers(view) if name != "trace"]
    if len(names) > 1:
        return names
    required = methods.required(view)
    return methods.ALL_BUT_TRACE if required is None else required


def is_guarded(view: Any) -> bool:
    """Return whether *view*, or a handler of it, has a guard in the code."""
    return any(
        getattr(each, "meterly_guarded", False)
        for each in (view, *handlers(view).values())
    )


class NoGuard:
    """What ``request.meterly`` is while nothing is guarded: every use says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __repr__(self) -> str:
        return f"<NoGuard: {self._why}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # Of a protocol, copying for one: nobody asked for the guard.
            raise AttributeError(name)
        raise MeterlyUsageError(f"There is no request.meterly.{name} here. {self._why}")


class _Call:
    """How a guarded view or handler was called."""

    def __init__(self, view: View, args: tuple[Any, ...], kwargs: Any) -> None:
        #: Whether a class's ``dispatch()`` called it, in its transaction.
        self.dispatched = _is_bound(view)
        if args and isinstance(args[0], DjangoView):
            self.dispatched, args = True, args[1:]
        #: What the view got: Django's request, or the one that DRF wraps around it.
        self.given: Any = args[0] if args else kwargs.get("request")
        self.request: Any = getattr(self.given, "_request", self.given)
        if not isinstance(self.request, HttpRequest):
            raise TypeError(_NOT_A_VIEW.format(type(self.given).__name__))
        if self.dispatched and getattr(view, "__name__", "") == "dispatch":
            raise TypeError(_NOT_ON_DISPATCH)
        self.rest = self.request is not self.given
        self.dispatched = self.dispatched or self.rest
        self.args = args[1:]
        self.kwargs = {key: kwargs[key] for key in kwargs if args or key != "request"}


class _ViewGuard:
    """The guard of one view: its name, and what it is to do for a request."""

    def __init__(self, view: View, options_for: OptionsFor) -> None:
        #: The view's name: for people, and with its module for the journal.
        self.name, self.full_name = _names(view)
        self.options_for = options_for
        #: What ``Allow`` says where the guard answers OPTIONS and TRACE itself.
        self.allowed = None if _answers_options(view) else _allowed(view)

    def costs(self, request: HttpRequest) -> bool:
        options = self.options_for(request)
        return options is not None and options.costs(request.method)

    def begin(self, call: _Call) -> Execution | HttpResponseBase | None:
        """Reserve; return what runs the view, or the response that refuses it.

        A request that costs nothing has neither. DRF has its refusals raised.
        """
        request = call.request
        options = self.options_for(request)
        if options is None:
            return None
        if self.allowed is not None and (
            answer := methods.answer(request.method, self.allowed)
        ):
            return answer
        if not options.costs(request.method):
            if not isinstance(getattr(request, "meterly", None), Guard):
                why = _FREE if request.method == "OPTIONS" else _FREE + _NAME_IT
                request.meterly = NoGuard(why.format(*[request.method] * 2))
            return None
        try:
            with db.serving():
                # Who pays may be read from the database, too.
                guard = options.guard(self.name, call.given, *call.args, **call.kwargs)
            if guard is None:
                return self._refuse_nobody(call)
            guard.name = self.full_name
            guard.reserve()
        except responses.RENDERED as exc:
            if call.rest:
                from .rest_framework.exceptions import counterpart

                _prepare_refusal(call)
                raise counterpart(exc) from exc
            return responses.render(request, exc)
        request.meterly = guard
        if dispatch := _Dispatch.of(request):
            dispatch.begun.append(guard)
        return Execution(guard, options, head=request.method == "HEAD")

    def _refuse_nobody(self, call: _Call) -> HttpResponseBase:
        if call.rest:
            from .rest_framework.exceptions import nobody_pays

            _prepare_refusal(call)
            raise nobody_pays(call.given)
        return responses.nobody_pays(call.request)


def _prepare_refusal(call: _Call) -> None:
    """Have the view's exception handler answer in full, and for nobody else."""
    from .rest_framework.exceptions import complete_answers

    view = call.given.parser_context.get("view")
    if view is not None:
        complete_answers(view)
    # These headers DRF puts on whatever its exception handler makes of a refusal.
    headers = getattr(view, "headers", None)
    if headers is not None:
        headers["Cache-Control"] = responses.UNSHARED


def _guard(view: View, begin: Callable[[_Call], Any]) -> View:
    guarded: Any = (_guard_async if _is_async(view) else _guard_sync)(view, begin)
    guarded.meterly_guarded = True
    return guarded  # type: ignore[no-any-return]


def _guard_sync(view: View, begin: Callable[[_Call], Any]) -> View:
    # What the view exempts itself from. A copy: ``wraps`` hands the very set on,
    # and ours is about to say something else.
    exempt = set(getattr(view, "_non_atomic_requests", ()))
    taken_over = _TakenOver(connections)

    @wraps(view)
    def _view_wrapper(*args: Any, **kwargs: Any) -> Any:
        called = _Call(view, args, kwargs)
        begun = begin(called)
        if isinstance(begun, HttpResponseBase):
            return begun
        if called.dispatched:
            aliases = _Dispatch.take_aliases(called.request, view)
        else:
            aliases = _atomic_aliases(exempt | taken_over.exempted)
        if begun is None and not aliases:
            return view(*args, **kwargs)
        call = partial(view, *args, **kwargs)
        if begun is None:
            with _atomic(aliases):
                return call()
        return begun.run(call, aliases)

    _view_wrapper._non_atomic_requests = taken_over  # type: ignore[attr-defined]
    return _view_wrapper


def _guard_async(view: View, begin: Callable[[_Call], Any]) -> View:
    # Without a takeover: Django refuses async views under ATOMIC_REQUESTS.

    @wraps(view)
    async def _view_wrapper(*args: Any, **kwargs: Any) -> Any:
        called = _Call(view, args, kwargs)
        try:
            begun = await to_the_end(begin, called)
        except asyncio.CancelledError:
            if isinstance(guard := getattr(called.request, "meterly", None), Guard):
                await to_the_end(guard.abandon)
            raise
        if isinstance(begun, HttpResponseBase):
            return begun
        call = partial(view, *args, **kwargs)
        return await (call() if begun is None else begun.arun(call))

    return _view_wrapper


class _Dispatch:
    """What a request for a class-based view leaves to the handler it selects."""

    def __init__(self, request: HttpRequest) -> None:
        self.request = request
        #: The databases whose transactions the handler's guard is to open.
        self.aliases: list[str] = []
        #: The guards around the view that have not begun, the outermost first.
        self.waiting: list[_ViewGuard] = []
        self.begun: list[Guard] = []
        self.installed = False

    @staticmethod
    def of(request: Any) -> _Dispatch | None:
        dispatch: _Dispatch | None = request.__dict__.get("_meterly_dispatch")
        return dispatch

    @classmethod
    def prepare(
        cls, request: Any, guard: _ViewGuard | None, aliases: list[str]
    ) -> _Dispatch:
        """Leave *guard*, if it costs something, and *aliases* to the handler."""
        dispatch = cls.of(request) or cls(request)
        request._meterly_dispatch = dispatch
        dispatch.aliases += aliases
        if guard is not None and guard.costs(request):
            dispatch.waiting.append(guard)
        return dispatch

    @classmethod
    def take_aliases(cls, request: Any, handler: Any) -> list[str]:
        """Return the transactions that the guard of *handler* is to open.

        The innermost guard opens them, for those around it do not reserve inside.
        """
        if getattr(handler, "meterly_guarded", False):
            return []
        dispatch = request.__dict__.pop("_meterly_dispatch", None)
        return dispatch.aliases if dispatch else []

    def begin(self, guard: _ViewGuard, call: _Call) -> Any:
        if guard in self.waiting:
            self.waiting.remove(guard)
        # Else a dispatch() tries its handler again: another piece of work.
        return guard.begin(call)

    def refuse_bypass(self, response: Any, *, rest: bool) -> None:
        """Raise ``MeterlyUsageError`` for work that went past its guard.

        A ``dispatch()`` of Django's may answer by itself: with a log-in page, say.
        """
        if not self.waiting or (self.installed and not rest):
            return
        options = self.waiting[0].options_for(self.request)
        if (
            options is not None
            and isinstance(response, HttpResponseBase)
            and options.succeeded(response)
        ):
            raise MeterlyUsageError(_PAST_THE_GUARD.format(self.waiting[0].name))

    def abandon(self) -> None:
        for guard in self.begun:
            guard.abandon()

    def leave(self) -> None:
        self.request.__dict__.pop("_meterly_dispatch", None)


def _guard_handlers(view: View, guard: _ViewGuard | None) -> View:
    """Return *view*, of a class, with *guard* on the handler a request selects."""
    exempt = set(getattr(view, "_non_atomic_requests", ()))
    taken_over = _TakenOver(connections)
    rest = is_rest(class_of(view))
    costs = _any_costs(
        None if guard is None else guard.costs,
        getattr(view, "meterly_costs", partial(_handler_costs, view)),
    )
    guarded: Any
    if rest:
        _hook_initial(class_of(view))

    def free(*args: Any, **kwargs: Any) -> Any:
        """Return the guard's own answer to a request that costs nothing, if any."""
        return None if guard is None else guard.begin(_Call(view, args, kwargs))

    if _is_async(view):

        @wraps(view)
        async def _view_wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
            call = partial(view, request, *args, **kwargs)
            if not (_Dispatch.of(request) or costs(request)):
                answer = free(request, *args, **kwargs)
                return await call() if answer is None else answer
            dispatch = _Dispatch.prepare(request, guard, [])
            try:
                response = await call()
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

        guarded = _view_wrapper

    else:

        @wraps(view)
        def _view_wrapper(request: Any, *args: Any, **kwargs: Any) -> Any:
            aliases = _atomic_aliases(exempt | taken_over.exempted)
            call = partial(view, request, *args, **kwargs)
            # One wrapper around is enough to leave the transaction to the handler.
            if not (_Dispatch.of(request) or costs(request)):
                if (answer := free(request, *args, **kwargs)) is not None:
                    return answer
                with _atomic(aliases):
                    return call()
            dispatch = _Dispatch.prepare(request, guard, aliases)
            try:
                with _unspoiled(aliases):
                    response = call()
                dispatch.refuse_bypass(response, rest=rest)
            except BaseException:
                dispatch.abandon()
                raise
            finally:
                dispatch.leave()
            return response

        guarded = _view_wrapper
        guarded._non_atomic_requests = taken_over

    guarded.meterly_guarded = guard is not None or is_guarded(view)
    guarded.meterly_costs = costs
    return guarded  # type: ignore[no-any-return]


def _any_costs(
    *costs: Callable[[HttpRequest], bool] | None,
) -> Callable[[HttpRequest], bool]:
    return lambda request: any(each(request) for each in costs if each is not None)


def _handler_costs(view: View, request: HttpRequest) -> bool:
    handler = handlers(view).get((request.method or "").lower())
    costs = getattr(handler, "meterly_costs", None)
    return costs is not None and costs(request)


def _hook_initial(cls: Any) -> None:
    """Let ``initial()`` of a DRF class end with what ``install_guards`` does.

    It acts on requests that a guard has marked, and on no others.
    """
    initial = cls.initial
    if getattr(initial, "meterly_hook", False):
        return

    @wraps(initial)
    def initial_and_guards(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        initial(self, request, *args, **kwargs)
        install_guards(self, request)

    initial_and_guards.meterly_hook = True  # type: ignore[attr-defined]
    cls.initial = initial_and_guards


class Execution:
    """One run of a view under its guard."""

    def __init__(
        self, guard: Guard, options: GuardOptions, *, head: bool = False
    ) -> None:
        self.guard = guard
        self.options = options
        # Servers read the whole stream that answers a HEAD, and drop it.
        self._head = head
        self._heart: Heart | None = None

    def run(self, call: View, aliases: list[str]) -> Any:
        """Run the view by *call*, in the transactions of *aliases*, and conclude."""
        recorded = False
        try:
            with _atomic(aliases) if aliases else nullcontext():
                response = call()
                good = self._is_good(response) and not any(
                    connections[alias].needs_rollback for alias in aliases
                )
                if good and journal.alias() in aliases:
                    # The last statement inside: work and decision commit together.
                    recorded = True
                    if self._is_late(response):
                        self._presume(response)
                    else:
                        self.guard.decide()
        except BaseException:
            # Whether the COMMIT took place only the row knows.
            self.guard.fail()
            raise
        self._conclude(response, good, recorded=recorded)
        return response

    async def arun(self, call: View) -> Any:
        """Run the async view by *call*, and conclude, even if it is cancelled."""
        try:
            response = await call()
            good = self._is_good(response)
        except GeneratorExit:
            # A coroutine that is being closed cannot await: the lease releases.
            raise
        except asyncio.CancelledError:
            if _is_cancelled():
                await to_the_end(self.guard.disconnect, self._on_disconnect)
            else:
                await to_the_end(self.guard.fail)
            raise
        except BaseException:
            await to_the_end(self.guard.fail)
            raise
        await to_the_end(self._conclude, response, good)
        return response

    @property
    def _on_disconnect(self) -> str:
        policy: str = self.options.on_disconnect or meterly_settings.ON_DISCONNECT
        return policy

    def _is_good(self, response: Any) -> bool:
        if isawaitable(response):
            if iscoroutine(response):
                response.close()
            raise TypeError(
                "meterly_guard cannot guard a view that returns a coroutine: it "
                "would be charged before it ran."
            )
        if not isinstance(response, HttpResponseBase):
            # Somebody above may make a response of it: then the work would be free.
            raise TypeError(_NO_RESPONSE.format(type(response).__name__))
        return self.options.succeeded(response)

    def _is_late(self, response: HttpResponseBase) -> bool:
        """Return whether something of *response* remains to be produced.

        Not if the work was handed off: then the task decides, and the response is
        only what tells so.
        """
        return not self.guard.is_handed_off and (
            response.streaming or not getattr(response, "is_rendered", True)
        )

    def _presume(self, response: HttpResponseBase) -> None:
        # A stream's work is its chunks. If it is never begun, its reader has left.
        if not response.streaming or self._on_disconnect == "charge":
            self.guard.presume()

    def _conclude(self, response: Any, good: bool, *, recorded: bool = False) -> None:
        """Decide by *response*, or let its rendering or its last chunk decide.

        What the return decides may be *recorded* in the view's transaction already.
        """
        if isinstance(response, HttpResponseBase):
            responses.keep_private(response)
        if not good:
            self.guard.fail()
        elif not self._is_late(response):
            self.guard.confirm() if recorded else self.guard.succeed()
        else:
            if not recorded:
                try:
                    self._presume(response)
                except Error:
                    logger.exception("The return of %s is not recorded", self.guard)
            if response.streaming:
                self._conclude_after_sending(response)
            else:
                self._conclude_after_rendering(response)

    def _conclude_after_sending(self, response: Any) -> None:
        chunks = response.streaming_content
        response.streaming_content = (
            self._asend(response, chunks)
            if response.is_async
            else self._send(response, chunks)
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
                self.guard.cancel()
                raise
            self.guard.succeed()
            return rendered

        response.render = render_and_conclude

    def _close(self) -> None:
        # A stream that is never begun runs no code of ours, and an async one that
        # is abandoned may be finalized any time later.
        self.guard.disconnect(self._on_disconnect)
        self._stop_heart()

    def _send(self, response: Any, chunks: Iterable[Any]) -> Iterator[Any]:
        if self._head:
            return
        self._start_heart()
        left = _length(response)
        try:
            for chunk in chunks:
                if left is not None:
                    left -= len(chunk)
                    if left <= 0:
                        # With this chunk the reader has everything.
                        self._succeed()
                yield chunk
        except GeneratorExit:
            self._close()
            raise
        except BaseException:
            self.guard.cancel()
            raise
        else:
            self._succeed()
        finally:
            self._stop_heart()

    async def _asend(
        self, response: Any, chunks: AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        if self._head:
            return
        await to_the_end(self._start_heart)
        left = _length(response)
        try:
            async for chunk in chunks:
                if left is not None:
                    left -= len(chunk)
                    if left <= 0:
                        await to_the_end(self._succeed)
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            await to_the_end(self._close)
            raise
        except BaseException:
            await to_the_end(self.guard.cancel)
            raise
        else:
            await to_the_end(self._succeed)
        finally:
            self._stop_heart()

    def _succeed(self) -> None:
        self._stop_heart()
        self.guard.succeed()

    def _start_heart(self) -> None:
        """Keep lease and hold alive beside the stream; no chunk waits for it."""
        self._heart = self.guard.start_heart(at_once=True)

    def _stop_heart(self) -> None:
        if self._heart is not None:
            self._heart.stop()


def _is_cancelled() -> bool:
    """Return whether somebody has cancelled this task, or its work only says so."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _length(response: Any) -> int | None:
    """Return how many bytes *response* says that its stream has, if it says so."""
    length = response.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


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
    "meterly_guard got a {} where a view gets its request. It guards view functions, "
    "what as_view() returns, and the handlers of class-based views: post() and the "
    "like, or an @action."
)
_NO_RESPONSE = (
    "meterly_guard guards a view that returns an HttpResponse, and this one has "
    "returned {}. Nothing is charged. If a decorator above makes a response of it, "
    "guard what that decorator makes. With django-ninja, for example, put "
    "@decorate_view(meterly_guard(...)) below @api.post(...)."
)
_ABOVE_NINJA = (
    "meterly_guard guards nothing on {0}, which is an operation of django-ninja "
    "already: ninja calls it without the guard. Put "
    "@decorate_view(meterly_guard(...)) below @api.post(...)."
)
_NOT_ON_DISPATCH = (
    "meterly_guard cannot guard dispatch(): it runs before it is known who asks, and "
    "answers what is free, too. Set guard_options on the class and let it inherit from "
    "MeterlyGuardMixin, or put the guard around as_view() in the URLconf, or on the "
    "handler, post() say."
)
_PAST_THE_GUARD = (
    "{} answered without calling the handler that is guarded, so nothing was charged. "
    "If its class overrides dispatch(), setup() or initial(), call super() there."
)
_FREE = "{} costs nothing on this view."
_NAME_IT = ' To charge for it, name it: meterly_guard(..., methods=["{}"]).'


def _refuse(view: View) -> None:
    """Raise ``TypeError`` for what cannot be guarded."""
    if isclass(view):
        raise TypeError(
            f"meterly_guard guards a view function. Guard {view.__name__}.as_view() "
            "in the URLconf instead of the class, or use MeterlyGuardMixin."
        )
    if not callable(view):
        raise TypeError(f"meterly_guard guards a view function, not {view!r}.")
    ninja = sys.modules.get("ninja.operation")
    operation = getattr(view, "_ninja_operation", None)
    if ninja is not None and isinstance(operation, ninja.Operation):
        # django-ninja calls what it was given, and not what is made of that.
        raise TypeError(_ABOVE_NINJA.format(view.__name__))


def _names(view: Any) -> tuple[str, str]:
    """Return the name of the work, without its module and with it."""
    # as_view() names all views alike, and so does django-ninja, by Operation.run().
    named = class_of(view) or _operation(view) or _unpartial(view)
    name = getattr(named, "__qualname__", type(named).__qualname__)
    if isclass(named) and not name.endswith(named.__name__):
        # @api_view names its class after the function, by __name__ only.
        name = named.__name__
    # The journal has 255 characters for it, the default reference fewer.
    short, full = (
        text.encode("ascii", "backslashreplace").decode()[:200]
        for text in (name.rpartition("<locals>.")[2], f"{named.__module__}.{name}")
    )
    return short, full


def _operation(view: Any) -> Any:
    """Return the function whose ``run()``, by an ``Operation`` of ninja, *view* is."""
    ninja = sys.modules.get("ninja.operation")
    for layer in methods.layers(view):
        operation = getattr(layer, "__self__", None)
        if ninja is not None and isinstance(operation, ninja.Operation):
            return operation.view_func
    return None


def class_of(view: Any) -> Any:
    """Return the class that *view* is ``as_view()`` of, or ``None``."""
    view = _as_view(view)
    return getattr(view, "cls", None) or getattr(view, "view_class", None)


def _as_view(view: Any) -> Any:
    """Return what ``as_view()`` returned, below wrappers and partials, or ``None``."""
    for layer in methods.layers(view):
        for name in ("cls", "view_class"):
            cls = getattr(layer, name, None)
            if isclass(cls) and issubclass(cls, DjangoView):
                return layer
    return None


def is_rest(cls: Any) -> bool:
    """Return whether *cls* is a view of Django REST framework, which is not imported.

    By its type: others have attributes of the same names, as ``FormView.initial``.
    """
    rest = sys.modules.get("rest_framework.views")
    return rest is not None and isclass(cls) and issubclass(cls, rest.APIView)


def _is_bound(view: Any) -> bool:
    """Return whether *view* is a handler bound to its view, below any decorators."""
    return any(
        isinstance(getattr(layer, "__self__", None), DjangoView)
        for layer in methods.layers(view)
    )


def _unpartial(view: Any) -> Any:
    while isinstance(view, partial):
        view = view.func
    return view


def _is_async(view: Any) -> bool:
    view = _unpartial(view)
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


@contextmanager
def _unspoiled(aliases: list[str]) -> Iterator[None]:
    """Undo DRF's ``set_rollback()`` on a block that is not the request's.

    It asks for it after every error, of whatever block is open on a database with
    ``ATOMIC_REQUESTS``. While guards open the transactions, that is a test's own.
    """
    spared = [
        connections[alias]
        for alias in aliases
        if connections[alias].in_atomic_block and not connections[alias].needs_rollback
    ]
    try:
        yield
    finally:
        for connection in spared:
            if connection.in_atomic_block:
                connection.set_rollback(False)
