"""Readers who leave while the view is still at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.books import balance, movements, states

from .serving import served, settled, swept

if TYPE_CHECKING:
    from django_meterly.models import Customer

    from .serving import Site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]

RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]


@served("uvicorn-joined", "uvicorn-remote")
def test_f22_an_async_view_that_is_cancelled_is_released_at_once(
    site: Site, customer: Customer
) -> None:
    visit = site.begin("POST", "/apaid/?hold=work")
    site.wait_for("work")
    visit.hang_up()
    # Nobody lets it go: it ends by its cancellation.
    settled(site, "released")
    assert movements() == RELEASED


@served(
    "uvicorn-joined",
    "uvicorn-remote",
    "uvicorn-joined-atomic",
    "uvicorn-remote-atomic",
    "gthread-joined",
    "sync-remote",
)
def test_f22_a_sync_view_finishes_and_is_charged(
    site: Site, customer: Customer
) -> None:
    visit = site.begin("POST", "/paid/?hold=work")
    site.wait_for("work")
    visit.hang_up()
    site.let_go("work")
    settled(site, "committed")
    assert movements() == COMMITTED


@pytest.mark.parametrize("path", ["/late/?hold=work", "/paid/?hold=work&template=good"])
@served("uvicorn-joined", "uvicorn-remote", "uvicorn-joined-atomic")
def test_f22_a_late_response_that_nobody_waits_for_is_released(
    site: Site, customer: Customer, path: str
) -> None:
    visit = site.begin("POST", path)
    site.wait_for("work")
    visit.hang_up()
    # By the time this is answered, Django has given the view up; its thread goes on.
    assert site.request("GET", "/nothing/")[0] == 404
    site.let_go("work")
    site.wait_until(lambda: site.has_passed("work"))
    swept()
    assert states() == ["released"]
    assert balance(customer) == (100, 0)
    assert movements() == RELEASED


@pytest.mark.parametrize(
    ("site", "view"),
    [
        ("uvicorn-joined", "paid"),
        ("uvicorn-joined", "apaid"),
        ("uvicorn-remote", "paid"),
        ("uvicorn-joined-atomic", "paid"),
        ("gthread-joined", "paid"),
    ],
    indirect=["site"],
)
def test_f22_a_template_that_is_being_rendered_is_finished_and_charged(
    site: Site, customer: Customer, view: str
) -> None:
    visit = site.begin("POST", f"/{view}/?template=held&render=template")
    site.wait_for("template")
    # The view has returned, but what it costs is not decided before it is rendered.
    assert states() == ["reserved"]
    visit.hang_up()
    # By the time this is answered, Django under ASGI has given the rendering up.
    assert site.request("GET", "/nothing/")[0] == 404
    site.let_go("template")
    settled(site, "committed")
    assert movements() == COMMITTED
    assert balance(customer) == (75, 0)
