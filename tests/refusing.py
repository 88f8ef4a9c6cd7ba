"""A database that refuses every change of some rows, by its own means."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import count
from typing import TYPE_CHECKING

from django.db import connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BEGIN = {
    "sqlite": [
        (
            "CREATE TRIGGER {name} BEFORE {event} ON {table} WHEN {row}.{condition} "
            "BEGIN SELECT RAISE({how}); END"
        ),
    ],
    "postgresql": [
        (
            "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN {how}; END $$"
        ),
        (
            "CREATE TRIGGER {name} BEFORE {event} ON {table} "
            "FOR EACH ROW WHEN ({row}.{condition}) EXECUTE FUNCTION {name}()"
        ),
    ],
    "mysql": [
        (
            "CREATE TRIGGER {name} BEFORE {event} ON {table} FOR EACH ROW "
            "IF {row}.{condition} THEN {how}; END IF"
        ),
    ],
}
END = {
    "sqlite": ["DROP TRIGGER {name}"],
    "postgresql": ["DROP TRIGGER {name} ON {table}", "DROP FUNCTION {name}"],
    "mysql": ["DROP TRIGGER {name}"],
}
LOUD = {
    "sqlite": "ABORT, 'refused'",
    "postgresql": "RAISE EXCEPTION 'refused'",
    "mysql": "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'",
}
#: MySQL has no such thing.
SILENT = {"sqlite": "IGNORE", "postgresql": "RETURN NULL", "mysql": LOUD["mysql"]}

_numbers = count(1)


@contextmanager
def refused(
    table: str, event: str, condition: str, *, silent: bool = False
) -> Iterator[None]:
    """Have the database refuse an *event* for the rows of *condition*, in the block.

    *event* is ``UPDATE``, for example, and *condition* begins with a column. If it is
    *silent*, the database leaves such a row as it is, and goes on.
    """
    texts = {
        "name": f"refusing_{next(_numbers)}",
        "table": table,
        "event": event,
        "condition": condition,
        "row": "NEW" if event == "INSERT" else "OLD",
        "how": (SILENT if silent else LOUD)[connection.vendor],
    }

    def run(statements: list[str]) -> None:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement.format_map(texts), None)

    run(BEGIN[connection.vendor])
    try:
        yield
    finally:
        run(END[connection.vendor])


@contextmanager
def refusing_database() -> Iterator[Callable[[str], None]]:
    """Give what has the database refuse the accounts of a unit, until the end."""
    with ExitStack() as ends:

        def begin(unit: str) -> None:
            condition = f"unit = '{unit}'"
            ends.enter_context(refused("meterly_ledger_account", "UPDATE", condition))

        yield begin
