"""What a guard may cost: transactions, journal writes and calls, counted.

A *transaction* is what makes the database write to its disk: each ``BEGIN`` that
comes to a ``COMMIT``, and each statement outside of one that writes. Statements
that only read are counted apart. Savepoints are no transactions. The view of these
tests touches the database by one ``INSERT``; what it costs unguarded is counted in
the same way, and taken off.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.contrib.auth.models import AnonymousUser, Group, User
from django.db import connection
from django.http import HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.test import RequestFactory
from django.test.utils import CaptureQueriesContext

from django_meterly import guard, meterly_guard
from django_meterly.ledger import postgresql
from tests import views
from tests.books import balance, fund, states

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

#: A movement of the ledger on PostgreSQL is a function, called by a SELECT, which may
#: be part of the statement that writes the journal's row.
WRITES = re.compile(
    r"INSERT|UPDATE|DELETE|WITH|SELECT .*meterly_(?!ledger_)\w+_\d+\(", re.I
)
JOURNAL = re.compile(
    r'(INSERT INTO|(?<!FOR NO KEY )UPDATE) "meterly_reservation"', re.I
)


def once_or_twice() -> int:
    """Return how often reserving, or deciding, writes the journal's row.

    On PostgreSQL that is part of the statement that moves the credits. Elsewhere it is
    two UPDATEs in one transaction: before the ledger is asked, and afterwards.
    """
    return 1 if postgresql.serves("default") else 2


@dataclass
class Cost:
    """What a block has cost the database."""

    transactions: int = 0
    journal_writes: int = 0
    statements: int = 0
    log: list[str] = field(default_factory=list)


@contextmanager
def counted() -> Iterator[Cost]:
    cost = Cost()
    with CaptureQueriesContext(connection) as queries:
        yield cost
    inside = False
    for query in queries:
        sql = query["sql"]
        cost.log.append(sql)
        word = sql.split(maxsplit=1)[0].upper().rstrip(";")
        if word in ("SAVEPOINT", "RELEASE"):
            continue
        if word == "BEGIN":
            inside = True
        elif word in ("COMMIT", "ROLLBACK"):
            cost.transactions += word == "COMMIT"
            inside = False
        else:
            cost.statements += 1
            cost.journal_writes += bool(JOURNAL.search(sql))
            cost.transactions += not inside and bool(WRITES.match(sql))
    assert not inside


def plain(request: Any) -> HttpResponse:
    Group.objects.create(name="trace")
    if request.POST.get("break"):
        raise views.Boom
    return HttpResponse(status=int(request.POST.get("status", "200")))


async def aplain(request: Any) -> HttpResponse:
    await Group.objects.acreate(name="trace")
    if request.POST.get("break"):
        raise views.Boom
    return HttpResponse(status=int(request.POST.get("status", "200")))


def template(request: Any) -> TemplateResponse:
    return TemplateResponse(request, "tests/good.html", {"value": 1})


def stream(request: Any) -> StreamingHttpResponse:
    return StreamingHttpResponse([b"one", b"two"])


async def astream(request: Any) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    return StreamingHttpResponse(chunks())


def ask(view: Any, user: Any, method: str = "post", **data: Any) -> Any:
    """Call *view* as a server does, to the end of its response."""
    request = getattr(RequestFactory(), method)("/", data)
    request.user = user

    async def whole() -> Any:
        response = await view(request)
        if response.streaming:
            assert [chunk async for chunk in response]
        return response

    if iscoroutinefunction(view):
        return async_to_sync(whole)()
    response = view(request)
    if hasattr(response, "render"):
        response.render()
    elif response.streaming:
        assert list(response)
    return response


def added(view: Any, user: User, **data: Any) -> Cost:
    """Return what the guard adds to the cost of *view*."""
    with counted() as bare:
        _whatever_it_raises(lambda: ask(view, user, **data))
    Group.objects.all().delete()
    guarded = meterly_guard("image_credits", 25)(view)
    with counted() as cost:
        _whatever_it_raises(lambda: ask(guarded, user, **data))
    assert states()
    cost.transactions -= bare.transactions
    cost.statements -= bare.statements
    return cost


def _whatever_it_raises(call: Callable[[], Any]) -> None:
    try:
        call()
    except views.Boom:
        pass


EVERY_KIND = [plain, aplain, template, stream, astream]
#: One statement more records that the view has returned.
LATE = [template, stream, astream]
ENDS: list[dict[str, Any]] = [{}, {"status": 400}, {"break": 1}]


@pytest.mark.parametrize("view", EVERY_KIND)
def test_an_embedded_ledger_adds_two_transactions(
    user: User, joined: None, view: Any
) -> None:
    customer = fund(user)
    cost = added(view, user)
    late = view in LATE
    assert cost.transactions <= 2 + late, cost.log
    assert cost.journal_writes <= 2 * once_or_twice() + late, cost.log
    if postgresql.serves("default"):
        # The hold with its row, and the decision with its movement.
        assert cost.statements <= 2 + late, cost.log
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("data", ENDS[1:], ids=repr)
@pytest.mark.parametrize("view", [plain, aplain])
def test_failed_work_costs_no_more_than_work_that_succeeds(
    user: User, joined: None, view: Any, data: Any
) -> None:
    customer = fund(user)
    cost = added(view, user, **data)
    assert cost.transactions <= 2, cost.log
    assert cost.journal_writes <= 2 * once_or_twice(), cost.log
    assert balance(customer) == (100, 0)


@pytest.mark.usefixtures("atomic_requests")
def test_a_takeover_settles_in_the_views_own_transaction(
    user: User, joined: None
) -> None:
    customer = fund(user)
    guarded = meterly_guard("image_credits", 25)(plain)
    with counted() as cost:
        ask(guarded, user)
    # The view's own, in which the credits move, and the one that held them.
    assert cost.transactions <= 1 + 1, cost.log
    assert cost.journal_writes <= 2 * once_or_twice(), cost.log
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize("data", ENDS, ids=repr)
@pytest.mark.parametrize("view", EVERY_KIND)
def test_a_remote_ledger_takes_four_journal_writes_and_two_calls(
    user: User, remote: Any, view: Any, data: Any
) -> None:
    fund(user)
    remote.calls.clear()
    cost = added(view, user, **data)
    # The intent, the hold, the decision, the outcome: each is durable before the
    # next step, so each is a transaction.
    assert cost.journal_writes <= 4 + (view in LATE), cost.log
    assert len(remote.calls) == 2


@pytest.mark.usefixtures("atomic_requests")
def test_a_takeover_needs_no_more_with_a_remote_ledger(user: User, remote: Any) -> None:
    fund(user)
    remote.calls.clear()
    with counted() as cost:
        ask(meterly_guard("image_credits", 25)(plain), user)
    assert cost.journal_writes <= 4, cost.log
    assert len(remote.calls) == 2


@pytest.mark.parametrize("view", EVERY_KIND)
def test_a_free_request_costs_nothing(user: User, any_ledger: Any, view: Any) -> None:
    with counted() as bare:
        ask(view, user, "get")
    Group.objects.all().delete()
    with counted() as cost:
        ask(meterly_guard("image_credits", 25)(view), user, "get")
    assert len(cost.log) == len(bare.log), cost.log
    assert states() == []
    if any_ledger:
        assert any_ledger.calls == []


@pytest.mark.parametrize("view", [plain, aplain])
def test_a_refusal_adds_one_transaction_or_one_call(
    user: User, any_ledger: Any, view: Any
) -> None:
    fund(user, 24)
    if any_ledger:
        any_ledger.calls.clear()
    with counted() as cost:
        assert ask(meterly_guard("image_credits", 25)(view), user).status_code == 402
    if any_ledger:
        assert len(any_ledger.calls) == 1
        assert cost.journal_writes <= 2, cost.log
    else:
        # On PostgreSQL the first was to write the row with the hold, and wrote neither.
        asked = int(postgresql.serves("default"))
        assert cost.transactions <= 1 + asked, cost.log
        assert cost.journal_writes <= 2, cost.log


@pytest.mark.parametrize("view", [plain, aplain])
def test_somebody_unknown_costs_nothing(any_ledger: Any, view: Any) -> None:
    with counted() as cost:
        response = ask(meterly_guard("image_credits", 25)(view), AnonymousUser())
    assert response.status_code == 401
    assert cost.log == []


def test_a_key_of_the_callers_costs_an_intent(user: User, joined: None) -> None:
    fund(user)
    with counted() as cost, guard(user, 25, idempotency_key="order-1"):
        pass
    assert cost.transactions <= 2, cost.log
    assert cost.journal_writes <= 2 + once_or_twice(), cost.log


def test_a_block_adds_two_transactions(user: User, joined: None) -> None:
    fund(user)
    with counted() as cost, guard(user, 25):
        pass
    assert cost.transactions <= 2, cost.log
