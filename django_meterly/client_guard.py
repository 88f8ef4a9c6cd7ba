"""``MeterlyClient.guard``: reserve, run, then commit or release, without a journal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from asgiref.sync import sync_to_async

from .errors import (
    OUTAGE,
    MeterlyDuplicateError,
    MeterlyError,
    MeterlyUnknownOutcomeError,
    MeterlyUsageError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from .client import MeterlyClient
    from .types import ReservationResult

T = TypeVar("T")
R = TypeVar("R")

#: How many attempts ``guard`` makes with a key whose attempts have all failed.
MOST_ATTEMPTS = 100


class ClientGuard(Generic[T]):
    """A hold around one piece of work: what ``guard`` and ``aguard`` return."""

    #: The result of a callback.
    result: T | None = None

    def __init__(
        self,
        client: MeterlyClient,
        reserve: Callable[..., ReservationResult],
        key: str,
        *,
        is_random: bool,
    ) -> None:
        self._client = client
        #: Called with the key of each attempt.
        self._reserve = reserve
        self._key = key
        self._is_random = is_random
        self._reservation_id = ""
        #: The present attempt's key on the wire.
        self._attempt = ""

    def __enter__(self) -> ReservationResult:
        if self._attempt:
            raise MeterlyUsageError(
                "A guard guards one piece of work. Call guard() again for the next."
            )
        for number in range(1, MOST_ATTEMPTS + 1):
            self._attempt = self._key if number == 1 else f"{self._key}~{number}"
            reservation = self._reserve(idempotency_key=self._attempt)
            if reservation.is_held:
                if reservation.replayed and not self._is_random:
                    # Nobody knows whose hold it is. It may even be this one's: the
                    # transport asks again if an answer was lost.
                    raise self._duplicate(reservation)
                self._reservation_id = reservation.reservation_id
                return reservation
            if reservation.status == "committed":
                raise self._duplicate(reservation)
        raise MeterlyUsageError(
            f"The idempotency key {self._key!r} was tried {MOST_ATTEMPTS} times, and "
            "each attempt has failed. Use a new key."
        )

    def _duplicate(self, reservation: ReservationResult) -> MeterlyDuplicateError:
        in_progress = reservation.is_held
        return MeterlyDuplicateError(
            f"The idempotency key {self._key!r} "
            + (
                f"is in use right now, until {reservation.expires_at} at most"
                if in_progress
                else "was used already"
            )
            + f" (reservation {reservation.status}).",
            state=reservation.status or "",
            reference=reservation.reference or "",
            in_progress=in_progress,
        )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self._release()
        else:
            # The work is done, so nothing here may release it.
            self._commit()

    async def __aenter__(self) -> ReservationResult:
        try:
            return await self._to_its_end(self.__enter__)
        except asyncio.CancelledError:
            if self._reservation_id:
                await self._to_its_end(self._release)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._to_its_end(self.__exit__, exc_type, exc, traceback)

    async def arun(self, callback: Callable[[], Awaitable[T]]) -> T:
        async with self:
            self.result = result = await callback()
        return result

    async def _to_its_end(self, function: Callable[..., R], *args: Any) -> R:
        """Run *function* in a thread; a cancellation takes effect when it is done."""
        sensitive = self._client.transport.thread_sensitive
        run = sync_to_async(function, thread_sensitive=sensitive)
        task = asyncio.ensure_future(run(*args))
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                # Unlike awaiting the task itself, this does not cancel it.
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled from (None if task.cancelled() else task.exception())
        return task.result()

    def _release(self) -> None:
        # The caller has to see the work's exception. A hold that cannot be released
        # now expires.
        try:
            self._client.release_reservation(
                self._reservation_id, idempotency_key=f"{self._attempt}:release"
            )
        except MeterlyError:
            pass

    def _commit(self) -> None:
        key = f"{self._attempt}:commit"
        try:
            self._client.commit_reservation(self._reservation_id, idempotency_key=key)
        except OUTAGE as exc:
            unknown = MeterlyUnknownOutcomeError(
                "The work is done, but whether it was charged is unknown. Commit "
                f"reservation {self._reservation_id} again with idempotency key {key}."
            )
            unknown.idempotency_key, unknown.result = key, self.result
            raise unknown from exc
