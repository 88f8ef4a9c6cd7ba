"""What a guard does when it is told not to insist: on trust, in shadow, or off."""

from __future__ import annotations

import threading
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, connection, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test.utils import CaptureQueriesContext
from django.urls import path

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyUsageError,
    get_client,
    guard,
    journal,
    meterly_guard,
    signals,
)
from django_meterly.errors import (
    MeterlyAuthenticationError,
    MeterlyError,
    MeterlyIdempotencyInProgressError,
    MeterlyInvalidKeyError,
    MeterlyNotFoundError,
    MeterlyRateLimitedError,
    MeterlyServerError,
)
from django_meterly.ledger import service
from django_meterly.models import Customer, Reservation
from django_meterly.testing import assert_books_balance, lapse_leases, sweep
from tests.books import balance, fund, movements, states

if TYPE_CHECKING:
    from django.contrib.auth.models import User

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_modes"),
]


def view(request: HttpRequest) -> HttpResponse:
    work = request.meterly  # type: ignore[attr-defined]
    if "used" in request.POST:
        work.charge(int(request.POST["used"]))
    held = work.reservation is not None
    return HttpResponse("held" if held else "free")


#: How often the amount was asked for.
ASKED: list[HttpRequest] = []
KEPT: list[Any] = []


def asked(request: HttpRequest) -> int:
    ASKED.append(request)
    return 25


def keeps(request: HttpRequest) -> HttpResponse:
    request.meterly.charge(1)  # type: ignore[attr-defined]
    KEPT.append(request.meterly)  # type: ignore[attr-defined]
    return HttpResponse("done")


def tells(request: HttpRequest) -> dict[str, str]:
    return {"done": "work"}


async def aview(request: HttpRequest) -> HttpResponse:
    return view(request)


urlpatterns = [
    path("plain", meterly_guard(amount=25)(view)),
    path("aplain", meterly_guard(amount=25)(aview)),
    path("allow", meterly_guard(amount=25, on_unavailable="allow")(view)),
    path("aallow", meterly_guard(amount=25, on_unavailable="allow")(aview)),
    path("off", meterly_guard(amount=25, enforcement="off")(view)),
    path("enforced", meterly_guard(amount=25, enforcement="enforce")(view)),
    path("unused", meterly_guard(amount=asked)(lambda request: HttpResponse("done"))),
    path("used", meterly_guard(amount=asked)(view)),
    path("kept", meterly_guard(amount=asked)(keeps)),
    path("told", meterly_guard(amount=asked)(tells)),
    path("capped", meterly_guard(amount=25, overage="cap")(view)),
    path("charged", meterly_guard(amount=25, overage="charge")(view)),
    path(
        "keyed",
        meterly_guard(amount=25, idempotency_key=lambda r: r.POST["key"])(view),
    ),
]


def in_loop(test: Any) -> Any:
    """Run an async test, its sync code on this thread."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async_to_sync(test)(*args, **kwargs)

    return run


class TestOnTrust:
    @pytest.fixture(autouse=True)
    def allow(self, settings: Any, remote: Any) -> None:
        settings.METERLY = {
            **settings.METERLY,
            "ON_UNAVAILABLE": "allow",
            "UNAVAILABLE_CAP": 30,
        }

    @pytest.fixture
    def customer(self, user: User, allow: None) -> Customer:
        return fund(user)

    @pytest.mark.parametrize(
        "fault",
        [
            "lost",
            "unanswered",
            "unsent",
            MeterlyAuthenticationError("no"),
            MeterlyIdempotencyInProgressError("wait"),
            MeterlyServerError("oops"),
        ],
        ids=str,
    )
    def test_work_runs_through_an_outage_and_is_charged_once(
        self, user: User, customer: Any, remote: Any, fault: Any
    ) -> None:
        remote.meet("reserve_credits", fault)
        with guard(user, 25) as work:
            row = Reservation.objects.get()
            assert (row.state, row.reservation_id) == ("reserved", None)
            assert work.available == 0
            remote.meet("reserve_credits", "unsent")
        assert states() == ["commit_pending"]
        sweep()
        assert states() == ["committed"]
        assert movements() == ["reserved", "committed"]
        assert balance(customer) == (75, 0)
        keys = {
            call.idempotency_key
            for call in remote.calls
            if call.operation == "reserve_credits"
        }
        assert len(keys) == 1
        assert_books_balance()

    def test_the_lease_is_that_of_the_hold_it_would_have(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", "lost")
        work = guard(user, 25, ttl_seconds=500)
        work.lifecycle.reserve()
        row = Reservation.objects.get()
        assert 559 < (row.lease_until - row.created_at).total_seconds() < 575
        work.lifecycle.fail()

    @pytest.mark.parametrize("fault", ["lost", "unanswered"])
    @pytest.mark.parametrize("how", ["fails", "is free", "lapses"])
    def test_work_that_is_not_to_be_charged_leaves_nothing_behind(
        self, user: User, customer: Any, remote: Any, fault: str, how: str
    ) -> None:
        remote.meet("reserve_credits", fault)
        work = guard(user, 25)
        work.lifecycle.reserve()
        if how == "fails":
            work.lifecycle.fail()
        elif how == "is free":
            work.release()
            work.lifecycle.succeed()
        sweep()
        assert states() == ["released"]
        assert balance(customer) == (100, 0)
        assert_books_balance()

    def test_a_late_success_is_charged(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", "unsent")
        with guard(user, 25):
            sweep()
            assert states() == ["released"]
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
        assert movements() == ["reserved", "released", "used"]

    def test_first_use_during_the_outage_is_registered_afterwards(
        self, user: User, remote: Any
    ) -> None:
        remote.meet("create_customer", "lost", "unsent")
        with guard(user, 25, "tokens"):
            assert remote.operations() == ["create_customer"]
        assert states() == ["commit_pending"]
        customer = fund(user, 100, "tokens")
        sweep()
        assert states() == ["committed"]
        assert balance(customer, "tokens") == (75, 0)

    def test_the_default_account_is_the_same_whoever_registers(
        self, user: User, remote: Any
    ) -> None:
        remote.meet("create_customer", "unsent")
        with guard(user, 25, "tokens"):
            pass
        registered = [c for c in remote.calls if c.operation == "create_customer"]
        assert [c.arguments["creditUnit"] for c in registered] == ["image_credits"] * 2

    def test_denying_writes_no_row_for_a_customer_nobody_knows(
        self, user: User, remote: Any
    ) -> None:
        remote.meet("create_customer", "unsent")
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25, on_unavailable="deny").lifecycle.reserve()
        assert states() == []

    def test_no_is_not_an_outage(self, user: User, customer: Any, remote: Any) -> None:
        with pytest.raises(MeterlyInsufficientCreditsError):
            guard(user, 101).lifecycle.reserve()
        remote.meet("reserve_credits", MeterlyNotFoundError("who?"))
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["denied", "failed"]

    def test_f67_a_ledger_that_does_not_register_a_customer_keeps_its_id(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        for fault in ("unsent", MeterlyNotFoundError("no such path"), "unanswered"):
            remote.meet("reserve_credits", MeterlyNotFoundError("no such path"))
            remote.meet("create_customer", fault)
            with pytest.raises(MeterlyUnavailableError):
                guard(user, 25).lifecycle.reserve()
            assert Customer.objects.get(pk=customer.pk).customer_id == (
                customer.customer_id
            )
        with guard(user, 25):
            pass

    def test_a_customer_whom_another_ledger_registers_gets_its_id_at_once(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        Customer.objects.update(customer_id="cus_of_another_ledger")
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        assert Customer.objects.get().customer_id == customer.customer_id

    @pytest.mark.parametrize(
        ("fault", "state"), [("unsent", "failed"), ("lost", "release_pending")]
    )
    def test_the_cap_is_for_all_that_is_not_paid_for(
        self, user: User, customer: Any, remote: Any, fault: str, state: str
    ) -> None:
        remote.meet("reserve_credits", *["unsent"] * 3, fault, "unsent")
        other = Customer.objects.resolve("somebody-else")
        other.register(get_client(), "image_credits")
        with guard(user, 25), guard(user, 25, "tokens"), guard(other, 25):
            with pytest.raises(MeterlyUnavailableError):
                guard(user, 6).lifecycle.reserve()
            refused = Reservation.objects.get(amount=6)
            assert (refused.state, refused.lapsed) == (state, False)
            # What was refused takes no room.
            with guard(user, 5):
                pass

    def test_the_cap_counts_what_is_charged_once_that_is_decided(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", *["unsent"] * 4)
        with guard(user, 25) as work:
            work.charge(10)
        assert states() == ["commit_pending"]
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 21).lifecycle.reserve()
        with guard(user, 20):
            pass

    def test_the_cap_counts_work_that_may_still_succeed(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", *["unsent"] * 4)
        work = guard(user, 25)
        work.lifecycle.reserve()
        lapse_leases()
        assert journal.record_lapsed() == 1
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 6).lifecycle.reserve()
        failed = guard(user, 5)
        failed.lifecycle.reserve()
        failed.lifecycle.fail()
        assert not Reservation.objects.on_trust().filter(pk=failed.reservation.pk)

    def test_the_cap_counts_debts(self, user: User, remote: Any, settings: Any) -> None:
        settings.METERLY = {**settings.METERLY, "ON_DEBT": "allow"}
        customer = fund(user, 10)
        remote.meet("reserve_credits", "unsent")
        with guard(user, 25):
            pass
        assert states() == ["unbilled"]
        remote.meet("reserve_credits", "unsent", "unsent", "unsent")
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 6).lifecycle.reserve()
        fund(user, 25)
        sweep()
        assert balance(customer) == (10, 0)
        with guard(user, 6):
            pass

    def test_f59_too_many_requests_are_no_reason_for_trust(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", MeterlyRateLimitedError())
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 1).lifecycle.reserve()
        assert states() == ["failed"]
        assert balance(customer) == (100, 0)

    def test_no_cap_allows_nothing(
        self, user: User, customer: Any, remote: Any, settings: Any
    ) -> None:
        settings.METERLY = {**settings.METERLY, "UNAVAILABLE_CAP": 0}
        remote.meet("reserve_credits", "unsent")
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 1).lifecycle.reserve()

    @pytest.mark.database
    def test_two_at_once_do_not_share_the_room_for_one(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", *["unsent"] * 12)
        barrier = threading.Barrier(6)
        ran: list[bool] = []

        def work() -> None:
            guarded = guard(user, 10)
            barrier.wait()
            try:
                guarded.lifecycle.reserve()
                ran.append(True)
            except MeterlyUnavailableError:
                ran.append(False)
            finally:
                connections.close_all()

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(ran) == [False] * 3 + [True] * 3
        assert sorted(states()) == ["failed"] * 3 + ["reserved"] * 3

    def test_a_debit_whose_answer_was_lost_is_not_followed_by_a_commit(
        self, user: User, remote: Any
    ) -> None:
        # 20 are there: too few for the hold of 25, enough for the charge of 20.
        customer = fund(user, 20)
        remote.meet("reserve_credits", "unsent")
        remote.meet("use_credits", "unanswered")
        with guard(user, 25) as work:
            work.charge(20)
        assert states() == ["commit_pending"]
        assert movements() == ["used"]
        fund(user, 100)
        sweep()
        assert states() == ["committed"]
        assert movements() == ["used"]
        assert balance(customer) == (100, 0)
        assert_books_balance()

    def test_a_hold_that_was_found_too_late_is_given_back(
        self, user: User, remote: Any
    ) -> None:
        customer = fund(user, 20)
        remote.meet("reserve_credits", "unsent", "unsent")
        with guard(user, 25) as work:
            work.charge(20)

        def overtaken() -> None:
            # The other settler is refused, and then there are more credits.
            assert sweep() == (0, 1)
            assert states() == ["committed"]
            fund(user, 100)

        remote.meet("reserve_credits", overtaken)
        stalled = Reservation.objects.get()
        journal.settle(get_client(), stalled, timeout=None)
        assert states() == ["committed"]
        assert movements() == ["used", "reserved", "released"]
        assert balance(customer) == (100, 0)

    def test_two_settlers_that_find_the_hold_commit_it_once(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", "unsent", "unsent")
        with guard(user, 25):
            pass
        remote.meet("reserve_credits", lambda: sweep())
        stalled = Reservation.objects.get()
        journal.settle(get_client(), stalled, timeout=None)
        assert states() == ["committed"]
        assert movements() == ["reserved", "committed"]
        assert balance(customer) == (75, 0)

    def test_only_a_refused_debit_is_a_debt(self, user: User, remote: Any) -> None:
        fund(user, 10)
        announced: list[Any] = []

        def receive(reservation: Reservation, **kwargs: Any) -> None:
            announced.append(reservation.pk)

        signals.reservation_unbilled.connect(receive)
        try:
            remote.meet("reserve_credits", "unsent")
            remote.meet("use_credits", "lost")
            with guard(user, 25):
                pass
            assert (states(), announced) == (["commit_pending"], [])
            sweep()
            sweep()
            assert (states(), len(announced)) == (["unbilled"], 1)
        finally:
            signals.reservation_unbilled.disconnect(receive)

    def test_free_work_that_had_no_hold_is_no_debt(
        self, user: User, remote: Any
    ) -> None:
        fund(user, 10)
        remote.meet("reserve_credits", "unsent")
        with guard(user, 25) as work:
            work.charge(0)
        assert states() == ["committed"]
        assert movements() == []

    def test_without_a_hold_nothing_is_sent_past_the_journal(
        self,
        user: User,
        customer: Any,
        remote: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def down(*args: Any, **kwargs: Any) -> Any:
            raise OperationalError("the database is down")

        remote.meet("reserve_credits", "unsent")
        work = guard(user, 25)
        work.lifecycle.reserve()
        monkeypatch.setattr(journal, "record_success", down)
        with pytest.raises(OperationalError):
            work.lifecycle.succeed()
        assert "commit_reservation" not in remote.operations()
        assert "ran on trust" in caplog.text

    def test_in_a_transaction_of_the_callers(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", "unsent")
        with transaction.atomic(), guard(user, 25, durable=False):
            pass
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)

    def test_a_joined_ledger_whose_database_failed(
        self,
        user: User,
        joined: None,
        settings: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        customer = fund(user)
        perform, failed = service.perform, []

        def fails_once(*args: Any) -> Any:
            if not failed:
                failed.append(args)
                raise OperationalError("database is locked")
            return perform(*args)

        monkeypatch.setattr(service, "perform", fails_once)
        with guard(user, 25):
            assert states() == ["reserved"]
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
        assert movements() == ["reserved", "committed"]


class TestOnTrustInViews:
    @pytest.fixture(autouse=True)
    def cap(self, settings: Any, remote: Any, user: User) -> None:
        settings.METERLY = {**settings.METERLY, "UNAVAILABLE_CAP": 30}
        fund(user)

    def test_the_views_option_stands_above_the_setting(
        self, client: Any, user: User, remote: Any
    ) -> None:
        client.force_login(user)
        remote.meet("reserve_credits", "unsent", "unsent", "unsent")
        assert client.post("/allow").content == b"held"
        assert client.post("/plain").status_code == 503
        assert states() == ["commit_pending", "failed"]

    @in_loop
    async def test_async_views_as_well(
        self, async_client: Any, user: User, remote: Any
    ) -> None:
        await async_client.aforce_login(user)
        remote.meet("reserve_credits", *["unsent"] * 4)
        assert (await async_client.post("/aallow")).content == b"held"
        response = await async_client.post("/aallow")
        assert response.status_code == 503
        assert response["Retry-After"]

    def test_under_atomic_requests(
        self, client: Any, user: User, remote: Any, any_requests: bool
    ) -> None:
        client.force_login(user)
        remote.meet("reserve_credits", "lost", "lost")
        assert client.post("/allow").content == b"held"
        assert states() == ["commit_pending"]
        sweep()
        assert states() == ["committed"]
        assert movements() == ["reserved", "committed"]


class TestShadow:
    @pytest.fixture(autouse=True)
    def shadow(self, settings: Any, any_ledger: Any) -> None:
        settings.METERLY = {**settings.METERLY, "ENFORCEMENT": "shadow"}

    @pytest.fixture
    def denials(self) -> Any:
        heard: list[dict[str, Any]] = []

        def receive(**kwargs: Any) -> None:
            heard.append(kwargs)

        signals.would_deny.connect(receive)
        signals.credits_denied.connect(receive)
        yield heard
        signals.would_deny.disconnect(receive)
        signals.credits_denied.disconnect(receive)

    def test_who_can_pay_pays(self, user: User, denials: Any) -> None:
        customer = fund(user)
        with guard(user, 25):
            pass
        with pytest.raises(ZeroDivisionError), guard(user, 25):
            raise ZeroDivisionError
        assert states() == ["committed", "released"]
        assert balance(customer) == (75, 0)
        assert denials == []

    def test_who_cannot_pay_is_let_through_and_put_on_record(
        self, user: User, denials: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        customer = fund(user, 10)
        with guard(user, 25, reference="poster-1") as work:
            assert work.available == 0
            work.charge(20)
        assert states() == ["denied"]
        assert balance(customer) == (10, 0)
        [denial] = denials
        assert denial["signal"] is signals.would_deny
        assert denial["customer"] == customer
        assert (denial["unit"], denial["amount"]) == ("image_credits", 25)
        assert denial["reference"] == "poster-1"
        assert isinstance(denial["error"], MeterlyInsufficientCreditsError)
        assert "poster-1 would have been denied" in caplog.text
        with pytest.raises(MeterlyUsageError, match="too late"):
            work.charge(1)
        with pytest.raises(MeterlyUsageError, match="one piece of work"), work:
            pass
        assert sweep() == (0, 0)

    def test_failing_work_raises_its_own_exception(
        self, user: User, denials: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        fund(user, 10)
        with pytest.raises(ZeroDivisionError), guard(user, 25):
            raise ZeroDivisionError
        assert states() == ["denied"]
        assert "released" not in caplog.text

    @in_loop
    async def test_async_blocks_as_well(self, user: User, denials: Any) -> None:
        async with guard(user, 25):
            pass
        assert len(denials) == 1

    def test_duplicates_run_uncharged(self, user: User, denials: Any) -> None:
        customer = fund(user)
        for _ in range(2):
            with guard(user, 25, idempotency_key="order-1"):
                pass
        assert balance(customer) == (75, 0)
        assert [type(d["error"]) for d in denials] == [MeterlyDuplicateError]

    def test_keys_that_are_none_run_uncharged(self, user: User, denials: Any) -> None:
        with guard(user, 25, idempotency_key="a b"):
            pass
        assert states() == []
        assert [type(d["error"]) for d in denials] == [MeterlyInvalidKeyError]

    def test_wrong_use_raises(self, user: User, denials: Any) -> None:
        with transaction.atomic(), pytest.raises(MeterlyUsageError):
            guard(user, 25).lifecycle.reserve()
        with pytest.raises(ValueError, match="amount"):
            guard(user, 0)
        assert denials == []

    def test_views_let_everybody_through(
        self, client: Any, user: User, denials: Any, any_requests: bool
    ) -> None:
        assert client.post("/plain").content == b"free"
        client.force_login(user)
        assert client.post("/plain").content == b"free"
        assert client.post("/keyed", {"key": "a b"}).content == b"free"
        assert client.post("/enforced").status_code == 402
        fund(user)
        assert client.post("/plain").content == b"held"
        assert states() == ["denied", "denied", "committed"]
        nobody, poor, _, enforced = denials
        assert nobody["customer"] is None
        assert type(nobody["error"]) is MeterlyError
        assert poor["reference"].startswith("view:")
        assert enforced["signal"] is signals.credits_denied

    @in_loop
    async def test_async_views_let_everybody_through(
        self, async_client: Any, user: User, denials: Any
    ) -> None:
        assert (await async_client.post("/aplain")).content == b"free"
        await async_client.aforce_login(user)
        assert (await async_client.post("/aplain")).content == b"free"
        assert len(denials) == 2


def test_an_outage_in_shadow_lets_work_run_uncharged(
    user: User, remote: Any, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "ENFORCEMENT": "shadow"}
    customer = fund(user)
    for fault in ("unsent", "unanswered"):
        remote.meet("reserve_credits", fault)
        with guard(user, 25):
            pass
    assert states() == ["failed", "intent"]
    sweep()
    assert states() == ["failed", "released"]
    assert balance(customer) == (100, 0)


class TestOff:
    @pytest.fixture(autouse=True)
    def off(self, settings: Any) -> None:
        # Without an API key: a developer's machine.
        settings.METERLY = {"DEFAULT_UNIT": "image_credits", "ENFORCEMENT": "off"}

    def test_nothing_is_asked_and_nothing_written(self, user: User) -> None:
        with CaptureQueriesContext(connection) as log:
            with guard(user, 25, idempotency_key="a b") as work:
                assert (work.available, work.lifecycle.charge) == (0, 25)
                with pytest.raises(ValueError, match="amount"):
                    work.charge(1.5)  # type: ignore[arg-type]
                work.charge(20)
                assert work.lifecycle.charge == 20
                work.release()
            with pytest.raises(ZeroDivisionError), guard(user, 25):
                raise ZeroDivisionError
            with guard(None, 25):
                pass
        assert list(log) == []
        assert work.reservation is None
        with pytest.raises(MeterlyUsageError, match="too late"):
            work.charge(1)
        with pytest.raises(MeterlyUsageError, match="one piece of work"), work:
            pass

    @in_loop
    async def test_async_blocks_as_well(self, user: User) -> None:
        async with guard(user, 25) as work:
            work.charge(20)
        assert work.reservation is None

    def test_views_are_free_for_everybody(
        self, client: Any, user: User, any_requests: bool
    ) -> None:
        assert client.post("/plain", {"used": 30}).content == b"free"
        client.force_login(user)
        assert client.post("/keyed", {"key": "a b"}).content == b"free"
        assert not Reservation.objects.exists()
        assert not Customer.objects.exists()

    def test_the_guard_is_made_when_the_view_uses_it(
        self, client: Any, any_requests: bool
    ) -> None:
        ASKED.clear()
        answer = client.post("/unused")
        assert (answer.content, answer["Cache-Control"]) == (b"done", "private")
        assert ASKED == []
        assert client.post("/used", {"used": 30}).content == b"free"
        assert len(ASKED) == 1

    def test_what_was_kept_of_it_ends_with_the_view(
        self, client: Any, any_requests: bool
    ) -> None:
        KEPT.clear()
        assert client.post("/kept").content == b"done"
        with pytest.raises(MeterlyUsageError, match="too late"):
            KEPT[0].charge(1)

    def test_what_is_no_response_is_refused_all_the_same(
        self, client: Any, any_requests: bool
    ) -> None:
        with pytest.raises(TypeError, match="has returned dict"):
            client.post("/told")

    @in_loop
    async def test_async_views_are_free_for_everybody(self, async_client: Any) -> None:
        assert (await async_client.post("/aplain")).content == b"free"


def test_a_view_can_be_off_by_itself(client: Any, user: User, customer: Any) -> None:
    client.force_login(user)
    assert client.post("/off").content == b"free"
    assert client.post("/plain").content == b"held"
    assert balance(customer) == (75, 0)


@pytest.mark.parametrize(
    ("name", "setting", "used", "left"),
    [
        ("capped", "charge", 40, 75),
        ("capped", "charge", 20, 80),
        ("charged", "cap", 40, 60),
        ("plain", "cap", 40, 75),
        ("plain", "charge", 40, 60),
    ],
)
def test_the_overage_of_a_view_stands_above_the_setting(
    client: Any,
    user: User,
    customer: Any,
    settings: Any,
    name: str,
    setting: str,
    used: int,
    left: int,
) -> None:
    settings.METERLY = {**settings.METERLY, "OVERAGE": setting}
    client.force_login(user)
    assert client.post(f"/{name}", {"used": used}).status_code == 200
    assert balance(customer) == (left, 0)
    assert_books_balance()


@pytest.mark.parametrize("name", ["on_unavailable", "enforcement"])
def test_policies_are_one_of_their_words(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        guard("user_1", 1, **{name: "maybe"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        meterly_guard(**{name: "maybe"})  # type: ignore[arg-type]
