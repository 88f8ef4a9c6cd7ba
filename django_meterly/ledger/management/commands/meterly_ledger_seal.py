"""Seal the entries: see ``seals``."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from ... import seals


class Command(BaseCommand):
    help = (
        "Seal the entries that are not sealed yet, and print the chain's last hash. "
        "Keep the hash where nobody who can change the database can change it."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        done = seals.seal_entries()
        # Only the hash on stdout, so that it can be piped into a file elsewhere.
        self.stderr.write(f"{done.entries} entries sealed, {done.late} of them late.")
        if done.head is not None:
            self.stdout.write(done.head.hash)
