"""Every place that changes an object of Django, DRF, or the project.

A guard has to act inside code that has no hook for it. Each function replaces one
attribute, on one object if that is enough, and says what would break without it:

======================= ============================= ==============================
Function                It replaces                   Called by
======================= ============================= ==============================
extend_initial          ``initial`` of a DRF class    ``classes.guard_class``
replace_handlers        handlers of a view instance   ``classes.install_guards``
extend_error_answers    the exception handler of a    ``rest_framework.exceptions``
                        DRF view instance
extend_form_invalid     ``form_invalid`` of a view    ``mixins``
                        instance
replace_match           ``resolve`` of a URL pattern  ``patterns.guard_urlconf``
extend_render           ``render`` of a response      ``execution.Execution``
replace_chunks          the chunks of a response      ``streams.Stream``
======================= ============================= ==============================
"""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.urls import ResolverMatch

    Function = Callable[..., Any]


def extend_initial(cls: Any, finish: Callable[[Any, Any], None]) -> None:
    """Let ``initial()`` of a DRF class end with ``finish(view, request)``.

    ``initial()`` authenticates, and the handler is called right after it. DRF has no
    other hook in between: without this, the guard would reserve for a caller whom the
    permissions refuse, or would not know the user. On the class, because ``as_view()``
    makes the instance; *finish* ignores requests without a ``Dispatch``.
    """
    initial = cls.initial
    if getattr(initial, "meterly_hook", False):
        return

    @wraps(initial)
    def initial_and_finish(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        initial(self, request, *args, **kwargs)
        finish(self, request)

    initial_and_finish.meterly_hook = True  # type: ignore[attr-defined]
    cls.initial = initial_and_finish


def replace_handlers(view: Any, guarded: Callable[[Function], Function]) -> None:
    """Let the first handler of *view* that is called be ``guarded(handler)``.

    Without this, the guard would sit around ``dispatch()`` and reserve before its
    checks. Until one handler is called, every handler stands ready. Then the others get
    back what they were: if the handler calls them, they are part of its work. Its own
    stays guarded, because ``dispatch()`` may call it again.
    """
    plain = {
        method: getattr(view, method)
        for method in view.http_method_names
        if method != "options" and hasattr(view, method)
    }
    chosen: dict[str, Function] = {}

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        if method not in chosen:
            chosen[method] = guarded(plain.pop(method))
            for name, handler in {**plain, method: chosen[method]}.items():
                setattr(view, name, handler)
        return chosen[method](*args, **kwargs)

    for method, handler in plain.items():
        setattr(view, method, wraps(handler)(partial(call, method)))


def extend_error_answers(view: Any, extend: Callable[..., Any]) -> None:
    """Let ``extend(answer, exc, context)`` return the view's answer to an error.

    *answer* is that of the project's exception handler. Without this, a handler that
    does not know the guard's exceptions would answer 402 without the amounts, or 500.
    """
    choose = view.get_exception_handler

    def choose_extended() -> Function:
        handler = choose()

        def handle(exc: Exception, context: dict[str, Any]) -> Any:
            return extend(handler(exc, context), exc, context)

        return handle

    view.get_exception_handler = choose_extended


def extend_form_invalid(view: Any, before: Callable[[], None]) -> None:
    """Let *view* call *before* when it shows an invalid form again.

    Without this, that would be charged: the page has status 200, as after a success.
    """
    form_invalid = view.form_invalid

    @wraps(form_invalid)
    def before_and_form_invalid(form: Any) -> Any:
        # Before: the project's form_invalid() may charge for it all the same.
        before()
        return form_invalid(form)

    view.form_invalid = before_and_form_invalid


def replace_match(pattern: Any, view: Function) -> None:
    """Let the URL *pattern* resolve to *view*.

    Without this, ``GUARDED_VIEWS`` could guard only from ``process_view``, which would
    skip the CSRF check and other middleware. ``pattern.callback`` stays as it is,
    because ``reverse()`` finds a view by it.
    """
    resolve = pattern.resolve

    def resolve_guarded(path: str) -> ResolverMatch | None:
        match: ResolverMatch | None = resolve(path)
        if match is not None:
            match.func = view
        return match

    pattern.resolve = resolve_guarded
    pattern.meterly_guarded = True


def extend_render(
    response: Any, succeed: Callable[[], None], fail: Callable[[], None]
) -> None:
    """Call *succeed* once *response* is rendered, or *fail* if that raises.

    ``add_post_render_callback()`` runs after a success only: without this, a template
    that raises would be charged.
    """
    render = response.render

    def render_and_tell() -> Any:
        # A rendered response must be picklable again, for Django's cache.
        response.__dict__.pop("render", None)
        try:
            rendered = render()
        except BaseException:
            fail()
            raise
        succeed()
        return rendered

    response.render = render_and_tell


def replace_chunks(response: Any, chunks: Any, close: Callable[[], None]) -> None:
    """Send *chunks*, which read those of *response*, and call *close* at its end.

    Without this, a stream would be charged before its first chunk. The server closes
    every response, also one whose stream it never began.
    """
    response.streaming_content = chunks
    response._resource_closers.append(close)
