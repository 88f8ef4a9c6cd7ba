"""Check that the books balance, and that no entry has changed since it was sealed.

``manage.py meterly_ledger_verify`` calls ``differences`` and shows what it yields. For
example, an account whose balance is 90 while its last entry says 100 is one
``Difference``. Nothing is changed.

Most rules are one statement each, which sees the database as of one moment, so that
movements may go on meanwhile; it returns only the rows that break the rule. The hashes
are computed here, from a page of entries at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from django.apps import apps
from django.db.models import (
    CheckConstraint,
    Count,
    Exists,
    F,
    ForeignKey,
    OuterRef,
    Q,
    Subquery,
    Sum,
    Value,
    Window,
)
from django.db.models.functions import Coalesce, Concat, Lag

from .database import write_alias
from .idempotency import fingerprint_of
from .models import SHAPES, Account, Entry, Hold, Seal, Shape
from .seals import Digest, Range, head, ranges, rows, without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from django.db.models import QuerySet

#: How many accounts are compared, and how many entries read, at a time.
PAGE = 500
#: A value that replaces erased personal data begins with this.
ERASED = "[erased]"


class Difference(NamedTuple):
    """A row that contradicts other rows, and the column in which it does."""

    row: str
    #: The customer and the unit, if they are known.
    account: str
    column: str
    expected: str
    found: str


def differences(
    kept: Sequence[str] = (), progress: Callable[[int], None] = lambda done: None
) -> Iterator[Difference]:
    """Yield each difference between the rows of the ledger.

    *kept* are hashes that ``meterly_ledger_seal`` printed earlier: the chain of seals
    must still have each of them. *progress* is called with the number of entries read
    so far.
    """
    yield from _orphans()
    yield from _violations()
    pages: Any = Account.objects.using(write_alias()).order_by("pk")
    last = 0
    while pks := list(
        pages.filter(pk__gt=last).values_list("pk", flat=True)[:PAGE],
    ):
        yield from _entries_follow(pks[0], pks[-1])
        yield from _accounts_end(pks[0], pks[-1])
        yield from _accounts_hold(pks[0], pks[-1])
        yield from _holds(pks[0], pks[-1])
        last = pks[-1]
    yield from _entries(progress)
    yield from _seals(kept)


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


# Every table


def _orphans() -> Iterator[Difference]:
    """Yield the rows that refer to a missing row."""
    for model in apps.get_app_config("meterly_ledger").get_models():
        for field in model._meta.concrete_fields:
            if not isinstance(field, ForeignKey):
                continue
            target: Any = field.related_model
            there = Exists(target.objects.filter(pk=OuterRef(field.attname)))
            rows = _all(model).filter(~there, **{f"{field.name}__isnull": False})
            for row in rows.iterator():
                yield Difference(
                    _name(row),
                    "",
                    field.name,
                    f"a {target._meta.verbose_name}",
                    f"{getattr(row, field.attname)}, which does not exist",
                )


def _violations() -> Iterator[Difference]:
    """Yield the rows that break a check constraint."""
    for model in apps.get_app_config("meterly_ledger").get_models():
        for constraint in model._meta.constraints:
            if isinstance(constraint, CheckConstraint):
                for row in _all(model).exclude(constraint.condition).iterator():
                    name = constraint.name.removeprefix(f"{model._meta.db_table}_")
                    yield Difference(_name(row), "", name, "kept", "violated")


def _all(model: Any) -> QuerySet[Any]:
    rows: QuerySet[Any] = model._base_manager.using(write_alias()).order_by("pk")
    return rows


def _name(row: Any) -> str:
    return f"{row._meta.model_name} {getattr(row, 'public_id', row.pk)}"


# Accounts and holds, by the primary keys of accounts


def _entries_follow(first: int, last: int) -> Iterator[Difference]:
    """Compare each entry's balance with that of the entry before it."""

    def follows(field: str, delta: str) -> Any:
        before = Window(Lag(field), partition_by=F("account"), order_by="pk")
        return Coalesce(before, 0) + F(delta)

    # Any: the models do not declare the annotations.
    entries: Any = Entry.objects.using(write_alias()).filter(
        account__pk__range=(first, last)
    )
    for entry in (
        entries.select_related("account__customer")
        .annotate(
            balance=follows("balance_after", "balance_delta"),
            reserved=follows("reserved_after", "reserved_delta"),
        )
        .exclude(balance_after=F("balance"), reserved_after=F("reserved"))
        .order_by("pk")
        .iterator()
    ):
        yield from _numbers(
            entry,
            entry.account,
            "after the entry before",
            balance_after=entry.balance,
            reserved_after=entry.reserved,
        )


def _accounts_end(first: int, last: int) -> Iterator[Difference]:
    """Compare each account with its last entry, which has the sum of all entries."""
    latest = Entry.objects.filter(account=OuterRef("pk")).order_by("-pk")
    for account in (
        _accounts(first, last)
        .annotate(
            rebuilt_balance=Coalesce(Subquery(latest.values("balance_after")[:1]), 0),
            rebuilt_reserved=Coalesce(Subquery(latest.values("reserved_after")[:1]), 0),
        )
        .exclude(balance=F("rebuilt_balance"), reserved=F("rebuilt_reserved"))
        .iterator()
    ):
        yield from _numbers(
            account,
            account,
            "after the last entry",
            balance=account.rebuilt_balance,
            reserved=account.rebuilt_reserved,
        )


def _accounts_hold(first: int, last: int) -> Iterator[Difference]:
    """Compare each account's reserved credits with the sum of its live holds."""
    held = (
        Hold.objects.live()
        .filter(account=OuterRef("pk"))
        .order_by()
        .values("account")
        .annotate(total=Sum("amount"))
        .values("total")
    )
    for account in (
        _accounts(first, last)
        .annotate(held=Coalesce(Subquery(held), 0))
        .exclude(reserved=F("held"))
        .iterator()
    ):
        yield from _numbers(account, account, "in live holds", reserved=account.held)


def _accounts(first: int, last: int) -> Any:
    accounts = Account.objects.using(write_alias()).filter(pk__range=(first, last))
    return accounts.select_related("customer").order_by("pk")


def _numbers(
    row: Any, account: Account, why: str, **expected: int
) -> Iterator[Difference]:
    """Return the columns of *row* that do not have the *expected* numbers."""
    for column, value in expected.items():
        if getattr(row, column) != value:
            found = str(getattr(row, column))
            yield Difference(_name(row), str(account), column, f"{value} {why}", found)


def _holds(first: int, last: int) -> Iterator[Difference]:
    """Compare the holds with the entries that opened and closed them."""
    live = Q(status=Hold.Status.RESERVED)
    on_time = Q(status=Hold.Status.EXPIRED, closed_at__gte=F("expires_at")) | (
        ~Q(status=Hold.Status.EXPIRED) & Q(closed_at__lt=F("expires_at"))
    )
    # One entry opened each hold; if it is not live, one entry closed it.
    holds: Any = Hold.objects.using(write_alias()).filter(
        account__pk__range=(first, last)
    )
    counted = holds.select_related("account__customer").annotate(
        opened=Count("entries", Q(entries__kind=Entry.Kind.RESERVED)),
        closed=Count("entries", Q(entries__kind=Concat(Value("credits_"), "status"))),
        written=Count("entries"),
    )
    right = Q(opened=1) & (
        live & Q(written=1, closed_at=None) | ~live & Q(written=2, closed=1) & on_time
    )
    for hold in counted.exclude(right).order_by("pk").iterator():
        account = str(hold.account)
        is_live = hold.status == Hold.Status.RESERVED
        if (hold.opened, hold.closed, hold.written) != (
            (1, 1, 1) if is_live else (1, 1, 2)
        ):
            kinds = hold.entries.using(write_alias()).order_by("pk")
            said = ", ".join(kinds.values_list("kind", flat=True))
            expected = f"as its entries say: {said or 'none'}"
            yield Difference(_name(hold), account, "status", expected, hold.status)
        elif is_live != (hold.closed_at is None):
            expected = "nothing" if is_live else "a time"
            found = _shown(hold.closed_at)
            yield Difference(_name(hold), account, "closed_at", expected, found)
        else:
            order = "before" if hold.status == Hold.Status.EXPIRED else "after"
            expected = f"a time {order} it was {hold.status}, at {hold.closed_at}"
            found = str(hold.expires_at)
            yield Difference(_name(hold), account, "expires_at", expected, found)


# Entries, and what they refer to

_CUSTOMER = "account__customer__"
_READ = [
    *("pk", "public_id", "workspace_id", "account_id", "hold_id", "kind", "amount"),
    *(
        "reserved_delta",
        "unique_reference",
        "reference",
        "description",
        "idempotency_key",
        "fingerprint",
    ),
    *("account__unit", f"{_CUSTOMER}workspace_id", f"{_CUSTOMER}public_id"),
    *(f"{_CUSTOMER}external_id", f"{_CUSTOMER}credit_unit"),
    *("hold__public_id", "hold__account_id", "hold__amount", "hold__reference"),
]

_LABEL = {"reference": "reference", "description": "description"}
_MOVED = {
    "customer_id": f"{_CUSTOMER}public_id",
    "amount": "amount",
    "unit": "account__unit",
    **_LABEL,
}
_GRANTED = {
    "external_id": f"{_CUSTOMER}external_id",
    "amount": "amount",
    "credit_unit": "account__unit",
    **_LABEL,
}
_HELD = {"reservation_id": "hold__public_id"}
#: For each kind of entry: the operation that writes it, and for each argument in its
#: fingerprint the column that has its value. A reserve is left out: its fingerprint
#: includes the time to live, which the ledger does not keep.
_ASKED: dict[str, tuple[str, dict[str, str]]] = {
    Entry.Kind.GRANTED: ("grant_credits", _GRANTED),
    Entry.Kind.ADDED: ("add_credits", _MOVED),
    Entry.Kind.USED: ("use_credits", _MOVED),
    Entry.Kind.COMMITTED: ("commit_reservation", {**_HELD, "amount": "amount"}),
    Entry.Kind.RELEASED: ("release_reservation", _HELD),
}


def _entries(progress: Callable[[int], None]) -> Iterator[Difference]:
    """Compare each entry with its account, its hold and the call that wrote it."""
    entries: Any = Entry.objects.using(write_alias()).order_by("pk")
    last: Any = -(2**63)
    done = 0
    while page := list(entries.filter(pk__gt=last).values(*_READ)[:PAGE]):
        for row in page:
            for column, expected, found in _compared(row):
                yield Difference(
                    f"entry {row['public_id']}",
                    f"{row[f'{_CUSTOMER}external_id']} {row['account__unit']}",
                    column,
                    _shown(expected),
                    _shown(found),
                )
        done, last = done + len(page), page[-1]["pk"]
        progress(done)


def _compared(row: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each wrong column: its name, the expected value, the value found."""

    def compared(column: str, expected: Any) -> Iterator[tuple[str, Any, Any]]:
        if row[column] != expected:
            yield column.removesuffix("_id"), expected, row[column]

    yield from compared("workspace_id", row[f"{_CUSTOMER}workspace_id"])
    shape = SHAPES.get(row["kind"], Shape(0, 0))
    yield from compared("unique_reference", row["reference"] if shape.once else None)
    if shape.hold != (row["hold_id"] is not None):
        yield "hold", "a hold" if shape.hold else None, row["hold_id"]
    # _orphans() reports a hold that is missing.
    if row["hold__public_id"] is not None:
        yield from compared("account_id", row["hold__account_id"])
        yield from compared("reference", row["hold__reference"])
        yield from compared("description", "")
        opens = row["kind"] == Entry.Kind.RESERVED
        held = row["hold__amount"]
        yield from compared("reserved_delta", held if opens else -held)
    if row["kind"] == Entry.Kind.EXPIRED:
        # The ledger itself wrote it, without a call.
        yield from compared("idempotency_key", None)
        yield from compared("fingerprint", "")
    elif row["idempotency_key"] is None:
        yield "idempotency_key", "a key", None
    elif row["kind"] in _ASKED and not _was_asked(row):
        _, columns = _ASKED[row["kind"]]
        yield (
            "fingerprint",
            f"the call's, with this {', '.join(['idempotency_key', *columns])}",
            row["fingerprint"],
        )


def _was_asked(row: dict[str, Any]) -> bool:
    """Return whether the fingerprint fits the arguments that the row shows."""
    operation, columns = _ASKED[row["kind"]]
    arguments = {name: row[column] for name, column in columns.items()}
    if any(str(value).startswith(ERASED) for value in arguments.values()):
        return True
    # A call may omit the unit (the customer's default one) and the amount of a commit
    # (the whole hold).
    optional = []
    if arguments.get("unit") == row[f"{_CUSTOMER}credit_unit"]:
        optional = ["unit"]
    elif row["kind"] == Entry.Kind.COMMITTED and row["amount"] == row["hold__amount"]:
        optional = ["amount"]
    return row["fingerprint"] in (
        fingerprint_of(operation, row["idempotency_key"], **asked)
        for asked in (arguments, {**arguments, **dict.fromkeys(optional)})
    )


# Seals


def _seals(kept: Sequence[str]) -> Iterator[Difference]:
    """Compute the chain of hashes again, and compare it with the seals."""
    using = write_alias()
    last = head(using)
    for start in range(0, len(kept), PAGE):
        some = kept[start : start + PAGE]
        known = Seal.objects.using(using).filter(hash__in=some)
        for lost in sorted(set(some) - set(known.values_list("hash", flat=True))):
            yield Difference("seal", "", "hash", lost, "a chain without it")
    # Ids begin with 1, so no seal covers these.
    for row in Entry.objects.using(using).filter(pk__lt=1).iterator():
        yield Difference(_name(row), "", "id", "1 or more", str(row.pk))
    if last is None:
        return
    seals: Any = Seal.objects.using(using).filter(number__lte=last.number)
    before = Seal(number=0, last=0, hash="")
    # A forged seal may have any number.
    at = -(2**63)
    while page := list(seals.filter(number__gt=at).order_by("number")[:PAGE]):
        for seal in page:
            yield from _sealed(before, seal, last)
            before = seal
        at = before.number


def _sealed(before: Seal, seal: Seal, last: Seal) -> Iterator[Difference]:
    """Compare a seal with its entries; *last* is the chain's last one."""
    using = write_alias()

    def differs(column: str, expected: object, found: object) -> Difference:
        return Difference(_name(seal), "", column, str(expected), str(found))

    if seal.number != before.number + 1:
        yield differs("number", before.number + 1, seal.number)
    if seal.first != before.last + 1:
        yield differs("first", before.last + 1, seal.first)
    for column in ("gaps", "late"):
        if sound(getattr(seal, column)) != getattr(seal, column):
            yield differs(column, "ranges of ids", getattr(seal, column))
    gaps, late = sound(seal.gaps), sound(seal.late)
    digest = Digest(before.hash)
    missing: list[Range] = []
    ids = []
    for row in rows(using, late):
        digest.add(row)
        ids.append(row["id"])
    missing += without(late, ranges(ids))
    ids = []
    in_gaps = []
    holes = iter(gaps)
    hole = next(holes, None)
    for row in rows(using, [[seal.first, seal.last]]):
        while hole is not None and hole[1] < row["id"]:
            hole = next(holes, None)
        if hole is not None and hole[0] <= row["id"]:
            in_gaps.append(row["id"])
        else:
            digest.add(row)
            ids.append(row["id"])
    missing += without(without([[seal.first, seal.last]], gaps), ranges(ids))
    for begin, end in missing:
        yield differs("count", f"entries {begin} to {end}, by primary key", "nothing")
    if in_gaps and seal.number <= last.settled:
        for begin, end in without(ranges(in_gaps), _late_of(seal, last)):
            expected = f"no entries {begin} to {end}, by primary key"
            yield differs("gaps", expected, "entries that were not there")
    if (found := digest.seal(seal)) != seal.hash:
        sealed = f"entries {seal.first} to {seal.last}"
        yield differs("hash", seal.hash, f"{found}, of {sealed} as they are now")


def _late_of(seal: Seal, last: Seal) -> list[Range]:
    """Return the ids in the gaps of a settled seal that later seals covered."""
    seals: Any = Seal.objects.using(write_alias()).order_by("number")
    settled = seals.filter(settled__gte=seal.number).first() or last
    after = seals.filter(number__gt=seal.number, number__lte=settled.number)
    return sorted(gap for seal in after for gap in sound(seal.late))


def sound(value: Any) -> list[Range]:
    """Return *value* if it is a list of ranges, else an empty list."""
    return value if _are_ranges(value) else []


def _are_ranges(value: Any) -> bool:
    last = -(2**63)
    for pair in value if isinstance(value, list) else [None]:
        if not (
            isinstance(pair, list)
            and [type(number) for number in pair] == [int, int]
            and last < pair[0] <= pair[1] < 2**63
        ):
            return False
        last = pair[1]
    return True


def sealed() -> int:
    """Return how many entries the seals have covered."""
    seals: Any = Seal.objects.using(write_alias())
    return int(seals.aggregate(total=Coalesce(Sum("count"), 0))["total"])
