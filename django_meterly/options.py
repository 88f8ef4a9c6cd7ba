"""What a guarded view can be told, checked once, whichever edge it comes from."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, fields
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from asgiref.sync import async_to_sync
from django.utils.module_loading import import_string

from . import methods
from .conf import check_choice, meterly_settings, suggestion
from .guards import guard
from .keys import requested_key
from .transports.base import check_amount, check_ttl, check_unit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from .guards import Guard

#: Options that are functions: a mapping may name them by their dotted paths.
FUNCTIONS = ("amount", "customer", "idempotency_key", "success")


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """The options of one guarded view; ``meterly_guard`` describes them.

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
    def of(cls, mapping: Mapping[str, Any], where: str) -> GuardOptions:
        """Return the options that *mapping* names, as ``meterly_guard`` names them.

        Functions may be dotted paths, for settings cannot import what they are the
        settings of; ``reference`` is a text or a function. *where* the mapping stands
        begins the messages of the ``TypeError``, ``ValueError`` or ``ImportError``.
        """
        if not hasattr(mapping, "items"):
            raise TypeError(f"{where} must be a dict of options, not {mapping!r}.")
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
                )
        try:
            for name in FUNCTIONS:
                if isinstance(path := values.get(name), str):
                    values[name] = import_string(path)
            return cls(**values)
        except (TypeError, ValueError, ImportError) as exc:
            raise type(exc)(f"{where}: {exc}") from exc

    def __post_init__(self) -> None:
        if self.unit is not None:
            check_unit(self.unit)
        if not callable(self.amount):
            check_amount(self.amount)
        if self.ttl_seconds is not None:
            check_ttl(self.ttl_seconds)
        for name in ("on_disconnect", "overage", "on_unavailable", "enforcement"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name))
        if self.methods is not None:
            object.__setattr__(self, "methods", methods.check_methods(self.methods))

    def costs(self, method: str | None) -> bool:
        """Return whether a request with this HTTP *method* costs something."""
        return methods.costs(method, self.methods)

    def succeeded(self, response: HttpResponseBase) -> bool:
        """Return whether the work that led to *response* is to be charged."""
        if self.success is not None:
            return self.success(response)
        return response.status_code < 400

    def guard(
        self, name: str, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> Guard | None:
        """Return the guard for *request*, or ``None`` when nobody is known to pay.

        *name* is the view's, for people; *args* and *kwargs* are the view's arguments,
        for options that are functions, sync or async. Call it from sync code.
        """

        def value(option: Any) -> Any:
            if not callable(option):
                return option
            return _result(option, request, *args, **kwargs)

        enforcement = self.enforcement or meterly_settings.ENFORCEMENT
        payer = key = None
        # Off, nobody pays, and so nobody is looked for.
        if enforcement != "off":
            payer = value(self.customer) if self.customer else payer_of(request)
            if payer is None and enforcement == "enforce":
                return None
            key = (
                value(self.idempotency_key)
                if self.idempotency_key
                else requested_key(request)
            )
        return guard(
            payer,
            value(self.amount),
            self.unit,
            reference=value(self.reference) or f"{name}:{uuid.uuid4()}",
            idempotency_key=key,
            ttl_seconds=self.ttl_seconds,
            overage=self.overage,
            on_unavailable=self.on_unavailable,
            enforcement=enforcement,
        )


def payer_of(request: Any) -> Any:
    """Return whom ``CUSTOMER_RESOLVER`` names, or ``None``. Call it from sync code."""
    return _result(meterly_settings.CUSTOMER_RESOLVER, request)


def _result(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    return async_to_sync(_await)(result) if isawaitable(result) else result


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
