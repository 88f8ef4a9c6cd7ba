"""Servers that are told to end, reload, or lose patience, with work in their hands."""

from __future__ import annotations

import contextlib
import http.client
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.books import balance, movements, states
from tests.children import dying_transport

from .serving import LEDGERS, settled, swept

if TYPE_CHECKING:
    from django_meterly.models import Customer

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]

RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]

#: The signal that lets a server finish what it has begun.
GRACEFUL = [
    ("sync-joined", signal.SIGTERM),
    ("sync-remote-atomic", signal.SIGHUP),
    ("gthread-joined-atomic", signal.SIGHUP),
    ("gthread-remote", signal.SIGTERM),
    ("uvicorn-joined", signal.SIGTERM),
    ("uvicorn-remote", signal.SIGTERM),
]


@pytest.mark.parametrize("stream", [False, True], ids=["view", "stream"])
@pytest.mark.parametrize(("name", "number"), GRACEFUL)
def test_f15_work_that_a_graceful_end_waits_for_is_charged(
    own_site: Any, customer: Customer, name: str, number: int, stream: bool
) -> None:
    site = own_site(name)
    asynchronous = "a" if name.startswith("uvicorn") else ""
    if stream:
        visit = site.begin("GET", f"/{asynchronous}stream/release/?hold=work")
    else:
        visit = site.begin("POST", f"/{asynchronous}paid/?hold=work")
    site.wait_for("work")
    site.signal(number)
    site.wait_until(
        lambda: any(
            word in site.said() for word in ("Shutting down", "Handling signal")
        )
    )
    site.let_go("work")
    assert visit.response().read() == (b"0\n1\n2\n" if stream else b"done")
    settled(site, "committed")
    assert movements() == COMMITTED
    if number == signal.SIGHUP:
        # The next worker serves on.
        assert site.request("POST", "/paid/")[0] == 200
        swept()
        assert balance(customer) == (50, 0)


@pytest.mark.parametrize("view", ["paid", "apaid"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sync-joined", ["--graceful-timeout=1"]),
        ("gthread-remote", ["--graceful-timeout=1"]),
        ("uvicorn-remote", ["--timeout-graceful-shutdown=1"]),
    ],
)
def test_f22_work_that_a_graceful_end_does_not_wait_for_is_released(
    own_site: Any, customer: Customer, name: str, options: list[str], view: str
) -> None:
    site = own_site(name, *options)
    site.begin("POST", f"/{view}/?hold=work")
    site.wait_for("work")
    site.signal(signal.SIGTERM)
    site.wait_until(lambda: site.process.poll() is not None)
    swept()
    assert states() == ["released"]
    assert movements() == RELEASED


@pytest.mark.slow("a worker that gunicorn ends for its time")
def test_f23_a_worker_that_gunicorn_ends_for_its_time_releases_by_itself(
    own_site: Any, customer: Customer
) -> None:
    site = own_site("sync-joined", "--timeout=1")
    visit = site.begin("POST", "/paid/?hold=work")
    site.wait_for("work")
    # SIGABRT, which gunicorn turns into SystemExit in the middle of the work.
    settled(site, "released")
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        assert visit.response().status == 500
    assert movements() == RELEASED
    assert site.request("POST", "/paid/")[0] == 200
    assert states() == ["released", "committed"]


def test_f15_a_worker_that_gunicorn_kills_within_the_release_is_swept(
    own_site: Any, customer: Customer
) -> None:
    site = own_site(
        "sync-remote",
        "--timeout=1",
        env={"HANG_AT": "before:release_reservation"},
        TRANSPORT=dying_transport(LEDGERS["remote"]),
    )
    site.begin("POST", "/paid/?hold=work")
    site.wait_for("work")
    # SIGABRT comes first, and the release that it leads to takes too long.
    site.wait_until(lambda: "SIGKILL" in site.said())
    assert states() == ["release_pending"]
    assert balance(customer) == (100, 25)
    swept()
    assert states() == ["released"]
    assert movements() == RELEASED
