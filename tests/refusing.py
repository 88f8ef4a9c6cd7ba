"""A database that refuses every change of some accounts, by its own means."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from django.db import connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BEGIN = {
    "sqlite": [
        (
            "CREATE TRIGGER refusing BEFORE UPDATE ON meterly_ledger_account "
            "WHEN OLD.unit = '{}' BEGIN SELECT RAISE(ABORT, 'refused'); END"
        ),
    ],
    "postgresql": [
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'refused'; END $$"
        ),
        (
            "CREATE TRIGGER refusing BEFORE UPDATE ON meterly_ledger_account "
            "FOR EACH ROW WHEN (OLD.unit = '{}') EXECUTE FUNCTION refuse()"
        ),
    ],
    "mysql": [
        (
            "CREATE TRIGGER refusing BEFORE UPDATE ON meterly_ledger_account "
            "FOR EACH ROW IF OLD.unit = '{}' THEN "
            "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'; END IF"
        ),
    ],
}
END = {
    "sqlite": ["DROP TRIGGER refusing"],
    "postgresql": [
        "DROP TRIGGER refusing ON meterly_ledger_account",
        "DROP FUNCTION refuse",
    ],
    "mysql": ["DROP TRIGGER refusing"],
}


def _run(statements: list[str], unit: str = "") -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement.replace("{}", unit), None)


@contextmanager
def refusing_database() -> Iterator[Callable[[str], None]]:
    """Give what has the database refuse the accounts of a unit, until the end."""
    began = []

    def begin(unit: str) -> None:
        began.append(unit)
        _run(BEGIN[connection.vendor], unit)

    yield begin
    if began:
        _run(END[connection.vendor])
