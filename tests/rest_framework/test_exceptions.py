"""The guard's refusals in DRF's format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rest_framework.views import exception_handler as default

from django_meterly import MeterlyDuplicateError, MeterlyUnavailableError, errors
from django_meterly.rest_framework.exceptions import counterpart, exception_handler
from django_meterly.views.responses import RENDERED

if TYPE_CHECKING:
    from django_meterly.errors import MeterlyError


@pytest.mark.parametrize(
    ("exc", "status", "code", "retry_after"),
    [
        (MeterlyUnavailableError(retry_after=7), 503, "unavailable", "7"),
        (MeterlyDuplicateError(in_progress=True), 409, "duplicate", "5"),
        (MeterlyDuplicateError(state="committed"), 409, "duplicate", None),
        (errors.MeterlyInvalidKeyError(), 400, "invalid_idempotency_key", None),
        (errors.MeterlyIdempotencyMismatchError(), 422, "idempotency_mismatch", None),
        (errors.MeterlyInsufficientCreditsError(), 402, "insufficient_credits", None),
    ],
)
def test_a_refusal_keeps_its_status_and_code(
    exc: MeterlyError, status: int, code: str, retry_after: str | None
) -> None:
    response = exception_handler(exc, {})
    assert response is not None
    assert (response.status_code, response.data["code"]) == (status, code)
    assert response.headers.get("Retry-After") == retry_after
    answer = counterpart(exc)
    assert str(answer) == response.data["detail"] != ""
    assert answer.get_codes() == code
    assert answer.get_full_details()["message"] == str(answer)


def test_everything_the_guard_raises_has_a_counterpart() -> None:
    assert {type(counterpart(cls())) for cls in RENDERED}


def test_other_exceptions_are_left_to_drf() -> None:
    assert exception_handler(LookupError(), {}) is default(LookupError(), {}) is None
    with pytest.raises(TypeError, match="does not raise"):
        counterpart(errors.MeterlyUsageError())
