"""A job under its guard: its hold, its heartbeat, and which copy of it may settle.

``tasks`` connects it to Celery.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import handoffs, journal
from .client import get_client
from .conf import meterly_settings
from .errors import MeterlyUsageError
from .lifecycle import Lifecycle, prepare
from .models import Customer, Reservation
from .wire import MAX_CALLER_KEY_LENGTH, MAX_TTL_SECONDS, check_key

if TYPE_CHECKING:
    from .heart import Heart
    from .policies import TaskOptions


class Job:
    """One run of a guarded task.

    Its key is made of *name* and *task_id*. A task that was called as a plain function
    has no id, so each such call is charged separately. *header* is the signed header of
    the message if a reservation was handed off.
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
        self.lifecycle: Lifecycle | None = None
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
            # A caller may choose any text for a task's id.
            return f"task:{hashlib.sha256(key.encode()).hexdigest()}"

    def begin(self, options: TaskOptions, args: Any, kwargs: Any) -> None:
        """Claim the hold that was offered or abandoned, or else reserve.

        Raises ``MeterlyDuplicateError`` if another copy of this job is or was at work,
        ``MeterlyUsageError`` for a hand-off that is forged, and what
        ``journal.reserve`` raises.
        """
        self.lifecycle = self._prepare(options, args, kwargs)
        self.lifecycle.resume()
        self._heart = self.lifecycle.start_heart()

    def _prepare(self, options: TaskOptions, args: Any, kwargs: Any) -> Lifecycle:
        if self._header is None:
            return self._reserving(options, args, kwargs)
        # A forged header is refused. If it were ignored, the customer would hold
        # credits twice.
        handed_off = handoffs.read(self._header, self.name, self.request_id)
        if handed_off in handoffs.NO_HOLD:
            return self._uncharged(options, free=handed_off == handoffs.FREE)
        return self._handed_off(options, handed_off)

    def _reserving(self, options: TaskOptions, args: Any, kwargs: Any) -> Lifecycle:
        payer = options.ask("customer", *args, **kwargs)
        if payer is None and options.value("enforcement") == "enforce":
            raise MeterlyUsageError(
                f"Nobody is known to pay for {self.name}: give it customer=, a "
                "function of its arguments, or let a view hand it off."
            )
        return prepare(
            None if payer is None else Customer.objects.resolve(payer),
            options.ask("amount", *args, **kwargs),
            options.unit,
            options,
            reference=options.ask("reference", *args, **kwargs)
            or (self.key or f"{self.name}:{uuid.uuid4()}").removeprefix("task:"),
            idempotency_key=self.key,
            name=self.name,
        )

    def _uncharged(self, options: TaskOptions, *, free: bool) -> Lifecycle:
        """Return a lifecycle that charges nobody, because the hand-off did not."""
        return Lifecycle(
            None,
            0 if free else 1,
            options.unit or handoffs.UNCHARGED,
            replace(options, enforcement="off"),
            reference=f"{self.name}:{uuid.uuid4()}",
            idempotency_key=None,
        )

    def _handed_off(self, options: TaskOptions, reservation_id: str) -> Lifecycle:
        """Return a lifecycle like that of the work that has handed this job off."""
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
        # Without prepare(): the job goes on, even if UNITS declares its unit no longer.
        return Lifecycle(
            row.customer,
            row.amount,
            row.unit,
            replace(options, ttl_seconds=row.ttl_seconds),
            reference=row.reference,
            idempotency_key=row.key,
            name=row.name,
        )

    def keep(self, delay: float) -> None:
        """Keep the credits for the job's retry, *delay* seconds from now."""
        work = self.lifecycle
        if work is None or work.reservation is None or self.kept:
            return
        self._stop()
        held = int(delay) + 1 + work.ttl_seconds
        if held > MAX_TTL_SECONDS:
            # No hold lasts that long: the retry reserves again.
            work.fail()
            return
        self.kept = work.offer(held + meterly_settings.LEASE_GRACE)
        if self.kept and delay:
            journal.extend(get_client(), work.reservation, f"{work.fence}", held)

    def succeed(self) -> None:
        """Settle, unless the credits are kept for the job's retry."""
        self._stop()
        if self.lifecycle is not None and not self.kept:
            self.lifecycle.succeed()

    def fail(self) -> None:
        """Release, unless the job's retry has claimed the credits kept for it."""
        self._stop()
        if self.lifecycle is not None:
            self.lifecycle.cancel()

    @property
    def superseded(self) -> bool:
        """Whether another copy has claimed the job, and decides."""
        # The job's retry claims it, too. In shadow every copy counts.
        work = self.lifecycle
        if work is None or self.kept or work.enforcement == "shadow":
            return False
        return work.superseded

    def _stop(self) -> None:
        if self._heart is not None:
            self._heart.stop()
            # Wait for a beat that has begun, but not for long.
            self._heart.join(journal.SETTLE_TIMEOUT)
