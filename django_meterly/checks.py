"""System checks: what is misconfigured, found before a user does."""

from __future__ import annotations

import sys
from inspect import isclass
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, OperationalError, connections, router
from django.urls import get_resolver
from django.utils.module_loading import import_string

from . import methods
from .conf import CHOICES, DEFAULTS, check_choice, meterly_settings, suggestion
from .execution import class_of, handlers, is_guarded
from .middleware import MeterlyMiddleware, key_for, named_patterns
from .options import GuardOptions
from .transports.base import (
    MAX_TTL_SECONDS,
    check_amount,
    check_ttl,
    check_unit,
    key_problem,
    url_problem,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from django.apps import AppConfig

HTTP_TRANSPORT = "django_meterly.transports.HttpTransport"
LEDGER_TRANSPORT = "django_meterly.ledger.transport.LedgerTransport"
LEDGER_APP = "django_meterly.ledger"
#: Seconds a row may be overdue before it is worth a warning.
OVERDUE = 3600
#: The longest hold: its work has to find its row when it ends.
SHORTEST_RETENTION = 86400


@register("meterly")
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check ``settings.METERLY``."""
    try:
        project = meterly_settings.as_dict()
    except ImproperlyConfigured as exc:
        return [Error(str(exc), id="meterly.E001")]
    unknown = [name for name in project if name not in DEFAULTS]
    if unknown:
        # Every other setting refuses to be read until these are gone.
        return [
            Error(
                f"There is no setting METERLY[{name!r}].",
                hint=suggestion(str(name), DEFAULTS).strip()
                or f"The settings are {', '.join(sorted(DEFAULTS))}.",
                id="meterly.E002",
            )
            for name in unknown
        ]
    return [*_check_values(), *_check_transport()]


def _check_values() -> Iterator[CheckMessage]:
    for name in DEFAULTS:
        try:
            getattr(meterly_settings, name)
        except ImproperlyConfigured as exc:
            yield Error(str(exc), id="meterly.E003")
            return
    for name, check in (
        ("RESERVATION_TTL", check_ttl),
        ("DEFAULT_UNIT", check_unit),
    ):
        value = getattr(meterly_settings, name)
        if value is not None:
            try:
                check(value, f"METERLY[{name!r}]")
            except ValueError as exc:
                yield Error(str(exc), id="meterly.E003")
    if meterly_settings.JOURNAL_RETENTION < SHORTEST_RETENTION:
        yield Error(
            "METERLY['JOURNAL_RETENTION'] must be a day at least, not "
            f"{meterly_settings.JOURNAL_RETENTION} seconds.",
            hint="Work that ends late has to find its reservation still there.",
            id="meterly.E003",
        )
    for name in CHOICES:
        try:
            check_choice(name, getattr(meterly_settings, name))
        except ValueError as exc:
            yield Error(f"METERLY: {exc}", id="meterly.E003")
    for name, least in (
        ("MAX_ATTEMPTS", 1),
        ("MAX_SETTLE_ATTEMPTS", 1),
        ("UNAVAILABLE_CAP", 0),
    ):
        value = getattr(meterly_settings, name)
        if type(value) is not int or value < least:
            yield Error(
                f"METERLY[{name!r}] must be a whole number from {least}, "
                f"not {value!r}.",
                id="meterly.E003",
            )
    if problem := _low_balance_problem(meterly_settings.LOW_BALANCE):
        yield Error(f"METERLY['LOW_BALANCE'] {problem}", id="meterly.E003")
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
    for name in ("TRANSPORT", "SIGNER", "CUSTOMER_RESOLVER", "EXTERNAL_ID"):
        path = getattr(meterly_settings, name)
        if name == "SIGNER" and path is None:
            continue
        try:
            import_string(path)
        except (ImportError, TypeError, AttributeError) as exc:
            yield Error(
                f"METERLY[{name!r}] cannot be imported: {exc}",
                hint="Give the dotted path of a class or function.",
                id="meterly.E004",
            )


def _low_balance_problem(value: Any) -> str:
    if not isinstance(value, dict):
        return f"must be a dict of units and thresholds, not {value!r}."
    for unit, threshold in value.items():
        try:
            check_unit(unit)
            check_amount(threshold, f"the threshold of {unit!r}")
        except ValueError as exc:
            return f"maps units to credits: {exc}"
    return ""


def _check_transport() -> Iterator[CheckMessage]:
    transport = meterly_settings.TRANSPORT
    if transport == LEDGER_TRANSPORT and LEDGER_APP not in _app_modules():
        yield Error(
            "METERLY['TRANSPORT'] is the embedded ledger, which is not installed.",
            hint=f"Add {LEDGER_APP!r} to INSTALLED_APPS and run migrate.",
            id="meterly.E005",
        )
    if transport != HTTP_TRANSPORT or meterly_settings.ENFORCEMENT == "off":
        return
    if problem := key_problem(meterly_settings.API_KEY or ""):
        yield Error(
            f"METERLY['API_KEY']: {problem}",
            hint=(
                "Set it (METERLY_API_KEY with from_env), or set METERLY['TRANSPORT'] "
                f"to {LEDGER_TRANSPORT!r} to keep the credits in your own database."
            ),
            id="meterly.E006",
        )
    if problem := url_problem(
        str(meterly_settings.BASE_URL), bool(meterly_settings.ALLOW_INSECURE_HTTP)
    ):
        yield Error(f"METERLY['BASE_URL']: {problem}", id="meterly.E007")


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
    except (ImproperlyConfigured, OperationalError):
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
    if not isinstance(views, dict):
        return [
            Error(
                f"METERLY['GUARDED_VIEWS'] must be a dict, not {views!r}.",
                hint="Its keys are URL names or namespaces, its values options.",
                id="meterly.E009",
            )
        ]
    found: list[CheckMessage] = []
    for name, options in views.items():
        try:
            GuardOptions.of(options, f"METERLY['GUARDED_VIEWS'][{name!r}]")
        except (TypeError, ValueError, ImportError) as exc:
            found.append(Error(str(exc), id="meterly.E009"))
    if views and not any(
        isclass(each) and issubclass(each, MeterlyMiddleware) for each in _middleware()
    ):
        found.append(
            Error(
                "METERLY['GUARDED_VIEWS'] guards nothing without MeterlyMiddleware.",
                hint="Add 'django_meterly.middleware.MeterlyMiddleware' to MIDDLEWARE.",
                id="meterly.E010",
            )
        )
    return found


def _middleware() -> Iterator[Any]:
    for path in settings.MIDDLEWARE:
        try:
            yield import_string(path)
        except ImportError:
            # Django says so, and more loudly.
            continue


@register("meterly", Tags.urls)
def check_urls(**kwargs: Any) -> list[CheckMessage]:
    """Check the guards of the views in ``ROOT_URLCONF``."""
    try:
        views = meterly_settings.GUARDED_VIEWS
    except ImproperlyConfigured:
        return []
    if not getattr(settings, "ROOT_URLCONF", None) or not isinstance(views, dict):
        return []
    found: list[CheckMessage] = []
    names = []
    for name, pattern in named_patterns(get_resolver()):
        names.append(name)
        found += _check_guards(name, pattern.callback, key_for(name) == name)
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


def _check_guards(name: str, view: Any, named: bool) -> Iterator[CheckMessage]:
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
    if early and is_guarded(view):
        yield Error(
            f"The view {where!r} has a guard on a handler, which ATOMIC_REQUESTS (on "
            f"the database {early[0]!r}) makes it refuse.",
            hint="Put MeterlyGuardMixin first among the bases of its class.",
            id="meterly.E012",
        )
    answered = _methods(view)
    options = getattr(view, "meterly_options", None)
    if named and not is_guarded(view):
        try:
            options = GuardOptions.of(meterly_settings.GUARDED_VIEWS[name], name)
        except (TypeError, ValueError, ImportError):
            return
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
        longest = import_string(meterly_settings.TRANSPORT).longest_hold()
        wanted = dict(_holds())
    except (ImproperlyConfigured, ImportError, TypeError, ValueError, AttributeError):
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
    """Yield for how long each guard that can be found holds credits, if it says so."""
    yield "METERLY['RESERVATION_TTL']", meterly_settings.RESERVATION_TTL
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
    if "celery" in sys.modules:
        from .tasks import guarded_tasks

        guards += [
            (f"The task {task.name!r}", task.meterly_options)
            for task in guarded_tasks()
        ]
    for name, options in guards:
        if options.ttl_seconds is not None:
            yield f"{name}: its ttl_seconds", options.ttl_seconds


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
    except (ImproperlyConfigured, DatabaseError):
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
