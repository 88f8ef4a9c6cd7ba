"""What the work came to decides, under every server."""

from __future__ import annotations

import http.client
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Group
from django.db import connection

from tests.books import balance, movements, states
from tests.children import dying_transport

from .serving import LEDGERS, served, settled, swept

if TYPE_CHECKING:
    from django_meterly.models import Customer

    from .serving import Site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]

WSGI = ("sync-joined", "sync-remote-atomic", "gthread-remote", "gthread-joined-atomic")
ASGI = ("uvicorn-joined", "uvicorn-remote")
ASGI_ATOMIC = ("uvicorn-joined-atomic", "uvicorn-remote-atomic")

RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]
ENDS = [
    ("status=201", 201, True),
    ("status=404", 404, False),
    ("status=503", 503, False),
    ("raise=404", 404, False),
    ("raise=403", 403, False),
    ("raise=boom", 500, False),
    ("template=good", 200, True),
    ("template=bad", 500, False),
]

each_sync = served(*WSGI, *ASGI, *ASGI_ATOMIC)
each_async = served("gthread-joined", "gthread-remote", *ASGI)
each_atomic = served("gthread-joined-atomic", "sync-remote-atomic", *ASGI_ATOMIC)


def check_ends(site: Site, customer: Customer, view: str) -> None:
    owed = 0
    for query, status, charged in ENDS:
        assert site.request("POST", f"/{view}/?{query}")[0] == status, query
        owed += 25 * charged
        assert states()[-1] == ("committed" if charged else "released"), query
        assert balance(customer) == (100 - owed, 0), query
    swept()
    assert len(movements()) == 2 * len(ENDS)


@each_sync
def test_f12_f19_f20_sync_work_is_charged_by_how_it_ends(
    site: Site, customer: Customer
) -> None:
    check_ends(site, customer, "paid")


@each_async
def test_f19_f20_async_work_is_charged_by_how_it_ends(
    site: Site, customer: Customer
) -> None:
    check_ends(site, customer, "apaid")


@each_atomic
def test_f12_the_work_is_rolled_back_and_the_release_is_not(
    site: Site, customer: Customer
) -> None:
    assert site.request("POST", "/paid/?raise=boom")[0] == 500
    settled(site, "released")
    assert not Group.objects.exists()
    assert movements() == RELEASED


@each_atomic
def test_f13_a_commit_that_fails_releases(site: Site, customer: Customer) -> None:
    assert site.request("POST", "/breaks_at_commit/")[0] == 500
    settled(site, "released")
    assert movements() == RELEASED
    assert balance(customer) == (100, 0)


if connection.vendor == "postgresql":

    @pytest.mark.database
    @each_atomic
    def test_f13_a_connection_that_is_killed_before_the_commit_releases(
        site: Site, customer: Customer
    ) -> None:
        assert site.request("POST", "/loses_connection/")[0] == 500
        settled(site, "released")
        assert not Group.objects.exists()
        assert movements() == RELEASED


@pytest.mark.parametrize("kind", ["sync", "gthread", "uvicorn"])
@pytest.mark.parametrize(
    ("ledger", "left"), [("remote", "commit_pending"), ("joined", "committed")]
)
def test_f15_a_process_killed_after_the_views_commit_is_charged(
    own_site: Any, customer: Customer, kind: str, ledger: str, left: str
) -> None:
    site = own_site(
        f"{kind}-{ledger}-atomic",
        env={"DIE_AT": "commit"},
        TRANSPORT=dying_transport(LEDGERS[ledger]),
    )
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        site.request("POST", "/paid/")
    assert states() == [left]
    assert Group.objects.count() == 1
    swept()
    assert states() == ["committed"]
    assert movements() == COMMITTED


@pytest.mark.parametrize("view", ["paid", "apaid"])
@pytest.mark.parametrize("name", ["sync-remote", "gthread-joined", "uvicorn-remote"])
def test_f15_a_process_killed_at_work_is_released_by_the_sweeper(
    own_site: Any, customer: Customer, name: str, view: str
) -> None:
    site = own_site(name)
    visit = site.begin("POST", f"/{view}/?hold=work")
    kill(site.wait_for("work"))
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        visit.response()
    assert states() == ["reserved"]
    assert balance(customer) == (100, 25)
    swept()
    assert states() == ["released"]
    assert movements() == RELEASED


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


OVERLAP = ["gthread-joined", "gthread-remote", "uvicorn-joined", "uvicorn-remote"]
if connection.features.has_select_for_update:
    # SQLite has one writer at a time: there a whole view would be one.
    OVERLAP += ["gthread-joined-atomic", "gthread-remote-atomic", *ASGI_ATOMIC]


def check_overlap(site: Site, customer: Customer, view: str) -> None:
    first = site.begin("POST", f"/{view}/?hold=first")
    site.wait_for("first")
    second = site.begin("POST", f"/{view}/?hold=second")
    site.wait_for("second")
    assert balance(customer) == (100, 50)
    # A third one comes and goes in the meantime.
    assert site.request("POST", f"/{view}/")[0] == 200
    assert balance(customer) == (75, 50)
    site.let_go("second")
    assert second.response().status == 200
    assert balance(customer) == (50, 25)
    site.let_go("first")
    assert first.response().status == 200
    swept()
    assert balance(customer) == (25, 0)
    assert states() == ["committed"] * 3


@served(*OVERLAP)
def test_f17_requests_of_one_customer_overlap(site: Site, customer: Customer) -> None:
    check_overlap(site, customer, "paid")


@served("gthread-joined", "gthread-remote", *ASGI)
def test_f17_async_requests_of_one_customer_overlap(
    site: Site, customer: Customer
) -> None:
    check_overlap(site, customer, "apaid")


@pytest.mark.parametrize("view", ["paid", "apaid"])
@pytest.mark.parametrize("kind", ["exit", "interrupt"])
@pytest.mark.parametrize("name", ["sync-joined", "gthread-remote", "uvicorn-joined"])
def test_f23_an_exit_in_the_work_releases_it(
    own_site: Any, customer: Customer, name: str, kind: str, view: str
) -> None:
    site = own_site(name)
    # Servers take it differently: some end, some answer 500, some hang up.
    try:
        assert site.request("POST", f"/{view}/?raise={kind}")[0] == 500
    except (ConnectionError, http.client.HTTPException):
        pass
    # By the guard itself, before a sweeper comes.
    settled(site, "released")
    assert movements() == RELEASED


@pytest.mark.parametrize("view", ["paid", "apaid"])
@pytest.mark.parametrize("kind", ["gthread", "uvicorn"])
def test_requests_wait_for_the_ledger_side_by_side(
    own_site: Any, customer: Customer, kind: str, view: str
) -> None:
    site = own_site(
        f"{kind}-remote", TRANSPORT="tests.servers.meeting.MeetingTransport"
    )
    visits = [site.begin("POST", f"/{view}/") for _ in range(3)]
    assert [visit.response().status for visit in visits] == [200] * 3
    swept()
    assert balance(customer) == (25, 0)
