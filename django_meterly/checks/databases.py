"""Do the databases have our tables, and does nothing get in their way?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Tags, register
from django.core.checks import Warning as CheckWarning
from django.db import connections

from ..db import missing_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from django.apps import AppConfig


@register("meterly", Tags.database)
def check_tables(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn about missing tables."""
    return missing_tables("meterly", databases or ())


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
def check_query_cache(**kwargs: Any) -> list[CheckMessage]:
    """Warn when django-cachalot caches queries of our tables."""
    enabled = getattr(settings, "CACHALOT_ENABLED", True)
    if not enabled or not apps.is_installed("cachalot"):
        return []
    labels = [
        config.label
        for config in apps.get_app_configs()
        if config.name in ("django_meterly", "django_meterly.ledger")
        and _is_cached(config)
    ]
    return [
        CheckWarning(
            f"django-cachalot caches the tables of {label!r}: it does not see what "
            "changes in the database, and shows outdated balances.",
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
