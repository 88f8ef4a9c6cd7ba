"""Servers that tests share, and what there is to say about the books afterwards."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.books import fund

from .serving import LEDGERS, Site, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.contrib.auth.models import User

    from django_meterly.models import Customer


@pytest.fixture
def customer(transactional_db: None, user: User) -> Customer:
    return fund(user)


@pytest.fixture
def cookie(customer: Customer, client: Any) -> str:
    """A session of the customer's, as a browser sends it."""
    client.force_login(customer.owner)
    return f"sessionid={client.cookies['sessionid'].value}"


@pytest.fixture(scope="session")
def shared(
    django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Site]]:
    """Return the server of a name like ``gthread-joined-atomic``, started once."""
    sites: dict[str, Site] = {}
    with ExitStack() as stack:

        def find(name: str) -> Site:
            kind, ledger, *atomic = name.split("-")
            if name not in sites or sites[name].process.poll() is not None:
                sites[name] = stack.enter_context(
                    serving(
                        kind,
                        tmp_path_factory.mktemp(name) / "site",
                        atomic_requests=bool(atomic),
                        TRANSPORT=LEDGERS[ledger],
                    )
                )
            return sites[name]

        yield find


@pytest.fixture
def site(request: pytest.FixtureRequest, shared: Any, cookie: str) -> Iterator[Site]:
    """The server that ``served`` names, for the customer's requests."""
    site: Site = shared(request.param)
    site.cookie = cookie
    yield site
    site.close()


@pytest.fixture
def own_site(cookie: str, tmp_path: Any) -> Iterator[Callable[..., Site]]:
    """Start a server for one test alone, which may do it any harm."""
    with ExitStack() as stack:

        def start(name: str, *options: str, **extra: Any) -> Site:
            kind, ledger, *atomic = name.split("-")
            extra = {"TRANSPORT": LEDGERS[ledger], **extra}
            site = stack.enter_context(
                serving(
                    kind,
                    tmp_path / "site",
                    *options,
                    atomic_requests=bool(atomic),
                    **extra,
                )
            )
            site.cookie = cookie
            stack.callback(site.close)
            return site

        yield start
