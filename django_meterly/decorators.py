"""``meterly_guard``: a view that runs only when it is paid for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import isawaitable, isclass, iscoroutine
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.db import connections, transaction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string

from . import journal, responses
from .conf import meterly_settings
from .guards import Guard, guard
from .transports.base import check_amount, check_ttl, check_unit

View = Callable[..., HttpResponseBase]
#: Reading is free, unless ``methods`` says otherwise.
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def meterly_guard(
    unit: str | None = None,
    amount: int | Callable[..., int] = 1,
    *,
    customer: Callable[..., Any] | None = None,
    reference: str | Callable[..., str] | None = None,
    idempotency_key: Callable[..., str | None] | None = None,
    ttl_seconds: int | None = None,
    methods: Iterable[str] | None = None,
    success: Callable[[HttpResponseBase], bool] | None = None,
) -> Callable[[View], View]:
    """Guard a view: reserve credits, run it, then commit or release.

    ::

        @meterly_guard("image_credits", 25)
        def render(request): ...

    *unit* defaults to ``DEFAULT_UNIT``. *amount*, *customer*, *reference* and
    *idempotency_key* may be callables; they get the view's arguments. The
    customer is who ``CUSTOMER_RESOLVER`` finds, the logged-in user by default;
    when there is none, a browser is sent to the log-in page and everybody else
    gets 401. *methods* are the HTTP methods that cost something: all but
    GET, HEAD, OPTIONS and TRACE by default. *success* decides by the response:
    a status below 400 by default.

    Too few credits are answered by 402, a ledger that cannot be asked by 503,
    a used idempotency key by 409; the view does not run then. While it runs,
    ``request.meterly`` is its ``Guard``.

    Under ``ATOMIC_REQUESTS`` the guard opens the view's transaction itself,
    after the credits are reserved, and records success in it as its last
    statement, so that the work and its charge are committed together or not
    at all. A template response or a stream is charged when it was rendered or
    sent to its end.

    Raises ``ValueError`` and ``TypeError`` for options out of bounds when the
    view is defined.
    """
    if unit is not None:
        check_unit(unit)
    if not callable(amount):
        check_amount(amount)
    if ttl_seconds is not None:
        check_ttl(ttl_seconds)
    if isinstance(methods, str):
        raise TypeError(f"methods is a list of HTTP methods, not {methods!r}.")
    charged = None if methods is None else {method.upper() for method in methods}
    if charged and "GET" in charged:
        # Or the work could be had for nothing.
        charged.add("HEAD")

    def decorator(view: View) -> View:
        _refuse(view)
        # What the view exempts itself from. A copy: ``wraps`` hands the very
        # set on, and ours is about to say something else.
        exempt = set(getattr(view, "_non_atomic_requests", ()))

        def start(request: HttpRequest, *args: Any, **kwargs: Any) -> Guard | None:
            payer = (
                customer(request, *args, **kwargs)
                if customer
                else import_string(meterly_settings.CUSTOMER_RESOLVER)(request)
            )
            if payer is None:
                return None

            def value(option: Any) -> Any:
                return option(request, *args, **kwargs) if callable(option) else option

            work = guard(
                payer,
                value(amount),
                unit,
                reference=value(reference) or f"{name}:{uuid.uuid4()}",
                idempotency_key=value(idempotency_key),
                ttl_seconds=ttl_seconds,
            )
            work.reserve()
            return work

        @wraps(view)
        def _view_wrapper(
            request: HttpRequest, *args: Any, **kwargs: Any
        ) -> HttpResponseBase:
            if not isinstance(request, HttpRequest):
                raise TypeError(_NOT_A_VIEW.format(type(request).__name__))
            aliases = _atomic_aliases(exempt | taken_over.exempted)
            free = (
                request.method in FREE_METHODS
                if charged is None
                else request.method not in charged
            )
            if free:
                with _atomic(aliases):
                    return view(request, *args, **kwargs)
            try:
                work = start(request, *args, **kwargs)
            except responses.RENDERED as exc:
                return responses.render(request, exc)
            if work is None:
                return responses.login_required(request)
            request.meterly = work  # type: ignore[attr-defined]
            return _run(
                work, aliases, success or _succeeded, view, request, *args, **kwargs
            )

        # as_view() names all views alike, and a partial has no name of its own.
        named = getattr(view, "view_class", None) or getattr(view, "cls", view)
        name = getattr(named, "__qualname__", type(view).__qualname__)
        taken_over = _TakenOver(connections)
        _view_wrapper._non_atomic_requests = taken_over  # type: ignore[attr-defined]
        _view_wrapper.meterly_guarded = True  # type: ignore[attr-defined]
        return _view_wrapper

    return decorator


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
    if iscoroutinefunction(view) or iscoroutinefunction(
        getattr(type(view), "__call__", None)  # noqa: B004
    ):
        raise TypeError(
            "meterly_guard cannot guard an async view yet. Use a sync view, or "
            "guard() in a function called by sync_to_async()."
        )


def _run(
    work: Guard,
    aliases: list[str],
    success: Callable[[HttpResponseBase], bool],
    view: View,
    request: HttpRequest,
    *args: Any,
    **kwargs: Any,
) -> HttpResponseBase:
    decided = False
    try:
        with _atomic(aliases):
            response = view(request, *args, **kwargs)
            if isawaitable(response):
                if iscoroutine(response):
                    response.close()
                raise TypeError(
                    "meterly_guard cannot guard a view that returns a coroutine: it "
                    "would be charged before it ran."
                )
            # What is no response is left to Django, which says so.
            good = isinstance(response, HttpResponseBase) and success(response)
            good = good and not any(
                connections[alias].needs_rollback for alias in aliases
            )
            if good and _finished(response) and journal.alias() in aliases:
                # The last statement inside: work and decision commit together.
                work.decide()
                decided = True
    except BaseException:
        # Whether the COMMIT took place only the row knows.
        work.fail()
        raise
    if decided:
        work.confirm()
    elif not good:
        work.fail()
    elif _finished(response):
        work.succeed()
    else:
        _conclude_later(work, response)
    return response


def _succeeded(response: HttpResponseBase) -> bool:
    return response.status_code < 400


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


def _conclude_later(work: Guard, response: Any) -> None:
    """Decide when *response* has been rendered, or sent to its end."""
    if not response.streaming:
        render = response.render

        def render_and_conclude() -> Any:
            # Once: the rendered response must be picklable again.
            response.__dict__.pop("render", None)
            try:
                rendered = render()
            except BaseException:
                work.fail()
                raise
            work.succeed()
            return rendered

        response.render = render_and_conclude
        return
    if response.is_async:
        work.fail()
        raise TypeError(
            "meterly_guard cannot guard an async stream yet. Stream from a sync "
            "iterator."
        )
    response.streaming_content = _charged_at_the_end(work, response.streaming_content)
    # A stream that is never begun runs no code of ours.
    response._resource_closers.append(work.abandon)


def _charged_at_the_end(work: Guard, chunks: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from chunks
    except GeneratorExit:
        work.disconnect()
        raise
    except BaseException:
        work.fail()
        raise
    work.succeed()
