"""Check the books: see ``verification``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.core.serializers.base import ProgressBar
from django.db import connections

from ... import verification
from ...database import write_alias
from ...models import Account, Entry
from ...seals import head
from ...triggers import missing

if TYPE_CHECKING:
    from argparse import ArgumentParser

#: How many differences are shown.
SHOWN = 1000


def _kept(path: str) -> list[str]:
    """Return the hashes in the file *path*, which must have only hashes."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(f"The heads in {path} cannot be read: {exc}") from exc
    hashes = text.split()
    for one in hashes:
        if not re.fullmatch("[0-9a-f]{64}", one):
            raise CommandError(
                f"{one[:80]!r} in {path} is not a hash of 64 hexadecimal digits, as "
                "meterly_ledger_seal prints."
            )
    if not hashes:
        # Without a hash to compare with, a forged chain would pass.
        raise CommandError(f"There is no hash in {path}. Was it copied completely?")
    return hashes


class Command(BaseCommand):
    help = (
        "Rebuild every balance from the ledger's entries, compare rows that refer to "
        "each other, and compute the chain of seals again. Nothing is changed. The "
        "exit code is 1 if there is a difference."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--heads",
            metavar="FILE",
            help="A file with the hashes that meterly_ledger_seal printed, or - for "
            "standard input: the chain must still have each of them.",
        )

    def handle(self, *args: Any, heads: str | None, **options: Any) -> None:
        kept = [] if heads is None else _kept(heads)
        self._warn()
        using = write_alias()
        entries = Entry.objects.using(using).count()
        counted = f"{Account.objects.using(using).count()} accounts, {entries} entries"
        bar = ProgressBar(sys.stderr if sys.stderr.isatty() else None, entries)
        shown: list[verification.Difference] = []
        count = 0
        for difference in verification.differences(
            # Entries may have been written since they were counted.
            kept,
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
