"""Seal the entries: a chain of hashes, made off the hot path.

A seal is a row whose hash covers up to 1000 entries, the seal's other columns and the
hash before it. Somebody who can change the database can rewrite entries, but then the
hashes change, too. Keep the last hash outside the database, for example in a mail to
your auditor: ``verification`` then proves that no entry sealed up to it was altered,
removed or added since. ``manage.py meterly_ledger_seal`` and the Celery task call
``seal_entries``.

Ids are drawn in order, but transactions commit in any order. So a seal also records
the *gaps*: the ids in its range without an entry. Later seals look there first, and
seal the entries that have appeared as *late*. When all transactions that were open at
that time have ended, the gap is *settled*: an entry that appears in it later is a
forgery. For example, a seal covers the ids 1 to 5 without 3; if 3 was still to be
committed, the next seal covers it as late.

==========  =====================================================================
PostgreSQL  A seal draws a transaction id, its *horizon*, after it has read. Every
            transaction that could fill its gaps has drawn a smaller one: a movement
            writes to its account before it writes its entry. These transactions have
            ended when the oldest running one is younger than the horizon.
SQLite      There is one writer at a time, so ids commit in order, and a gap is settled
            at once.
MySQL       A seal's gaps are settled after an hour, if no row in them is locked: an
            entry that is not committed yet is a locked row. In that hour each
            statement that had drawn an id has long written its row.
==========  =====================================================================

Nothing is locked. Several sealers may run at once: the number of a seal is unique, so
only one of them can write it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import DatabaseError, IntegrityError, connections, transaction
from django.db.models import Q

from ..db import DatabaseNow, in_utc
from .database import write_alias
from .models import Entry, Seal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

#: The most entries of one seal. A broken seal tells in which range an entry was
#: altered, so a small range tells more.
BATCH = 1000
#: How many ranges one statement looks at.
RANGES = 100
#: How long gaps stay open on MySQL, at least.
MYSQL_OPEN = dt.timedelta(hours=1)

#: ``[first, last]``, both included: JSON has no tuples.
Range = list[int]

COLUMNS = [field.attname for field in Entry._meta.concrete_fields]
SEAL_COLUMNS = [
    field.attname for field in Seal._meta.concrete_fields if field.name != "hash"
]


class Sealed(NamedTuple):
    """The result of one run of the sealer; *head* is the last seal of the chain."""

    entries: int
    late: int
    head: Seal | None


def seal_entries() -> Sealed:
    """Seal all entries that are not sealed yet, up to ``BATCH`` with each seal.

    Raises ``RuntimeError`` inside a transaction.
    """
    using = write_alias()
    entries = late = 0
    while (seal := _seal(using)) is not None:
        entries += seal.count
        late += size(seal.late)
    return Sealed(entries, late, head(using))


def head(using: str) -> Seal | None:
    seals: Any = Seal.objects.using(using)
    seal: Seal | None = seals.order_by("-number").first()
    return seal


def _seal(using: str) -> Seal | None:
    """Add one seal to the chain, and return it.

    Return ``None`` if all entries are sealed, or if another sealer was faster.
    """
    entries = Entry.objects.using(using)
    now = entries.values_list(DatabaseNow(), flat=True).first()
    if now is None:
        return None
    previous = head(using) or Seal(number=0, last=0, settled=0, hash="")
    gaps = open_gaps(using, previous)
    # Before the gaps are read: a transaction that has ended by now is visible to that
    # read.
    settled = _settled(connections[using], previous, gaps, now)
    late = list(rows(using, (gap for _, open_ in gaps for gap in open_), limit=BATCH))
    if len(late) == BATCH:
        # The gaps may have more entries.
        settled = previous.settled
    new = list(
        entries.filter(pk__gt=previous.last).order_by("pk").values(*COLUMNS)[:BATCH]
    )
    closed = any(open_ and seal.number <= settled for seal, open_ in gaps)
    if not (late or new or closed):
        return None
    seal = Seal(
        number=previous.number + 1,
        first=previous.last + 1,
        last=new[-1]["id"] if new else previous.last,
        count=len(late) + len(new),
        late=ranges(row["id"] for row in late),
        settled=settled,
        # After the entries are read.
        horizon=_horizon(connections[using]),
        created_at=now,
    )
    covered = ranges(row["id"] for row in new)
    seal.gaps = without([[seal.first, seal.last]], covered)
    digest = Digest(previous.hash)
    for row in (*late, *new):
        digest.add(row)
    seal.hash = digest.seal(seal)
    return seal if _append(using, seal) else None


def _append(using: str, seal: Seal) -> bool:
    """Write the seal, unless another sealer has written one with its number."""
    seals = Seal.objects.using(using)
    try:
        with transaction.atomic(using=using, durable=True):
            # Not save(): a receiver of its signals could raise.
            seals.bulk_create([seal])
    except IntegrityError:
        if not seals.filter(number=seal.number).exists():
            raise
        return False
    return True


# Which gaps are open


def open_gaps(using: str, last: Seal) -> list[tuple[Seal, list[Range]]]:
    """Return the seals that are not settled, up to *last*, with their gaps.

    The gaps are without the ids that later seals have covered.
    """
    seals = Seal.objects.using(using).filter(
        number__gt=last.settled, number__lte=last.number
    )
    unsettled: list[Seal] = list(seals.order_by("number"))
    late = sorted(gap for seal in unsettled for gap in seal.late)
    return [(seal, without(seal.gaps, late)) for seal in unsettled]


def _settled(
    connection: BaseDatabaseWrapper,
    previous: Seal,
    gaps: list[tuple[Seal, list[Range]]],
    now: dt.datetime,
) -> int:
    """Return the number of the last seal whose gaps, and those before, are settled."""
    if connection.vendor == "sqlite":
        # One writer: the gaps of the new seal are settled, too.
        return int(previous.number) + 1
    oldest = _oldest_transaction(connection)
    settled = int(previous.settled)
    for seal, open_ in gaps:
        if open_ and not (
            seal.horizon < oldest
            if oldest is not None and seal.horizon is not None
            else connection.vendor == "mysql"
            and seal.created_at <= now - MYSQL_OPEN
            and not _is_locked(connection, open_)
        ):
            break
        settled = seal.number
    return settled


def _oldest_transaction(connection: BaseDatabaseWrapper) -> int | None:
    """Return the id of PostgreSQL's oldest running, or prepared, transaction."""
    if connection.vendor != "postgresql":
        return None
    return _number(
        connection, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
    )


def _horizon(connection: BaseDatabaseWrapper) -> int | None:
    """Return a number above the id of every transaction that PostgreSQL has begun."""
    if connection.vendor != "postgresql":
        return None
    return _number(connection, "SELECT pg_current_xact_id()::text::bigint")


def _number(connection: BaseDatabaseWrapper, sql: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return int(cursor.fetchone()[0])


def _is_locked(connection: BaseDatabaseWrapper, gaps: list[Range]) -> bool:
    """Return whether an entry in the gaps is written, and not committed."""
    entries = Entry.objects.using(connection.alias).select_for_update(nowait=True)
    try:
        with transaction.atomic(using=connection.alias):
            for where in _where(gaps):
                list(entries.filter(where).values_list("pk"))
    except DatabaseError:
        return True
    return False


# Rows and their digest


class Digest:
    """The hash of a new seal: over the hash before it, the rows and its columns."""

    def __init__(self, previous: str) -> None:
        self._hash = hashlib.sha256(f"{previous}\n".encode())

    def add(self, row: dict[str, Any]) -> None:
        self._hash.update(_line(row))

    def seal(self, seal: Seal) -> str:
        self.add({name: getattr(seal, name) for name in SEAL_COLUMNS})
        return self._hash.hexdigest()


def _line(row: dict[str, Any]) -> bytes:
    """Return the row as one line: JSON with sorted names, in ASCII, without nulls.

    A column that a later version adds, and that is null, changes no hash.
    """
    known = {name: value for name, value in row.items() if value is not None}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), default=_utc)
    return f"{text}\n".encode()


def _utc(value: Any) -> str:
    """Return a time in UTC, to the microsecond, as every database has it."""
    return in_utc(value).isoformat(timespec="microseconds")


def rows(
    using: str, gaps: Iterable[Range], limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """Return the entries in these ranges, in the order of the ranges."""
    entries = Entry.objects.using(using).order_by("pk")
    count = 0
    for where in _where(gaps):
        for row in entries.filter(where).values(*COLUMNS):
            if count == limit:
                return
            count += 1
            yield row


def _where(gaps: Iterable[Range]) -> Iterator[Q]:
    """Return conditions that together choose the entries in these ranges."""
    some: list[Range] = []
    for gap in gaps:
        some.append(gap)
        if len(some) == RANGES:
            yield _any(some)
            some = []
    if some:
        yield _any(some)


def _any(gaps: list[Range]) -> Q:
    return Q(*(Q(pk__range=gap) for gap in gaps), _connector=Q.OR)


# Ranges


def ranges(ids: Iterable[int]) -> list[Range]:
    """Return the sorted *ids* as ranges."""
    found: list[Range] = []
    for number in ids:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def without(all_: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    """Return the ids of *all_* that are not in *taken*; both are sorted ranges."""
    found = []
    holes = iter(taken)
    hole = next(holes, None)
    for first, last in all_:
        begin = first
        while hole is not None and hole[0] <= last:
            if hole[1] >= begin:
                if hole[0] > begin:
                    found.append([begin, hole[0] - 1])
                begin = hole[1] + 1
            if hole[1] > last:
                break
            hole = next(holes, None)
        if begin <= last:
            found.append([begin, last])
    return found


def size(all_: Iterable[Range]) -> int:
    """Return how many ids the ranges have."""
    return sum(last - first + 1 for first, last in all_)
