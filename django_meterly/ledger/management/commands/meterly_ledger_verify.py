from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from django.core.management.base import BaseCommand, CommandError
from django.db.models import F, OuterRef, Subquery, Sum, Window
from django.db.models.functions import Coalesce, Lag

from ...models import Account, Entry, Hold
from ...operations import write_alias

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def differences() -> Iterator[Difference]:
    """Compare the accounts with their entries, and with their live holds.

    Each comparison is one statement, which sees the database as of one moment,
    so movements may go on meanwhile.
    """
    using = write_alias()
    # Any: the annotations below are no fields of the models.
    accounts: Any = Account.objects.using(using).select_related("customer")
    entries: Any = Entry.objects.using(using).select_related("account__customer")

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
    last = Entry.objects.filter(account=OuterRef("pk")).order_by("-pk")
    for account in (
        accounts.annotate(
            rebuilt_balance=Coalesce(Subquery(last.values("balance_after")[:1]), 0),
            rebuilt_reserved=Coalesce(Subquery(last.values("reserved_after")[:1]), 0),
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
        found = list(differences())
        if not found:
            self.stdout.write(f"{counted}: the books balance.")
            return
        self.stdout.write(f"{counted}: the books do not balance.\n\n")
        rows = [
            ("ACCOUNT", "CUSTOMER", "UNIT", "AT", "EXPECTED", "FOUND"),
            *(difference.cells for difference in found),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.stdout.write("  ".join(cells).rstrip())
        raise CommandError(f"Differences: {len(found)}. Balance / reserved.")
