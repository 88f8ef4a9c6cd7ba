"""System checks: what is misconfigured, found before a user does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections, router
from django.utils.module_loading import import_string

from .conf import CHOICES, DEFAULTS, check_choice, meterly_settings, suggestion
from .transports.base import (
    check_amount,
    check_ttl,
    check_unit,
    key_problem,
    url_problem,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HTTP_TRANSPORT = "django_meterly.transports.HttpTransport"
LEDGER_TRANSPORT = "django_meterly.ledger.transport.LedgerTransport"
LEDGER_APP = "django_meterly.ledger"


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
            id="meterly.W005",
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
            id="meterly.W006",
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
