"""Readers who leave while the view is still at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.books import balance, movements, states

from .serving import served, settled

if TYPE_CHECKING:
    from django_meterly.models import Customer

    from .serving import Site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]

RELEASED = ["reserved", "released"]
COMMITTED = ["reserved", "committed"]


@pytest.mark.parametrize(
    ("policy", "end"), [("charge", COMMITTED), ("release", RELEASED)]
)
@served("uvicorn-joined", "uvicorn-remote")
def test_f22_an_async_view_that_is_cancelled_follows_the_policy(
    site: Site, customer: Customer, policy: str, end: list[str]
) -> None:
    visit = site.begin("POST", f"/aplain/{policy}/?hold=work")
    site.wait_for("work")
    visit.hang_up()
    # Nobody lets it go: it ends by its cancellation.
    settled(site, end[-1])
    assert movements() == end


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
    # The view has returned: its charge is presumed until it is rendered.
    assert states() == ["reserved"]
    visit.hang_up()
    # By the time this is answered, Django under ASGI has given the rendering up.
    assert site.request("GET", "/nothing/")[0] == 404
    site.let_go("template")
    settled(site, "committed")
    assert movements() == COMMITTED
    assert balance(customer) == (75, 0)
