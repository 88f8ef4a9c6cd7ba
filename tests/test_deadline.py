"""How long a guarded view waits for a ledger that is slow, or dead."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import User

from django_meterly import journal
from django_meterly.client import get_client
from django_meterly.conf import DEFAULTS
from django_meterly.models import Customer, Reservation
from tests.transports.server import KEY, Server, answer, hang, within

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.django_db(transaction=True)

DEADLINE, SETTLE = 1.5, 1.5
#: What the view, Django and a busy machine may take on top.
SLACK = 1.0

CUSTOMER = {
    "customerId": "cus_1",
    "creditUnit": "image_credits",
    "createdAt": "2026-01-01T00:00:00Z",
}
HELD = {
    "reservationId": "res_1",
    "customerId": "cus_1",
    "unit": "image_credits",
    "amount": 25,
    "status": "reserved",
    "expiresAt": "2099-01-01T00:00:00Z",
    "balance": {
        "creditUnit": "image_credits",
        "balance": 100,
        "reserved": 25,
        "available": 75,
    },
}
EXPIRED = answer({"error": {"code": "reservation_expired"}}, "409 Conflict")


class Ledger(Server):
    """Meets each path with a number of seconds to wait, and what to say then."""

    def __init__(self) -> None:
        super().__init__(self.meet)
        self.answers: dict[str, tuple[float, bytes | None]] = {
            "/v1/customers": (0, answer(CUSTOMER)),
            "/v1/reservations": (0, answer(HELD)),
        }

    @property
    def paths(self) -> list[str]:
        return [request.split(b" ")[1].decode() for request in self.requests]

    def meet(self, connection: socket.socket) -> object:
        delay, data = self.answers.get(self.paths[-1], (0, None))
        if data is None:
            return hang(connection)
        time.sleep(delay)
        connection.sendall(data)
        return None


@pytest.fixture
def ledger(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(journal, "SETTLE_TIMEOUT", SETTLE)
    server = Ledger()
    settings.METERLY = {
        "API_KEY": KEY,
        "BASE_URL": server.url,
        "DEADLINE": DEADLINE,
    }
    yield server
    get_client().close()
    server.stop()


@pytest.fixture
def post(client: Any, any_requests: bool) -> Callable[[], Any]:
    """Ask a user's guarded view, with and without ``ATOMIC_REQUESTS``."""
    client.force_login(User.objects.create_user("alice"))
    # What is loaded with the first request is not the ledger's doing.
    client.get("/paid/")
    return lambda: client.post("/paid/", {"trace": "posted"})


def test_the_defaults_are_ten_seconds_in_all() -> None:
    assert DEFAULTS["DEADLINE"] == 8
    assert journal.SETTLE_TIMEOUT == 2


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_f06_dead_ledger_holds_a_view_for_the_deadline(
    ledger: Ledger, post: Any, known: bool
) -> None:
    ledger.answers.clear()
    if known:
        Customer.objects.resolve(User.objects.get())
        Customer.objects.update(customer_id="cus_1")
    with within(DEADLINE + SLACK):
        assert post().status_code == 503
    assert set(ledger.paths) == {"/v1/reservations" if known else "/v1/customers"}


@pytest.mark.sample(1)
def test_f06_registering_and_reserving_share_the_deadline(
    ledger: Ledger, post: Any
) -> None:
    ledger.answers["/v1/customers"] = (DEADLINE * 0.8, answer(CUSTOMER))
    del ledger.answers["/v1/reservations"]
    with within(DEADLINE + SLACK):
        assert post().status_code == 503
    assert ledger.paths[-1] == "/v1/reservations"
    assert Reservation.objects.get().state == "intent"


@pytest.mark.sample(1)
def test_f03_settlement_in_a_request_is_tried_once_and_for_its_time(
    ledger: Ledger, post: Any
) -> None:
    ledger.answers["/v1/reservations"] = (DEADLINE * 0.8, answer(HELD))
    with within(DEADLINE * 0.8 + SETTLE + SLACK):
        assert post().status_code == 200
    assert ledger.paths.count("/v1/reservations/res_1/commit") == 1
    assert Reservation.objects.get().state == "commit_pending"


@pytest.mark.parametrize("status", ["503 No", "429 No"])
def test_settlement_in_a_request_is_not_retried(
    ledger: Ledger, post: Any, status: str
) -> None:
    ledger.answers["/v1/reservations/res_1/commit"] = (0, answer({}, status))
    assert post().status_code == 200
    assert ledger.paths.count("/v1/reservations/res_1/commit") == 1
    assert Reservation.objects.get().state == "commit_pending"


@pytest.mark.sample(1)
def test_f06_all_calls_of_a_settlement_share_its_time(
    ledger: Ledger, post: Any
) -> None:
    ledger.answers["/v1/reservations/res_1/commit"] = (SETTLE * 0.8, EXPIRED)
    with within(SETTLE + SLACK):
        assert post().status_code == 200
    assert ledger.paths[-1] == "/v1/customers/cus_1/credits/use"
    assert Reservation.objects.get().state == "commit_pending"


def test_f01_reserve_that_is_being_served_leaves_the_row_to_be_swept(
    ledger: Ledger, post: Any
) -> None:
    body = {"error": {"code": "idempotency_in_progress"}}
    ledger.answers["/v1/reservations"] = (0, answer(body, "409 Conflict"))
    assert post().status_code == 503
    assert Reservation.objects.get().state == "intent"


def test_f06_sweeper_has_the_whole_deadline_and_every_attempt(
    ledger: Ledger, post: Any
) -> None:
    ledger.answers["/v1/reservations/res_1/commit"] = (0, answer({}, "503 No"))
    post()
    Reservation.objects.update(next_attempt_at="2000-01-01T00:00:00Z")
    ledger.requests.clear()
    journal.settle_due(get_client())
    assert ledger.paths == ["/v1/reservations/res_1/commit"] * DEFAULTS["MAX_ATTEMPTS"]
