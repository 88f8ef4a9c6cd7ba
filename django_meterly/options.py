"""What a guard can be told, checked once, whichever edge it comes from."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from functools import wraps
from inspect import Parameter, getattr_static, isawaitable, iscoroutine, signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from asgiref.sync import async_to_sync, iscoroutinefunction
from django.utils.module_loading import import_string

from .conf import check_choice, meterly_settings, suggestion
from .transports.base import check_amount, check_text, check_ttl, check_unit, shown
from .views import methods
from .views.keys import requested_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from .guards import Guard

P = ParamSpec("P")
T = TypeVar("T")

#: Options that are functions: a mapping may name them by their dotted paths.
FUNCTIONS = ("amount", "customer", "idempotency_key", "success")
#: Those that get what the view or the task gets.
OF_ARGUMENTS = ("amount", "customer", "reference", "idempotency_key")


def shows(example: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that ends what a function refuses with a right call of it.

    It is for functions that do nothing but check their arguments. For example, an
    unknown keyword is answered by "... got an unexpected keyword argument 'ammount'.
    Did you mean 'amount'? For example: " and *example*.
    """

    def decorator(function: Callable[P, T]) -> Callable[P, T]:
        known = signature(function).parameters

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as exc:
                if type(exc) not in (TypeError, ValueError):
                    # One of ours, which says all there is to say.
                    raise
                # From Python 3.13 on, it may have a suggestion of its own.
                hint = "".join(
                    suggestion(name, known)
                    for name in kwargs
                    if name not in known
                    and f"{name!r}" in str(exc)
                    and "Did you mean" not in str(exc)
                )
                refused = type(exc)(f"{_sentence(exc)}{hint} For example: {example}")
            raise refused

        return call

    return decorator


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return text if text.endswith((".", "?")) else f"{text}."


def check_price(unit: Any, amount: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless *amount* of *unit* can be held.

    ``None`` for the unit is ``DEFAULT_UNIT``.
    """
    if callable(unit):
        raise TypeError(
            f"unit must be a text, not the function {_name(unit)}. The decorator needs "
            "parentheses."
        )
    if isinstance(amount, str) and isinstance(unit, int):
        raise TypeError(
            f"unit is {shown(unit)} and amount is {shown(amount)}, the wrong way round."
        )
    if unit is not None:
        check_unit(unit)
    check_amount(amount)


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """The options of one guarded view or task; ``meterly_guard`` describes them.

    Raises ``ValueError`` and ``TypeError`` for options out of bounds. Whether ``UNITS``
    declares the *unit* is for the system check, and for the guard at each call: tests
    may override the setting after a view was defined.
    """

    unit: str | None = None
    amount: int | Callable[..., Any] = 1
    customer: Callable[..., Any] | None = None
    reference: str | Callable[..., Any] | None = None
    idempotency_key: Callable[..., Any] | None = None
    ttl_seconds: int | None = None
    methods: Iterable[str] | None = None
    success: Callable[[HttpResponseBase], bool] | None = None
    on_disconnect: str | None = None
    overage: str | None = None
    on_unavailable: str | None = None
    enforcement: str | None = None

    @classmethod
    def of(
        cls,
        mapping: Mapping[str, Any],
        where: str,
        views: Mapping[str, Callable[..., Any]] | None = None,
    ) -> GuardOptions:
        """Return the options that *mapping* names, as ``meterly_guard`` names them.

        Functions may be dotted paths, for settings cannot import what they are the
        settings of; ``reference`` is a text or a function. They have to fit those of
        the *views*, by their HTTP methods, that cost something. *where* the mapping
        stands begins the messages of the ``TypeError``, ``ValueError`` or
        ``ImportError``.
        """
        if not hasattr(mapping, "items"):
            raise TypeError(
                f"{where} must be a dict of options, not {mapping!r}. For example: "
                f"{_MAPPING}"
            )
        known = [field.name for field in fields(cls)]
        values = dict(mapping)
        for name in values:
            if name not in known:
                raise TypeError(
                    f"{where}: there is no option {name!r}."
                    + (
                        suggestion(str(name), known)
                        or f" The options are {', '.join(known)}."
                    )
                    + f" For example: {_MAPPING}"
                )
        try:
            for name in FUNCTIONS:
                if isinstance(path := values.get(name), str):
                    values[name] = _imported(name, path)
            options = cls(**values)
            options.fit()
            for method, view in (views or {}).items():
                if options.costs(method.upper()):
                    options.fit(view)
        except ImportError as exc:
            raise ImportError(f"{where}: {exc}") from exc
        except (TypeError, ValueError) as exc:
            raise type(exc)(
                f"{where}: {_sentence(exc)} For example: {_MAPPING}"
            ) from exc
        return options

    def __post_init__(self) -> None:
        check_price(self.unit, 1 if callable(self.amount) else self.amount)
        for name in ("customer", "idempotency_key", "success"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                given = "response" if name == "success" else "arguments"
                raise TypeError(
                    f"{name} must be a function of the {given}, not {shown(function)}."
                )
        if self.reference is not None and not callable(self.reference):
            check_text(self.reference, "reference")
        if self.success is not None:
            _check_takes("success", self.success, ["response"], more=False)
            if iscoroutinefunction(self.success) or iscoroutinefunction(
                type(self.success).__call__
            ):
                raise _async_success(self.success)
        if self.ttl_seconds is not None:
            check_ttl(self.ttl_seconds)
        for name in ("on_disconnect", "overage", "on_unavailable", "enforcement"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name))
        if self.methods is not None:
            object.__setattr__(self, "methods", methods.check_methods(self.methods))

    def fit(self, view: Callable[..., Any] | None = None) -> None:
        """Raise ``TypeError`` for a function that cannot take what *view* gets.

        ``None`` is a view that is not known yet: it gets a request, at least.
        """
        names, more = _parameters(view) if view else ([], True)
        # A handler in the body of its class has a self.
        names = names[1:] if names[:1] == ["self"] else names
        self._fit(["request", *names[1:]], more=more, by_name=False)

    def fit_task(self, task: Callable[..., Any], *, bind: bool) -> None:
        """Raise ``TypeError`` for a function that cannot take what *task* gets."""
        names, more = _parameters(task)
        self._fit(names[1:] if bind else names, more=more, by_name=True)

    def _fit(self, names: list[str], *, more: bool, by_name: bool) -> None:
        for name in OF_ARGUMENTS:
            if callable(option := getattr(self, name)):
                _check_takes(name, option, names, more=more, by_name=by_name)

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return the option *name*; a function, sync or async, is asked with the rest.

        Raises ``ValueError`` for an amount, and ``TypeError`` for a key, that is none,
        and ``TypeError`` for a function that cannot take its arguments. Call it from
        sync code.
        """
        option = getattr(self, name)
        if not callable(option):
            return option
        try:
            value = _result(option, *args, **kwargs)
        except TypeError as exc:
            if _takes(option, args, kwargs):
                raise
            given = [*map(shown, args), *(f"{each}=..." for each in kwargs)]
            raise _cannot_take(name, option, ", ".join(given)) from exc
        try:
            if name == "amount":
                check_amount(value, name, minimum=0)
            if name == "idempotency_key" and not isinstance(value, str | None):
                raise TypeError(f"{name} must be a text or None, not {shown(value)}.")
            if name == "reference" and value is not None:
                check_text(value, name)
        except (TypeError, ValueError) as exc:
            raise type(exc)(f"{exc} {_name(option)} has returned it.") from None
        return value

    def costs(self, method: str | None) -> bool:
        """Return whether a request with this HTTP *method* costs something."""
        return methods.costs(method, self.methods)

    def succeeded(self, response: HttpResponseBase) -> bool:
        """Return whether the work that led to *response* is to be charged."""
        if self.success is None:
            return response.status_code < 400
        verdict: Any = self.success(response)
        if isawaitable(verdict):
            if iscoroutine(verdict):
                verdict.close()
            raise _async_success(self.success)
        return bool(verdict)

    def guard(
        self, name: str, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> Guard | None:
        """Return the guard for *request*, or ``None`` when nobody is known to pay.

        *name* is the view's, for people; *args* and *kwargs* are the view's arguments,
        for options that are functions, sync or async. Call it from sync code.
        """
        from .guards import prepare

        enforcement = self.enforcement or meterly_settings.ENFORCEMENT
        payer = key = None
        # Off, nobody pays, and so nobody is looked for.
        if enforcement != "off":
            payer = (
                _somebody(self.ask("customer", request, *args, **kwargs))
                if self.customer
                else payer_of(request)
            )
            if payer is None and enforcement == "enforce":
                return None
            key = (
                self.ask("idempotency_key", request, *args, **kwargs)
                if self.idempotency_key
                else requested_key(request)
            )
        return prepare(
            payer,
            self.ask("amount", request, *args, **kwargs),
            self.unit,
            reference=self.ask("reference", request, *args, **kwargs)
            or f"{name}:{uuid.uuid4()}",
            idempotency_key=key,
            ttl_seconds=self.ttl_seconds,
            overage=self.overage,
            on_unavailable=self.on_unavailable,
            enforcement=enforcement,
        )


def near_miss(cls: type, *, guarded: bool) -> str | None:
    """Return the name of an attribute of *cls* that was to be ``guard_options``.

    For example ``guards_options``; or ``options`` for a dict of a ``"unit"`` and an
    ``"amount"``, if the class is not *guarded* otherwise. Other attributes are the
    class's own business: ``render_options`` with a ``"unit"``, for example.
    """
    known = {field.name for field in fields(GuardOptions)}
    for name in dir(cls):
        if name == "guard_options" or name.startswith("_" if guarded else "__"):
            continue
        value = getattr_static(cls, name)
        if not isinstance(value, Mapping) or not value or not set(value) <= known:
            continue
        likeness = SequenceMatcher(None, name.lower(), "guard_options").ratio()
        remembered = likeness >= _SIMILAR or "guard" in name.lower()
        if likeness >= _SAME_WORD or (
            not guarded and remembered and {"unit", "amount"} <= set(value)
        ):
            return name
    return None


def payer_of(request: Any) -> Any:
    """Return whom ``CUSTOMER_RESOLVER`` names, or ``None``. Call it from sync code."""
    return _somebody(_result(meterly_settings.CUSTOMER_RESOLVER, request))


def _somebody(payer: Any) -> Any:
    """Return *payer*, or ``None`` for a user who is not logged in."""
    # Its class is Django's, REST framework's or the project's.
    return None if getattr(payer, "is_anonymous", False) is True else payer


def _imported(name: str, path: str) -> Any:
    try:
        return import_string(path)
    except ImportError as exc:
        number = "a number, " if name == "amount" else ""
        raise ImportError(
            f"{name} must be {number}a function or its dotted path, not {path!r}: {exc}"
        ) from exc


def _async_success(function: Callable[..., Any]) -> TypeError:
    return TypeError(
        "success must be a sync function, because an async one decides nothing until "
        f"it is awaited: {_name(function)}."
    )


def _result(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    return async_to_sync(_await)(result) if isawaitable(result) else result


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


#: How much of ``guard_options`` is in a name that has a slip of the pen, and in one
#: that was remembered badly: ``guards_options`` and ``meterly_options``.
_SAME_WORD, _SIMILAR = 0.9, 0.6
#: A right mapping, for messages.
_MAPPING = '{"unit": "image_credits", "amount": 25}'


def _name(function: Any) -> str:
    name = str(getattr(function, "__qualname__", None) or repr(function))
    return name.rpartition("<locals>.")[2]


def _parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return the names of what *function* needs, and whether it may be given more.

    Not those of what it wraps: a decorator may give that more, or less.
    """
    try:
        parameters = signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return [], True
    needed = [
        each.name
        for each in parameters
        if each.default is Parameter.empty
        and each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    return needed, len(needed) < len(parameters)


def _check_takes(
    name: str,
    function: Callable[..., Any],
    given: list[str],
    *,
    more: bool,
    by_name: bool = False,
) -> None:
    """Raise ``TypeError`` if the option *name*, a *function*, cannot take *given*.

    All but the first may come by position or by name; with *by_name* the first, too.
    With *more* it may be given others besides.
    """
    if (
        _takes(function, given, more=more)
        or _takes(function, given[:1], given[1:], more=more)
        or (by_name and _takes(function, [], given, more=more))
    ):
        return
    listed = ", ".join([*given, *(["*args", "**kwargs"] if more else [])])
    raise _cannot_take(name, function, listed, f" Write {name}=lambda {listed}: ...")


def _takes(
    function: Callable[..., Any],
    args: Iterable[Any],
    keywords: Iterable[str] = (),
    *,
    more: bool = False,
) -> bool:
    try:
        parameters = signature(function)
    except (TypeError, ValueError):
        return True  # Nobody knows what it takes, as of some builtins.
    try:
        bind = parameters.bind_partial if more else parameters.bind
        bind(*args, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _cannot_take(
    name: str, function: Callable[..., Any], given: str, remedy: str = ""
) -> TypeError:
    return TypeError(
        f"{name} is called with ({given}), but {_name(function)} takes "
        f"{signature(function)}.{remedy}"
    )
