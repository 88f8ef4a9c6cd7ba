"""Guards and other people's transactions, ``TestCase``'s among them."""

from __future__ import annotations

from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Group, User
from django.db import connection, connections, transaction
from django.http import HttpResponse
from django.test import (
    TestCase,
    override_settings,
)
from django.urls import path

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyUsageError,
    guard,
    meterly_guard,
)
from django_meterly.journal import attempts
from django_meterly.testing import assert_books_balance, override_meterly, sweep
from tests import views
from tests.books import balance, fund, movements, states

pytestmark = pytest.mark.database


@meterly_guard("image_credits", 25)
async def apaid(request: Any) -> HttpResponse:
    await Group.objects.acreate(name=request.POST.get("trace", "trace"))
    if request.POST.get("break"):
        raise views.Boom
    return HttpResponse("done", status=int(request.POST.get("status", "200")))


@meterly_guard("image_credits", 25)
async def anested(request: Any) -> HttpResponse:
    async with guard(request.user, 10, reference="inner"):
        pass
    return HttpResponse("done")


@meterly_guard("image_credits", 25)
def integrity(request: Any) -> HttpResponse:
    """Meet an IntegrityError of ours in the middle of the view's work."""
    with pytest.raises(MeterlyDuplicateError):
        guard(
            request.user,
            1,
            idempotency_key="taken",
            durable=not connection.in_atomic_block,
        ).reserve()
    Group.objects.create(name="still works")
    return HttpResponse("done")


urlpatterns = [
    path("paid/", views.paid),
    path("raises/", views.raises),
    path("apaid/", apaid),
    path("anested/", anested),
    path("integrity/", integrity),
]


class TestBlocks:
    pytestmark = pytest.mark.django_db(transaction=True)

    def test_f16_not_durable_and_failed_releases_with_the_transaction(
        self, user: User, customer: Any
    ) -> None:
        with transaction.atomic():
            with pytest.raises(views.Boom), guard(user, 25, durable=False):
                raise views.Boom
            Group.objects.create(name="went on")
        sweep()
        assert Group.objects.exists()
        assert states() == ["released"]
        assert movements() == ["reserved", "released"]

    def test_f16_not_durable_and_rolled_back_never_tells_a_remote_ledger(
        self, user: User, remote: Any
    ) -> None:
        fund(user)
        with transaction.atomic():
            with guard(user, 25, durable=False):
                pass
            transaction.set_rollback(True)
        sweep()
        # No row is left that would: the hold there ends with its time.
        assert states() == []
        assert remote.operations()[-1] == "reserve_credits"

    def test_f16_not_durable_without_autocommit_is_settled_by_the_sweeper(
        self, user: User, customer: Any, any_ledger: Any
    ) -> None:
        transaction.set_autocommit(False)
        try:
            with guard(user, 25, durable=False):
                pass
            transaction.commit()
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)
        # Without autocommit Django tells nobody about a COMMIT.
        assert states() == ["commit_pending" if any_ledger else "committed"]
        sweep()
        assert states() == ["committed"]
        assert movements() == ["reserved", "committed"]
        assert balance(customer) == (75, 0)

    # Without autocommit, SQLite commits before each savepoint: Django says so.
    if connection.vendor != "sqlite":

        def test_f16_not_durable_without_autocommit_dies_with_the_rollback(
            self, user: User, joined: None
        ) -> None:
            customer = fund(user)
            transaction.set_autocommit(False)
            try:
                with guard(user, 25, durable=False):
                    pass
                transaction.rollback()
            finally:
                transaction.set_autocommit(True)
            assert states() == []
            assert balance(customer) == (100, 0)
            assert_books_balance()

    def test_f16_async_blocks_need_no_transaction_and_are_refused_in_one(
        self, user: User, customer: Any
    ) -> None:
        async def block() -> None:
            async with guard(user, 25):
                raise AssertionError

        # The coroutine's sync parts run in this very thread, in its transaction.
        with transaction.atomic(), pytest.raises(MeterlyUsageError, match="durable"):
            async_to_sync(block)()
        assert states() == []


class TestViews:
    pytestmark = pytest.mark.django_db(transaction=True)

    @pytest.fixture(autouse=True)
    def urls(self, settings: Any) -> None:
        settings.ROOT_URLCONF = __name__

    @pytest.mark.usefixtures("atomic_requests")
    def test_f12_an_async_view_under_atomic_requests_is_djangos_own_error(
        self, client: Any, user: User, customer: Any
    ) -> None:
        client.force_login(user)
        with pytest.raises(RuntimeError, match="ATOMIC_REQUESTS with async views"):
            client.post("/apaid/")
        assert states() == []
        assert movements() == []

    @pytest.mark.parametrize("fault", ["lost", "unanswered", "unsent"])
    def test_f14_settlement_trouble_never_becomes_a_500_of_an_async_view(
        self, client: Any, user: User, remote: Any, fault: str
    ) -> None:
        customer = fund(user)
        client.force_login(user)
        remote.meet("commit_reservation", fault)
        assert client.post("/apaid/").content == b"done"
        assert states() == ["commit_pending"]
        sweep()
        assert movements() == ["reserved", "committed"]
        assert balance(customer) == (75, 0)

    def test_f28_an_async_guard_inside_an_async_view_is_its_own(
        self, client: Any, user: User, customer: Any
    ) -> None:
        client.force_login(user)
        assert client.post("/anested/").status_code == 200
        assert states() == ["committed", "committed"]
        assert balance(customer) == (65, 0)

    def test_f28_our_integrity_error_does_not_poison_a_guarded_view(
        self,
        client: Any,
        user: User,
        customer: Any,
        any_requests: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with guard(user, 1, idempotency_key="taken"):
            # As in a race: whoever looked before sees the key free.
            monkeypatch.setattr(attempts, "number", lambda *args: None)
            client.force_login(user)
            assert client.post("/integrity/").status_code == 200
        assert Group.objects.count() == 1
        assert balance(customer) == (74, 0)


@override_settings(ROOT_URLCONF=__name__)
class InTestCase(TestCase):
    """As a project's own tests are: no ``databases``, no fixtures of ours."""

    ledger = "django_meterly.ledger.transport.LedgerTransport"

    def setUp(self) -> None:
        self.enterContext(override_meterly(TRANSPORT=self.ledger))
        self.user = User.objects.create_user("alice")
        self.customer = fund(self.user)
        self.client.force_login(self.user)

    def test_f16_a_guarded_view_just_works(self) -> None:
        assert self.client.post("/paid/").status_code == 200
        assert (
            self.client.post("/paid/", {"trace": 2, "status": 400}).status_code == 400
        )
        with pytest.raises(views.Boom):
            self.client.post("/raises/", {"kind": "boom", "trace": 3})
        assert states() == ["committed", "released", "released"]
        assert balance(self.customer) == (75, 0)
        assert_books_balance()

    def test_f16_an_async_view_just_works(self) -> None:
        assert self.client.post("/apaid/").status_code == 200
        with pytest.raises(views.Boom):
            self.client.post("/apaid/", {"trace": 2, "break": 1})
        assert states() == ["committed", "released"]
        assert balance(self.customer) == (75, 0)

    async def test_f16_the_async_client_just_works(self) -> None:
        await self.async_client.aforce_login(self.user)
        for number, url in enumerate(("/paid/", "/apaid/")):
            response = await self.async_client.post(url, {"trace": number})
            assert response.status_code == 200
        with pytest.raises(views.Boom):
            await self.async_client.post("/apaid/", {"trace": 2, "break": 1})
        assert await sync_to_async(states)() == ["committed", "committed", "released"]
        assert await sync_to_async(balance)(self.customer) == (50, 0)

    async def test_f16_an_async_block_just_works(self) -> None:
        async with guard(self.user, 10) as work:
            work.charge(4)
        with pytest.raises(views.Boom):
            async with guard(self.user, 10):
                raise views.Boom
        assert await sync_to_async(states)() == ["committed", "released"]
        assert await sync_to_async(balance)(self.customer) == (96, 0)

    def test_f16_too_few_credits_are_a_402_and_on_record(self) -> None:
        with guard(self.user, 90):
            assert self.client.post("/paid/").status_code == 402
        assert sorted(states()) == ["committed", "denied"]
        assert balance(self.customer) == (10, 0)

    def test_f16_a_test_that_opens_a_transaction_is_told(self) -> None:
        with transaction.atomic(), pytest.raises(MeterlyUsageError, match="durable"):
            guard(self.user, 25).reserve()
        with transaction.atomic(), guard(self.user, 25, durable=False):
            pass
        # A remote ledger hears of it after a COMMIT that never comes in a test.
        remote = "Faulty" in self.ledger
        assert states() == ["commit_pending" if remote else "committed"]
        with (
            self.captureOnCommitCallbacks(execute=True),
            transaction.atomic(),
            guard(self.user, 25, durable=False),
        ):
            pass
        assert states()[-1] == "committed"


class InTestCaseRemote(InTestCase):
    ledger = "django_meterly.testing.FaultyTransport"


class InAtomicTestCase(InTestCase):
    """Under ``ATOMIC_REQUESTS``, too: only the async views are not for it."""

    test_f16_an_async_view_just_works = None  # type: ignore[assignment]
    test_f16_the_async_client_just_works = None  # type: ignore[assignment]

    def setUp(self) -> None:
        super().setUp()
        options = connections.settings["default"]
        before = options["ATOMIC_REQUESTS"]
        options["ATOMIC_REQUESTS"] = True
        self.addCleanup(options.__setitem__, "ATOMIC_REQUESTS", before)
