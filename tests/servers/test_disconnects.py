"""Readers who leave while the view is still at work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.books import balance, fund, movements, states

from .serving import served, settled, swept

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


#: What the view was about to send when its reader hung up, for each server.
KINDS = {
    "plain": "/plain/{}/?hold={}",
    "template": "/plain/{}/?hold={}&template=good",
    "rest": "/rest/{}/?hold={}",
    "file": "/file/{}/?hold={}",
    "aplain": "/aplain/{}/?hold={}",
    "atemplate": "/aplain/{}/?hold={}&template=good",
}
#: How often each of them is left.
TIMES = int(os.environ.get("HANG_UPS", "3"))


def hang_up_on(site: Site, path: str, policy: str, number: int) -> None:
    name = f"work{number}"
    visit = site.begin("POST", path.format(policy, name))
    site.wait_for(name)
    visit.hang_up()
    # When this is answered, Django has given the view up. A thread goes on.
    assert site.request("GET", "/nothing/")[0] == 404
    site.let_go(name)
    if not path.startswith("/aplain/"):
        site.wait_until(lambda: site.has_passed(name))


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        (site, kind)
        for site in (
            "uvicorn-joined",
            "uvicorn-remote",
            "uvicorn-joined-atomic",
            "gthread-joined",
        )
        for kind in KINDS
        # Django refuses async views under ATOMIC_REQUESTS.
        if not (site.endswith("atomic") and kind.startswith("a"))
    ],
    indirect=["site"],
)
def test_f47_a_reader_who_hangs_up_pays(
    site: Site, customer: Customer, kind: str
) -> None:
    fund(customer, 25 * TIMES)
    for number in range(TIMES):
        hang_up_on(site, KINDS[kind], "charge", number)
    site.wait_until(lambda: len(states()) == TIMES)
    swept()
    assert states() == ["committed"] * TIMES
    assert balance(customer) == (100, 0)


@pytest.mark.parametrize("kind", KINDS)
@served("uvicorn-joined")
def test_f47_release_lets_only_streams_and_cancelled_views_go_free(
    site: Site, customer: Customer, kind: str
) -> None:
    fund(customer, 25 * TIMES)
    for number in range(TIMES):
        hang_up_on(site, KINDS[kind], "release", number)
    swept()
    free = kind in ("file", "aplain", "atemplate")
    assert states() == ["released" if free else "committed"] * TIMES
    assert balance(customer) == (100 + 25 * TIMES * free, 0)


@pytest.mark.parametrize("kind", ["plain", "rest", "aplain"])
@served("uvicorn-joined", "gthread-joined")
def test_f47_work_that_raised_is_free_whoever_hangs_up(
    site: Site, customer: Customer, kind: str
) -> None:
    for number in range(TIMES):
        name = f"work{number}"
        visit = site.begin("POST", f"/{kind}/release/?hold={name}&raise=boom")
        site.wait_for(name)
        visit.hang_up()
        site.let_go(name)
    site.wait_until(lambda: "reserved" not in states())
    swept()
    assert states() == ["released"] * TIMES
    assert balance(customer) == (100, 0)


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
