"""The sweep of expired reservations: see ``expiry``."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ... import expiry, idempotency


class Command(BaseCommand):
    help = (
        "Expire reservations whose time has run out, and delete old idempotency "
        "records. Run it every minute or so."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--batch-size",
            type=int,
            default=1000,
            metavar="N",
            help="How many reservations are read at a time (%(default)s).",
        )

    def handle(self, *args: Any, batch_size: int, **options: Any) -> None:
        if batch_size < 1:
            raise CommandError("--batch-size must be at least 1.")
        idempotency.prune_records()
        expired = expiry.expire_due(batch_size)
        noun = "reservation" if expired == 1 else "reservations"
        self.stdout.write(f"{expired} {noun} expired.")
