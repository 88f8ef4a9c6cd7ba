"""The ledger's system checks, which ``apps`` imports to register them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as AnyDatabaseError
from django.db import connections

from ..db import missing_tables
from .conf import DEFAULTS, ledger_settings

if TYPE_CHECKING:
    from collections.abc import Sequence


@register
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Report the errors in ``settings.METERLY_LEDGER``."""
    messages: dict[str, None] = {}
    for name in DEFAULTS:
        try:
            getattr(ledger_settings, name)
        except ImproperlyConfigured as exc:
            messages[str(exc)] = None
    return [Error(message, id="meterly_ledger.E001") for message in messages]


@register(Tags.database)
def check_tables(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn when ``migrate`` has not created the tables."""
    return missing_tables("meterly_ledger", databases or ())


@register(Tags.database)
def check_triggers(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Warn when the triggers that protect the entries are missing."""
    from .database import write_alias
    from .models import Entry
    from .triggers import missing

    using = write_alias()
    if using not in (databases or ()):
        return []
    connection = connections[using]
    try:
        if Entry._meta.db_table not in connection.introspection.table_names():
            return []
        names = [trigger.name for trigger in missing(connection)]
    except AnyDatabaseError:
        # The database cannot be reached; another check reports that.
        return []
    if not names:
        return []
    return [
        CheckWarning(
            f"The database {using!r} does not refuse changes to the ledger's entries: "
            f"the triggers {', '.join(names)} are missing, or this role cannot see "
            "them.",
            hint=(
                "Run migrate as a role that may create triggers. With MySQL's binary "
                "log that takes log_bin_trust_function_creators = 1."
            ),
            id="meterly_ledger.W001",
        )
    ]
