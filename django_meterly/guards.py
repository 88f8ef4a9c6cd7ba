"""``guard()`` and ``Guard``: what users hold. ``lifecycle`` does the work."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from django.core.exceptions import SynchronousOnlyOperation
from django.utils.asyncio import async_unsafe

from .errors import MeterlyUsageError
from .handoffs import Message
from .lifecycle import Lifecycle, prepare, to_the_end
from .options import shows
from .policies import Policies, PolicyKeywords, check_price
from .wire import check_amount, shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .models import Reservation

__all__ = ["Guard", "guard"]

logger = logging.getLogger(__name__)


class Guard:
    """One guarded piece of work: what ``guard()`` returns and ``request.meterly`` is.

    *amount* credits of *unit* are held while the work runs. The work may call
    ``charge`` to be charged for what it used, or ``release`` to be free. For example::

        request.meterly.charge(80)
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        #: What the edges call, in order; not for the work itself.
        self.lifecycle = lifecycle

    def __repr__(self) -> str:
        state = self.reservation.state if self.reservation else "not reserved"
        return f"<Guard {self.reference}: {self.amount} {self.unit}, {state}>"

    @property
    def amount(self) -> int:
        """How many credits are held, and charged unless ``charge`` says otherwise."""
        return self.lifecycle.amount

    @property
    def unit(self) -> str:
        """The credit unit: ``"image_credits"``, for example."""
        return self.lifecycle.unit

    @property
    def reference(self) -> str:
        """The name of the work, for people."""
        return self.lifecycle.reference

    @property
    def reservation(self) -> Reservation | None:
        """The journal's row of this work, or ``None`` where nothing is held."""
        return self.lifecycle.reservation

    @property
    def fence(self) -> int:
        """A fencing token: a later claim of the same work has a higher one.

        Pass it to other systems so that they can reject writes of a worker that has
        been superseded.
        """
        return self.lifecycle.fence

    @property
    def available(self) -> int:
        """The credits that were left for other work when these were reserved."""
        balance = self.lifecycle.balance
        return balance.available if balance else 0

    @property
    def superseded(self) -> bool:
        """Whether another worker has taken over; then this one charges nothing."""
        return self.lifecycle.superseded

    def charge(self, amount: int) -> None:
        """Charge *amount* on success, instead of the amount held.

        If *amount* is below the hold, the remainder is returned; 0 is free. If it is
        above, the policy ``overage`` decides: ``"charge"`` charges it all, ``"cap"``
        charges the hold. The last call counts. For example, after ``charge(80)`` a hold
        of 100 credits costs 80. Raises

        - ``ValueError`` unless *amount* is a whole number from 0,
        - ``MeterlyUsageError`` before the work has begun and once it has ended,
        - ``MeterlyUsageError`` if nothing is held (the guard's amount was 0) and
          *amount* is above 0, unless ``overage`` is ``"cap"``.
        """
        charge = check_amount(amount, minimum=0)
        self._refuse_unless_at_work("charge", "80")
        overage = self.lifecycle.policies.value("overage")
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
        self.lifecycle.charge = charge

    def release(self) -> None:
        """Let the work be free, even if it succeeds.

        Raises ``MeterlyUsageError`` before the work has begun and once it has ended.
        """
        self._refuse_unless_at_work("release")
        self.lifecycle.charge = None

    def hand_off(self, task: Any, /, *args: Any, **kwargs: Any) -> str:
        """Let a ``meterly_task`` finish the work and settle; return the task's id.

        For example, ``request.meterly.hand_off(render_video, job.pk)``. *task* is the
        task, or a signature with options (``task.s().set(queue="gpu")``); *args* and
        *kwargs* are the task's. The message carries the reservation's id. It is sent
        when this work has succeeded and is committed. If the work fails, nothing is
        sent and the credits are released. If the message cannot be sent, the credits
        are released, and the end of the work raises ``MeterlyUnavailableError``.

        Raises ``TypeError`` for a task that is not guarded, or for arguments that it
        does not take. Raises ``MeterlyUsageError`` before the work has begun, once it
        has ended, and once it was handed off.
        """
        self._refuse_unless_at_work("hand_off", "task, ...")
        message = self.lifecycle.message = Message(task, args, kwargs)
        return message.task_id

    def _refuse_unless_at_work(self, verb: str, arguments: str = "") -> None:
        if not self.lifecycle.has_begun:
            raise MeterlyUsageError(
                f"{verb}() came too early: no credits are held yet. Call it in the "
                "block: with guard(...) as reservation: "
                f"reservation.{verb}({arguments})"
            )
        if self.lifecycle.has_ended:
            raise MeterlyUsageError(
                f"{verb}() came too late: the work has ended, and what it costs is "
                "decided. Call it while the work is running."
            )
        if self.lifecycle.is_handed_off:
            raise MeterlyUsageError(
                f"{verb}() came too late: the work was handed off; the task decides."
            )

    def __enter__(self) -> Guard:
        try:
            _refuse_in_event_loop()
        except SynchronousOnlyOperation as exc:
            raise MeterlyUsageError(str(exc)) from None
        self.lifecycle.reserve()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.lifecycle.succeed()
        else:
            self.lifecycle.fail()

    async def __aenter__(self) -> Guard:
        try:
            await to_the_end(self.lifecycle.reserve)
        except asyncio.CancelledError:
            await to_the_end(self.lifecycle.cancel)
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


@shows('with guard(user, 25, "image_credits"): ...', PolicyKeywords)
def guard(
    customer: Any,
    amount: int,
    unit: str | None = None,
    *,
    reference: str | None = None,
    idempotency_key: str | None = None,
    durable: bool = True,
    **policies: Unpack[PolicyKeywords],
) -> Guard:
    """Hold credits while a block of code runs; charge them if it succeeds.

    Use it as a context manager; in ``async`` code it is ``async with``::

        with guard(user, 100, "gpu_seconds", reference="render-42") as reservation:
            ...
            reservation.charge(80)

    *customer* is an instance of ``CUSTOMER_MODEL``, a ``Customer`` or an external id.
    *amount* is a positive whole number of credits. ``UNITS`` declares the *unit*;
    ``DEFAULT_UNIT`` is the default. *reference* names the work for people. ``Policies``
    explains the other options.

    An *idempotency_key* (up to 200 visible ASCII characters) runs a customer's work
    once: it is refused after a success, and may be tried again after a refusal or a
    failure. If *durable* is false, the reservation is part of an open transaction.

    An exception from the block releases the credits and is raised again. Entering the
    block raises

    - ``MeterlyInsufficientCreditsError`` if there are too few credits,
    - ``MeterlyUnavailableError`` if the ledger cannot be asked,
    - ``MeterlyDuplicateError`` if the key was used,
    - ``MeterlyIdempotencyMismatchError`` if it was used for another unit or amount,
    - ``MeterlyUsageError`` inside an open transaction (unless *durable* is false), and
      for a plain ``with`` in a running event loop.

    Invalid arguments raise ``ValueError`` before anything is written or sent.
    """
    if isinstance(customer, int) and not isinstance(amount, int):
        raise TypeError(
            f"customer is {shown(customer)} and amount is {shown(amount)}, the wrong "
            "way round."
        )
    check_price(unit, amount)
    return Guard(
        prepare(
            customer,
            amount,
            unit,
            Policies(**policies),
            reference=reference,
            idempotency_key=idempotency_key,
            durable=durable,
        )
    )


_ASYNC_WITH = "async with guard(...) as reservation: ..."
_refuse_in_event_loop: Callable[[], None] = async_unsafe(
    "A plain with would block the event loop that is running. In async code, write "
    + _ASYNC_WITH
)(lambda: None)
