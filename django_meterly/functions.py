"""Options that are functions: whether they fit a view or a task, and what they return.

For example, ``amount=lambda request, pk: 25`` fits ``def render(request, pk)``. It is
compared when the view is defined, and asked once for each request.
"""

from __future__ import annotations

from inspect import Parameter, isawaitable, signature
from typing import TYPE_CHECKING, Any

from asgiref.sync import async_to_sync, iscoroutinefunction

from .wire import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping


def ask(
    option: str,
    function: Callable[..., Any],
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return what *function*, sync or async, returns. Call it from sync code.

    Raises ``TypeError`` with the name of the *option* if it cannot take its arguments.
    """
    try:
        return result(function, *args, **kwargs)
    except TypeError as exc:
        if takes(function, args, kwargs):
            # The function takes them, so this error is from its own code.
            raise
        given = [*map(shown, args), *(f"{each}=..." for each in kwargs)]
        raise cannot_take(option, function, ", ".join(given)) from exc


def result(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what *function*, sync or async, returns. Call it from sync code."""
    returned = function(*args, **kwargs)
    return async_to_sync(_await)(returned) if isawaitable(returned) else returned


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def is_async(function: Any) -> bool:
    """Return whether calling *function*, or an object of its class, makes a coroutine.

    A plain function may still return one.
    """
    return iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)


def name_of(function: Any) -> str:
    """Return the name of *function* for error messages."""
    name = str(getattr(function, "__qualname__", None) or repr(function))
    return name.rpartition("<locals>.")[2]


def needed(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return the names of what *function* needs, and whether it may be given more.

    What it wraps does not count: a decorator may pass on more, or less.
    """
    try:
        parameters = signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return [], True
    names = [
        each.name
        for each in parameters
        if each.default is Parameter.empty
        and each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    return names, len(names) < len(parameters)


def check_takes(
    option: str,
    function: Callable[..., Any],
    given: list[str],
    *,
    more: bool,
    by_name: bool = False,
) -> None:
    """Raise ``TypeError`` if *function*, the value of *option*, cannot take *given*.

    All but the first may come by position or by name; with *by_name* the first, too.
    With *more* it may be given others besides.
    """
    if (
        takes(function, given, more=more)
        or takes(function, given[:1], given[1:], more=more)
        or (by_name and takes(function, [], given, more=more))
    ):
        return
    listed = ", ".join([*given, *(["*args", "**kwargs"] if more else [])])
    raise cannot_take(option, function, listed, f" Write {option}=lambda {listed}: ...")


def takes(
    function: Callable[..., Any],
    args: Iterable[Any],
    keywords: Iterable[str] = (),
    *,
    more: bool = False,
) -> bool:
    """Return whether *function* can be called so; with *more*, with others besides."""
    try:
        parameters = signature(function)
    except (TypeError, ValueError):
        return True  # Some builtins do not say what they take.
    try:
        bind = parameters.bind_partial if more else parameters.bind
        bind(*args, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def cannot_take(
    option: str, function: Callable[..., Any], given: str, remedy: str = ""
) -> TypeError:
    """Return the error for a *function* that is called with *given* and cannot be."""
    return TypeError(
        f"{option} is called with ({given}), but {name_of(function)} takes "
        f"{signature(function)}.{remedy}"
    )
