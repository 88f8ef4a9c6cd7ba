"""Do the guards of views and tasks charge what they are meant to charge?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.core.checks import CheckMessage, Error, Info, Tags, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.urls import get_resolver

from .. import units
from ..conf import meterly_settings, suggestion
from ..middleware import MIDDLEWARE, is_installed
from ..mixins import MeterlyGuardMixin
from ..options import read_mapping
from ..views import methods
from ..views.introspection import class_of, handlers, is_guarded
from ..views.patterns import key_for, named_patterns
from ..wire import MAX_TTL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..policies import ViewOptions, WorkOptions


@register("meterly")
def check_guarded_views(**kwargs: Any) -> list[CheckMessage]:
    """Check the options in ``GUARDED_VIEWS``, and that the middleware reads them."""
    try:
        views = meterly_settings.GUARDED_VIEWS
    except ImproperlyConfigured:
        return []
    found: list[CheckMessage] = []
    for name, options in views.items():
        try:
            read_mapping(options, f"METERLY['GUARDED_VIEWS'][{name!r}]")
        except (TypeError, ValueError, ImportError) as exc:
            found.append(Error(str(exc), id="meterly.E009"))
    if views and not is_installed():
        found.append(
            Error(
                "METERLY['GUARDED_VIEWS'] guards nothing without MeterlyMiddleware.",
                hint=f"Add {MIDDLEWARE!r} to MIDDLEWARE.",
                id="meterly.E010",
            )
        )
    return found


@register("meterly", Tags.urls)
def check_urls(**kwargs: Any) -> list[CheckMessage]:
    """Check the guards of the views in ``ROOT_URLCONF``."""
    try:
        views = meterly_settings.GUARDED_VIEWS
    except ImproperlyConfigured:
        return []
    if not getattr(settings, "ROOT_URLCONF", None):
        return []
    found: list[CheckMessage] = []
    names = []
    for name, pattern in named_patterns(get_resolver()):
        names.append(name)
        found += _check_view(name, pattern.callback, key_for(name))
    used = {key_for(name) for name in names}
    # A namespace counts even if each of its views has a key, too.
    spaces = {f"{name.rpartition(':')[0]}:" for name in names if ":" in name}
    for key in views:
        if key not in used and key not in spaces:
            known = {*names, *spaces, *_outer(spaces)} - {""}
            found.append(
                CheckWarning(
                    f"METERLY['GUARDED_VIEWS'] names {key!r}, which matches no URL.",
                    hint=(
                        suggestion(str(key), known).strip()
                        or "A name needs its namespace, 'posters:render', and a "
                        "namespace its colon, 'posters:'."
                    ),
                    id="meterly.W002",
                )
            )
    return found


def _outer(spaces: set[str]) -> set[str]:
    """Return the namespaces around *spaces*: for ``"a:b:"`` that is ``"a:"``."""
    return {
        ":".join(parts[:count]) + ":"
        for parts in (space.rstrip(":").split(":") for space in spaces)
        for count in range(1, len(parts))
    }


def _check_view(name: str, view: Any, key: str | None) -> Iterator[CheckMessage]:
    """Check the guards of one *view*, which ``GUARDED_VIEWS`` may guard by *key*."""
    where = _label(name, view)
    if getattr(getattr(class_of(view), "dispatch", None), "meterly_guarded", False):
        yield Error(
            f"The view {where!r} has meterly_guard on dispatch(), which it refuses.",
            hint=(
                "Let the class inherit from MeterlyGuardMixin and set guard_options, "
                "or put the guard around as_view() or on the handlers."
            ),
            id="meterly.E011",
        )
        return
    if is_guarded(view):
        yield from _check_atomic_requests(where, view)
    if key is None and (problem := _guards_nothing(view)):
        yield CheckWarning(
            f"The view {where!r} costs nothing: its class {problem}",
            hint=(
                "Let the class inherit from MeterlyGuardMixin first, and set "
                'guard_options = {"unit": "image_credits", "amount": 25}, or put '
                '@meterly_guard("image_credits", 25) on the handlers that cost '
                "something."
            ),
            id="meterly.W010",
        )
    options = getattr(view, "meterly_options", None)
    if key == name and not is_guarded(view):
        setting = f"METERLY['GUARDED_VIEWS'][{name!r}]"
        given = meterly_settings.GUARDED_VIEWS[name]
        try:
            options = read_mapping(given, setting)
        except (TypeError, ValueError, ImportError):
            return  # check_guarded_views reports it.
        try:
            read_mapping(given, setting, handlers(view) or {"post": view})
        except TypeError as exc:
            yield Error(str(exc), id="meterly.E009")
    yield from _check_charges(where, view, options)


def _check_atomic_requests(where: str, view: Any) -> Iterator[CheckMessage]:
    """Refuse a guarded *view* around which Django opens a transaction."""
    exempt = getattr(view, "_non_atomic_requests", ())
    early = [
        alias
        for alias, database in connections.settings.items()
        if database["ATOMIC_REQUESTS"] and alias not in exempt
    ]
    if not early:
        return
    if iscoroutinefunction(view):
        yield Error(
            f"The guarded view {where!r} is async, which Django refuses under "
            f"ATOMIC_REQUESTS (on the database {early[0]!r}).",
            hint=(
                "Put @transaction.non_atomic_requests above its guard, or around "
                "as_view(). The guard needs no transaction around it. Or make the view "
                "sync."
            ),
            id="meterly.E012",
        )
    else:
        yield Error(
            f"The view {where!r} has a guard on a handler, which ATOMIC_REQUESTS (on "
            f"the database {early[0]!r}) makes it refuse.",
            hint="Put MeterlyGuardMixin first among the bases of its class.",
            id="meterly.E012",
        )


def _check_charges(
    where: str, view: Any, options: ViewOptions | None
) -> Iterator[CheckMessage]:
    """Warn of each guard of *view* that only sees methods that cost nothing.

    *options* are those of the guard around the whole view, if it has one.
    """
    answered = _methods(view)
    guards = [(where, options, answered)] if options and answered else []
    for method, handler in handlers(view).items():
        own = getattr(handler, "meterly_options", None)
        if own and not (method == "head" and "get" in handlers(view)):
            guards.append((f"{where}, {method}()", own, {method.upper()}))
    for guarded, told, answers in guards:
        if not any(told.costs(method) for method in answers):
            listed = ", ".join(sorted(answers))
            yield CheckWarning(
                f"The guard of {guarded!r} never charges: only {listed} is answered, "
                "and costs nothing.",
                hint=(
                    'To charge for reading, set methods=["GET"]. Otherwise guard the '
                    "view that does the work by POST."
                ),
                id="meterly.W003",
            )


@register("meterly", Tags.urls)
def check_holds(**kwargs: Any) -> list[CheckMessage]:
    """Refuse guards that hold credits for longer than the ledger allows."""
    try:
        longest = meterly_settings.TRANSPORT.longest_hold()
        wanted = dict(_holds())
    except (ImproperlyConfigured, ImportError, TypeError, ValueError):
        return []  # Other checks report it.
    return [
        Error(
            f"{name} is {seconds} seconds, but the ledger refuses to hold credits for "
            f"longer than {longest}.",
            hint="Shorten it, or raise METERLY_LEDGER['MAX_TTL'].",
            id="meterly.E013",
        )
        for name, seconds in wanted.items()
        # A longer time is an E003.
        if longest < seconds <= MAX_TTL_SECONDS
    ]


def _holds() -> Iterator[tuple[str, int]]:
    """Yield the seconds of the default hold, and of each guard that sets its own."""
    yield "METERLY['RESERVATION_TTL']", meterly_settings.RESERVATION_TTL
    for name, options in _guards():
        if options.ttl_seconds is not None:
            yield f"{name}: its ttl_seconds", options.ttl_seconds


@register("meterly", Tags.urls)
def check_units(**kwargs: Any) -> list[CheckMessage]:
    """Refuse guards without a unit, or of one that ``UNITS`` does not declare.

    Without ``UNITS``, recommend it.
    """
    try:
        declared = meterly_settings.UNITS
        usual = meterly_settings.DEFAULT_UNIT
        guards = [(name, options.unit) for name, options in _guards()]
        # A task without a customer is only handed off: the view names the unit.
        handed_off = {
            _named(task) for task in _tasks() if task.meterly_options.customer is None
        }
    except (ImproperlyConfigured, ImportError, TypeError, ValueError, AttributeError):
        return []  # Other checks report it.
    errors: list[CheckMessage] = [
        Error(
            f"{name} names no unit, and METERLY['DEFAULT_UNIT'] is not set: it refuses "
            "to work.",
            hint='Name its unit, for example "image_credits", or set DEFAULT_UNIT.',
            id="meterly.E015",
        )
        for name, unit in guards
        if unit is None and usual is None and name not in handed_off
    ]
    named = [(name, unit) for name, unit in guards if unit is not None]
    if not declared:
        found = sorted({usual or "image_credits", *(unit for _, unit in named)})
        example = {unit: unit.replace("_", " ") for unit in found}
        return [
            *errors,
            Info(
                "METERLY['UNITS'] declares no units: a typo in a unit's name is a new "
                "unit.",
                hint=f"Set METERLY['UNITS'] = {example}, with names for people.",
                id="meterly.I001",
            ),
        ]
    for name, unit in named:
        try:
            units.check_declared(unit)
        except ValueError as exc:
            errors.append(Error(f"{name}: its {exc}", id="meterly.E014"))
    return errors


def _guards() -> list[tuple[str, WorkOptions]]:
    """Return where each guard stands, and its options.

    These are the guards of the settings, of the views in ``ROOT_URLCONF`` and of tasks.
    """
    guards = [
        (f"METERLY['GUARDED_VIEWS'][{name!r}]", read_mapping(options, name))
        for name, options in meterly_settings.GUARDED_VIEWS.items()
    ]
    if getattr(settings, "ROOT_URLCONF", None):
        for name, pattern in named_patterns(get_resolver()):
            view = pattern.callback
            guards += [
                (f"The view {_label(name, view)!r}", each.meterly_options)
                for each in (view, *handlers(view).values())
                if hasattr(each, "meterly_options")
            ]
    return guards + [(_named(task), task.meterly_options) for task in _tasks()]


def _label(name: str, view: Any) -> str:
    """Return the URL name of *view*, or the name of its function."""
    return name or str(getattr(view, "__qualname__", repr(view)))


def _tasks() -> list[Any]:
    if "celery" not in sys.modules:
        return []
    from ..tasks import guarded_tasks

    return guarded_tasks()


def _named(task: Any) -> str:
    return f"The task {task.name!r}"


def _guards_nothing(view: Any) -> str:
    """Return why the class of *view* looks guarded, but guards nothing.

    The text is empty if all is well. For example, another URL may answer the guarded
    action of a view set.
    """
    cls = class_of(view)
    if cls is None or is_guarded(view):
        return ""
    if not issubclass(cls, MeterlyGuardMixin):
        if isinstance(getattr(cls, "guard_options", None), Mapping):
            return "has guard_options, but not MeterlyGuardMixin."
        return ""
    members = (getattr_static(cls, name) for name in dir(cls))
    if any(getattr(member, "meterly_guarded", False) for member in members):
        return ""
    return "has MeterlyGuardMixin, but no guard_options and no guarded handler."


def _methods(view: Any) -> set[str] | None:
    """Return the HTTP methods that *view* answers, or ``None`` if it answers any."""
    if found := handlers(view):
        return {method.upper() for method in found} - {"OPTIONS"}
    allowed = methods.required(view)
    return None if allowed is None else set(allowed)
