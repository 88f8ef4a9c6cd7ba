"""The options of guards, each declared once.

::

    Policies            ttl_seconds overage on_unavailable enforcement   everywhere
      WorkOptions       unit amount customer reference                   views and tasks
        ViewOptions     idempotency_key methods success on_disconnect
        TaskOptions     on_retry on_duplicate

Beside each class stands the ``TypedDict`` of its keywords, by which type checkers and
editors know them: ``def meterly_guard(..., **options: Unpack[ViewKeywords])``. So a new
policy is a field of ``Policies`` and its line in ``PolicyKeywords``. All edges take it,
check it and hand it to the guard that runs. ``tests/test_policies.py`` proves that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import isawaitable, iscoroutine
from typing import Any, TypedDict

from django.http.response import HttpResponseBase  # noqa: TC002

from . import functions
from .conf import check_choice, check_word, meterly_settings
from .views import methods
from .wire import check_amount, check_text, check_ttl, check_unit, shown

#: Returns a value as it is used, or raises ``ValueError`` or ``TypeError``, which begin
#: with the option's name.
Check = Callable[[Any, str], Any]


def option(
    check: Check,
    setting: str | None = None,
    *,
    default: Any = None,
    returns: Check | None = None,
    path: bool = False,
) -> Any:
    """Return the dataclass field of an option.

    The *setting* says what holds if the option is ``None``. *returns* checks what a
    function returns that gets the arguments of the view or the task. With *path* a
    settings file may name the function by its dotted path. For example::

        overage: str | None = option(_choice, "OVERAGE")
    """
    metadata = {"check": check, "setting": setting, "returns": returns, "path": path}
    return field(default=default, metadata=metadata)


def _choice(value: Any, name: str) -> str:
    return check_choice(name, value)


def _one_of(*words: str) -> Check:
    return partial(check_word, words=words)


def _unit(value: Any, name: str) -> str:
    if callable(value):
        raise TypeError(
            f"{name} must be a text, not the function {functions.name_of(value)}. The "
            "decorator needs parentheses."
        )
    return check_unit(value, name)


def _amount(value: Any, name: str) -> Any:
    return value if callable(value) else check_amount(value, name)


def _reference(value: Any, name: str) -> Any:
    return value if callable(value) else check_text(value, name)


def _function(value: Any, name: str, *, of: str = "arguments") -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be a function of the {of}, not {shown(value)}.")
    return value


def _success(value: Any, name: str) -> Any:
    _function(value, name, of="response")
    functions.check_takes(name, value, ["response"], more=False)
    if functions.is_async(value):
        raise _async_success(value)
    return value


def _async_success(function: Callable[..., Any]) -> TypeError:
    return TypeError(
        "success must be a sync function, because an async one decides nothing until "
        f"it is awaited: {functions.name_of(function)}."
    )


def _returned_amount(value: Any, name: str) -> int:
    return check_amount(value, name, minimum=0)


def _returned_reference(value: Any, name: str) -> str | None:
    return None if value is None else check_text(value, name)


def _returned_key(value: Any, name: str) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"{name} must be a text or None, not {shown(value)}.")
    return value


def _returned_customer(value: Any, name: str) -> Any:
    # The guard resolves it, and says what a customer may be.
    return value


def check_price(unit: Any, amount: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless *amount* of *unit* can be held.

    ``None`` for the unit is ``DEFAULT_UNIT``.
    """
    _check_order(unit, amount)
    if unit is not None:
        _unit(unit, "unit")
    check_amount(amount)


def _check_order(unit: Any, amount: Any) -> None:
    if isinstance(amount, str) and isinstance(unit, int):
        raise TypeError(
            f"unit is {shown(unit)} and amount is {shown(amount)}, the wrong way round."
        )


class PolicyKeywords(TypedDict, total=False):
    """The keywords of ``Policies``."""

    ttl_seconds: int | None
    overage: str | None
    on_unavailable: str | None
    enforcement: str | None


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The options that views, blocks and tasks have in common.

    For example, ``meterly_guard("image_credits", 25, overage="cap")``. A policy that is
    ``None`` is what its setting says at the time when it is needed.

    *ttl_seconds* (``RESERVATION_TTL``)
        How long the credits are held at most: 1 to 86400 seconds. The heartbeat of a
        task extends the hold while the task runs.
    *overage* (``OVERAGE``)
        What ``charge(n)`` does if ``n`` is above the hold: ``"charge"`` it all, or
        ``"cap"`` it at the hold.
    *on_unavailable* (``ON_UNAVAILABLE``)
        What happens if the ledger cannot be asked: ``"deny"`` the work, or ``"allow"``
        it and charge later, up to ``UNAVAILABLE_CAP`` credits for each customer.
    *enforcement* (``ENFORCEMENT``)
        ``"enforce"``; ``"shadow"`` lets everything run and records what it would have
        denied; ``"off"`` does not ask the ledger at all.

    Raises ``ValueError`` or ``TypeError`` for an invalid value, with the option's name.
    """

    ttl_seconds: int | None = option(check_ttl, "RESERVATION_TTL")
    overage: str | None = option(_choice, "OVERAGE")
    on_unavailable: str | None = option(_choice, "ON_UNAVAILABLE")
    enforcement: str | None = option(_choice, "ENFORCEMENT")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not each.default:
                checked = each.metadata["check"](value, each.name)
                object.__setattr__(self, each.name, checked)

    def value(self, name: str) -> Any:
        """Return the policy *name*, or what its setting says now."""
        told = getattr(self, name)
        if told is not None:
            return told
        setting = self.__dataclass_fields__[name].metadata["setting"]
        return getattr(meterly_settings, setting)


class WorkKeywords(PolicyKeywords, total=False):
    """The keywords of ``WorkOptions``, besides the unit and the amount."""

    customer: Callable[..., Any] | None
    reference: str | Callable[..., Any] | None


@dataclass(frozen=True, kw_only=True)
class WorkOptions(Policies):
    """The options that views and tasks have in common: the work, and who pays for it.

    *amount*, *customer* and *reference* may be functions, sync or async, of the
    arguments of the view or the task. For example::

        @meterly_guard("tokens", lambda request, pk: price_of(pk))
        def summarise(request, pk): ...

    *unit*
        What is counted; ``DEFAULT_UNIT`` by default. The guard checks at each call that
        ``UNITS`` declares it, because tests may override the setting.
    *amount*
        How many credits are held: 1 or more. A function may return 0 for free work.
    *customer*
        Who pays: a function that returns an instance of ``CUSTOMER_MODEL``, a
        ``Customer``, an external id, or ``None``. A view with this option does not use
        ``CUSTOMER_RESOLVER``.
    *reference*
        The name of the work, for people: up to 255 printable ASCII characters. The
        default is the name of the view or task, and a random id.
    """

    unit: str | None = option(_unit)
    amount: int | Callable[..., Any] = option(
        _amount, returns=_returned_amount, path=True, default=1
    )
    customer: Callable[..., Any] | None = option(
        _function, returns=_returned_customer, path=True
    )
    reference: str | Callable[..., Any] | None = option(
        _reference, returns=_returned_reference
    )

    def __post_init__(self) -> None:
        _check_order(self.unit, self.amount)
        super().__post_init__()

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return the option *name*; a function is asked with the other arguments.

        Raises ``ValueError`` or ``TypeError`` for an invalid value that a function has
        returned, and ``TypeError`` for one that cannot take its arguments. Call it from
        sync code.
        """
        told = getattr(self, name)
        if not callable(told):
            return told
        value = functions.ask(name, told, args, kwargs)
        try:
            return self.__dataclass_fields__[name].metadata["returns"](value, name)
        except (TypeError, ValueError) as exc:
            raise type(exc)(
                f"{exc} {functions.name_of(told)} has returned it."
            ) from None

    def _fit(self, names: list[str], *, more: bool, by_name: bool) -> None:
        for each in fields(self):
            told = getattr(self, each.name)
            if each.metadata["returns"] and callable(told):
                functions.check_takes(
                    each.name, told, names, more=more, by_name=by_name
                )


class ViewKeywords(WorkKeywords, total=False):
    """The keywords of ``ViewOptions``, besides the unit and the amount."""

    idempotency_key: Callable[..., Any] | None
    methods: Iterable[str] | None
    success: Callable[[HttpResponseBase], bool] | None
    on_disconnect: str | None


@dataclass(frozen=True, kw_only=True)
class ViewOptions(WorkOptions):
    """The options of ``meterly_guard``, ``guard_options`` and ``GUARDED_VIEWS``.

    *idempotency_key*
        A function of the view's arguments that returns the key, or ``None``. By
        default, the key is in the header ``Idempotency-Key``, or in a form's field.
    *methods*
        Which of GET and HEAD cost something. For example, ``methods=["GET"]`` charges
        for both. OPTIONS is always free. POST and all other methods always cost
        something.
    *success*
        A function of the response: whether to charge. By default, a status below 400.
    *on_disconnect* (``ON_DISCONNECT``)
        Whether to ``"charge"`` or to ``"release"`` a stream whose reader leaves and an
        async view that is cancelled.
    """

    idempotency_key: Callable[..., Any] | None = option(
        _function, returns=_returned_key, path=True
    )
    methods: Iterable[str] | None = option(methods.check_methods)
    success: Callable[[HttpResponseBase], bool] | None = option(_success, path=True)
    on_disconnect: str | None = option(_choice, "ON_DISCONNECT")

    def fit(self, view: Callable[..., Any] | None = None) -> None:
        """Raise ``TypeError`` for a function that cannot take what *view* gets.

        Without a *view*, the functions only have to take a request.
        """
        names, more = functions.needed(view) if view else ([], True)
        # A handler in the body of its class has a self.
        names = names[1:] if names[:1] == ["self"] else names
        self._fit(["request", *names[1:]], more=more, by_name=False)

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


class TaskKeywords(WorkKeywords, total=False):
    """The keywords of ``TaskOptions``, besides the unit and the amount."""

    on_retry: str
    on_duplicate: str


@dataclass(frozen=True, kw_only=True)
class TaskOptions(WorkOptions):
    """The options of ``meterly_task``, besides those of Celery's ``shared_task``.

    *on_retry*
        What ``retry()`` and ``autoretry_for`` do with the credits: ``"keep"`` them for
        the retry, or ``"release"`` them.
    *on_duplicate*
        What a second copy of the message does while another worker runs the task.
        ``"retry"`` looks again after ``LEASE_GRACE``, in case that worker dies.
        ``"ignore"`` ends the copy.
    """

    on_retry: str = option(_one_of("keep", "release"), default="keep")
    on_duplicate: str = option(_one_of("retry", "ignore"), default="retry")

    def fit(self, task: Callable[..., Any], *, bind: bool) -> None:
        """Raise ``TypeError`` for a function that cannot take what *task* gets."""
        names, more = functions.needed(task)
        self._fit(names[1:] if bind else names, more=more, by_name=True)
