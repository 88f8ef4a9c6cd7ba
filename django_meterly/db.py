"""What both apps need from every database alike: exact text, and one clock."""

from __future__ import annotations

import datetime as dt
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.core.checks import CheckMessage
from django.core.checks import Warning as CheckWarning
from django.db import DatabaseError, connections, models, router
from django.db.models.functions import Now

if TYPE_CHECKING:
    from collections.abc import Collection

    from django.db.backends.base.base import BaseDatabaseWrapper


class ExactCharField(models.CharField):  # type: ignore[type-arg]
    """A ``CharField`` that compares by the byte on every database.

    MySQL's default collation takes ``Key-1`` for ``key-1``, and "é" for "e":
    ids and idempotency keys that differ must stay apart.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        column = super().db_type(connection)
        if column is not None and connection.vendor == "postgresql":
            # The same type, by the name under which Django adds no second index
            # to a unique column, for LIKE: every movement would pay for it.
            column = column.replace("varchar", "character varying", 1)
        return column

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            parameters["collation"] = "utf8mb4_bin"
        return parameters


class DatabaseNow(Now):
    """The database's clock, in UTC.

    Django's ``Now`` is the session's local time on MySQL, while Django stores
    UTC there.
    """

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


def from_now(seconds: float) -> models.Expression:
    """Return the moment *seconds* from now by the database's clock."""
    return models.ExpressionWrapper(
        DatabaseNow() + dt.timedelta(seconds=seconds),
        output_field=models.DateTimeField(),
    )


def error_codes(exc: DatabaseError) -> tuple[Any, Any]:
    """Return PostgreSQL's SQLSTATE of *exc* and MySQL's number; ``None`` elsewhere."""
    cause = exc.__cause__
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    arguments: tuple[Any, ...] = getattr(cause, "args", ())
    return sqlstate, next(iter(arguments), None)


def missing_tables(label: str, databases: Collection[str]) -> list[CheckMessage]:
    """Return warnings about tables of the app *label* that *databases* lack.

    No error: commands of other packages that migrate run the checks first, too.
    """
    if sys.argv[1:2] == ["migrate"]:
        # It runs the checks, and then makes the tables.
        return []
    config = apps.get_app_config(label)
    expected: dict[str, set[str]] = defaultdict(set)
    for model in config.get_models():
        expected[router.db_for_write(model)].add(model._meta.db_table)
    found: list[CheckMessage] = []
    for using in sorted(expected.keys() & set(databases)):
        try:
            present = connections[using].introspection.table_names()
        except DatabaseError:
            # A database out of reach: not for this check.
            continue
        if missing := sorted(expected[using].difference(present)):
            option = "" if using == "default" else f" --database {using}"
            found.append(
                CheckWarning(
                    f"The database {using!r} lacks tables of {config.name}: "
                    f"{', '.join(missing)}.",
                    hint=f"Run manage.py migrate{option}.",
                    id=f"{label}.W021",
                )
            )
    return found
