"""The check constraint on the shape of an entry, made cheap for PostgreSQL.

``models.Entry`` declares it. ``postgresql`` creates the function before the tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db.models import CheckConstraint

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

#: As with the other functions, the number changes when the arguments change.
FUNCTION = "meterly_shaped_1"
ARGUMENTS = {
    "kind": "varchar",
    "amount": "bigint",
    "balance_delta": "bigint",
    "reserved_delta": "bigint",
}


class ShapeConstraint(CheckConstraint):
    """Check ``ARGUMENTS``, columns of the model; on PostgreSQL by a function.

    PostgreSQL parses the text of a check with each statement, which made reserve and
    commit an eighth slower. It compiles a function once in each session.
    """

    def _get_check_sql(self, model: Any, schema_editor: Any) -> str:
        if schema_editor.connection.vendor != "postgresql":
            return self.text(model, schema_editor)
        return f"{FUNCTION}({', '.join(ARGUMENTS)})"

    def text(self, model: Any, schema_editor: Any) -> str:
        """Return the condition as SQL."""
        sql: str = super()._get_check_sql(model, schema_editor)  # type: ignore[misc]
        return sql


def create_shape_function(connection: BaseDatabaseWrapper) -> None:
    """Create the constraint's function, or replace it; nothing on other databases."""
    from .models import Entry

    if connection.vendor != "postgresql":
        return
    for constraint in Entry._meta.constraints:
        if isinstance(constraint, ShapeConstraint):
            text = constraint.text(Entry, connection.SchemaEditorClass(connection))
            arguments = ", ".join(f"{name} {ARGUMENTS[name]}" for name in ARGUMENTS)
            with connection.cursor() as cursor:
                cursor.execute(
                    f"CREATE OR REPLACE FUNCTION {FUNCTION}({arguments}) "
                    "RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS "
                    f"$$ BEGIN RETURN {text}; END $$",
                    None,
                )


def drop_shape_function(connection: BaseDatabaseWrapper) -> None:
    """Drop the function, once no constraint calls it; nothing on other databases."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(f"DROP FUNCTION IF EXISTS {FUNCTION}", None)
