"""F70: other people's exception handlers answer our refusals as they do DRF's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.urls import include, path
from drf_standardized_errors.handler import exception_handler as standardized
from rest_framework.exceptions import APIException, ErrorDetail
from rest_framework.response import Response
from rest_framework.test import APIClient
from rest_framework.views import APIView
from rest_framework.views import exception_handler as default

from django_meterly import errors, meterly_guard
from django_meterly.rest_framework.exceptions import counterpart
from django_meterly.rest_framework.permissions import HasCredits
from tests.books import fund
from tests.test_responses import short

if TYPE_CHECKING:
    from django.contrib.auth.models import User

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.urls("tests.rest_framework.test_foreign_handlers"),
]

#: How each refusal comes about, with its status and its code.
REFUSALS: dict[str, tuple[Any, int, str]] = {
    "short": (short(), 402, "insufficient_credits"),
    "debt": (
        errors.MeterlyDebtError(details={"required": 5, "unit": "image_credits"}),
        402,
        "debt",
    ),
    "unavailable": (errors.MeterlyUnavailableError(), 503, "unavailable"),
    "in progress": (errors.MeterlyDuplicateError(in_progress=True), 409, "duplicate"),
    "done": (errors.MeterlyDuplicateError(state="committed"), 409, "duplicate"),
    "bad key": (errors.MeterlyInvalidKeyError(), 400, "invalid_idempotency_key"),
    "mismatch": (errors.MeterlyIdempotencyMismatchError(), 422, "idempotency_mismatch"),
    "no customer": (None, 403, "no_customer"),
}


def payer(request: Any) -> Any:
    exc, _, _ = REFUSALS[request.data["refusal"]]
    if exc is not None:
        raise exc


class Poster(APIView):
    def post(self, request: Any) -> Response:
        raise AssertionError("It ran.")


class Permitted(Poster):
    permission_classes = [HasCredits]


urlpatterns = [
    path("poster/", meterly_guard("x", 1, customer=payer)(Poster.as_view())),
    path("permitted/", Permitted.as_view()),
    path("credits/", include("django_meterly.rest_framework.urls")),
]


def _walk(detail: Any) -> Any:
    """Visit a detail as DRF documents it: texts with codes, in lists and dicts."""
    if isinstance(detail, dict):
        return {key: _walk(value) for key, value in detail.items()}
    if isinstance(detail, list):
        return [_walk(each) for each in detail]
    assert isinstance(detail, ErrorDetail), repr(detail)
    return {"code": detail.code, "detail": str(detail)}


def walks(exc: Any, context: Any) -> Any:
    return Response(_walk(exc.detail), status=exc.status_code)


def texts(exc: Any, context: Any) -> Any:
    data = {"detail": f"{exc.detail}", "code": exc.detail.code, "title": str(exc)}
    return Response(data, status=exc.status_code)


def indexes(exc: Any, context: Any) -> Any:
    data = {"detail": exc.detail["detail"], "code": exc.get_codes()}
    return Response({"errors": [data]}, status=exc.status_code)


def hog(exc: Any, context: Any) -> Any:
    code = exc.get_codes()
    key = None
    while isinstance(code, (dict, list)):
        key, code = next(iter(dict(code).items()))
    assert exc.get_full_details() == {"message": exc.detail, "code": code}
    data = {"type": "invalid_request", "code": code, "detail": exc.detail, "attr": key}
    return Response(data, status=exc.status_code)


def adds(exc: Any, context: Any) -> Any:
    response = default(exc, context)
    assert response is not None
    response.data["status"] = response.status_code
    return response


def copies(exc: Any, context: Any) -> Any:
    response = default(exc, context)
    assert response is not None
    response.data = {"error": {"message": response.data["detail"]}}
    return response


def nothing(exc: Any, context: Any) -> Any:
    return None


def ask(client: APIClient, refusal: str) -> Any:
    return client.post("/poster/", {"refusal": refusal}, format="json")


@pytest.fixture
def api(user: User) -> APIClient:
    # drf-standardized-errors reports a 503, which the client would raise.
    client = APIClient(raise_request_exception=False)
    client.force_authenticate(user)
    return client


@pytest.mark.parametrize(
    "handler",
    [default, standardized, walks, texts, indexes, hog, adds, copies, nothing],
    ids=lambda handler: f"{handler.__module__}.{handler.__name__}",
)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_f70_every_handler_answers_every_refusal(
    api: APIClient, settings: Any, refusal: str, handler: Any
) -> None:
    exc, status, code = REFUSALS[refusal]
    name = f"{handler.__module__}.{handler.__name__}"
    settings.REST_FRAMEWORK = {"EXCEPTION_HANDLER": name}
    response = ask(api, refusal)
    assert response.status_code == status
    assert response["Cache-Control"] == "private, no-store"
    if handler is not copies:
        assert code in response.content.decode()
    if handler in (default, adds, nothing):
        said = response.json()
        extra = counterpart(exc).extra if exc else {}
        assert {name: said[name] for name in extra} == extra
        assert isinstance(said["detail"], str)
    if handler is standardized:
        (error,) = response.json()["errors"]
        assert (error["code"], error["attr"]) == (code, None)


@pytest.mark.parametrize(
    "refusal", [each for each in REFUSALS if each != "no customer"]
)
def test_f70_a_refusal_is_as_drfs_own_exceptions_are(refusal: str) -> None:
    exc, status, code = REFUSALS[refusal]
    answer = counterpart(exc)
    assert isinstance(answer, APIException)
    assert answer.status_code == status
    assert isinstance(answer.detail, ErrorDetail)
    assert answer.get_codes() == answer.detail.code == code
    assert answer.get_full_details() == {"message": answer.detail, "code": code}
    assert str(answer) == str(answer.detail) == answer.detail["detail"]


@pytest.mark.parametrize("url", ["/permitted/", "/credits/balances/"])
def test_f70_an_outage_beside_the_guard_is_answered_in_the_same_way(
    api: APIClient, user: User, remote: Any, settings: Any, url: str
) -> None:
    fund(user)
    settings.REST_FRAMEWORK = {"EXCEPTION_HANDLER": f"{__name__}.nothing"}
    remote.meet("get_balances", "unsent")
    method = api.post if url == "/permitted/" else api.get
    response = method(url)
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
