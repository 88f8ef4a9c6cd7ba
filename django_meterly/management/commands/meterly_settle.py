from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError
from django.core.serializers.base import ProgressBar

from django_meterly import grants, journal
from django_meterly.client import get_client
from django_meterly.models import Grant, Reservation

if TYPE_CHECKING:
    from argparse import ArgumentParser

#: The exit code when reservations are stuck: somebody has to look into them.
STUCK = 3


def _rows(value: str) -> int:
    try:
        rows = int(value)
    except ValueError:
        raise ArgumentTypeError(f"must be a whole number, not {value!r}.") from None
    if rows < 1:
        raise ArgumentTypeError("must be at least 1.")
    return rows


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    # At most a hundred years, which every database can subtract from a date.
    if not 0 <= seconds <= 100 * 365 * 86400:
        raise ArgumentTypeError(f"must be a number of seconds from 0, not {value!r}.")
    return seconds


class Command(BaseCommand):
    help = (
        "Release the reservations that crashed work left behind, and carry out the "
        "commits, releases and grants that are still due. Delete reservations that "
        "were settled JOURNAL_RETENTION ago. The Celery tasks do the same; without "
        "Celery, run this command from cron. Exit codes: 0, or 3 when reservations are "
        "stuck."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--limit",
            type=_rows,
            metavar="ROWS",
            help="Settle at most ROWS reservations (default: all that are due).",
        )
        parser.add_argument(
            "--older-than",
            type=_seconds,
            default=0.0,
            metavar="SECONDS",
            help="Leave alone what lapsed or came due in the last SECONDS.",
        )
        parser.add_argument(
            "--retry-stuck",
            action="store_true",
            help="Also try the stuck reservations again.",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="Say what would be done, and change nothing.",
        )
        parser.add_argument(
            "--json", action="store_true", help="Print the counts as JSON."
        )

    def handle(
        self,
        *,
        limit: int | None,
        older_than: float,
        retry_stuck: bool,
        dry_run: bool,
        **options: Any,
    ) -> None:
        if dry_run:
            self._foretell(older_than, retry_stuck, as_json=options["json"])
            return
        found = self._settle(limit, older_than, retry_stuck=retry_stuck)
        if options["json"]:
            self.stdout.write(json.dumps(found))
        else:
            self._report(found)
        if found["outage"]:
            self.stderr.write(
                f"The ledger is out of reach; {found['due']} reservations wait for it."
            )
        if found["stuck"]:
            raise CommandError(
                f"Stuck reservations: {found['stuck']}. The admin lists them, with the "
                "ledger's last answer; --retry-stuck tries them again.",
                returncode=STUCK,
            )

    def _settle(
        self, limit: int | None, older_than: float, *, retry_stuck: bool
    ) -> dict[str, Any]:
        """Do everything that is due; return the counts that ``--json`` prints."""
        client = get_client()
        retried = journal.retry_stuck(Reservation.objects.all()) if retry_stuck else 0
        lapsed = journal.record_lapsed(older_than=older_than)
        due = Reservation.objects.using(journal.alias()).due(older_than).count()
        bar = ProgressBar(
            sys.stderr if sys.stderr.isatty() else None, min(due, limit or due)
        )
        done = journal.settle_due(
            client,
            limit=limit,
            older_than=older_than,
            # More may have come due since they were counted.
            on_row=lambda count: bar.update(min(count, bar.total_count)),
        )
        granted = grants.settle_due(client)
        pruned = journal.prune()
        left = journal.backlog()
        return {
            "lapsed": lapsed,
            "taken": done.taken,
            "settled": done.settled,
            "grants": granted,
            "pruned": pruned,
            "retried": retried,
            "outage": done.outage,
            "due": left.due,
            "unbilled": left.unbilled,
            "stuck": left.stuck,
            "oldest_due_seconds": left.oldest_due_seconds,
        }

    def _report(self, found: dict[str, Any]) -> None:
        self.stdout.write(
            f"{found['lapsed']} lapsed, {found['taken']} tried, "
            f"{found['grants']} pending grants asked again."
        )
        if found["retried"]:
            self.stdout.write(
                f"{found['retried']} stuck reservations were tried again."
            )
        if found["pruned"]:
            self.stdout.write(f"{found['pruned']} old reservations deleted.")

    def _foretell(self, older_than: float, retry_stuck: bool, *, as_json: bool) -> None:
        """Say what a run would do (``--dry-run``)."""
        left = journal.backlog(older_than)
        grants_pending = Grant.objects.filter(state=Grant.State.PENDING).count()
        old = journal.prunable().count()
        if as_json:
            self.stdout.write(
                json.dumps(
                    {
                        "dry_run": True,
                        "lapsed": left.lapsed,
                        "due": left.due,
                        "by_state": left.by_state,
                        "unbilled": left.unbilled,
                        "stuck": left.stuck,
                        "oldest_due_seconds": left.oldest_due_seconds,
                        "grants": grants_pending,
                        "prunable": old,
                    }
                )
            )
            return
        labels = dict(Reservation.State.choices)

        def shown(states: Any) -> str:
            found = [
                f"{left.by_state[state]} {labels[state]}"
                for state in states
                if left.by_state.get(state)
            ]
            return ", ".join(found) or "none"

        self.stdout.write("Nothing is changed. These would be")
        self.stdout.write(f"  given up:        {shown(Reservation.State.open())}")
        due = left.by_state.keys() - set(Reservation.State.open())
        self.stdout.write(f"  carried out:     {shown(sorted(due))}")
        stuck = left.stuck if retry_stuck else 0
        self.stdout.write(f"  tried again:     {stuck} of {left.stuck} stuck")
        self.stdout.write(f"  grants asked:    {grants_pending}")
        self.stdout.write(f"  deleted as old:  {old}")
