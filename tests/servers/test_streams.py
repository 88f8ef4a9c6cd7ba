"""Streams: sync and async ones, read to the end or broken off, WSGI and ASGI."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import call_command

from django_meterly.models import Reservation
from tests.books import balance, movements, states

from .serving import served, settled, swept

if TYPE_CHECKING:
    from django_meterly.models import Customer

    from .serving import Site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]

WSGI = ("sync-joined", "sync-remote", "gthread-joined-atomic", "gthread-remote-atomic")
ASGI = ("uvicorn-joined", "uvicorn-remote")

RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]
#: More than anybody reads in a test: ten seconds of chunks.
ENDLESS = "chunks=1000&pace=0.01"

by_policy = pytest.mark.parametrize(
    ("policy", "query", "charge"),
    [
        ("release", "", 0),
        ("release", "&used=5", 0),
        ("charge", "", 25),
        ("charge", "&used=5", 5),
    ],
)


def hang_up_after_two_chunks(site: Site, path: str) -> None:
    visit = site.begin("GET", path)
    response = visit.response()
    assert [response.readline(), response.readline()] == [b"0\n", b"1\n"]
    assert states() == ["reserved"]
    visit.hang_up()


def check_charged(site: Site, customer: Customer, charge: int) -> None:
    settled(site, "committed" if charge else "released")
    assert movements() == (COMMITTED if charge else RELEASED)
    assert balance(customer) == (100 - charge, 0)


@served(*WSGI, *ASGI)
def test_f21_a_sync_stream_is_charged_once_after_its_last_chunk(
    site: Site, customer: Customer
) -> None:
    assert site.request("GET", "/stream/release/?used=5") == (200, b"0\n1\n2\n")
    check_charged(site, customer, 5)


@served(*ASGI, "gthread-joined", "gthread-remote")
def test_f21_an_async_stream_is_charged_once_after_its_last_chunk(
    site: Site, customer: Customer
) -> None:
    assert site.request("GET", "/astream/release/?used=5") == (200, b"0\n1\n2\n")
    check_charged(site, customer, 5)


@by_policy
@served(*WSGI)
def test_f21_a_reader_of_a_sync_stream_who_leaves_is_charged_by_the_policy(
    site: Site, customer: Customer, policy: str, query: str, charge: int
) -> None:
    hang_up_after_two_chunks(site, f"/stream/{policy}/?{ENDLESS}{query}")
    check_charged(site, customer, charge)


@by_policy
@served(*ASGI)
def test_f21_a_reader_of_an_async_stream_who_leaves_is_charged_by_the_policy(
    site: Site, customer: Customer, policy: str, query: str, charge: int
) -> None:
    hang_up_after_two_chunks(site, f"/astream/{policy}/?{ENDLESS}{query}")
    check_charged(site, customer, charge)


@pytest.mark.parametrize(
    ("site", "view"),
    [
        ("uvicorn-joined", "stream"),
        ("uvicorn-remote", "stream"),
        ("gthread-joined", "astream"),
        ("gthread-remote", "astream"),
    ],
    indirect=["site"],
)
def test_f21_a_stream_that_django_reads_before_it_is_sent_counts_as_delivered(
    site: Site, customer: Customer, view: str
) -> None:
    # Sync under ASGI, async under WSGI: all of the work is done before the first
    # chunk leaves, and the reader is gone by then.
    visit = site.begin("GET", f"/{view}/release/?hold=chunks")
    site.wait_for("chunks")
    visit.hang_up()
    site.let_go("chunks")
    if view == "stream":
        # Django does not wait for the thread that reads the stream.
        site.wait_until(lambda: states() != ["reserved"])
    check_charged(site, customer, 25)


@pytest.mark.parametrize(("policy", "charge"), [("charge", 25), ("release", 0)])
@pytest.mark.parametrize("view", ["stream", "astream"])
@served("sync-joined", "gthread-remote-atomic", *ASGI)
def test_f21_a_charged_head_of_a_stream_follows_the_policy(
    site: Site, customer: Customer, view: str, policy: str, charge: int
) -> None:
    if site.atomic and view == "astream":
        # Django's own refusal, before the guard is asked.
        assert site.request("HEAD", f"/astream/{policy}/")[0] == 500
        assert states() == []
        return
    # The stream is not run, and so it does not say what it used.
    assert site.request("HEAD", f"/{view}/{policy}/?used=5") == (200, b"")
    check_charged(site, customer, charge)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("sync-joined", "stream"),
        ("gthread-remote", "stream"),
        ("uvicorn-joined", "astream"),
        ("uvicorn-remote", "stream"),
    ],
)
def test_f21_a_stream_that_is_never_closed_is_swept(
    own_site: Any, customer: Customer, name: str, view: str
) -> None:
    site = own_site(name)
    site.begin("GET", f"/{view}/charge/?hold=chunks")
    process = site.wait_for("chunks")
    # The first beat, beside the stream, notes that it has begun. A process that dies
    # before that has not begun it, as far as anybody knows: it is charged.
    site.wait_until(lambda: not Reservation.objects.get().is_presumed)
    os.kill(process, signal.SIGKILL)
    call_command("meterly_settle", verbosity=0)
    # Its lease has not run out: it might still be at work somewhere.
    assert states() == ["reserved"]
    swept()
    assert states() == ["released"]
    assert movements() == RELEASED
