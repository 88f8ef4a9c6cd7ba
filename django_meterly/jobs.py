"""A job under its guard: claiming it, its heartbeat, and who may settle it.

What of it is Celery's is in ``tasks``.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING, Any

from . import guards, handoffs, journal
from .client import get_client
from .conf import meterly_settings
from .errors import MeterlyIdempotencyMismatchError, MeterlyUsageError
from .models import Customer, Reservation
from .wire import MAX_CALLER_KEY_LENGTH, MAX_TTL_SECONDS, check_key

if TYPE_CHECKING:
    from .guards import Guard
    from .heart import Heart
    from .options import GuardOptions


class Job:
    """One run of a guarded task.

    *name* and *task_id* are what its key is made of; a task that was called as a
    plain function has no id, and every call is for itself. *header* is that of the
    message, if it says that a reservation was handed off.
    """

    def __init__(
        self,
        name: str,
        task_id: str | None,
        *,
        request_id: str | None = None,
        header: Any = None,
        outer: Job | None = None,
    ) -> None:
        self.name = name
        self.task_id = task_id
        self.request_id = request_id
        self.outer = outer
        self.guard: Guard | None = None
        self.kept = False
        self._header = header
        self._heart: Heart | None = None

    @property
    def key(self) -> str | None:
        """The idempotency key: one task id, one charge."""
        if self.task_id is None:
            return None
        key = f"task:{self.name}:{self.task_id}"
        try:
            return check_key(key, length=MAX_CALLER_KEY_LENGTH)
        except ValueError:
            # Ids may be anybody's own.
            return f"task:{hashlib.sha256(key.encode()).hexdigest()}"

    def begin(self, options: GuardOptions, args: Any, kwargs: Any) -> None:
        """Claim what was offered or abandoned, or else reserve.

        Raises ``MeterlyDuplicateError`` when another copy of this job is at work or
        has been, ``MeterlyUsageError`` for a hand-off that is forged, and what
        ``journal.reserve`` raises.
        """
        if self._header is None:
            customer, guard = self._guard(options, args, kwargs)
        else:
            # Not as if it were not there: the customer would hold credits twice.
            handed_off = handoffs.read(self._header, self.name, self.request_id)
            if handed_off in handoffs.NO_HOLD:
                # Nobody is charged for what handed it off: not for this, either.
                self.guard = guards.Guard(
                    None,
                    0 if handed_off == handoffs.FREE else 1,
                    options.unit or handoffs.UNCHARGED,
                    reference=f"{self.name}:{uuid.uuid4()}",
                    idempotency_key=None,
                    ttl_seconds=meterly_settings.RESERVATION_TTL,
                    overage=options.overage,
                    enforcement="off",
                )
                self.guard.reserve()
                return
            customer, guard = self._guard_handed_off(options, handed_off)
        # Whoever beats needs no longer lease than that of a beat.
        guard.lease = 0
        self.guard = guard
        row = None
        key = None if guard.enforcement == "off" else guard.idempotency_key
        if customer is not None and key is not None:
            client = get_client()
            journal.refuse_open_transaction(client)
            row = journal.claim(client, customer, key)
        if row is None:
            try:
                guard.reserve()
            except MeterlyIdempotencyMismatchError as exc:
                # The amount is another one by now, but the job is the same.
                if customer is None or key is None:
                    raise
                raise (journal.in_the_way(customer, key) or exc) from exc
        else:
            guard.adopt(row)
        self._heart = guard.start_heart()

    def _guard(
        self, options: GuardOptions, args: Any, kwargs: Any
    ) -> tuple[Customer | None, Guard]:
        payer = options.ask("customer", *args, **kwargs)
        enforcement = options.enforcement or meterly_settings.ENFORCEMENT
        if payer is None and enforcement == "enforce":
            raise MeterlyUsageError(
                f"Nobody is known to pay for {self.name}: give it customer=, a "
                "function of its arguments, or let a view hand it off."
            )

        customer = None if payer is None else Customer.objects.resolve(payer)
        guard = guards.prepare(
            customer,
            options.ask("amount", *args, **kwargs),
            options.unit,
            reference=options.ask("reference", *args, **kwargs)
            or (self.key or f"{self.name}:{uuid.uuid4()}").removeprefix("task:"),
            idempotency_key=self.key,
            ttl_seconds=options.ttl_seconds,
            overage=options.overage,
            on_unavailable=options.on_unavailable,
            enforcement=enforcement,
        )
        guard.name = self.name
        return customer, guard

    def _guard_handed_off(
        self, options: GuardOptions, reservation_id: str
    ) -> tuple[Customer, Guard]:
        """Return a guard like the one that has handed this job off."""
        row = (
            Reservation.objects.using(journal.alias())
            .select_related("customer")
            .filter(pk=reservation_id)
            .first()
        )
        if row is None:
            raise MeterlyUsageError(
                f"{self.name} was handed off with the reservation {reservation_id}, "
                "which is not in the journal."
            )
        # Not by prepare(): the row goes on, also if its unit is not in UNITS any more.
        guard = guards.Guard(
            row.customer,
            row.amount,
            row.unit,
            reference=row.reference,
            idempotency_key=row.key,
            ttl_seconds=row.ttl_seconds,
            overage=options.overage,
            on_unavailable=options.on_unavailable,
            enforcement=options.enforcement,
        )
        guard.name = row.name
        return row.customer, guard

    def keep(self, delay: float) -> None:
        """Keep the credits for the job's own retry, *delay* seconds from now."""
        guard = self.guard
        if guard is None or guard.reservation is None or self.kept:
            return
        self._stop()
        held = int(delay) + 1 + guard.ttl_seconds
        if held > MAX_TTL_SECONDS:
            # No hold lasts that long: the retry reserves anew.
            guard.fail()
            return
        self.kept = guard.offer(held + meterly_settings.LEASE_GRACE)
        if self.kept and delay:
            journal.extend(get_client(), guard.reservation, f"{guard.fence}", held)

    def succeed(self) -> None:
        """Settle, unless the credits are kept for the job's retry."""
        self._stop()
        if self.guard is not None and not self.kept:
            self.guard.succeed()

    def fail(self) -> None:
        """Release, unless the job's retry has claimed the credits kept for it."""
        self._stop()
        if self.guard is not None:
            self.guard.abandon()

    @property
    def superseded(self) -> bool:
        """Whether another copy has claimed the job, and decides."""
        # Its own retry may have, too; and in shadow every copy counts.
        guard = self.guard
        if guard is None or self.kept or guard.enforcement == "shadow":
            return False
        return guard.superseded

    def _stop(self) -> None:
        if self._heart is not None:
            self._heart.stop()
            # For the beat that is under way; but not for long.
            self._heart.join(journal.SETTLE_TIMEOUT)
