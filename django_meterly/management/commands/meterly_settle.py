from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError

from django_meterly import grants, journal
from django_meterly.client import get_client

if TYPE_CHECKING:
    from argparse import ArgumentParser


class Command(BaseCommand):
    help = (
        "Release the reservations that crashed work left behind, and carry out the "
        "commits, releases and grants that are still due. The Celery tasks do the "
        "same; run this from cron where there is no Celery."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--limit",
            type=int,
            help="Settle this many reservations at most (default: all that are due).",
        )

    def handle(self, *, limit: int | None, **options: Any) -> None:
        if limit is not None and limit < 1:
            raise CommandError("--limit must be at least 1.")
        client = get_client()
        lapsed, taken = journal.sweep(client, limit=limit)
        granted = grants.settle_due(client)
        self.stdout.write(
            f"{lapsed} lapsed, {taken} taken up, {granted} pending grants asked again."
        )
