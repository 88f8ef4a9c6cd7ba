"""What the ledger can do. The only module that has credits moved.

It moves them through ``portable``, or through PostgreSQL's functions (``postgresql``):
the two answer alike, and here their codes become errors.

Locks are taken in one order everywhere: holds (by primary key), then accounts.
Times are the database's.
"""

from __future__ import annotations

import functools
import logging
import random
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.db import DatabaseError, IntegrityError, connections, router, transaction
from django.db.models import F

from ..db import (
    DatabaseNow,
    bound_waits,
    change_in_batches,
    from_now,
    gave_way,
    refuses_rows,
    unlocked,
    was_locked,
)
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
from . import portable, postgresql
from .conf import ledger_settings
from .idempotency import Request, fingerprint_of, text_of
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
from .movements import UNKNOWN, Closed, Closing, Spending, Spent

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable

    from ..errors import MeterlyApiError
    from ..transports.base import Statement

P = ParamSpec("P")
R = TypeVar("R")
AnswerT = TypeVar("AnswerT", Spent, Closed)

logger = logging.getLogger("django_meterly.ledger")

DEFAULT_TTL_SECONDS = 300
PAGE_SIZE = 100

_RETRY_SECONDS = 10.0
_LONGEST_PAUSE = 0.5
#: Each try expires all holds that are due and in the way. A third one is rare.
_MOST_TRIES = 20


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
    """Credits of *unit*, as of now or right after a movement.

    Right after a movement they are those of its entry: a replay has to find the same.
    Then *reserved* includes holds whose time is over, until they are swept.
    """

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
    """A hold as it is now; *account* is as it was right after the movement.

    If nothing was moved, *account* is as it is now, too.
    """

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
                    not gave_way(exc)
                    or time.monotonic() > until
                    or connection.in_atomic_block
                    or not connection.get_autocommit()
                ):
                    raise
            # Jitter: those who met once are not to meet again.
            pause = min(2 * pause, _LONGEST_PAUSE)
            time.sleep(random.uniform(0, pause))  # noqa: S311

    return wrapper


# Workspaces and customers


@_retried
def ensure_workspace(name: str, *, is_test: bool = False) -> Workspace:
    """Return the workspace called *name*, made now if need be.

    *is_test* is for a new one: an existing workspace stays of its kind.
    """
    workspaces = Workspace.objects.using(write_alias())
    workspace = workspaces.filter(name=name).first()
    if workspace is None:
        workspaces.bulk_create(
            [Workspace(name=name, is_test=is_test)], ignore_conflicts=True
        )
        workspace = workspaces.get(name=name)
    return workspace


@_retried
def create_customer(
    workspace_id: int, *, external_id: str, credit_unit: str, idempotency_key: str
) -> CustomerRecord:
    """Register a customer, once per *external_id*.

    Raises ``MeterlyCustomerExistsError`` when it exists, whatever its unit. The same
    call again, with the same key, returns the customer that it created.
    """
    request = _request(
        workspace_id,
        idempotency_key,
        "create_customer",
        external_id=external_id,
        credit_unit=credit_unit,
    )
    recorded = request.recorded()
    customer, created = _ensure_customer(workspace_id, external_id, credit_unit)
    if not created and recorded is None:
        # The same call may have been faster.
        recorded = request.recorded()
    if not created and recorded is None:
        raise MeterlyCustomerExistsError(
            f"Customer {external_id!r} exists with credit unit "
            f"{customer.credit_unit!r}.",
            details={"customerId": customer.public_id},
        )
    if recorded is None:
        request.remember()
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
    return _balances(_customer(workspace_id, customer_id))


@_retried
def default_balance(workspace_id: int, customer_id: str) -> AccountBalance:
    """Return the balance of the account the customer was created with."""
    customer = _customer(workspace_id, customer_id)
    for account in _balances(customer, unit=customer.credit_unit):
        return account
    # A crash may have left a new customer without it.
    return AccountBalance(customer_id, customer.credit_unit, 0, 0)


def _balances(customer: LedgerCustomer, **lookup: Any) -> list[AccountBalance]:
    """Return the balances of this moment: credits of expired holds are available."""
    accounts = Account.objects.using(write_alias()).filter(customer=customer, **lookup)
    return [
        AccountBalance(
            customer.public_id, account.unit, account.balance, account.present_reserved
        )
        for account in accounts.current().order_by("unit")
    ]


def _balance(customer_id: str, found: Spent | Closed) -> AccountBalance:
    return AccountBalance(customer_id, found.unit, found.balance, found.reserved)


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
    holds = Hold.objects.using(write_alias()).filter(
        public_id=reservation_id, account__customer__workspace=workspace_id
    )
    hold = holds.current().first()
    if hold is None:
        raise _no_reservation(reservation_id)
    return hold


def _entry_record(entry: Entry, replayed: bool = False) -> EntryRecord:
    customer_id, unit = entry.account.customer.public_id, entry.account.unit
    balance, reserved = entry.balance_after, entry.reserved_after
    return EntryRecord(
        entry_id=entry.public_id,
        kind=entry.kind,
        amount=entry.amount,
        balance_delta=entry.balance_delta,
        reserved_delta=entry.reserved_delta,
        account=AccountBalance(customer_id, unit, balance, reserved),
        reference=entry.reference,
        description=entry.description,
        created_at=entry.created_at,
        replayed=replayed,
    )


def _hold_record(hold: Hold, replayed: bool = False) -> HoldRecord:
    return HoldRecord(
        reservation_id=hold.public_id,
        amount=hold.amount,
        status=hold.present_status,
        reference=hold.reference,
        expires_at=hold.expires_at,
        account=AccountBalance(
            hold.account.customer.public_id,
            hold.account.unit,
            hold.account.balance,
            hold.present_reserved,
        ),
        replayed=replayed,
    )


def _request(
    workspace_id: int, idempotency_key: str, operation: str, **arguments: Any
) -> Request:
    return Request(
        write_alias(),
        workspace_id,
        idempotency_key,
        fingerprint_of(operation, idempotency_key, **arguments),
    )


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
    if isinstance(entry := request.recorded(), Entry):
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
    if isinstance(entry := request.recorded(), Entry):
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
    request: Request,
    reference: str,
    description: str,
    *,
    field: str,
) -> EntryRecord:
    referred = functools.partial(
        _referred, account, kind, amount, reference, description
    )

    def written() -> Entry | None:
        """Return the entry of this call, or of an earlier one."""
        entry = request.recorded()
        return entry if isinstance(entry, Entry) else referred()

    if (entry := referred()) is not None:
        request.remember()
        return _entry_record(entry, replayed=True)
    public_id = entry_id()
    accounts = Account.objects.using(request.using).filter(pk=account.pk)
    try:
        with transaction.atomic(using=request.using):
            if accounts.filter(balance__lte=MAX_AMOUNT - amount).update(
                balance=F("balance") + amount
            ):
                portable.write_entry(
                    request,
                    accounts.get(),
                    kind,
                    amount,
                    entry_id=public_id,
                    balance_delta=amount,
                    reference=reference,
                    description=description,
                    unique_reference=reference,
                )
    except IntegrityError:
        # Another call with the key, or with the reference, was first.
        if (entry := written()) is None:
            raise
    else:
        entry = written()
    if entry is None:
        raise _invalid(field, "The balance would exceed 2**63 - 1.")
    if entry.idempotency_key != request.idempotency_key:
        request.remember()
    return _entry_record(entry, replayed=entry.public_id != public_id)


def _referred(
    account: Account, kind: Entry.Kind, amount: int, reference: str, description: str
) -> Entry | None:
    """Return the entry of an earlier call with the reference and the same values."""
    entries = _entries().filter(account=account, unique_reference=reference)
    entry: Entry | None = entries.first()
    values = kind, amount, description
    if entry and (entry.kind, entry.amount, entry.description) != values:
        raise MeterlyReferenceConflictError(
            f"Reference {reference!r} was used before, with other values."
        )
    return entry


# Spending and holding
#
# *workspace*, here and in the next section, is a primary key or a name: PostgreSQL
# finds one by its name in the same round trip.


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

    Raises ``MeterlyNotFoundError``, ``MeterlyInsufficientCreditsError`` and
    ``MeterlyInvalidRequestError`` (an amount below 1).
    """
    fingerprint = fingerprint_of(
        "use_credits",
        idempotency_key,
        customer_id=customer_id,
        amount=amount,
        unit=unit,
        reference=reference,
        description=description,
    )
    spending = Spending(
        workspace,
        idempotency_key,
        fingerprint,
        customer_id,
        unit,
        amount,
        reference,
        description,
        entry_id(),
    )
    answer = _spend(spending)
    assert answer.entry_id is not None
    assert answer.created_at is not None
    return EntryRecord(
        entry_id=answer.entry_id,
        kind=Entry.Kind.USED.value,
        amount=amount,
        balance_delta=-amount,
        reserved_delta=0,
        account=_balance(customer_id, answer),
        reference=reference,
        description=description,
        created_at=answer.created_at,
        replayed=answer.code == "replayed",
    )


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
    A *statement*, here and in the next section, is only for PostgreSQL. Here it finds
    the customer, and the scope of the key.

    Raises ``MeterlyNotFoundError``, ``MeterlyInsufficientCreditsError`` and
    ``MeterlyInvalidRequestError`` (an amount below 1).
    """
    asked = {
        "amount": amount,
        "unit": unit,
        "reference": reference,
        "ttl_seconds": ttl_seconds,
    }
    spending = Spending(
        workspace,
        idempotency_key,
        fingerprint_of(
            "reserve_credits", idempotency_key, customer_id=customer_id, **asked
        )
        if statement is None
        else text_of(
            "reserve_credits", UNKNOWN + idempotency_key, customer_id=UNKNOWN, **asked
        ),
        customer_id,
        unit,
        amount,
        reference,
        "",
        entry_id(),
        hold_id(),
        ttl_seconds or min(DEFAULT_TTL_SECONDS, ledger_settings.MAX_TTL),
    )
    answer = _spend(spending, statement)
    assert answer.hold_id is not None
    assert answer.status is not None
    assert answer.expires_at is not None
    return HoldRecord(
        reservation_id=answer.hold_id,
        amount=amount,
        status=answer.status,
        reference=reference,
        expires_at=answer.expires_at,
        account=_balance(customer_id, answer),
        replayed=answer.code == "replayed",
    )


def _spend(spending: Spending, statement: Statement | None = None) -> Spent:
    """Return what was moved, now or by an earlier call with the key.

    What was asked for is not in the answer: a replay asks for the same.
    """
    using = write_alias()
    spend, _ = _ways(using)
    answer = _answer(
        lambda: spend(using, spending, statement),
        lambda answer: {"account_id": answer.account_id},
    )
    if answer.code == "invalid":
        raise _invalid("amount", "The amount must be at least 1.")
    if answer.code == "not_found":
        raise _no_customer(answer.customer_id or spending.customer_id)
    if answer.code in {"insufficient", "due"}:
        account = _balance(spending.customer_id, answer)
        raise _insufficient(spending.amount, account)
    return answer


def _ways(using: str) -> tuple[Callable[..., Spent], Callable[..., Closed]]:
    """Return the functions that spend, and close, in the database *using*."""
    if postgresql.serves(using):
        return postgresql.spend, postgresql.close
    return portable.spend, portable.close


def _answer(
    call: Callable[[], AnswerT], due: Callable[[AnswerT], dict[str, Any]]
) -> AnswerT:
    """Return the answer of *call*, made again while due holds are in its way.

    *due* looks those holds up. It does not matter who expires them: a neighbour may
    have done it since, and then their credits are available, too.
    """
    for _try in range(_MOST_TRIES):
        answer = call()
        if answer.code != "due":
            break
        _expire_due(**due(answer))
    if answer.code == "mismatch":
        raise MeterlyIdempotencyMismatchError
    return answer


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
    ``MeterlyInvalidRequestError`` (more than the hold, or less than 0),
    ``MeterlyReservationExpiredError`` and ``MeterlyReservationReleasedError``.
    """
    fingerprint = fingerprint_of(
        "commit_reservation",
        idempotency_key,
        reservation_id=reservation_id,
        amount=amount,
    )
    closing = Closing(
        workspace,
        idempotency_key,
        fingerprint,
        reservation_id,
        Hold.Status.COMMITTED.value,
        amount,
        entry_id(),
    )
    return _close(closing, statement)


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
    closing = Closing(
        workspace,
        idempotency_key,
        fingerprint_of(
            "release_reservation", idempotency_key, reservation_id=reservation_id
        ),
        reservation_id,
        Hold.Status.RELEASED.value,
        0,
        entry_id(),
    )
    return _close(closing, statement)


_CLOSED: dict[str, type[MeterlyApiError]] = {
    Hold.Status.COMMITTED: MeterlyReservationCommittedError,
    Hold.Status.RELEASED: MeterlyReservationReleasedError,
    Hold.Status.EXPIRED: MeterlyReservationExpiredError,
}


def _close(closing: Closing, statement: Statement | None) -> HoldRecord:
    """Return the hold, closed now or before."""
    using = write_alias()
    _, close = _ways(using)
    answer = _answer(
        lambda: close(using, closing, statement),
        lambda answer: {"public_id": closing.hold_id},
    )
    if answer.code == "invalid":
        raise _invalid("amount", "The charge must be at least 0.")
    if answer.code == "not_found":
        raise _no_reservation(closing.hold_id)
    if answer.code == "too_much":
        raise _invalid("amount", f"The reservation holds {answer.amount} credits.")
    if answer.code in {"closed", "due"}:
        raise _CLOSED.get(answer.status, MeterlyReservationExpiredError)
    if answer.code == "already":
        workspace = closing.workspace
        if isinstance(workspace, str):
            workspace = ensure_workspace(workspace).pk
        key, fingerprint = closing.idempotency_key, closing.fingerprint
        Request(using, workspace, key, fingerprint).remember()
    assert answer.expires_at is not None
    return HoldRecord(
        reservation_id=closing.hold_id,
        amount=answer.amount,
        status=answer.status,
        reference=answer.reference,
        expires_at=answer.expires_at,
        account=_balance(answer.customer_id, answer),
        replayed=answer.code != "moved",
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
    for _try in range(_MOST_TRIES):
        recorded = request.recorded()
        hold = _hold(workspace_id, reservation_id)
        if recorded is not None:
            return _hold_record(hold, replayed=True)
        if hold.status != Hold.Status.RESERVED:
            raise _CLOSED[hold.status]
        if _extended(request, hold, ttl_seconds):
            return _hold_record(_hold(workspace_id, reservation_id))
        # Its time is over, or the key was recorded meanwhile, or another call has
        # extended the hold at its very end.
        _expire_due(pk=hold.pk)
    raise MeterlyReservationExpiredError


def _extended(request: Request, hold: Hold, ttl_seconds: int) -> bool:
    """Extend the hold, unless its time is over or the key was recorded before."""
    live = Hold.objects.using(request.using).live().filter(pk=hold.pk)
    try:
        with transaction.atomic(using=request.using):
            if not live.filter(expires_at__gt=DatabaseNow()).update(
                expires_at=from_now(ttl_seconds)
            ):
                return False
            request.record()
    except IntegrityError:
        if request.recorded() is None:
            raise
        return False
    return True


# Expiry


@_retried
def expire_due(batch_size: int = 1000) -> int:
    """Expire every hold that is past its time, and return how many that were.

    Several sweeps at once, and commits that race them, are harmless. Holds are
    read *batch_size* at a time. A hold that cannot be expired is logged and left; the
    others go on.
    """
    using = write_alias()
    holds = Hold.objects.using(using).due().order_by("expires_at")
    expired = 0
    broken: list[int] = []
    while True:
        with transaction.atomic(using=using):
            batch = list(unlocked(holds.exclude(pk__in=broken))[:batch_size])
        before = expired, len(broken)
        batch.sort(key=attrgetter("account_id", "pk"))
        for account_id, group in groupby(batch, attrgetter("account_id")):
            expired += _expire_or_leave(account_id, list(group), broken)
        if (expired, len(broken)) == before:
            # Nothing is due, somebody else is at it, or the caller's snapshot is old.
            return expired


def _expire_or_leave(account_id: int, holds: list[Hold], left: list[int]) -> int:
    """Expire *holds*; add to *left* what cannot be expired. Return how many were."""
    handled = sys.exception()
    try:
        return _expire_soon(account_id, holds)
    except DatabaseError as exc:
        if not refuses_rows(write_alias(), exc):
            raise
        if len(holds) > 1 and not was_locked(exc, handled):
            # One of them is refused, or the account's row is.
            return sum(_expire_or_leave(account_id, [hold], left) for hold in holds)
        pks = [hold.pk for hold in holds]
        logger.exception("The holds %s of account %s do not expire.", pks, account_id)
        left += pks
        return 0


@_retried
def _expire_soon(account_id: int, holds: list[Hold]) -> int:
    """Do as ``_expire``, but do not wait for ever for a row that is locked."""
    using = write_alias()
    with transaction.atomic(using=using):
        bound_waits(using)
        return _expire(account_id, holds)


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
    return change_in_batches(
        old, lambda rows: rows.delete()[1].get(Record._meta.label, 0)
    )


def _invalid(field: str, message: str) -> MeterlyInvalidRequestError:
    return MeterlyInvalidRequestError(message, details={"fields": {field: [message]}})


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
