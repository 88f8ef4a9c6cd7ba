"""The ledger's refusals: here, and only here, a code becomes an error.

``movements`` lists the codes that ``portable`` and PostgreSQL's functions answer with.
``spending`` raises what ``of_spending`` and ``of_closing`` return. The other functions
make the errors that several operations share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import (
    MeterlyIdempotencyMismatchError,
    MeterlyInsufficientCreditsError,
    MeterlyInvalidRequestError,
    MeterlyNotFoundError,
    MeterlyReservationCommittedError,
    MeterlyReservationExpiredError,
    MeterlyReservationReleasedError,
)
from .models import Hold

if TYPE_CHECKING:
    from ..errors import MeterlyApiError
    from .movements import Closed, Closing, Spending, Spent

_CLOSED: dict[str, type[MeterlyApiError]] = {
    Hold.Status.COMMITTED: MeterlyReservationCommittedError,
    Hold.Status.RELEASED: MeterlyReservationReleasedError,
}


def of_spending(spending: Spending, answer: Spent) -> MeterlyApiError | None:
    """Return the error that the answer's code stands for, ``None`` for a success."""
    match answer.code:
        case "mismatch":
            return MeterlyIdempotencyMismatchError()
        case "invalid":
            return invalid("amount", "The amount must be at least 1.")
        case "not_found":
            return no_customer(answer.customer_id or spending.customer_id)
        case "insufficient" | "due":
            return _insufficient(spending.amount, answer)
    return None


def of_closing(closing: Closing, answer: Closed) -> MeterlyApiError | None:
    """Return the error that the answer's code stands for, ``None`` for a success."""
    match answer.code:
        case "mismatch":
            return MeterlyIdempotencyMismatchError()
        case "invalid":
            return invalid("amount", "The charge must be at least 0.")
        case "not_found":
            return no_reservation(closing.hold_id)
        case "too_much":
            return invalid("amount", f"The reservation holds {answer.amount} credits.")
        case "closed" | "due":
            return closed(answer.status)
    return None


def closed(status: str) -> MeterlyApiError:
    """Return the error for a hold that already has the final *status*."""
    return _CLOSED.get(status, MeterlyReservationExpiredError)()


def invalid(field: str, message: str) -> MeterlyInvalidRequestError:
    """Return the error for a wrong value of *field*, which has its name on the wire."""
    return MeterlyInvalidRequestError(message, details={"fields": {field: [message]}})


def no_customer(customer_id: str) -> MeterlyNotFoundError:
    return MeterlyNotFoundError(f"There is no customer {customer_id!r}.")


def no_reservation(reservation_id: str) -> MeterlyNotFoundError:
    return MeterlyNotFoundError(f"There is no reservation {reservation_id!r}.")


def _insufficient(required: int, answer: Spent) -> MeterlyInsufficientCreditsError:
    available = answer.balance - answer.reserved
    return MeterlyInsufficientCreditsError(
        f"{required} credits of {answer.unit!r} are required, {available} are "
        "available.",
        details={
            "required": required,
            "available": available,
            "reserved": answer.reserved,
            "unit": answer.unit,
        },
    )
