"""The public API as a type checker sees it. mypy reads this; nobody runs it.

Every ignored error is one that has to be found: mypy reports unused ignores.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, assert_type

from django.test import TestCase
from django.views import View
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from django_meterly import (
    MeterlyApiError,
    MeterlyClient,
    MeterlyInsufficientCreditsError,
    MeterlyNotSentError,
    MeterlyUnknownOutcomeError,
    get_client,
    grants,
    guard,
)
from django_meterly.errors import api_error
from django_meterly.mixins import MeterlyGuardMixin
from django_meterly.models import Customer, Grant
from django_meterly.tasks import meterly_task
from django_meterly.testing import (
    Altered,
    assert_charged,
    assert_not_charged,
    expire_holds,
    faults,
    override_credits,
    override_meterly,
    sweep,
)
from django_meterly.transports import (
    Call,
    HttpTransport,
    JoinedTransport,
    Request,
    Transport,
)
from django_meterly.transports.signing import BearerSigner, HmacSigner
from django_meterly.types import (
    Balance,
    Balances,
    CustomerResult,
    EntryPage,
    GrantResult,
    LedgerEntry,
    MovementResult,
    ReservationResult,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.contrib.auth.models import User
    from requests import PreparedRequest


def making_one() -> None:
    assert_type(get_client(), MeterlyClient)
    MeterlyClient("mk_test_x")
    MeterlyClient(api_key="mk_hmac_k1_x", base_url="https://x.test", deadline=2.5)
    MeterlyClient("mk_test_x", signer=HmacSigner)
    MeterlyClient("mk_test_x", signer=BearerSigner)
    MeterlyClient(transport=HttpTransport("mk_test_x", signer=Signer))
    MeterlyClient(transport=Own())
    MeterlyClient(5)  # type: ignore[arg-type]
    HttpTransport("mk_test_x", signer=Own)  # type: ignore[arg-type]
    with MeterlyClient("mk_test_x") as meterly:
        assert_type(meterly, MeterlyClient)
    assert_type(meterly.within(2.0, attempts=1), MeterlyClient)


async def customers(user: User) -> None:
    assert_type(Customer.objects.for_owner(user), Customer)
    assert_type(Customer.objects.resolve("user_5"), Customer)
    assert_type(await Customer.objects.afor_owner(user), Customer)
    assert_type(await Customer.objects.aresolve(user), Customer)
    Customer.objects.for_owner("user_5")  # type: ignore[arg-type]


@meterly_task("tokens", lambda job: job.size, customer=lambda job: job.owner)
def job(number: int) -> None: ...


meterly_task(amount="25")  # type: ignore[arg-type]
meterly_task(customer="user_1")  # type: ignore[arg-type]


def handing_off() -> None:
    with guard("user_1", 5, "tokens") as work:
        assert_type(work.hand_off(job, 42), str)
        assert_type(work.fence, int)


class Signer:
    def __init__(self, api_key: str) -> None: ...

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        return request


class Own(Transport):
    partial_commit = False

    def send(self, call: Call) -> dict[str, Any]:
        return dict(call.arguments)


class Acme(HttpTransport):
    signer = Signer

    def encode(self, call: Call) -> Request:
        return Request(call.method, f"/api{call.path}", {"X-Once": "k"}, b"{}")

    def decode(
        self, call: Call, status: int, headers: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        if status >= 400:
            raise api_error(status, "not_found", details={"unit": "tokens"})
        return {"body": body.decode()}


class Joined(JoinedTransport):
    def alias(self) -> str:
        return "default"


def calling(meterly: MeterlyClient) -> None:
    customer = meterly.create_customer("user_1", "tokens", idempotency_key="k")
    assert_type(customer, CustomerResult)
    assert_type(meterly.find_customer("user_1"), CustomerResult | None)
    granted = meterly.grant_credits("user_1", 5, "tokens", "signup", "Welcome")
    assert_type(granted, GrantResult)
    assert_type(granted.grant.customer_id, str)
    assert_type(meterly.get_balance("c"), Balance)
    assert_type(meterly.get_balances("c"), Balances)
    assert_type(meterly.get_balances("c").balances[0].available, int)
    page = meterly.list_entries("c", "tokens", cursor="e")
    assert_type(page, EntryPage)
    assert_type(page.entries, tuple[LedgerEntry, ...])
    assert_type(page.next_cursor, str | None)
    assert_type(meterly.add_credits("c", 5, "tokens", "r"), MovementResult)
    assert_type(
        meterly.use_credits("c", 5, unit="tokens", reference="r"), MovementResult
    )
    held = meterly.reserve_credits("c", 5, unit="tokens", ttl_seconds=60)
    assert_type(held, ReservationResult)
    assert_type(held.reservation_id, str)
    assert_type(held.is_held, bool)
    assert_type(held.balance, Balance | None)
    assert_type(meterly.get_reservation("r"), ReservationResult)
    assert_type(meterly.commit_reservation("r", amount=0), ReservationResult)
    assert_type(meterly.release_reservation("r"), ReservationResult)
    assert_type(meterly.extend_reservation("r", 60), ReservationResult)

    meterly.use_credits("c", "5")  # type: ignore[arg-type]
    meterly.use_credits("c", 1.5)  # type: ignore[arg-type]
    meterly.reserve_credits("c", 5, "tokens")  # type: ignore[call-arg]
    meterly.extend_reservation("r")  # type: ignore[call-arg]
    held.amount = 6  # type: ignore[misc]


async def granting(meterly: MeterlyClient, customer: Customer) -> None:
    grant = grants.grant(meterly, customer, 5, "tokens", reason="r", reference="s")
    assert_type(grant, tuple[Grant, bool])
    twin = grants.agrant(meterly, customer, 5, "tokens", reason="r", reference="s")
    assert_type(await twin, tuple[Grant, bool])


async def awaiting(meterly: MeterlyClient) -> None:
    async with meterly as same:
        assert_type(same, MeterlyClient)
    customer = await meterly.acreate_customer("user_1", "tokens", idempotency_key="k")
    assert_type(customer, CustomerResult)
    assert_type(await meterly.afind_customer("user_1"), CustomerResult | None)
    granted = await meterly.agrant_credits("user_1", 5, "tokens", "signup")
    assert_type(granted, GrantResult)
    assert_type(await meterly.aget_balance("c"), Balance)
    assert_type(await meterly.aget_balances("c"), Balances)
    assert_type(await meterly.alist_entries("c", "tokens", cursor="e"), EntryPage)
    assert_type(await meterly.aadd_credits("c", 5, "tokens"), MovementResult)
    assert_type(await meterly.ause_credits("c", 5, reference="r"), MovementResult)
    held = await meterly.areserve_credits("c", 5, unit="tokens", ttl_seconds=60)
    assert_type(held, ReservationResult)
    assert_type(await meterly.aget_reservation("r"), ReservationResult)
    assert_type(await meterly.acommit_reservation("r", amount=0), ReservationResult)
    assert_type(await meterly.arelease_reservation("r"), ReservationResult)
    assert_type(await meterly.aextend_reservation("r", 60), ReservationResult)
    await meterly.aclose()

    await meterly.ause_credits("c", "5")  # type: ignore[arg-type]
    await meterly.areserve_credits("c", 5, "tokens")  # type: ignore[call-arg]
    assert_type((await meterly.aget_balance("c")).available, int)


def guarding(meterly: MeterlyClient) -> None:
    assert_type(meterly.guard("c", 5), AbstractContextManager[ReservationResult])
    with meterly.guard("c", 5, "tokens", "r", "k", 60) as held:
        assert_type(held, ReservationResult)
    assert_type(meterly.guard("c", 5, callback=lambda: "done"), str)
    meterly.guard("c", 5, callback="done")  # type: ignore[call-overload]


async def awaiting_a_guard(meterly: MeterlyClient) -> None:
    assert_type(meterly.aguard("c", 5), AbstractAsyncContextManager[ReservationResult])
    async with meterly.aguard("c", 5, "tokens", "r", "k", 60) as held:
        assert_type(held, ReservationResult)

    async def work() -> str:
        return "done"

    assert_type(await meterly.aguard("c", 5, callback=work), str)
    await meterly.aguard("c", 5, callback=str)  # type: ignore[arg-type]


def failing(meterly: MeterlyClient) -> None:
    try:
        meterly.use_credits("c", 5)
    except MeterlyInsufficientCreditsError as exc:
        assert_type(exc.required, int)
        assert_type(exc.available, int)
        assert_type(exc.reserved, int)
        assert_type(exc.unit, str)
    except MeterlyApiError as exc:
        assert_type(exc.status, int)
        assert_type(exc.code, str)
        assert_type(exc.message, str)
        assert_type(exc.request_id, str | None)
        assert_type(exc.method, str | None)
        assert_type(exc.path, str | None)
    except MeterlyNotSentError:
        pass
    except MeterlyUnknownOutcomeError as exc:
        assert_type(exc.idempotency_key, str | None)
        assert_type(exc.result, Any)


class Page(MeterlyGuardMixin, View):
    guard_options = {"unit": "tokens", "amount": 5}


class Api(MeterlyGuardMixin, APIView):
    guard_options = {"unit": "tokens", "amount": 5}


class Set(MeterlyGuardMixin, ViewSet):
    guard_options = {"unit": "tokens", "amount": 5}


class Bad(MeterlyGuardMixin, View):
    guard_options = "tokens"  # type: ignore[assignment]


@override_credits(lambda test: test.user, image_credits=100)
@override_meterly(ENFORCEMENT="off")
class Tests(TestCase):
    user: Any

    @override_credits("user_1", image_credits=100)
    def test_it(self) -> None:
        assert_type(sweep(), tuple[int, int])
        with assert_charged(self.user, 25, unit="tokens"), assert_not_charged("u"):
            pass

    @override_credits("user_1", image_credits=100)
    async def test_async(self) -> None:
        async with assert_charged(self.user, 25):
            pass


@override_credits("user_1", image_credits=100)
def length(text: str) -> int:
    return len(text)


assert_type(length("text"), int)
length(4)  # type: ignore[arg-type]


def failing_ledgers() -> None:
    with faults("unsent", get_balance=["lost", None, MeterlyNotSentError()]) as line:
        assert_type(line, faults)
        assert_type(line.operations(), list[str])
        line.meet("use_credits", expire_holds, Altered(dict), MeterlyApiError)
    faults("lots")  # type: ignore[arg-type]
    override_credits("user_1", image_credits="100")  # type: ignore[arg-type]
    assert_charged("user_1", "25")  # type: ignore[arg-type]
