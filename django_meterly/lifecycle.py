"""The lifecycle of guarded work: what the edges call, in this order.

::

    for_request()  prepare()     who pays, how much, under which policies
          |
    reserve()                    -> journal.reserve: the credits are held
      or resume()                -> journal.claim: a task goes on with its own hold
          |
    start_heart()                beside long work: -> journal.beat
          |
    decide()                     in the work's transaction: -> journal.record_success
      or presume()               before the response is rendered: -> journal.presume
          |
    succeed() fail() cancel()    -> journal.record_success, record_failure, settle
      or offer()                 -> journal.offer: a task keeps its hold for its retry

For example, a view without ``ATOMIC_REQUESTS`` is reserve, then succeed or fail; with
it, reserve, decide, succeed. Users hold a ``Guard``, which has one of these.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections, transaction
from django.utils.functional import cached_property

from . import db, journal, signals, units
from .client import get_client
from .conf import meterly_settings
from .errors import (
    MeterlyError,
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidKeyError,
    MeterlyUnavailableError,
    MeterlyUsageError,
)
from .heart import Heart
from .resolvers import payer_of, somebody
from .transports.base import JoinedTransport
from .views.keys import requested_key
from .wire import MAX_CALLER_KEY_LENGTH, check_amount, check_key, check_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.dispatch import Signal
    from django.http import HttpRequest

    from .client import MeterlyClient
    from .handoffs import Message
    from .models import Customer, Reservation
    from .policies import Policies, ViewOptions
    from .types import Balance

logger = logging.getLogger(__name__)
T = TypeVar("T")


def for_request(
    options: ViewOptions, name: str, request: HttpRequest, *args: Any, **kwargs: Any
) -> Lifecycle | None:
    """Return the lifecycle of one request, or ``None`` if nobody is known to pay.

    *name* is the view's, for people; *args* and *kwargs* are the view's arguments. The
    *options* that are functions are asked. Call it from sync code.
    """
    enforcement = options.value("enforcement")
    payer = key = None
    # Off, nobody pays, and so nobody is looked for.
    if enforcement != "off":
        payer = (
            somebody(options.ask("customer", request, *args, **kwargs))
            if options.customer
            else payer_of(request)
        )
        if payer is None and enforcement == "enforce":
            return None
        key = (
            options.ask("idempotency_key", request, *args, **kwargs)
            if options.idempotency_key
            else requested_key(request)
        )
    return prepare(
        payer,
        options.ask("amount", request, *args, **kwargs),
        options.unit,
        options,
        reference=options.ask("reference", request, *args, **kwargs)
        or f"{name}:{uuid.uuid4()}",
        idempotency_key=key,
    )


def prepare(
    payer: Any,
    amount: int,
    unit: str | None,
    policies: Policies,
    *,
    reference: str | None = None,
    idempotency_key: str | None = None,
    durable: bool = True,
    name: str = "",
) -> Lifecycle:
    """Return the lifecycle that ``guard()`` describes, its arguments checked.

    An *amount* of 0 holds nothing: the work is free.
    """
    unit = units.check_declared(unit) if unit else units.default()
    if unit is None:
        raise ImproperlyConfigured(
            'Name a unit: guard(user, 25, "image_credits"), or set '
            "METERLY['DEFAULT_UNIT']."
        )
    lifecycle = Lifecycle(
        payer,
        check_amount(amount, minimum=0),
        unit,
        policies,
        reference=check_text(reference or f"guard:{uuid.uuid4()}", "reference"),
        idempotency_key=idempotency_key,
        durable=durable,
        name=name,
    )
    if lifecycle.enforcement == "enforce":
        lifecycle.check_key()
    return lifecycle


class Lifecycle:
    """One guarded piece of work, from its reservation to its settlement."""

    def __init__(
        self,
        payer: Any,
        amount: int,
        unit: str,
        policies: Policies,
        *,
        reference: str,
        idempotency_key: str | None,
        durable: bool = True,
        name: str = "",
    ) -> None:
        self.payer = payer
        self.amount = amount
        self.unit = unit
        self.policies = policies
        self.reference = reference
        self.idempotency_key = idempotency_key
        self.durable = durable
        #: The name of the view or the task, for the journal.
        self.name = name
        self.ttl_seconds: int = policies.value("ttl_seconds")
        self.enforcement: str = policies.value("enforcement")
        self.reservation: Reservation | None = None
        self.fence = 0
        self.balance: Balance | None = None
        #: How much a success costs; ``None`` releases the hold.
        self.charge: int | None = amount
        #: The message that is sent when the work has succeeded: then a task decides.
        self.message: Message | None = None
        self._uncharged = False
        self._reserved_at = 0.0
        self._decided = False
        self._presumed = False
        self._concluded = False
        self._delivered = False

    @cached_property
    def _client(self) -> MeterlyClient:
        # Not before it is needed: enforcement "off" works without an API key.
        return get_client()

    @property
    def has_begun(self) -> bool:
        """Whether ``reserve`` or ``resume`` has let the work run."""
        return self.reservation is not None or self._uncharged

    @property
    def has_ended(self) -> bool:
        """Whether it is decided what the work costs."""
        return self._decided or self._concluded

    def check_key(self) -> None:
        """Raise ``MeterlyInvalidKeyError`` for an idempotency key that is invalid."""
        if self.idempotency_key is not None:
            try:
                check_key(self.idempotency_key, length=MAX_CALLER_KEY_LENGTH)
            except ValueError as exc:
                raise MeterlyInvalidKeyError(str(exc)) from None

    # Beginning

    def reserve(self, *, lease: float | None = None) -> None:
        """Hold the credits, as ``enforcement`` says.

        *lease* is how many seconds the work may take without a heartbeat; by default,
        as long as the hold. Raises what ``journal.reserve`` raises; in shadow,
        ``MeterlyUsageError`` only.
        """
        if self.has_begun:
            raise MeterlyUsageError(
                "A guard guards one piece of work. Call guard() again for the next."
            )
        if self.enforcement == "off":
            self._uncharged = True
            return
        payer = journal.Payer(self.payer)
        try:
            if self.durable:
                with db.serving():
                    journal.refuse_open_transaction(self._client)
            if self.enforcement == "shadow":
                self._refuse_in_shadow()
            with db.serving():
                if self.amount:
                    self._reserve(payer, lease)
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

    def resume(self) -> None:
        """Claim the hold of the same key if it was offered or abandoned, or reserve.

        For work with a heartbeat, which needs no longer lease than that of a beat.
        Raises ``MeterlyDuplicateError`` if another copy is or was at work.
        """
        customer, key = self.payer, self.idempotency_key
        if self.enforcement == "off" or customer is None or key is None:
            self.reserve(lease=0)
            return
        journal.refuse_open_transaction(self._client)
        row = journal.claim(self._client, customer, key)
        if row is not None:
            self.reservation, self.fence = row, row.fence
            return
        try:
            self.reserve(lease=0)
        except MeterlyIdempotencyMismatchError as exc:
            # The amount has changed meanwhile, but the work is the same.
            raise (journal.in_the_way(customer, key) or exc) from exc

    def _refuse_in_shadow(self) -> None:
        """Raise what ``prepare`` and the edges raise where guards are enforced."""
        self.check_key()
        if self.payer is None:
            raise MeterlyError("Nobody is known to pay for this.")

    def _reserve(self, payer: journal.Payer, lease: float | None) -> None:
        self._reserved_at = time.monotonic()
        self.reservation, self.balance = journal.reserve(
            self._client,
            payer,
            self.amount,
            self.unit,
            reference=self.reference,
            key=self.idempotency_key,
            ttl_seconds=self.ttl_seconds,
            name=self.name,
            on_unavailable=self.policies.value("on_unavailable"),
            lease=lease,
        )
        self.fence = self.reservation.fence

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
        # Receivers know the class that users hold, and it imports this module.
        from .guards import Guard

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

    # At work

    def start_heart(self, *, at_once: bool = False) -> Heart | None:
        """Renew lease and hold from now on, beside the work.

        Return ``None`` without a hold to renew. In a test's transaction no heart beats,
        because no other connection sees the row.
        """
        row = self.reservation
        in_test = connections[journal.alias()].in_atomic_block
        if row is None or row.state != row.State.RESERVED or in_test:
            return None
        heart = Heart(row, self.fence, at_once=at_once)
        heart.start()
        return heart

    @property
    def superseded(self) -> bool:
        """Whether somebody else has taken the work up, and this copy decides nothing.

        Either they have claimed this reservation, or they have made the next attempt.
        """
        row = self.reservation
        if row is None or self.is_handed_off:
            return False
        return row.fence != self.fence or (
            # The lease has lapsed, not: the work has failed and is tried again.
            row.lapsed and row.charge is None and journal.is_tried_again(row)
        )

    @property
    def is_handed_off(self) -> bool:
        """Whether a task will finish the work, and decides."""
        return self.message is not None

    # Deciding in the work's transaction

    def decide(self) -> None:
        """Record success in the work's transaction, which is open.

        If the ledger is in the same database, the credits move in this transaction,
        too. So work and charge are committed together or not at all. This is done only
        at READ COMMITTED: at a higher isolation level, a busy account would fail the
        work with a serialization error.
        """
        self._decided = True
        if self._uncharged:
            return
        using = journal.alias()
        transport = self._client.transport
        joins = not self.is_handed_off and transport.joins(using)
        if (
            joins
            and journal.carries_statements(self._client, using)
            and self._decide_in_one_statement()
        ):
            return
        settles = joins and db.reads_committed(using)
        if self._record(succeeded=True) and settles:
            self._settle_now()

    def presume(self) -> None:
        """Record that the work has returned well, before its response is rendered.

        If neither ``succeed`` nor ``cancel`` follows before the lease ends, the sweeper
        charges. The lease ends before the hold does, so that the hold can be
        committed. The record is part of an open transaction, or a statement by itself.
        """
        if self._uncharged or self.charge is None:
            return
        self._presumed = True
        left = max(self._reserved_at + self.ttl_seconds - time.monotonic(), 0)
        lease = min(meterly_settings.LEASE_GRACE, left / 2)
        charge = self.charge
        db.on_live_connection(
            journal.alias(),
            lambda: journal.presume(self._row, charge, fence=self.fence, lease=lease),
        )

    # Ending

    def succeed(self) -> None:
        """Record success in a separate transaction, then settle.

        After ``decide``, only settle. If the work was handed off, send its message
        instead; raises ``MeterlyUnavailableError`` if that cannot be sent. If the
        database is down, commit at a remote ledger, and raise the database's error.
        """
        if self._decided:
            self._confirm()
            return
        try:
            self._conclude(succeeded=True)
        except Error:
            if (
                self.charge is not None
                and not self.is_handed_off
                and not isinstance(self._client.transport, JoinedTransport)
            ):
                journal.commit_unrecorded(self._client, self._row, self.charge)
            raise
        self._deliver()

    def fail(self) -> None:
        """Record failure, then settle.

        If the work was presumed done, the row decides: after an exception from a
        COMMIT, only the row knows whether the work was done. Nothing is raised, so that
        the caller sees the work's exception.
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
        """Record failure although the work has returned.

        For example, its response was never sent, or rendering it raised. If nothing was
        reserved, or the work has ended already, nothing happens.
        """
        if self.reservation is not None and not self._concluded:
            self._presumed = False
            self.fail()

    def offer(self, lease: float) -> bool:
        """Offer the work to somebody else, for *lease* seconds.

        Until they have claimed it, it can still be failed here.
        """
        if not journal.offer(self._row, fence=self.fence, lease=lease):
            return False
        self.fence = self._row.fence
        return True

    @property
    def _row(self) -> Reservation:
        if self.reservation is None:
            raise MeterlyUsageError("This guard has not reserved anything yet.")
        return self.reservation

    def _is_presumed(self) -> bool:
        """Ask the row whether the record of ``presume`` was committed."""
        if not self._presumed:
            return False
        using = journal.alias()
        db.on_live_connection(using, lambda: self._row.refresh_from_db(using=using))
        return self._row.is_presumed

    def _confirm(self) -> None:
        """Settle a decision that is committed, or send what was handed off."""
        if self.is_handed_off:
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
            # A time limit or an interrupt has rolled the decision back.
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
                transaction.on_commit(self._confirm, using=using, robust=True)

    def _record(self, *, succeeded: bool) -> bool:
        if succeeded and self.is_handed_off:
            return journal.offer(self._row, fence=self.fence)
        if succeeded and self.charge is not None:
            return journal.record_success(self._row, self.charge, fence=self.fence)
        return journal.record_failure(self._row, fence=self.fence)

    def _decide_in_one_statement(self, succeeded: bool = True) -> bool:
        """Decide and settle in one statement; return whether that was all."""
        charge = self.charge if succeeded else None
        # A task settles what is handed off.
        return not self.is_handed_off and journal.decide_in_one_statement(
            self._client, self._row, charge, fence=self.fence
        )

    def _settle_now(self) -> None:
        journal.settle(self._client, self._row, timeout=journal.SETTLE_TIMEOUT)

    # Handing off

    @property
    def _is_offered(self) -> bool:
        row = self.reservation
        return (
            self.is_handed_off
            and row is not None
            and row.state == row.State.RESERVED
            and row.fence == self.fence + 1
        )

    def _deliver(self) -> None:
        """Send what was handed off, once, or give the credits back."""
        message = self.message
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
            # Given up meanwhile, or the outcome is unknown: the task would be free.
            raise MeterlyUnavailableError(
                f"{self.reference} was not handed off: its reservation is {row.state}."
            )
        try:
            message.send(row, self.amount)
        except Exception as exc:
            logger.exception("%s could not be handed off", self.reference)
            if row is not None:
                journal.record_failure(row, fence=row.fence)
                self._settle_now()
            raise MeterlyUnavailableError(
                f"The task of {self.reference} could not be sent: {exc}"
            ) from exc


async def to_the_end(function: Callable[..., T], /, *args: Any) -> T:
    """Run the sync *function* in a thread, and wait for its end in any case.

    If the caller is cancelled meanwhile, this still waits. Then it raises
    ``CancelledError``, and the result is lost. The request's other sync code runs in
    the same thread, so *function* uses the same database connections.
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
