"""``guard()``: reserve, run, then commit or release."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import Error, connections, transaction
from django.utils.asyncio import async_unsafe
from django.utils.functional import cached_property

from . import db, journal, signals, units
from .client import get_client
from .conf import check_choice, meterly_settings
from .errors import (
    MeterlyError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidKeyError,
    MeterlyUnavailableError,
    MeterlyUsageError,
)
from .handoffs import FREE, UNCHARGED, Message
from .heart import Heart
from .options import check_price, shows
from .transports.base import (
    MAX_CALLER_KEY_LENGTH,
    check_amount,
    check_key,
    check_text,
    check_ttl,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from django.dispatch import Signal

    from .client import MeterlyClient
    from .models import Customer, Reservation
    from .types import Balance

__all__ = ["Guard", "guard"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Guard:
    """One guarded piece of work: what ``guard()`` returns and ``request.meterly`` is.

    *amount* credits of *unit* are held while the work runs. The work may call
    ``charge`` to be charged for what it used, or ``release`` to be free.
    """

    def __init__(
        self,
        customer: Any,
        amount: int,
        unit: str,
        *,
        reference: str,
        idempotency_key: str | None,
        ttl_seconds: int,
        durable: bool = True,
        overage: str | None = None,
        on_unavailable: str | None = None,
        enforcement: str | None = None,
        invalid: MeterlyInvalidKeyError | None = None,
    ) -> None:
        self._payer = customer
        self.amount = amount
        self.unit = unit
        self.reference = reference
        self.idempotency_key = idempotency_key
        self.ttl_seconds = ttl_seconds
        self.durable = durable
        #: ``None``, here and below, is what the setting says when it is needed.
        self.overage = overage
        #: The name of the view or the task that this is for.
        self.name = ""
        self.on_unavailable = on_unavailable
        self.enforcement = enforcement or meterly_settings.ENFORCEMENT
        #: How many seconds the work may take without a beat; ``None`` is ttl_seconds.
        self.lease: float | None = None
        self.reservation: Reservation | None = None
        #: A fencing token: pass it to other systems so that they can reject writes of
        #: a worker that has been superseded.
        self.fence = 0
        self._balance: Balance | None = None
        self._charge: int | None = amount
        self._decided = False
        self._presumed = False
        self._reserved_at = 0.0
        self._concluded = False
        # Why the work would not have been run; only in shadow.
        self._invalid = invalid
        self._uncharged = False
        self._message: Message | None = None
        self._delivered = False

    @cached_property
    def _client(self) -> MeterlyClient:
        # Not before it is needed: enforcement "off" works without an API key.
        return get_client()

    def __repr__(self) -> str:
        state = self.reservation.state if self.reservation else "not reserved"
        return f"<Guard {self.reference}: {self.amount} {self.unit}, {state}>"

    @property
    def available(self) -> int:
        """The credits that were left for other work when these were reserved."""
        return self._balance.available if self._balance else 0

    def charge(self, amount: int) -> None:
        """Charge *amount* on success, instead of the amount held.

        If *amount* is below the hold, the remainder is returned; 0 is free. If it is
        above, ``OVERAGE`` decides: ``"charge"`` charges it all, ``"cap"`` charges
        the hold. The last call counts. For example, after ``charge(80)`` a hold of
        100 credits costs 80. Raises ``ValueError`` for anything that is not a whole
        number of credits, and ``MeterlyUsageError`` before the work has begun, once it
        has ended, and for more than 0 where the amount was 0 (unless ``OVERAGE`` is
        ``"cap"``).
        """
        charge = check_amount(amount, minimum=0)
        self._refuse_unless_at_work("charge", "80")
        overage = self.overage or meterly_settings.OVERAGE
        if charge and not self.amount and overage != "cap":
            raise MeterlyUsageError(
                f"charge({charge}) is too much: amount was 0, so no credits are held "
                "and nothing can be charged. Let amount return 1 or more, and say "
                "charge(0) for work that turns out to be free."
            )
        if charge > self.amount and overage == "cap":
            logger.warning(
                "%s used %d %s, but is charged the %d it reserved (overage is 'cap').",
                self.reference,
                charge,
                self.unit,
                self.amount,
            )
            charge = self.amount
        self._charge = charge

    def release(self) -> None:
        """Let the work be free, even if it succeeds.

        Raises ``MeterlyUsageError`` before the work has begun and once it has ended.
        """
        self._refuse_unless_at_work("release")
        self._charge = None

    def hand_off(self, task: Any, /, *args: Any, **kwargs: Any) -> str:
        """Let a ``meterly_task`` finish the work and settle; return the task's id.

        *task* is the task, or a signature of it with options of its own
        (``task.s().set(queue="gpu")``); *args* and *kwargs* are the task's. The
        message is sent when this work has succeeded and is committed, and carries
        the reservation's id. If the work fails, nothing is sent and the credits are
        released; and if the message cannot be sent, they are released and
        ``MeterlyUnavailableError`` is raised where the work ends.

        Raises ``TypeError`` for a task that is not guarded, or for arguments it
        does not take, and ``MeterlyUsageError`` before the work has begun, and once it
        has ended or was handed off.
        """
        self._refuse_unless_at_work("hand_off", "task, ...")
        self._message = Message(task, args, kwargs)
        return self._message.task_id

    def __enter__(self) -> Guard:
        try:
            _refuse_in_event_loop()
        except SynchronousOnlyOperation as exc:
            raise MeterlyUsageError(str(exc)) from None
        self.reserve()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.succeed()
        else:
            self.fail()

    async def __aenter__(self) -> Guard:
        try:
            await to_the_end(self.reserve)
        except asyncio.CancelledError:
            await to_the_end(self.abandon)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(exc, GeneratorExit):
            await to_the_end(self.__exit__, exc_type, exc, traceback)
        # A coroutine that is being closed cannot await: the lease releases.

    def __await__(self) -> NoReturn:
        raise TypeError(f"A guard is not awaited. Write {_ASYNC_WITH}")

    # What the edges call, in this order: reserve, then one of the others.

    def reserve(self) -> None:
        """Hold the credits, as ``enforcement`` says.

        Raises what ``journal.reserve`` raises; in shadow, ``MeterlyUsageError`` only.
        """
        if self.reservation is not None or self._uncharged:
            raise MeterlyUsageError(
                "A guard guards one piece of work. Call guard() again for the next."
            )
        if self.enforcement == "off":
            self._uncharged = True
            return
        payer = journal.Payer(self._payer)
        try:
            if self.durable:
                with db.serving():
                    journal.refuse_open_transaction(self._client)
            if self._invalid is not None:
                raise self._invalid
            if self._payer is None and self.enforcement == "shadow":
                raise MeterlyError("Nobody is known to pay for this.")
            with db.serving():
                if self.amount:
                    self._reserve(payer)
                else:
                    self._begin_free(payer.resolve())
        except MeterlyUsageError:
            raise
        except MeterlyError as exc:
            if self.enforcement == "shadow":
                self._uncharged = True
                logger.warning("%s would have been denied: %s", self.reference, exc)
                self._announce(signals.would_deny, payer.customer, exc)
                return
            if isinstance(
                exc, MeterlyInsufficientCreditsError | MeterlyUnavailableError
            ):
                self._announce(signals.credits_denied, payer.customer, exc)
            raise

    def _begin_free(self, customer: Customer) -> None:
        """Begin work that costs nothing: nothing is held, and nothing written.

        Its key is not used up by it, but a key that was used up is a duplicate.
        """
        if self.idempotency_key is not None and (
            duplicate := journal.in_the_way(customer, self.idempotency_key)
        ):
            raise duplicate
        self._uncharged = True

    def _announce(
        self, signal: Signal, customer: Customer | None, error: MeterlyError
    ) -> None:
        signals.announce(
            signal,
            Guard,
            using=journal.alias(),
            customer=customer,
            unit=self.unit,
            amount=self.amount,
            reference=self.reference,
            error=error,
        )

    def _reserve(self, payer: journal.Payer) -> None:
        self._reserved_at = time.monotonic()
        self.reservation, self._balance = journal.reserve(
            self._client,
            payer,
            self.amount,
            self.unit,
            reference=self.reference,
            key=self.idempotency_key,
            ttl_seconds=self.ttl_seconds,
            name=self.name,
            on_unavailable=self.on_unavailable or meterly_settings.ON_UNAVAILABLE,
            lease=self.lease,
        )
        self.fence = self.reservation.fence

    def adopt(self, row: Reservation) -> None:
        """Go on under a reservation that was claimed, instead of ``reserve``."""
        self.reservation = row
        self.fence = row.fence

    def offer(self, lease: float) -> bool:
        """Offer the work to somebody else, for *lease* seconds.

        Until it is claimed, it can still be failed here.
        """
        if not journal.offer(self._row, fence=self.fence, lease=lease):
            return False
        self.fence = self._row.fence
        return True

    @property
    def superseded(self) -> bool:
        """Whether somebody else has taken the work up, and nothing is owed for this.

        Either they have claimed this reservation, or they have made the next attempt.
        """
        row = self.reservation
        if row is None or self._message is not None:
            return False
        return row.fence != self.fence or (
            # Taken for dead, and not one that has failed and was told to try again.
            row.lapsed and row.charge is None and journal.is_tried_again(row)
        )

    def decide(self) -> None:
        """Record success as part of the transaction that is open, the work's own.

        With the ledger in the same database the credits move in it, too, so
        that work and charge are one; but only at READ COMMITTED, for above it
        a busy account would fail the work with a serialization error.
        """
        self._decided = True
        if self._uncharged:
            return
        using = journal.alias()
        transport = self._client.transport
        joins = self._message is None and transport.joins(using)
        if (
            joins
            and transport.carries_statements(using)
            and self._decide_in_one_statement()
        ):
            return
        settles = joins and db.reads_committed(using)
        if self._record(succeeded=True) and settles:
            self._settle_now()

    def presume(self) -> None:
        """Record that the work has returned well, before its response is rendered.

        From now on its charge lapses to commit, unless ``cancel`` comes before the
        lease ends. That is before the hold ends, so that the hold can be committed.
        Part of the transaction that is open, or a statement of its own.
        """
        if self._uncharged or self._charge is None:
            return
        self._presumed = True
        left = max(self._reserved_at + self.ttl_seconds - time.monotonic(), 0)
        lease = min(meterly_settings.LEASE_GRACE, left / 2)
        charge = self._charge
        db.on_live_connection(
            journal.alias(),
            lambda: journal.presume(self._row, charge, fence=self.fence, lease=lease),
        )

    def succeed(self) -> None:
        """Record success in a transaction of its own, then settle.

        Raises the database's error when it is down, too, for recording it;
        a remote ledger is told all the same.
        """
        try:
            self._conclude(succeeded=True)
        except Error:
            if (
                self._charge is not None
                and self._message is None
                and not self._client.transport.aliases()
            ):
                journal.commit_unrecorded(self._client, self._row, self._charge)
            raise
        self._deliver()

    def fail(self) -> None:
        """Record failure, then settle, whatever the row says by now.

        After an exception from a COMMIT only the row knows whether the work was
        done. Nothing is raised: the work's own exception is the one to see.
        """
        try:
            self._conclude(succeeded=self._is_presumed())
            if self._is_offered:
                # The exception came after the COMMIT.
                self._deliver()
        except Exception:
            logger.exception(
                "%s could not be released; the sweeper will do it", self.reference
            )

    def cancel(self) -> None:
        """Record failure although the work has returned: it was not delivered."""
        self._presumed = False
        self.fail()

    def disconnect(self, policy: str) -> None:
        """Conclude work whose reader went away, by a word of ``ON_DISCONNECT``."""
        if policy == "charge":
            self.succeed()
        else:
            self.cancel()

    def abandon(self) -> None:
        """Release what was reserved, and what nobody has concluded."""
        if self.reservation is not None and not self._concluded:
            self.cancel()

    def start_heart(self, *, at_once: bool = False) -> Heart | None:
        """Renew lease and hold from now on, beside the work; ``None`` for no need.

        Inside a test's transaction nobody else sees the row, and so no heart beats.
        """
        row = self.reservation
        in_test = connections[journal.alias()].in_atomic_block
        if row is None or row.state != row.State.RESERVED or in_test:
            return None
        heart = Heart(row, self.fence, at_once=at_once)
        heart.start()
        return heart

    def confirm(self) -> None:
        """Settle what ``decide`` has recorded, now that it is committed.

        Or send what was handed off; raises ``MeterlyUnavailableError`` if it cannot
        be sent.
        """
        if self._message is not None:
            self._deliver()
            return
        if self._uncharged:
            return
        try:
            self._settle_now()
        except Exception:
            logger.exception(
                "%s could not be settled; the sweeper will do it", self.reference
            )

    def _is_presumed(self) -> bool:
        """Ask the row whether what ``presume`` has recorded was committed."""
        if not self._presumed:
            return False
        using = journal.alias()
        db.on_live_connection(using, lambda: self._row.refresh_from_db(using=using))
        return self._row.is_presumed

    @property
    def is_handed_off(self) -> bool:
        """Whether a task will finish the work, and decides."""
        return self._message is not None

    @property
    def _row(self) -> Reservation:
        if self.reservation is None:
            raise MeterlyUsageError("This guard has not reserved anything yet.")
        return self.reservation

    def _refuse_unless_at_work(self, verb: str, arguments: str = "") -> None:
        if self.reservation is None and not self._uncharged:
            raise MeterlyUsageError(
                f"{verb}() came too early: no credits are held yet. Call it in the "
                "block: with guard(...) as reservation: "
                f"reservation.{verb}({arguments})"
            )
        if self._decided or self._concluded:
            raise MeterlyUsageError(
                f"{verb}() came too late: the work has ended, and what it costs is "
                "decided. Call it while the work is running."
            )
        if self._message is not None:
            raise MeterlyUsageError(
                f"{verb}() came too late: the work was handed off; the task decides."
            )

    @property
    def _is_offered(self) -> bool:
        row = self.reservation
        return (
            self._message is not None
            and row is not None
            and row.state == row.State.RESERVED
            and row.fence == self.fence + 1
        )

    def _deliver(self) -> None:
        """Send what was handed off, or give the credits back."""
        message = self._message
        if message is None or self._delivered:
            return
        self._delivered = True
        if self.durable:
            self._send(message)
        else:
            transaction.on_commit(
                lambda: self._send(message), using=journal.alias(), robust=True
            )

    def _send(self, message: Message) -> None:
        row = None if self._uncharged else self._row
        if row is not None and not self._is_offered:
            # Given up meanwhile, or nobody knows: then the task would run for free.
            raise MeterlyUnavailableError(
                f"{self.reference} was not handed off: its reservation is {row.state}."
            )
        try:
            if row is not None:
                message.send(str(row.pk))
            else:
                message.send(UNCHARGED if self.amount else FREE)
        except Exception as exc:
            logger.exception("%s could not be handed off", self.reference)
            if row is not None:
                journal.record_failure(row, fence=row.fence)
                self._settle_now()
            raise MeterlyUnavailableError(
                f"The task of {self.reference} could not be sent: {exc}"
            ) from exc

    def _conclude(self, *, succeeded: bool) -> None:
        """Decide and settle; if settling fails, the decision alone must hold."""
        if self._concluded:
            return
        self._concluded = True
        if self._uncharged:
            return
        using = journal.alias()
        try:
            db.on_live_connection(
                using, lambda: self._record_and_settle(using, succeeded=succeeded)
            )
        except Error:
            logger.exception("%s could not be settled at once", self.reference)
            db.on_live_connection(
                using,
                lambda: self._record(succeeded=succeeded),
                patience=journal.SETTLE_TIMEOUT,
            )
        except BaseException:
            # A time limit or an interrupt in the middle took the decision along.
            self._record(succeeded=succeeded)
            raise

    def _record_and_settle(self, using: str, *, succeeded: bool) -> None:
        if journal.fits_one_statement(
            self._client, using
        ) and self._decide_in_one_statement(succeeded):
            return
        transport = self._client.transport
        with transport.unit_of_work(using):
            if not self._record(succeeded=succeeded):
                # The row has another decision, and that one stands.
                self._row.refresh_from_db(using=using)
            if self._is_offered:
                return
            if self.durable or transport.joins(using):
                self._settle_now()
            else:
                # The ledger may only hear of it once it is committed.
                transaction.on_commit(self.confirm, using=using, robust=True)

    def _record(self, *, succeeded: bool) -> bool:
        if succeeded and self._message is not None:
            return journal.offer(self._row, fence=self.fence)
        if succeeded and self._charge is not None:
            return journal.record_success(self._row, self._charge, fence=self.fence)
        return journal.record_failure(self._row, fence=self.fence)

    def _decide_in_one_statement(self, succeeded: bool = True) -> bool:
        """Decide and settle in one statement; return whether that was all."""
        charge = self._charge if succeeded else None
        # What is handed off is not settled here.
        return self._message is None and journal.decide_in_one_statement(
            self._client, self._row, charge, fence=self.fence
        )

    def _settle_now(self) -> None:
        journal.settle(self._client, self._row, timeout=journal.SETTLE_TIMEOUT)


async def to_the_end(function: Callable[..., T], /, *args: Any) -> T:
    """Run the sync *function* in a thread, and wait for its end in any case.

    However often the caller is cancelled meanwhile; then ``CancelledError`` is
    raised, and the result is lost. In the thread that the request's other sync
    code runs in, so with its database connections.
    """
    task = asyncio.ensure_future(sync_to_async(function)(*args))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        if not task.cancelled() and (error := task.exception()):
            logger.warning("Ended by a cancellation, and by %r", error)
        raise cancelled
    return task.result()


@shows('with guard(user, 25, "image_credits"): ...')
def guard(
    customer: Any,
    amount: int,
    unit: str | None = None,
    *,
    reference: str | None = None,
    idempotency_key: str | None = None,
    ttl_seconds: int | None = None,
    durable: bool = True,
    overage: str | None = None,
    on_unavailable: str | None = None,
    enforcement: str | None = None,
) -> Guard:
    """Hold credits while a block of code runs; charge them if it succeeds.

    Use it as a context manager::

        with guard(user, 100, "gpu_seconds", reference="render-42") as reservation:
            ...
            reservation.charge(80)

    *customer* is an instance of ``CUSTOMER_MODEL``, a ``Customer`` or an external id;
    *amount* a positive whole number of credits; *unit* one that ``UNITS`` declares,
    ``DEFAULT_UNIT`` by default; *reference* names the work for people; *ttl_seconds* (1
    to 86400, default ``RESERVATION_TTL``) is how long the credits are held at most. An
    *idempotency_key* (up to 200 visible ASCII characters, unique for the customer) runs
    the work once: after a success it is refused, after a refusal or a failure it may be
    tried again. *overage* (``"charge"`` or ``"cap"``, default ``OVERAGE``) is what
    becomes of a ``charge`` above the hold. In ``async`` code it is ``async with``, and
    the same. *on_unavailable* and *enforcement* stand above the settings of these
    names.

    An exception from the block releases the credits and goes on. Entering
    raises ``MeterlyInsufficientCreditsError``, ``MeterlyUnavailableError`` when
    the ledger cannot be asked, ``MeterlyDuplicateError`` when the key was used,
    ``MeterlyIdempotencyMismatchError`` when it was for another unit or amount,
    and ``MeterlyUsageError`` inside an open transaction and, for a plain ``with``, in
    a running event loop. With *durable* false
    the reservation lives and dies with that transaction instead. Arguments out
    of bounds are a ``ValueError`` before anything is written or sent.
    """
    if isinstance(customer, int) and not isinstance(amount, int):
        raise TypeError(
            f"customer is {shown(customer)} and amount is {shown(amount)}, the wrong "
            "way round."
        )
    check_price(unit, amount)
    return prepare(
        customer,
        amount,
        unit,
        reference=reference,
        idempotency_key=idempotency_key,
        ttl_seconds=ttl_seconds,
        durable=durable,
        overage=overage,
        on_unavailable=on_unavailable,
        enforcement=enforcement,
    )


def prepare(
    customer: Any,
    amount: int,
    unit: str | None,
    *,
    reference: str | None = None,
    idempotency_key: str | None = None,
    ttl_seconds: int | None = None,
    durable: bool = True,
    overage: str | None = None,
    on_unavailable: str | None = None,
    enforcement: str | None = None,
) -> Guard:
    """Return the guard that ``guard()`` describes; for the edges.

    An *amount* of 0 holds nothing: the work is free.
    """
    unit = units.check_declared(unit) if unit else units.default()
    if unit is None:
        raise ImproperlyConfigured(
            'Name a unit: guard(user, 25, "image_credits"), or set '
            "METERLY['DEFAULT_UNIT']."
        )
    for name, policy in (
        ("overage", overage),
        ("on_unavailable", on_unavailable),
        ("enforcement", enforcement),
    ):
        if policy is not None:
            check_choice(name, policy)
    invalid = None
    if idempotency_key is not None:
        try:
            check_key(idempotency_key, length=MAX_CALLER_KEY_LENGTH)
        except ValueError as exc:
            invalid = MeterlyInvalidKeyError(str(exc))
            if (enforcement or meterly_settings.ENFORCEMENT) == "enforce":
                raise invalid from None
    return Guard(
        customer,
        check_amount(amount, minimum=0),
        unit,
        reference=check_text(reference or f"guard:{uuid.uuid4()}", "reference"),
        idempotency_key=idempotency_key,
        ttl_seconds=check_ttl(
            meterly_settings.RESERVATION_TTL if ttl_seconds is None else ttl_seconds
        ),
        durable=durable,
        overage=overage,
        on_unavailable=on_unavailable,
        enforcement=enforcement,
        invalid=invalid,
    )


_ASYNC_WITH = "async with guard(...) as reservation: ..."
_refuse_in_event_loop: Callable[[], None] = async_unsafe(
    "A plain with would block the event loop that is running. In async code, write "
    + _ASYNC_WITH
)(lambda: None)
