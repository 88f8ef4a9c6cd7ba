"""What the ledger can do. The only module that moves credits.

A movement is one guarded ``UPDATE`` of an account, with its hold and its entry,
in one transaction; nothing is read first to be written later. What must hold
stands in the ``UPDATE``'s ``WHERE``, and a match of no row is an answer.

The entry is also the record of its idempotency key. It is looked up *before* the
transaction, so that the transaction's first statement is a write: on SQLite a
transaction that has read cannot wait for the write lock. Inside, the unique
constraint decides between two calls with one key.

On PostgreSQL using, reserving and closing are one function each
(``postgresql``), which does the same in one round trip.

Locks are taken in one order everywhere: holds (by primary key), then accounts.
Times are the database's.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
import logging
import random
import time
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.db import DatabaseError, IntegrityError, connections, router, transaction
from django.db.models import Case, F, Q, Value, When

from ..db import DatabaseNow, from_now
from ..errors import (
    MeterlyCustomerExistsError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidRequestError,
    MeterlyNotFoundError,
    MeterlyReferenceConflictError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
)
from ..transports.base import MAX_AMOUNT
from . import postgresql
from .conf import ledger_settings
from .models import (
    Account,
    Entry,
    Hold,
    LedgerCustomer,
    Record,
    Workspace,
    entry_id,
    hold_id,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import MeterlyApiError
    from ..transports.base import Statement

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("django_meterly.ledger")

DEFAULT_TTL_SECONDS = 300
PAGE_SIZE = 100

_RETRY_SECONDS = 10.0
_LONGEST_PAUSE = 0.5


@dataclass(frozen=True, slots=True)
class CustomerRecord:
    """Who pays; *created* tells whether this very call made the record."""

    customer_id: str
    external_id: str
    credit_unit: str
    created_at: dt.datetime
    created: bool


@dataclass(frozen=True, slots=True)
class AccountBalance:
    """Credits of *unit*, as of now or right after a movement."""

    customer_id: str
    unit: str
    balance: int
    reserved: int

    @property
    def available(self) -> int:
        return self.balance - self.reserved


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """One line of the ledger; *replayed* when an earlier call wrote it."""

    entry_id: str
    kind: str
    amount: int
    balance_delta: int
    reserved_delta: int
    account: AccountBalance
    reference: str
    description: str
    created_at: dt.datetime
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """A hold as it is now; *account* is as it was right after the movement."""

    reservation_id: str
    amount: int
    status: str
    reference: str
    expires_at: dt.datetime
    account: AccountBalance
    replayed: bool = False


def write_alias() -> str:
    """Return the alias of the ledger's database. Reads go there too."""
    return router.db_for_write(Account)


# Retrying


def _retried(operation: Callable[P, R]) -> Callable[P, R]:
    """Repeat *operation* when the database gave up one transaction for another.

    Inside a caller's transaction there is nothing to repeat: it is the caller's
    whole transaction that has to be.
    """

    @functools.wraps(operation)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        until = time.monotonic() + _RETRY_SECONDS
        pause = 0.01
        while True:
            try:
                return operation(*args, **kwargs)
            except DatabaseError as exc:
                connection = connections[write_alias()]
                if (
                    not _passes(exc)
                    or time.monotonic() > until
                    or connection.in_atomic_block
                    or not connection.get_autocommit()
                ):
                    raise
            # Jitter: those who met once are not to meet again.
            pause = min(2 * pause, _LONGEST_PAUSE)
            time.sleep(random.uniform(0, pause))  # noqa: S311

    return wrapper


def _passes(exc: DatabaseError) -> bool:
    """Return whether *exc* ended a transaction that may be tried again."""
    cause = exc.__cause__
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if sqlstate in {"40001", "40P01"}:  # serialization failure, deadlock
        return True
    # The low byte is SQLite's primary code: 5 busy, 6 locked.
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF in {5, 6}:
        return True
    # MySQL: lock wait time-out, deadlock; MariaDB: row changed since the snapshot.
    arguments: tuple[Any, ...] = getattr(cause, "args", ())
    return arguments[:1] in {(1205,), (1213,), (1020,)}


# Workspaces and customers


@_retried
def ensure_workspace(name: str) -> Workspace:
    """Return the workspace called *name*, made now if need be."""
    workspaces = Workspace.objects.using(write_alias())
    workspace = workspaces.filter(name=name).first()
    if workspace is None:
        workspaces.bulk_create([Workspace(name=name)], ignore_conflicts=True)
        workspace = workspaces.get(name=name)
    return workspace


@_retried
def create_customer(
    workspace_id: int, *, external_id: str, credit_unit: str, idempotency_key: str
) -> CustomerRecord:
    """Register a customer, once per *external_id*.

    Raises ``MeterlyCustomerExistsError`` when it exists with another unit.
    """
    request = _request(
        workspace_id,
        idempotency_key,
        "create_customer",
        external_id=external_id,
        credit_unit=credit_unit,
    )
    request.recorded()
    customer, created = _ensure_customer(workspace_id, external_id, credit_unit)
    if customer.credit_unit != credit_unit:
        raise MeterlyCustomerExistsError(
            f"Customer {external_id!r} exists with credit unit "
            f"{customer.credit_unit!r}.",
            details={"customerId": customer.public_id},
        )
    try:
        if not request.is_recorded():
            request.record()
    except IntegrityError:
        request.is_recorded()
    return _customer_record(customer, created)


@_retried
def find_customer(workspace_id: int, *, external_id: str) -> CustomerRecord | None:
    """Return the customer with this external id, or ``None``."""
    customer = _customers(workspace_id).filter(external_id=external_id).first()
    return None if customer is None else _customer_record(customer, False)


def _customers(workspace_id: int) -> Any:
    return LedgerCustomer.objects.using(write_alias()).filter(workspace_id=workspace_id)


def _customer(workspace_id: int, public_id: str) -> LedgerCustomer:
    customer: LedgerCustomer | None = (
        _customers(workspace_id).filter(public_id=public_id).first()
    )
    if customer is None:
        raise _no_customer(public_id)
    return customer


def _ensure_customer(
    workspace_id: int, external_id: str, credit_unit: str
) -> tuple[LedgerCustomer, bool]:
    customers = _customers(workspace_id)
    customer = customers.filter(external_id=external_id).first()
    if customer is not None:
        return customer, False
    new = LedgerCustomer(
        workspace_id=workspace_id, external_id=external_id, credit_unit=credit_unit
    )
    customers.bulk_create([new], ignore_conflicts=True)
    customer = customers.get(external_id=external_id)
    _ensure_account(customer, customer.credit_unit)
    return customer, customer.public_id == new.public_id


def _customer_record(customer: LedgerCustomer, created: bool) -> CustomerRecord:
    return CustomerRecord(
        customer_id=customer.public_id,
        external_id=customer.external_id,
        credit_unit=customer.credit_unit,
        created_at=customer.created_at,
        created=created,
    )


def _ensure_account(customer: LedgerCustomer, unit: str) -> Account:
    accounts = Account.objects.using(write_alias())
    account = accounts.filter(customer=customer, unit=unit).first()
    if account is None:
        accounts.bulk_create(
            [Account(customer=customer, unit=unit)], ignore_conflicts=True
        )
        account = accounts.get(customer=customer, unit=unit)
    return account


# Reading


@_retried
def balances(workspace_id: int, customer_id: str) -> list[AccountBalance]:
    """Return the balance of every account of the customer, by unit."""
    customer = _customer(workspace_id, customer_id)
    accounts = Account.objects.using(write_alias()).filter(customer=customer)
    return [
        AccountBalance(customer_id, account.unit, account.balance, account.reserved)
        for account in accounts.order_by("unit")
    ]


@_retried
def default_balance(workspace_id: int, customer_id: str) -> AccountBalance:
    """Return the balance of the account the customer was created with."""
    customer = _customer(workspace_id, customer_id)
    return _balance_of(customer, customer.credit_unit)


def _balance_of(customer: LedgerCustomer, unit: str) -> AccountBalance:
    accounts = Account.objects.using(write_alias())
    account = accounts.filter(customer=customer, unit=unit).first()
    if account is None:
        return AccountBalance(customer.public_id, unit, 0, 0)
    return AccountBalance(customer.public_id, unit, account.balance, account.reserved)


@_retried
def entries(
    workspace_id: int,
    customer_id: str,
    *,
    unit: str | None = None,
    before: str | None = None,
) -> list[EntryRecord]:
    """Return up to ``PAGE_SIZE`` entries of the customer, the newest first.

    *before* is the id of the last entry of the page before. Raises
    ``MeterlyInvalidRequestError`` when it is none of the customer's.
    """
    customer = _customer(workspace_id, customer_id)
    page = _entries().filter(account__customer=customer)
    if before is not None:
        last = page.filter(public_id=before).values_list("pk", flat=True).first()
        if last is None:
            raise _invalid("cursor", "There is no such page.")
        page = page.filter(pk__lt=last)
    if unit is not None:
        page = page.filter(account__unit=unit)
    return [_entry_record(entry) for entry in page.order_by("-pk")[:PAGE_SIZE]]


@_retried
def get_reservation(workspace_id: int, reservation_id: str) -> HoldRecord:
    """Return a reservation as it is now."""
    return _hold_record(_hold(workspace_id, reservation_id))


def _entries() -> Any:
    return Entry.objects.using(write_alias()).select_related("account__customer")


def _hold(workspace_id: int, reservation_id: str) -> Hold:
    hold: Hold | None = (
        _present_holds()
        .filter(public_id=reservation_id, account__customer__workspace=workspace_id)
        .first()
    )
    if hold is None:
        raise _no_reservation(reservation_id)
    return hold


def _present_holds() -> Any:
    """Return the holds, each with its *present_status*.

    A hold past its time is expired whether or not a sweep has come by.
    """
    due = Q(status=Hold.Status.RESERVED, expires_at__lte=DatabaseNow())
    return (
        Hold.objects.using(write_alias())
        .select_related("account__customer")
        .annotate(
            present_status=Case(
                When(due, then=Value(Hold.Status.EXPIRED.value)), default=F("status")
            )
        )
    )


def _entry_record(entry: Entry, replayed: bool = False) -> EntryRecord:
    return EntryRecord(
        entry_id=entry.public_id,
        kind=entry.kind,
        amount=entry.amount,
        balance_delta=entry.balance_delta,
        reserved_delta=entry.reserved_delta,
        account=_account_after(entry),
        reference=entry.reference,
        description=entry.description,
        created_at=entry.created_at,
        replayed=replayed,
    )


def _account_after(entry: Entry) -> AccountBalance:
    account = entry.account
    return AccountBalance(
        account.customer.public_id,
        account.unit,
        entry.balance_after,
        entry.reserved_after,
    )


def _hold_record(
    hold: Hold, entry: Entry | None = None, replayed: bool = False
) -> HoldRecord:
    account = hold.account
    return HoldRecord(
        reservation_id=hold.public_id,
        amount=hold.amount,
        status=hold.present_status,  # type: ignore[attr-defined]
        reference=hold.reference,
        expires_at=hold.expires_at,
        account=(
            AccountBalance(
                account.customer.public_id,
                account.unit,
                account.balance,
                account.reserved,
            )
            if entry is None
            else _account_after(entry)
        ),
        replayed=replayed,
    )


# Idempotency


@dataclass(frozen=True)
class _Request:
    """What a call was asked with, and whether its key was used before.

    A movement's key is in its entry, for ever; that of another call is in a
    ``Record``, for ``METERLY_LEDGER["RECORD_RETENTION"]``.
    """

    workspace: int | str
    idempotency_key: str
    fingerprint: str

    @functools.cached_property
    def workspace_id(self) -> int:
        """The primary key, also of a workspace that was named."""
        if isinstance(self.workspace, int):
            return self.workspace
        return ensure_workspace(self.workspace).pk

    def recorded(self) -> Entry | None:
        """Return the entry of an earlier movement with this key.

        Raises ``MeterlyIdempotencyMismatchError`` when that call was another.
        """
        entry: Entry | None = (
            _entries()
            .filter(
                workspace_id=self.workspace_id, idempotency_key=self.idempotency_key
            )
            .first()
        )
        if entry is None:
            self.is_recorded()
        elif entry.fingerprint != self.fingerprint:
            raise MeterlyIdempotencyMismatchError
        return entry

    def is_recorded(self) -> bool:
        """Return whether an earlier call, no movement, had this key.

        Raises ``MeterlyIdempotencyMismatchError`` when that call was another.
        """
        record = self._records().first()
        if record is not None and record.fingerprint != self.fingerprint:
            raise MeterlyIdempotencyMismatchError
        return record is not None

    def record(self) -> None:
        """Keep the key of a call that is no movement.

        Raises ``IntegrityError`` when it is kept already.
        """
        with transaction.atomic(using=write_alias()):
            self._records().create(
                workspace_id=self.workspace_id,
                idempotency_key=self.idempotency_key,
                fingerprint=self.fingerprint,
            )

    def _records(self) -> Any:
        return Record.objects.using(write_alias()).filter(
            workspace_id=self.workspace_id, idempotency_key=self.idempotency_key
        )


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _request(
    workspace: int | str, idempotency_key: str, operation: str, **arguments: Any
) -> _Request:
    text = _encode([operation, arguments])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return _Request(workspace, idempotency_key, fingerprint)


def _write(
    account_id: int,
    kind: Entry.Kind,
    amount: int,
    request: _Request,
    *,
    reference: str,
    description: str = "",
    balance_delta: int = 0,
    reserved_delta: int = 0,
    hold: Hold | None = None,
) -> Entry:
    """Write the entry of a movement that the account has just made."""
    using = write_alias()
    # The UPDATE before holds the row's lock, so this is what it left behind.
    balance, reserved = (
        Account.objects.using(using)
        .filter(pk=account_id)
        .values_list("balance", "reserved")
        .get()
    )
    additive = kind in {Entry.Kind.GRANTED, Entry.Kind.ADDED}
    entry = Entry.objects.using(using).create(
        workspace_id=request.workspace_id,
        account_id=account_id,
        hold=hold,
        kind=kind,
        amount=amount,
        balance_delta=balance_delta,
        reserved_delta=reserved_delta,
        balance_after=balance,
        reserved_after=reserved,
        reference=reference,
        description=description,
        unique_reference=reference if additive else None,
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
    )
    written: Entry = _entries().get(pk=entry.pk)
    return written


# Grants and other additions


@_retried
def grant(
    workspace_id: int,
    *,
    external_id: str,
    amount: int,
    credit_unit: str,
    reference: str,
    description: str = "",
    idempotency_key: str,
) -> EntryRecord:
    """Add credits, once per *reference*; a new customer is created.

    Raises ``MeterlyReferenceConflictError`` and ``MeterlyInvalidRequestError``
    (a balance past 2**63 - 1).
    """
    request = _request(
        workspace_id,
        idempotency_key,
        "grant_credits",
        external_id=external_id,
        amount=amount,
        credit_unit=credit_unit,
        reference=reference,
        description=description,
    )
    if (entry := request.recorded()) is not None:
        return _entry_record(entry, replayed=True)
    customer, _ = _ensure_customer(workspace_id, external_id, credit_unit)
    account = _ensure_account(customer, credit_unit)
    return _increase(
        account,
        Entry.Kind.GRANTED,
        amount,
        request,
        reference,
        description,
        field="creditAmount",
    )


@_retried
def add(
    workspace_id: int,
    customer_id: str,
    *,
    amount: int,
    unit: str | None = None,
    reference: str,
    description: str = "",
    idempotency_key: str,
) -> EntryRecord:
    """Add credits of *unit* (or the customer's own), once per *reference*.

    Raises ``MeterlyNotFoundError``, ``MeterlyReferenceConflictError`` and
    ``MeterlyInvalidRequestError`` (a balance past 2**63 - 1).
    """
    request = _request(
        workspace_id,
        idempotency_key,
        "add_credits",
        customer_id=customer_id,
        amount=amount,
        unit=unit,
        reference=reference,
        description=description,
    )
    if (entry := request.recorded()) is not None:
        return _entry_record(entry, replayed=True)
    customer = _customer(workspace_id, customer_id)
    account = _ensure_account(customer, unit or customer.credit_unit)
    return _increase(
        account,
        Entry.Kind.ADDED,
        amount,
        request,
        reference,
        description,
        field="amount",
    )


def _increase(
    account: Account,
    kind: Entry.Kind,
    amount: int,
    request: _Request,
    reference: str,
    description: str,
    *,
    field: str,
) -> EntryRecord:
    def referred() -> Entry | None:
        """Return the entry of an earlier call with this reference."""
        entry: Entry | None = (
            _entries().filter(account=account, unique_reference=reference).first()
        )
        if entry is not None and (entry.kind, entry.amount, entry.description) != (
            kind,
            amount,
            description,
        ):
            raise MeterlyReferenceConflictError(
                f"Reference {reference!r} was used before, with other values."
            )
        return entry

    using = write_alias()
    if (entry := referred()) is not None:
        return _entry_record(entry, replayed=True)
    try:
        with transaction.atomic(using=using):
            if (
                Account.objects.using(using)
                .filter(pk=account.pk, balance__lte=MAX_AMOUNT - amount)
                .update(balance=F("balance") + amount)
            ):
                return _entry_record(
                    _write(
                        account.pk,
                        kind,
                        amount,
                        request,
                        reference=reference,
                        description=description,
                        balance_delta=amount,
                    )
                )
    except IntegrityError:
        if (entry := request.recorded() or referred()) is None:
            raise
        return _entry_record(entry, replayed=True)
    if (entry := request.recorded() or referred()) is not None:
        return _entry_record(entry, replayed=True)
    raise _invalid(field, "The balance would exceed 2**63 - 1.")


# Spending and holding
#
# *workspace*, here and in the next section, is a primary key or a name: one that
# is named is found, on PostgreSQL, within the same round trip.


@_retried
def use(
    workspace: int | str,
    customer_id: str,
    *,
    amount: int,
    unit: str | None = None,
    reference: str,
    description: str = "",
    idempotency_key: str,
) -> EntryRecord:
    """Take credits of *unit* (or the customer's own) at once, without a hold.

    Raises ``MeterlyNotFoundError`` and ``MeterlyInsufficientCreditsError``.
    """
    request = _request(
        workspace,
        idempotency_key,
        "use_credits",
        customer_id=customer_id,
        amount=amount,
        unit=unit,
        reference=reference,
        description=description,
    )
    if postgresql.serves(write_alias()):
        row = _call_spend(request, customer_id, unit, amount, reference, description)
        return EntryRecord(
            entry_id=row.entry_id,
            kind=Entry.Kind.USED.value,
            amount=amount,
            balance_delta=-amount,
            reserved_delta=0,
            account=AccountBalance(customer_id, row.unit, row.balance, row.reserved),
            reference=reference,
            description=description,
            created_at=dt.datetime.fromisoformat(row.created_at),
            replayed=row.code == "replayed",
        )

    def move(account_id: int) -> Entry | None:
        accounts = Account.objects.using(write_alias()).filter(pk=account_id)
        if not accounts.affording(amount).update(balance=F("balance") - amount):
            return None
        return _write(
            account_id,
            Entry.Kind.USED,
            amount,
            request,
            reference=reference,
            description=description,
            balance_delta=-amount,
        )

    entry, replayed = _spend(request, customer_id, unit, amount, move)
    return _entry_record(entry, replayed)


@_retried
def reserve(
    workspace: int | str,
    customer_id: str,
    *,
    amount: int,
    unit: str | None = None,
    reference: str,
    ttl_seconds: int | None = None,
    idempotency_key: str,
    statement: Statement | None = None,
) -> HoldRecord:
    """Hold credits of *unit* (or the customer's own) for *ttl_seconds*.

    300 seconds when not given, or ``METERLY_LEDGER["MAX_TTL"]`` if that is less.
    A *statement*, here and in the next section, is only for PostgreSQL.

    Raises ``MeterlyNotFoundError`` and ``MeterlyInsufficientCreditsError``.
    """
    request = _request(
        workspace,
        idempotency_key,
        "reserve_credits",
        customer_id=customer_id,
        amount=amount,
        unit=unit,
        reference=reference,
        ttl_seconds=ttl_seconds,
    )
    seconds = ttl_seconds or min(DEFAULT_TTL_SECONDS, ledger_settings.MAX_TTL)
    if postgresql.serves(write_alias()):
        row = _call_spend(
            request,
            customer_id,
            unit,
            amount,
            reference,
            hold=hold_id(),
            ttl_seconds=seconds,
            statement=statement,
        )
        return HoldRecord(
            reservation_id=row.hold_id,
            amount=amount,
            status=row.status,
            reference=reference,
            expires_at=dt.datetime.fromisoformat(row.expires_at),
            account=AccountBalance(customer_id, row.unit, row.balance, row.reserved),
            replayed=row.code == "replayed",
        )

    def move(account_id: int) -> Entry | None:
        using = write_alias()
        accounts = Account.objects.using(using).filter(pk=account_id)
        if not accounts.affording(amount).update(reserved=F("reserved") + amount):
            return None
        hold = Hold.objects.using(using).create(
            account_id=account_id,
            amount=amount,
            reference=reference,
            expires_at=from_now(seconds),
        )
        return _write(
            account_id,
            Entry.Kind.RESERVED,
            amount,
            request,
            reference=reference,
            reserved_delta=amount,
            hold=hold,
        )

    entry, replayed = _spend(request, customer_id, unit, amount, move)
    return _hold_record(_present_holds().get(pk=entry.hold_id), entry, replayed)


def _call_spend(
    request: _Request,
    customer_id: str,
    unit: str | None,
    amount: int,
    reference: str,
    description: str = "",
    hold: str | None = None,
    ttl_seconds: int | None = None,
    statement: Statement | None = None,
) -> postgresql.Spent:
    """Return what PostgreSQL's function has moved, or had for an earlier call.

    What was asked for is not in the answer: a replay asks for the same.
    """
    # Once more after due holds were found.
    for _attempt in range(2):
        row = postgresql.spend(
            write_alias(),
            request.workspace,
            request.idempotency_key,
            request.fingerprint,
            customer_id,
            unit,
            amount,
            reference,
            description,
            entry_id(),
            hold,
            ttl_seconds,
            statement=statement,
        )
        if row.code != "due" or not _expire_due(account_id=row.account_id):
            break
    if row.code == "mismatch":
        raise MeterlyIdempotencyMismatchError
    if row.code == "not_found":
        raise _no_customer(customer_id)
    if row.code in {"insufficient", "due"}:
        raise _insufficient(
            amount, AccountBalance(customer_id, row.unit, row.balance, row.reserved)
        )
    return row


def _spend(
    request: _Request,
    customer_id: str,
    unit: str | None,
    amount: int,
    move: Callable[[int], Entry | None],
) -> tuple[Entry, bool]:
    """Return the entry that *move* wrote, and whether an earlier call did."""
    if (entry := request.recorded()) is not None:
        return entry, True
    using = write_alias()
    customer = _customer(request.workspace_id, customer_id)
    unit = unit or customer.credit_unit
    account = Account.objects.using(using).filter(customer=customer, unit=unit).first()
    if account is not None:
        # Once more after due holds were found, or credits arrived meanwhile.
        for _attempt in range(2):
            try:
                with transaction.atomic(using=using):
                    entry = move(account.pk)
            except IntegrityError:
                if (entry := request.recorded()) is None:
                    raise
                return entry, True
            if entry is not None:
                return entry, False
            # A call with the same key may have taken the last credits just now.
            if (entry := request.recorded()) is not None:
                return entry, True
            if not _expire_due(account_id=account.pk):
                break
    raise _insufficient(amount, _balance_of(customer, unit))


# Closing a hold


@_retried
def commit(
    workspace: int | str,
    reservation_id: str,
    *,
    amount: int | None = None,
    idempotency_key: str,
    statement: Statement | None = None,
) -> HoldRecord:
    """Charge a hold: all of it, or *amount* (from 0); the rest is given back.

    Committing a committed one moves nothing. Raises ``MeterlyNotFoundError``,
    ``MeterlyInvalidRequestError`` (more than the hold),
    ``MeterlyReservationExpiredError`` and ``MeterlyReservationReleasedError``.
    """
    request = _request(
        workspace,
        idempotency_key,
        "commit_reservation",
        reservation_id=reservation_id,
        amount=amount,
    )
    return _close(request, reservation_id, Hold.Status.COMMITTED, amount, statement)


@_retried
def release(
    workspace: int | str,
    reservation_id: str,
    *,
    idempotency_key: str,
    statement: Statement | None = None,
) -> HoldRecord:
    """Give the held credits back.

    Releasing a released hold moves nothing. Raises ``MeterlyNotFoundError``,
    ``MeterlyReservationExpiredError`` and ``MeterlyReservationCommittedError``.
    """
    request = _request(
        workspace,
        idempotency_key,
        "release_reservation",
        reservation_id=reservation_id,
    )
    return _close(request, reservation_id, Hold.Status.RELEASED, 0, statement)


_CLOSING = {
    Hold.Status.COMMITTED: Entry.Kind.COMMITTED,
    Hold.Status.RELEASED: Entry.Kind.RELEASED,
}
_CLOSED: dict[str, type[MeterlyApiError]] = {
    Hold.Status.COMMITTED: MeterlyReservationCommittedError,
    Hold.Status.RELEASED: MeterlyReservationReleasedError,
    Hold.Status.EXPIRED: MeterlyReservationExpiredError,
}


def _close(
    request: _Request,
    reservation_id: str,
    status: Hold.Status,
    amount: int | None,
    statement: Statement | None = None,
    *,
    again: bool = True,
) -> HoldRecord:
    using = write_alias()
    if postgresql.serves(using):
        return _call_close(request, reservation_id, status, amount, statement)
    entry = request.recorded()
    hold = _hold(request.workspace_id, reservation_id)
    if entry is not None:
        return _hold_record(hold, entry, replayed=True)
    charged = hold.amount if amount is None else amount
    if charged > hold.amount:
        raise _too_much(hold.amount)
    live = Hold.objects.using(using).live().filter(pk=hold.pk)
    try:
        with transaction.atomic(using=using):
            if live.filter(expires_at__gt=DatabaseNow()).update(
                status=status, closed_at=DatabaseNow()
            ):
                Account.objects.using(using).filter(pk=hold.account_id).update(
                    balance=F("balance") - charged,
                    reserved=F("reserved") - hold.amount,
                )
                entry = _write(
                    hold.account_id,
                    _CLOSING[status],
                    charged if status == Hold.Status.COMMITTED else hold.amount,
                    request,
                    reference=hold.reference,
                    balance_delta=-charged,
                    reserved_delta=-hold.amount,
                    hold=hold,
                )
    except IntegrityError:
        if (entry := request.recorded()) is None:
            raise
        return _hold_record(
            _hold(request.workspace_id, reservation_id), entry, replayed=True
        )
    if entry is not None:
        return _hold_record(_hold(request.workspace_id, reservation_id), entry)
    # Closed already, perhaps by this very key just now; or it is past its time.
    entry = request.recorded()
    if entry is None:
        _expire_due(pk=hold.pk)
    hold = _hold(request.workspace_id, reservation_id)
    if hold.status == Hold.Status.RESERVED and again:
        # It was extended in the moment of its expiry.
        return _close(request, reservation_id, status, amount, again=False)
    if hold.status != status:
        raise _CLOSED[hold.status]
    return _hold_record(hold, entry, replayed=True)


def _call_close(
    request: _Request,
    reservation_id: str,
    status: Hold.Status,
    amount: int | None,
    statement: Statement | None,
) -> HoldRecord:
    """Return the hold that PostgreSQL's function has closed, or found closed."""
    # Once more after the hold was found to be due.
    for _attempt in range(2):
        row = postgresql.close(
            write_alias(),
            request.workspace,
            request.idempotency_key,
            request.fingerprint,
            reservation_id,
            status.value,
            amount,
            entry_id(),
            statement=statement,
        )
        if row.code != "due":
            break
        _expire_due(public_id=reservation_id)
    if row.code == "mismatch":
        raise MeterlyIdempotencyMismatchError
    if row.code == "not_found":
        raise _no_reservation(reservation_id)
    if row.code == "too_much":
        raise _too_much(row.amount)
    if row.code in {"closed", "due"}:
        raise _CLOSED.get(row.status, MeterlyReservationExpiredError)
    return HoldRecord(
        reservation_id=reservation_id,
        amount=row.amount,
        status=row.status,
        reference=row.reference,
        expires_at=dt.datetime.fromisoformat(row.expires_at),
        account=AccountBalance(row.customer_id, row.unit, row.balance, row.reserved),
        replayed=row.code == "replayed",
    )


# Extending a hold


@_retried
def extend(
    workspace_id: int, reservation_id: str, *, ttl_seconds: int, idempotency_key: str
) -> HoldRecord:
    """Let a live hold last *ttl_seconds* from now; that may be less than it had.

    Raises ``MeterlyNotFoundError``, ``MeterlyReservationExpiredError``,
    ``MeterlyReservationCommittedError`` and ``MeterlyReservationReleasedError``.
    """
    request = _request(
        workspace_id,
        idempotency_key,
        "extend_reservation",
        reservation_id=reservation_id,
        ttl_seconds=ttl_seconds,
    )
    request.recorded()
    hold = _hold(workspace_id, reservation_id)
    if request.is_recorded():
        return _hold_record(hold, replayed=True)
    using = write_alias()
    live = Hold.objects.using(using).live().filter(pk=hold.pk)
    try:
        with transaction.atomic(using=using):
            extended = live.filter(expires_at__gt=DatabaseNow()).update(
                expires_at=from_now(ttl_seconds)
            )
            if extended:
                request.record()
    except IntegrityError:
        if not request.is_recorded():
            raise
        return _hold_record(_hold(workspace_id, reservation_id), replayed=True)
    if not extended:
        _expire_due(pk=hold.pk)
    hold = _hold(workspace_id, reservation_id)
    if not extended:
        raise _CLOSED[hold.status]
    return _hold_record(hold)


# Expiry


@_retried
def expire_due(batch_size: int = 1000) -> int:
    """Expire every hold that is past its time, and return how many that were.

    Several sweeps at once, and commits that race them, are harmless. Holds are
    read *batch_size* at a time. An account whose row refuses the movement is
    logged and left; the others go on.
    """
    holds = Hold.objects.using(write_alias()).due().order_by("expires_at")
    expired = 0
    broken: list[int] = []
    while batch := list(holds.exclude(account__in=broken)[:batch_size]):
        before = expired, len(broken)
        batch.sort(key=attrgetter("account_id", "pk"))
        for account_id, group in groupby(batch, attrgetter("account_id")):
            try:
                expired += _expire(account_id, list(group))
            except IntegrityError:
                logger.exception("Holds of account %s do not expire.", account_id)
                broken.append(account_id)
        if (expired, len(broken)) == before:
            # Somebody else is at it, or the caller's snapshot is an old one.
            break
    return expired


def _expire_due(**lookup: Any) -> int:
    """Expire the due holds, of one account, that match *lookup*."""
    due = Hold.objects.using(write_alias()).due().filter(**lookup)
    holds = list(due.order_by("pk"))
    return _expire(holds[0].account_id, holds) if holds else 0


@_retried
def _expire(account_id: int, holds: list[Hold]) -> int:
    """Expire those of *holds* that are still due, and return how many.

    They all belong to the account, and are in primary key order.
    """
    using = write_alias()
    with transaction.atomic(using=using):
        expired = [
            hold
            for hold in holds
            # Still due: it may have been extended.
            if Hold.objects.using(using)
            .due()
            .filter(pk=hold.pk)
            .update(status=Hold.Status.EXPIRED, closed_at=DatabaseNow())
        ]
        if expired:
            total = sum(hold.amount for hold in expired)
            accounts = Account.objects.using(using).filter(pk=account_id)
            accounts.update(reserved=F("reserved") - total)
            account = accounts.select_related("customer").get()
            reserved = account.reserved + total
            lines = []
            for hold in expired:
                reserved -= hold.amount
                lines.append(
                    Entry(
                        workspace_id=account.customer.workspace_id,
                        account=account,
                        hold=hold,
                        kind=Entry.Kind.EXPIRED,
                        amount=hold.amount,
                        balance_delta=0,
                        reserved_delta=-hold.amount,
                        balance_after=account.balance,
                        reserved_after=reserved,
                        reference=hold.reference,
                    )
                )
            Entry.objects.using(using).bulk_create(lines)
    return len(expired)


def prune_records() -> int:
    """Forget the keys of calls that moved nothing, ``RECORD_RETENTION`` later."""
    old = Record.objects.using(write_alias()).filter(
        created_at__lt=from_now(-ledger_settings.RECORD_RETENTION)
    )
    return old.delete()[0]


def _invalid(field: str, message: str) -> MeterlyInvalidRequestError:
    return MeterlyInvalidRequestError(message, details={"fields": {field: [message]}})


def _too_much(held: int) -> MeterlyInvalidRequestError:
    return _invalid("amount", f"The reservation holds {held} credits.")


def _no_customer(customer_id: str) -> MeterlyNotFoundError:
    return MeterlyNotFoundError(f"There is no customer {customer_id!r}.")


def _no_reservation(reservation_id: str) -> MeterlyNotFoundError:
    return MeterlyNotFoundError(f"There is no reservation {reservation_id!r}.")


def _insufficient(
    required: int, account: AccountBalance
) -> MeterlyInsufficientCreditsError:
    return MeterlyInsufficientCreditsError(
        f"{required} credits of {account.unit!r} are required, "
        f"{account.available} are available.",
        details={
            "required": required,
            "available": account.available,
            "reserved": account.reserved,
            "unit": account.unit,
        },
    )
