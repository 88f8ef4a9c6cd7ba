from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from django.core.management.base import BaseCommand, CommandError
from django.core.serializers.base import ProgressBar
from django.db.models import F, OuterRef, Subquery, Sum, Window
from django.db.models.functions import Coalesce, Lag

from ...models import Account, Entry, Hold
from ...operations import write_alias

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How many accounts are compared at a time, and how many differences shown.
PAGE = 500
SHOWN = 1000


class Difference(NamedTuple):
    """Where the books do not balance; both numbers are (balance, reserved)."""

    account: Account
    where: str
    expected: tuple[int | None, int]
    found: tuple[int | None, int]

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            str(self.account.pk),
            self.account.customer.external_id,
            self.account.unit,
            self.where,
            _shown(self.expected),
            _shown(self.found),
        )


def _shown(numbers: tuple[int | None, int]) -> str:
    balance, reserved = numbers
    return f"reserved {reserved}" if balance is None else f"{balance} / {reserved}"


def differences(first: int, last: int) -> Iterator[Difference]:
    """Compare some accounts, by primary key, with their entries and live holds.

    The database does it, and answers with the differences alone. Each comparison is
    one statement, which sees the database as of one moment, so movements may go on
    meanwhile.
    """
    using = write_alias()
    # Any: the annotations below are no fields of the models.
    accounts: Any = (
        Account.objects.using(using)
        .filter(pk__range=(first, last))
        .select_related("customer")
    )
    entries: Any = (
        Entry.objects.using(using)
        .filter(account__pk__range=(first, last))
        .select_related("account__customer")
    )

    # Each entry follows from the one before ...
    def follows(field: str, delta: str) -> Any:
        before = Window(Lag(field), partition_by=F("account"), order_by="pk")
        return Coalesce(before, 0) + F(delta)

    for entry in (
        entries.annotate(
            balance=follows("balance_after", "balance_delta"),
            reserved=follows("reserved_after", "reserved_delta"),
        )
        .exclude(balance_after=F("balance"), reserved_after=F("reserved"))
        .order_by("pk")
        .iterator()
    ):
        yield Difference(
            entry.account,
            entry.public_id,
            (entry.balance, entry.reserved),
            (entry.balance_after, entry.reserved_after),
        )

    # ... the account is what the last one left behind: the sum of them all ...
    latest = Entry.objects.filter(account=OuterRef("pk")).order_by("-pk")
    for account in (
        accounts.annotate(
            rebuilt_balance=Coalesce(Subquery(latest.values("balance_after")[:1]), 0),
            rebuilt_reserved=Coalesce(Subquery(latest.values("reserved_after")[:1]), 0),
        )
        .exclude(balance=F("rebuilt_balance"), reserved=F("rebuilt_reserved"))
        .order_by("pk")
        .iterator()
    ):
        yield Difference(
            account,
            "account",
            (account.rebuilt_balance, account.rebuilt_reserved),
            (account.balance, account.reserved),
        )

    # ... and what is reserved is what the live holds hold.
    held = (
        Hold.objects.live()
        .filter(account=OuterRef("pk"))
        .order_by()
        .values("account")
        .annotate(total=Sum("amount"))
        .values("total")
    )
    for account in (
        accounts.annotate(held=Coalesce(Subquery(held), 0))
        .exclude(reserved=F("held"))
        .order_by("pk")
        .iterator()
    ):
        yield Difference(
            account, "live holds", (None, account.held), (None, account.reserved)
        )


class Command(BaseCommand):
    help = (
        "Rebuild every balance from the ledger's entries and compare. Nothing is "
        "changed; a difference ends with exit code 1."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        using = write_alias()
        counted = (
            f"{Account.objects.using(using).count()} accounts, "
            f"{Entry.objects.using(using).count()} entries"
        )
        shown: list[Difference] = []
        count = 0
        for difference in self._differences():
            count += 1
            if count <= SHOWN:
                shown.append(difference)
        if not count:
            self.stdout.write(f"{counted}: the books balance.")
            return
        self.stdout.write(f"{counted}: the books do not balance.\n\n")
        rows = [
            ("ACCOUNT", "CUSTOMER", "UNIT", "AT", "EXPECTED", "FOUND"),
            *(difference.cells for difference in shown),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.stdout.write("  ".join(cells).rstrip())
        if count > SHOWN:
            self.stdout.write(f"... and {count - SHOWN} more.")
        raise CommandError(f"Differences: {count}. Balance / reserved.")

    def _differences(self) -> Iterator[Difference]:
        keys = Account.objects.using(write_alias()).order_by("pk")
        bar = ProgressBar(sys.stderr if sys.stderr.isatty() else None, keys.count())
        done, last = 0, 0
        while pks := list(keys.filter(pk__gt=last).values_list("pk", flat=True)[:PAGE]):
            yield from differences(pks[0], pks[-1])
            done, last = done + len(pks), pks[-1]
            # Accounts may have been opened since they were counted.
            bar.update(min(done, bar.total_count))
