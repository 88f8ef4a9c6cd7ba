from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from ... import seals


class Command(BaseCommand):
    help = (
        "Seal the entries that are not sealed yet, and print the hash that all entries "
        "up to now have led to. Keep it out of reach of those who can change the "
        "database."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        done = seals.seal_entries()
        # The hash alone on stdout, so that it can be piped to where it is kept.
        self.stderr.write(f"{done.entries} entries sealed, {done.late} of them late.")
        if done.head is not None:
            self.stdout.write(done.head.hash)
