from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.core.serializers.base import ProgressBar
from django.db import connections

from ... import verification
from ...models import Account, Entry
from ...operations import write_alias
from ...seals import head
from ...triggers import missing

if TYPE_CHECKING:
    from argparse import ArgumentParser

#: How many differences are shown.
SHOWN = 1000


class Command(BaseCommand):
    help = (
        "Rebuild every balance from the ledger's entries, compare what refers to each "
        "other, and compute the chain of seals again. Nothing is changed; a difference "
        "ends with exit code 1."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--head",
            default="",
            metavar="HASH",
            help="A hash that meterly_ledger_seal printed, and that you kept "
            "elsewhere: the chain must still have it.",
        )

    def handle(self, *args: Any, head: str, **options: Any) -> None:
        self._warn()
        using = write_alias()
        entries = Entry.objects.using(using).count()
        counted = f"{Account.objects.using(using).count()} accounts, {entries} entries"
        bar = ProgressBar(sys.stderr if sys.stderr.isatty() else None, entries)
        shown: list[verification.Difference] = []
        count = 0
        for difference in verification.differences(
            # Entries may have been written since they were counted.
            head.strip(),
            lambda done: bar.update(min(done, entries)),
        ):
            count += 1
            if count <= SHOWN:
                shown.append(difference)
        if not count:
            self.stdout.write(f"{counted}: the books balance.")
            self._say_what_is_sealed(using)
            return
        self.stdout.write(f"{counted}: the books do not balance.\n\n")
        table = [("ROW", "ACCOUNT", "COLUMN", "EXPECTED", "FOUND"), *shown]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.stdout.write("  ".join(cells).rstrip())
        if count > SHOWN:
            self.stdout.write(f"... and {count - SHOWN} more.")
        raise CommandError(f"Differences: {count}.")

    def _warn(self) -> None:
        names = [trigger.name for trigger in missing(connections[write_alias()])]
        if names:
            self.stderr.write(
                "The database does not refuse changes to entries: these triggers are "
                f"missing, or this role cannot see them: {', '.join(names)}."
            )

    def _say_what_is_sealed(self, using: str) -> None:
        last = head(using)
        if last is not None:
            self.stdout.write(
                f"{verification.sealed()} entries are sealed, by {last.number} seals. "
                f"The last one is {last.hash}."
            )
