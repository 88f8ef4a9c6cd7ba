"""What Django calls after a test that commits, in place of its own ``flush``."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import Permission
from django.contrib.contenttypes.models import ContentType
from django.core.management.color import no_style
from django.core.management.commands import flush
from django.db import connections


class Command(flush.Command):
    """Delete what a test has left, but nothing that migrations have.

    Django's own command deletes content types and permissions, too, and brings them
    back by ``post_migrate``: that takes longer than most tests.
    """

    def handle(self, **options: Any) -> None:
        connection = connections[options["database"]]
        every = connection.introspection.django_table_names(
            only_existing=True, include_views=False
        )
        kept = {ContentType._meta.db_table, Permission._meta.db_table}
        tables = sorted({*every} - kept)
        statements = connection.ops.sql_flush(no_style(), tables)
        if connection.vendor == "postgresql":
            # Of a few rows; TRUNCATE makes new files for every table and index.
            quote = connection.ops.quote_name
            statements = [
                # No trigger refuses them.
                "SET LOCAL session_replication_role = replica",
                *(f"DELETE FROM {quote(table)}" for table in tables),
            ]
        connection.ops.execute_sql_flush(statements)
