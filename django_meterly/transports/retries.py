"""How often a call is sent, and what its attempts mean together."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

from tenacity import RetryCallState, Retrying, retry_if_exception

from ..errors import (
    OUTAGE,
    MeterlyApiError,
    MeterlyAuthenticationError,
    MeterlyError,
    MeterlyForbiddenError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .connections import Exchange

    Attempt = Callable[[], dict[str, Any]]

#: The first retry waits up to BACKOFF_FIRST seconds, each further one up to twice as
#: long, and none longer than BACKOFF_MOST.
BACKOFF_FIRST, BACKOFF_MOST = 0.25, 2.0
#: A transport may make BUDGET_SIZE retries at once, and each call adds BUDGET_SHARE.
#: When everything fails, a ledger in trouble gets a tenth more requests, not three
#: times as many.
BUDGET_SIZE, BUDGET_SHARE = 10.0, 0.1


class RetryBudget:
    """The retries that a transport may still make: a bucket that calls fill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = BUDGET_SIZE

    def deposit(self) -> None:
        with self._lock:
            self._tokens = min(self._tokens + BUDGET_SHARE, BUDGET_SIZE)

    def withdraw(self) -> bool:
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


def send(
    attempt: Attempt, exchange: Exchange, attempts: int, budget: RetryBudget
) -> dict[str, Any]:
    """Return what *attempt* returns, which is called up to *attempts* times.

    If each attempt raised a ``MeterlyError``, raises the one that is true of the whole
    call. For example, an unknown outcome stays unknown if a later attempt is not sent.
    """
    budget.deposit()
    errors: list[MeterlyError] = []
    # Most calls need one attempt, and tenacity is not free.
    try:
        return attempt()
    except MeterlyError as exc:
        errors.append(exc)
    try:
        return _try_again(attempt, errors, exchange, attempts, budget)
    except MeterlyError:
        pass
    # Outside the except clause, so that its context is not the last attempt's error.
    raise _outcome(errors)


def _try_again(
    attempt: Attempt,
    errors: list[MeterlyError],
    exchange: Exchange,
    attempts: int,
    budget: RetryBudget,
) -> dict[str, Any]:
    """Call *attempt* until it was called *attempts* times, the first one included.

    Appends each error to *errors*, which has the first one, and raises the last.
    """
    first = iter(errors[:])

    def attempt_or_first() -> dict[str, Any]:
        for error in first:
            raise error
        try:
            return attempt()
        except MeterlyError as exc:
            errors.append(exc)
            raise

    def give_up(state: RetryCallState) -> bool:
        return (
            state.attempt_number >= attempts
            or state.upcoming_sleep >= exchange.seconds_left
            or not budget.withdraw()
        )

    answer: dict[str, Any] = Retrying(
        retry=retry_if_exception(_may_be_asked_again),
        wait=_wait,
        stop=give_up,
        reraise=True,
    )(attempt_or_first)
    return answer


def _may_be_asked_again(exc: BaseException) -> bool:
    return isinstance(exc, OUTAGE) and not isinstance(
        exc, MeterlyAuthenticationError | MeterlyForbiddenError
    )


def _wait(state: RetryCallState) -> float:
    """Return the seconds before the next attempt: full jitter, doubled each time."""
    most = min(BACKOFF_FIRST * 2 ** (state.attempt_number - 1), BACKOFF_MOST)
    jitter = random.uniform(0, most)  # noqa: S311
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, MeterlyApiError):
        jitter += error.details.get("retryAfter", 0)
    return jitter


def _outcome(errors: list[MeterlyError]) -> MeterlyError:
    """Return the error of the whole call, which need not be the last one.

    An answer decides. Without an answer, one attempt that may have arrived leaves the
    call unknown, whatever the later ones met. The call was not sent only if no attempt
    was.
    """
    last = errors[-1]
    if not isinstance(last, OUTAGE):
        return last
    for error in reversed(errors):
        if isinstance(error, MeterlyUnknownOutcomeError):
            if error is last:
                return last
            unknown = MeterlyUnknownOutcomeError(f"{error} Later: {last}")
            unknown.__cause__ = last
            return unknown
    for error in reversed(errors):
        if not isinstance(error, MeterlyNotSentError):
            return error
    return last
