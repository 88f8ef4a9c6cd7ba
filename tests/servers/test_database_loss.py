"""The database goes away while the view is at work; the ledger does not."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from django.contrib.auth.models import Group
from django.db import connection

from django_meterly.ledger.authentication import create_api_key
from django_meterly.ledger.customers import ensure_workspace
from django_meterly.models import Reservation
from tests.books import balance, movements, states

from .line import Line
from .serving import Site, serving, swept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from django_meterly.models import Customer

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.database,
    pytest.mark.sample(1),
]

RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]


def during_the_work(
    site: Site, path: str, happen: Callable[[], None], method: str = "POST"
) -> int:
    """Let it *happen* while the view is at work; return the answer's status."""
    visit = site.begin(method, path)
    site.wait_for("work")
    happen()
    site.let_go("work")
    return visit.response().status


# A file has no line that could be cut.
if connection.vendor != "sqlite":

    @pytest.fixture
    def line() -> Iterator[Line]:
        settings = connection.settings_dict
        line = Line(settings["HOST"], int(settings["PORT"]))
        yield line
        line.cut()

    @pytest.fixture
    def start(
        cookie: str, line: Line, tmp_path: Path
    ) -> Iterator[Callable[[str], Site]]:
        """Start a site whose database is at the end of *line*.

        Its ledger is a third process, over HTTP, with a line of its own.
        """
        with ExitStack() as stack:

            def start(name: str) -> Site:
                kind, *atomic = name.split("-")
                ledger = stack.enter_context(serving("gthread", tmp_path / "ledger"))
                key = create_api_key(ensure_workspace("default"), "site")[1]
                url = urlsplit(os.environ["DATABASE_URL"])
                netloc = f"{url.netloc.rpartition(':')[0]}:{line.port}"
                site = stack.enter_context(
                    serving(
                        kind,
                        tmp_path / "site",
                        atomic_requests=bool(atomic),
                        env={"DATABASE_URL": url._replace(netloc=netloc).geturl()},
                        TRANSPORT="django_meterly.transports.HttpTransport",
                        API_KEY=key,
                        BASE_URL=f"http://127.0.0.1:{ledger.port}/ledger",
                    )
                )
                site.cookie = cookie
                stack.callback(site.close)
                return site

            yield start

    @pytest.mark.parametrize("view", ["paid", "apaid"])
    @pytest.mark.parametrize("kind", ["sync", "gthread", "uvicorn"])
    def test_f29_a_connection_lost_during_the_work_is_replaced(
        start: Any, line: Line, customer: Customer, kind: str, view: str
    ) -> None:
        site = start(kind)
        assert during_the_work(site, f"/{view}/?hold=work", line.drop) == 200
        assert states() == ["committed"]
        swept()
        assert movements() == COMMITTED
        assert balance(customer) == (75, 0)

    @pytest.mark.parametrize("kind", ["sync", "uvicorn"])
    def test_f13_a_connection_lost_under_atomic_requests_releases(
        start: Any, line: Line, customer: Customer, kind: str
    ) -> None:
        site = start(f"{kind}-atomic")
        assert during_the_work(site, "/paid/?hold=work", line.drop) == 500
        assert states() == ["released"]
        swept()
        assert not Group.objects.exists()
        assert movements() == RELEASED

    @pytest.mark.parametrize("view", ["paid", "apaid"])
    @pytest.mark.parametrize("kind", ["sync", "gthread", "uvicorn"])
    def test_f29_a_database_that_stays_down_does_not_keep_the_commit_back(
        start: Any, line: Line, customer: Customer, kind: str, view: str
    ) -> None:
        site = start(kind)
        assert during_the_work(site, f"/{view}/?hold=work", line.cut) == 500
        # The ledger knows, and the log has what is needed to tell it again.
        assert movements() == COMMITTED
        row = Reservation.objects.get()
        assert row.state == "reserved"
        assert row.wire_key("commit") in site.said()
        swept()
        assert states() == ["committed"]
        assert movements() == COMMITTED
        assert balance(customer) == (75, 0)

    @pytest.mark.parametrize("kind", ["sync", "uvicorn"])
    def test_f13_a_database_that_goes_down_with_the_work_in_it_releases(
        start: Any, line: Line, customer: Customer, kind: str
    ) -> None:
        site = start(f"{kind}-atomic")
        assert during_the_work(site, "/paid/?hold=work", line.cut) == 500
        # What was done went with its transaction, and is not charged.
        assert states() == ["reserved"]
        assert not Group.objects.exists()
        swept()
        assert states() == ["released"]
        assert movements() == RELEASED

    @pytest.mark.parametrize(("kind", "view"), [("sync", ""), ("uvicorn", "a")])
    def test_f29_a_stream_whose_database_went_down_is_charged_all_the_same(
        start: Any, line: Line, customer: Customer, kind: str, view: str
    ) -> None:
        site = start(kind)
        during_the_work(site, f"/{view}stream/release/?hold=work", line.cut, "GET")
        site.wait_until(lambda: movements() == COMMITTED)
        swept()
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
