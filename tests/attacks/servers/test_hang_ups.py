"""Readers who hang up once the work is done, as often as they like.

``HANG_UPS=20`` in the environment lets them do it 20 times for each kind of view.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.books import balance, fund, states
from tests.servers.serving import served, swept

if TYPE_CHECKING:
    from django_meterly.models import Customer
    from tests.servers.serving import Site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.sample(1)]

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
    site: Site, customer: Customer, kind: str, request: pytest.FixtureRequest
) -> None:
    fund(customer, 25 * TIMES)
    for number in range(TIMES):
        hang_up_on(site, KINDS[kind], "charge", number)
    end = ["committed"] * TIMES
    # Under WSGI nobody hears of it, and the server itself charges in the end.
    by_itself = request.node.callspec.params["site"].startswith("gthread")
    site.wait_until(lambda: states() == end if by_itself else len(states()) == TIMES)
    swept()
    assert states() == end
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


@pytest.mark.parametrize("policy", ["charge", "release"])
@pytest.mark.parametrize(
    ("site", "view"),
    [
        ("gthread-joined", "stream"),
        ("gthread-remote-atomic", "stream"),
        ("uvicorn-joined", "astream"),
        ("uvicorn-remote", "astream"),
    ],
    indirect=["site"],
)
def test_f49_a_reader_who_leaves_after_19_of_20_chunks_follows_the_policy(
    site: Site, customer: Customer, view: str, policy: str
) -> None:
    fund(customer, 25 * TIMES)
    for number in range(TIMES):
        visit = site.begin("GET", f"/{view}/{policy}/?chunks=20&last=0.5")
        response = visit.response()
        for chunk in range(19):
            assert response.readline() == b"%d\n" % chunk
        visit.hang_up()
        site.wait_until(lambda number=number: len(states()) == number + 1)
    end = {"charge": "committed", "release": "released"}[policy]
    site.wait_until(lambda: states() == [end] * TIMES)
    swept()
    assert states() == [end] * TIMES
    assert balance(customer) == (100 + 25 * TIMES * (policy == "release"), 0)
