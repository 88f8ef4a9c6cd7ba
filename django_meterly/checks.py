"""System checks: what is misconfigured, found before a user does."""

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
from django.db import Error as AnyDatabaseError
from django.db import connections, router
from django.urls import get_resolver

from . import units
from .conf import (
    DEFAULTS,
    FUNCTIONS,
    ignored_variables,
    meterly_settings,
    suggestion,
    text_of,
)
from .db import missing_tables
from .middleware import MIDDLEWARE, is_installed
from .mixins import MeterlyGuardMixin
from .options import GuardOptions, _cannot_take, _takes
from .resolvers import request_user
from .transports.base import MAX_TTL_SECONDS, shown
from .views import methods
from .views.introspection import class_of, handlers, is_guarded
from .views.patterns import key_for, named_patterns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from django.apps import AppConfig

HTTP_TRANSPORT = "django_meterly.transports.http.HttpTransport"
LEDGER_TRANSPORT = "django_meterly.ledger.transport.LedgerTransport"
LEDGER_APP = "django_meterly.ledger"
#: The longest hold: its work has to find its row when it ends.
SHORTEST_RETENTION = 86400
#: Seconds a row may be overdue before it is worth a warning.
OVERDUE = 3600


@register("meterly")
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check ``settings.METERLY``."""
    try:
        project = meterly_settings.as_dict()
    except ImproperlyConfigured as exc:
        return [Error(str(exc), id="meterly.E001")]
    unknown = meterly_settings.unknown()
    if unknown:
        # Every other setting refuses to be read until these are gone.
        return [
            Error(
                f"There is no setting METERLY[{shown(name)}].",
                hint=suggestion(name, DEFAULTS).strip()
                or f"The settings are {', '.join(sorted(DEFAULTS))}.",
                id="meterly.E002",
            )
            for name in unknown
        ]
    lacking = (
        project.get("TRANSPORT") == LEDGER_TRANSPORT
        and LEDGER_APP not in _app_modules()
    )
    found = list(_check_values({"TRANSPORT"} if lacking else set()))
    if lacking:
        found.append(
            Error(
                "METERLY['TRANSPORT'] is the embedded ledger, which is not installed.",
                hint=f"Add {LEDGER_APP!r} to INSTALLED_APPS and run migrate.",
                id="meterly.E005",
            )
        )
    return found or [*_check_together(), *_check_http()]


#: Ids of errors in values; all others are E003.
_VALUE_IDS = {
    **dict.fromkeys(FUNCTIONS, "meterly.E004"),
    "API_KEY": "meterly.E006",
    "BASE_URL": "meterly.E007",
    "GUARDED_VIEWS": "meterly.E009",
}


#: What the functions that settings name are called with.
_ARGUMENTS = {"CUSTOMER_RESOLVER": "request", "EXTERNAL_ID": "owner"}


def _check_values(skipped: set[str]) -> Iterator[CheckMessage]:
    for name in DEFAULTS:
        if name in skipped:
            continue
        try:
            value = getattr(meterly_settings, name)
        except ImproperlyConfigured as exc:
            yield Error(str(exc), id=_VALUE_IDS.get(name, "meterly.E003"))
            continue
        given = _ARGUMENTS.get(name)
        if given is not None and not _takes(value, [given]):
            refused = _cannot_take(f"METERLY[{name!r}]", value, given)
            yield Error(str(refused), id=_VALUE_IDS[name])


def _check_together() -> Iterator[CheckMessage]:
    for unit, people_say in meterly_settings.UNITS.items():
        try:
            if not text_of(people_say, f"METERLY['UNITS'][{unit!r}]").strip():
                raise ValueError(f"METERLY['UNITS'] gives {unit!r} an empty name.")
        except ValueError as exc:
            yield Error(str(exc), id="meterly.E003")
    typed = [(unit, "METERLY['LOW_BALANCE']") for unit in meterly_settings.LOW_BALANCE]
    if meterly_settings.DEFAULT_UNIT is not None:
        typed.append((meterly_settings.DEFAULT_UNIT, "METERLY['DEFAULT_UNIT']"))
    for unit, name in typed:
        try:
            units.check_declared(unit, f"{name}: the unit")
        except ValueError as exc:
            yield Error(str(exc), id="meterly.E003")
    if meterly_settings.JOURNAL_RETENTION < SHORTEST_RETENTION:
        yield Error(
            "METERLY['JOURNAL_RETENTION'] must be at least one day, not "
            f"{meterly_settings.JOURNAL_RETENTION} seconds.",
            hint="Work that ends late has to find its reservation still there.",
            id="meterly.E003",
        )
    if (
        meterly_settings.ON_UNAVAILABLE == "allow"
        and meterly_settings.UNAVAILABLE_CAP == 0
    ):
        yield CheckWarning(
            "METERLY['ON_UNAVAILABLE'] is 'allow', but UNAVAILABLE_CAP is 0: nothing "
            "is allowed.",
            hint="Set UNAVAILABLE_CAP to the credits a customer may have on trust.",
            id="meterly.W004",
        )
    for variable, name in sorted(ignored_variables.items()):
        yield CheckWarning(
            f"The environment variable {variable} names no setting of METERLY, and "
            f"from_env ignores it.{suggestion(name, DEFAULTS)}",
            hint="Rename it, or give from_env another prefix, if it is not a setting.",
            id="meterly.W013",
        )


def _check_http() -> Iterator[CheckMessage]:
    """Check what the first call over HTTP would raise."""
    transport = meterly_settings.TRANSPORT
    # By name: the embedded ledger needs no requests.
    named = f"{transport.__module__}.{transport.__qualname__}"
    if named != HTTP_TRANSPORT or meterly_settings.ENFORCEMENT == "off":
        return
    problem = ""
    if meterly_settings.API_KEY is None:
        problem = "METERLY['API_KEY'] is needed to reach the ledger over HTTP."
    else:
        try:
            transport.from_settings(meterly_settings).close()
        except (TypeError, ValueError) as exc:
            problem = f"METERLY cannot set up the transport: {exc}"
    if problem:
        yield Error(
            problem,
            hint=(
                "Set METERLY['API_KEY'] (METERLY_API_KEY with from_env), or set "
                f"METERLY['TRANSPORT'] to {LEDGER_TRANSPORT!r} to keep the credits in "
                "your own database."
            ),
            id="meterly.E006",
        )


@register("meterly", deploy=True)
def check_enforcement(**kwargs: Any) -> list[CheckMessage]:
    """Warn when guarded views run for nothing."""
    try:
        enforcement = meterly_settings.ENFORCEMENT
    except ImproperlyConfigured:
        return []  # check_settings reports it.
    if enforcement == "enforce":
        return []
    return [
        CheckWarning(
            f"METERLY['ENFORCEMENT'] is {enforcement!r}: work runs without credits.",
            hint="Set it to 'enforce' where credits are to be paid.",
            id="meterly.W005",
        )
    ]


@register("meterly", Tags.database)
def check_tables(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn when ``migrate`` has not made the tables."""
    return missing_tables("meterly", databases or ())


@register("meterly", Tags.database)
def check_customer_model(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Refuse a ``CUSTOMER_MODEL`` that is not the one of the first migrate."""
    from django.apps import apps

    from .models import Customer

    using = router.db_for_write(Customer)
    if using not in (databases or ()):
        return []
    table = Customer._meta.db_table
    connection = connections[using]
    try:
        expected = apps.get_model(meterly_settings.CUSTOMER_MODEL)._meta.db_table
        with connection.cursor() as cursor:
            if table not in connection.introspection.table_names(cursor):
                return []
            relations = connection.introspection.get_relations(cursor, table)
    except (ImproperlyConfigured, AnyDatabaseError):
        # check_settings reports the one, and this is no check for the other.
        return []
    actual = relations.get(Customer._meta.get_field("owner").column)
    if actual is None or actual[1] == expected:
        return []
    return [
        Error(
            f"METERLY['CUSTOMER_MODEL'] is {meterly_settings.CUSTOMER_MODEL!r}, but "
            f"the customers of the database {using!r} belong to the table "
            f"{actual[1]!r}.",
            hint=(
                "CUSTOMER_MODEL is fixed by the first migrate. Set it back, or move "
                "the customers with a migration of your own."
            ),
            id="meterly.E008",
        )
    ]


@register("meterly")
def check_resolver(**kwargs: Any) -> list[CheckMessage]:
    """Warn about customers who are no users, and a resolver that returns users."""
    from django.contrib.auth import get_user_model

    from .models import Customer

    name = "CUSTOMER_RESOLVER"
    try:
        if meterly_settings.CUSTOMER_RESOLVER is not request_user:
            return []
        user, owner = get_user_model(), Customer.owner_model()
    except ImproperlyConfigured:
        return []  # check_settings and Django report it.
    if issubclass(user, owner):
        return []
    return [
        CheckWarning(
            f"Customers belong to {owner._meta.label}, but METERLY[{name!r}] is the "
            f"default, which returns a {user._meta.label}: guarded views will fail.",
            hint=(
                "Set it to the dotted path of a function (request) that returns the "
                f"{owner._meta.object_name} that pays, or None."
            ),
            id="meterly.W012",
        )
    ]


def _app_modules() -> set[str]:
    from django.apps import apps

    return {config.name for config in apps.get_app_configs()}


@register("meterly")
def check_databases(**kwargs: Any) -> list[CheckMessage]:
    """Warn about SQLite with ``ATOMIC_REQUESTS``."""
    return [
        CheckWarning(
            f"The database {alias!r} is SQLite with ATOMIC_REQUESTS: a guarded view "
            "holds its one write lock until it is done, and concurrent requests fail.",
            hint="Set ATOMIC_REQUESTS to False there, or use another database.",
            id="meterly.W001",
        )
        for alias, options in connections.settings.items()
        if options["ENGINE"].endswith("sqlite3") and options["ATOMIC_REQUESTS"]
    ]


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
            GuardOptions.of(options, f"METERLY['GUARDED_VIEWS'][{name!r}]")
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
        found += _check_guards(name, pattern.callback, key_for(name))
    used = {key_for(name) for name in names}
    # A namespace whose every view is named by itself is there all the same.
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
    return {
        ":".join(parts[:count]) + ":"
        for parts in (space.rstrip(":").split(":") for space in spaces)
        for count in range(1, len(parts))
    }


def _check_guards(name: str, view: Any, key: str | None) -> Iterator[CheckMessage]:
    where = name or getattr(view, "__qualname__", repr(view))
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
    early = [
        alias
        for alias, database in connections.settings.items()
        if database["ATOMIC_REQUESTS"]
        and alias not in getattr(view, "_non_atomic_requests", ())
    ]
    if early and is_guarded(view) and iscoroutinefunction(view):
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
    elif early and is_guarded(view):
        yield Error(
            f"The view {where!r} has a guard on a handler, which ATOMIC_REQUESTS (on "
            f"the database {early[0]!r}) makes it refuse.",
            hint="Put MeterlyGuardMixin first among the bases of its class.",
            id="meterly.E012",
        )
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
    answered = _methods(view)
    options = getattr(view, "meterly_options", None)
    if key == name and not is_guarded(view):
        setting = f"METERLY['GUARDED_VIEWS'][{name!r}]"
        given = meterly_settings.GUARDED_VIEWS[name]
        try:
            options = GuardOptions.of(given, setting)
        except (TypeError, ValueError, ImportError):
            return  # check_guarded_views says so.
        try:
            GuardOptions.of(given, setting, handlers(view) or {"post": view})
        except TypeError as exc:
            yield Error(str(exc), id="meterly.E009")
    guards = [(where, options, answered)] if options and answered else []
    for method, handler in handlers(view).items():
        options = getattr(handler, "meterly_options", None)
        if options and not (method == "head" and "get" in handlers(view)):
            guards.append((f"{where}, {method}()", options, {method.upper()}))
    for guarded, options, answers in guards:
        if not any(options.costs(method) for method in answers):
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
    """Refuse guards that hold credits for longer than the ledger does."""
    try:
        longest = meterly_settings.TRANSPORT.longest_hold()
        wanted = dict(_holds())
    except (ImproperlyConfigured, ImportError, TypeError, ValueError):
        return []  # The others report it.
    return [
        Error(
            f"{name} is {seconds} seconds, but the ledger refuses to hold credits for "
            f"longer than {longest}.",
            hint="Shorten it, or raise METERLY_LEDGER['MAX_TTL'].",
            id="meterly.E013",
        )
        for name, seconds in wanted.items()
        # What no ledger takes is an E003.
        if longest < seconds <= MAX_TTL_SECONDS
    ]


def _holds() -> Iterator[tuple[str, int]]:
    """Yield how long credits are held, by default and by each guard that says so."""
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
        # A task that is only handed off settles what a view has reserved.
        handed_off = {
            _named(task) for task in _tasks() if task.meterly_options.customer is None
        }
    except (ImproperlyConfigured, ImportError, TypeError, ValueError, AttributeError):
        return []  # The others report it.
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


def _guards() -> list[tuple[str, GuardOptions]]:
    """Return the options of each guard that can be found, and where it stands."""
    guards = [
        (f"METERLY['GUARDED_VIEWS'][{name!r}]", GuardOptions.of(options, name))
        for name, options in meterly_settings.GUARDED_VIEWS.items()
    ]
    if getattr(settings, "ROOT_URLCONF", None):
        for name, pattern in named_patterns(get_resolver()):
            view = pattern.callback
            where = name or getattr(view, "__qualname__", repr(view))
            guards += [
                (f"The view {where!r}", each.meterly_options)
                for each in (view, *handlers(view).values())
                if hasattr(each, "meterly_options")
            ]
    return guards + [(_named(task), task.meterly_options) for task in _tasks()]


def _tasks() -> list[Any]:
    if "celery" not in sys.modules:
        return []
    from .tasks import guarded_tasks

    return guarded_tasks()


def _named(task: Any) -> str:
    return f"The task {task.name!r}"


def _guards_nothing(view: Any) -> str:
    """Return what is missing in the class of a *view* that looks guarded, and is not.

    A view set may have its guard on an action that another URL answers.
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


@register("meterly", Tags.database)
def check_sweeping(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn about rows that a sweeper would have settled long ago."""
    from . import journal
    from .models import Reservation

    using = journal.alias()
    if using not in (databases or ()):
        return []
    connection = connections[using]
    try:
        with connection.cursor() as cursor:
            tables = connection.introspection.table_names(cursor)
        if Reservation._meta.db_table not in tables:
            return []
        overdue = journal.backlog(OVERDUE)
    except (ImproperlyConfigured, AnyDatabaseError):
        # A database out of reach, or before its migrations: not for this check.
        return []
    if overdue.oldest_due_seconds is None:
        return []
    return [
        CheckWarning(
            f"Nothing seems to sweep: {overdue.lapsed + overdue.due} reservations in "
            f"the database {using!r} have been overdue for more than an hour, the "
            f"oldest for {overdue.oldest_due_seconds / 3600:.1f} hours.",
            hint=(
                "Run manage.py meterly_settle from cron, or Celery beat with "
                "django_meterly.tasks.beat_schedule(). If one of them runs, the "
                "ledger is out of reach: see its log."
            ),
            id="meterly.W007",
        )
    ]


@register("meterly")
def check_beat(**kwargs: Any) -> list[CheckMessage]:
    """Warn about a beat that runs some of our tasks, and not the others."""
    if "celery" not in sys.modules:
        return []
    from .tasks import missing_from_beat

    return [
        CheckWarning(
            f"Celery's beat_schedule lacks the task {name!r}.",
            hint=(
                "Take all of django_meterly.tasks.beat_schedule(), with ledger=True if "
                "the embedded ledger is installed. Each task does what no other does."
            ),
            id="meterly.W008",
        )
        for name in missing_from_beat()
    ]


@register("meterly")
def check_query_cache(**kwargs: Any) -> list[CheckMessage]:
    """Warn when django-cachalot answers queries for our tables from its cache."""
    from django.apps import apps

    installed = [
        config
        for config in apps.get_app_configs()
        if config.name in ("django_meterly", LEDGER_APP)
    ]
    if "cachalot" not in _app_modules() or not getattr(
        settings, "CACHALOT_ENABLED", True
    ):
        return []
    labels = [config.label for config in installed if _is_cached(config)]
    return [
        CheckWarning(
            f"django-cachalot caches the tables of {label!r}: it does not see what "
            "changes in the database, and shows balances that are not true any more.",
            hint=f"Add {label!r} to CACHALOT_UNCACHABLE_APPS.",
            id="meterly.W011",
        )
        for label in labels
    ]


def _is_cached(app: AppConfig) -> bool:
    """Return whether django-cachalot's settings let it cache a table of *app*."""
    chosen = {
        name: {*getattr(settings, f"CACHALOT_{name}", ())}
        for name in ("ONLY_CACHABLE_APPS", "ONLY_CACHABLE_TABLES")
    }
    if app.label in getattr(settings, "CACHALOT_UNCACHABLE_APPS", ()):
        return False
    tables = {model._meta.db_table for model in app.get_models()}
    tables -= {*getattr(settings, "CACHALOT_UNCACHABLE_TABLES", ())}
    if any(chosen.values()) and app.label not in chosen["ONLY_CACHABLE_APPS"]:
        tables &= chosen["ONLY_CACHABLE_TABLES"]
    return bool(tables)
