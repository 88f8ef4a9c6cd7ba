"""What is announced: each fact once, when it is durable, to whoever listens."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection, connections, transaction
from django.dispatch import Signal
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_meterly import (
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    get_client,
    grants,
    guard,
    journal,
    signals,
)
from django_meterly.errors import (
    MeterlyAuthenticationError,
    MeterlyForbiddenError,
    MeterlyIdempotencyInProgressError,
    MeterlyInvalidRequestError,
    MeterlyRateLimitedError,
)
from django_meterly.journal import low_balance
from django_meterly.models import Customer, LowBalance, Reservation
from django_meterly.testing import sweep
from tests.books import balance, fund, fund_by_grant, states

if TYPE_CHECKING:
    from django.contrib.auth.models import User

pytestmark = pytest.mark.django_db(transaction=True)

NAMES = [name for name, value in vars(signals).items() if isinstance(value, Signal)]


class Heard(list[tuple[str, dict[str, Any]]]):
    """What was announced, in order."""

    def names(self) -> list[str]:
        return [name for name, _ in self]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [facts for heard, facts in self if heard == name]


@pytest.fixture
def heard() -> Any:
    heard = Heard()

    def listener(name: str) -> Any:
        def listen(signal: Signal, sender: Any, **facts: Any) -> None:
            heard.append((name, facts))
            raise RuntimeError("a receiver that raises hurts nobody")

        return listen

    listeners = {name: listener(name) for name in NAMES}
    for name, listen in listeners.items():
        getattr(signals, name).connect(listen)
    yield heard
    for name, listen in listeners.items():
        getattr(signals, name).disconnect(listen)


class TestReservations:
    def test_a_success(self, user: User, customer: Any, heard: Heard) -> None:
        with guard(user, 25, reference="poster-1") as work:
            assert heard.names() == ["credits_reserved"]
            work.charge(20)
        assert heard.names() == ["credits_reserved", "credits_committed"]
        for _, facts in heard:
            assert set(facts) == {"reservation"}
            assert facts["reservation"].reference == "poster-1"
        committed = heard.of("credits_committed")[0]["reservation"]
        assert (committed.state, committed.charge) == ("committed", 20)

    def test_a_failure(self, user: User, customer: Any, heard: Heard) -> None:
        with pytest.raises(ZeroDivisionError), guard(user, 25):
            raise ZeroDivisionError
        assert heard.names() == ["credits_reserved", "credits_released"]

    def test_too_few_credits(self, user: User, customer: Any, heard: Heard) -> None:
        with pytest.raises(MeterlyInsufficientCreditsError) as info:
            guard(user, 101, reference="poster-1").reserve()
        [denied] = heard.of("credits_denied")
        assert denied == {
            "customer": customer,
            "unit": "image_credits",
            "amount": 101,
            "reference": "poster-1",
            "error": info.value,
        }
        assert len(heard) == 1

    def test_a_ledger_that_cannot_be_asked(
        self, user: User, remote: Any, heard: Heard
    ) -> None:
        fund(user)
        heard.clear()
        remote.meet("reserve_credits", "unsent")
        with pytest.raises(MeterlyUnavailableError) as info:
            guard(user, 25).reserve()
        assert heard.names() == ["ledger_unreachable", "credits_denied"]
        assert heard.of("credits_denied")[0]["error"] is info.value

    def test_on_trust_nothing_is_reserved(
        self, user: User, remote: Any, heard: Heard, settings: Any
    ) -> None:
        settings.METERLY = {**settings.METERLY, "UNAVAILABLE_CAP": 25}
        fund(user)
        heard.clear()
        remote.meet("reserve_credits", "unsent")
        with guard(user, 25, on_unavailable="allow"):
            pass
        assert heard.names() == [
            "ledger_unreachable",
            "ledger_reachable",
            "credits_committed",
        ]

    def test_they_wait_for_the_commit(
        self, user: User, joined: None, heard: Heard
    ) -> None:
        fund(user)
        heard.clear()
        with transaction.atomic(), guard(user, 25, durable=False):
            pass
        assert heard.names() == ["credits_reserved", "credits_committed"]
        heard.clear()
        with transaction.atomic():
            with guard(user, 25, durable=False):
                pass
            transaction.set_rollback(True)
        assert heard == []

    def test_a_debt_that_is_paid_is_announced_once_each(
        self, user: User, remote: Any, heard: Heard
    ) -> None:
        customer = fund_by_grant(user)
        heard.clear()
        with guard(user, 90):
            sweep()
            get_client().use_credits(str(customer.customer_id), 50)
        sweep()
        fund_by_grant(user, 50)
        sweep()
        sweep()
        assert heard.names() == [
            "credits_reserved",
            "credits_released",
            "reservation_unbilled",
            "credits_granted",
            "credits_committed",
        ]

    def test_of_two_settlers_the_one_that_was_first_says_so(
        self, user: User, remote: Any, heard: Heard
    ) -> None:
        fund(user)
        remote.meet("commit_reservation", "lost")
        with guard(user, 25):
            pass
        heard.clear()
        first, second = Reservation.objects.get(), Reservation.objects.get()
        for row in (first, second):
            journal.settle(get_client(), row, timeout=None)
        assert heard.names() == ["ledger_reachable", "credits_committed"]

    def test_of_two_sweepers_at_once_one_says_so(
        self, user: User, remote: Any, heard: Heard
    ) -> None:
        fund(user)
        remote.meet("commit_reservation", "lost")
        with guard(user, 25):
            pass
        heard.clear()
        meeting = threading.Barrier(2, timeout=60)
        remote.meet("commit_reservation", meeting.wait, meeting.wait)

        def settle() -> None:
            try:
                row = Reservation.objects.select_related("customer").get()
                journal.settle(get_client(), row, timeout=None)
            finally:
                connections.close_all()

        threads = [threading.Thread(target=settle) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert states() == ["committed"]
        assert len(heard.of("credits_committed")) == 1

    def test_listening_costs_no_query(
        self, user: User, customer: Any, request: pytest.FixtureRequest
    ) -> None:
        def statements() -> int:
            with CaptureQueriesContext(connection) as log, guard(user, 25):
                pass
            return len(log)

        unheard = statements()
        heard = request.getfixturevalue("heard")
        assert statements() == unheard
        assert len(heard) == 2


class TestGrants:
    def test_a_grant(self, user: User, any_ledger: Any, heard: Heard) -> None:
        customer = fund_by_grant(user)
        [granted] = heard.of("credits_granted")
        assert granted["grant"].state == "granted"
        assert granted["grant"].customer == customer
        # Again, with the same reference: not news.
        _, new = grants.grant(
            get_client(),
            customer,
            100,
            "image_credits",
            reason="again",
            reference=granted["grant"].reference,
        )
        assert not new
        assert len(heard) == 1

    def test_a_grant_whose_answer_was_lost(
        self, user: User, remote: Any, heard: Heard
    ) -> None:
        remote.meet("grant_credits", "unanswered")
        fund_by_grant(user)
        assert heard.of("credits_granted") == []
        grants.settle_due(get_client())
        assert len(heard.of("credits_granted")) == 1
        grants.settle_due(get_client())
        assert len(heard.of("credits_granted")) == 1


class TestLowBalance:
    @pytest.fixture(autouse=True)
    def threshold(self, settings: Any, any_ledger: Any) -> None:
        settings.METERLY = {
            **settings.METERLY,
            "LOW_BALANCE": {"image_credits": 50, "tokens": 1},
            "LOW_BALANCE_COOLDOWN": dt.timedelta(hours=1),
        }

    def test_the_crossing_is_announced_once(self, user: User, heard: Heard) -> None:
        customer = fund(user)
        with guard(user, 50):
            pass
        assert heard.of("low_balance") == []
        assert not LowBalance.objects.exists()
        with guard(user, 1):
            pass
        assert heard.of("low_balance") == [
            {
                "customer": customer,
                "unit": "image_credits",
                "available": 49,
                "threshold": 50,
            }
        ]
        with guard(user, 1):
            pass
        assert len(heard.of("low_balance")) == 1

    def test_nothing_is_written_without_a_crossing(
        self, user: User, heard: Heard
    ) -> None:
        fund(user, 30)
        with CaptureQueriesContext(connection) as log, guard(user, 1):
            pass
        assert not [q for q in log if "lowbalance" in q["sql"].lower()]

    def test_nothing_is_written_when_nobody_listens(self, user: User) -> None:
        fund(user)
        with guard(user, 60):
            pass
        assert not LowBalance.objects.exists()

    def test_the_next_crossing_waits_for_the_cooldown(
        self, user: User, heard: Heard
    ) -> None:
        fund(user)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError), guard(user, 60):
                raise ZeroDivisionError
        assert len(heard.of("low_balance")) == 1
        LowBalance.objects.update(announced_at=timezone.now() - dt.timedelta(hours=2))
        with guard(user, 60):
            pass
        assert [h["available"] for h in heard.of("low_balance")] == [40, 40]

    def test_units_and_customers_are_told_apart(self, user: User, heard: Heard) -> None:
        fund(user, 60)
        fund(user, 1, "tokens")
        fund("somebody-else", 60)
        for payer, unit, amount in (
            (user, "image_credits", 20),
            (user, "tokens", 1),
            ("somebody-else", "image_credits", 20),
        ):
            with guard(payer, amount, unit):
                pass
        assert [(str(h["customer"]), h["unit"]) for h in heard.of("low_balance")] == [
            (f"user_{user.pk}", "image_credits"),
            (f"user_{user.pk}", "tokens"),
            ("somebody-else", "image_credits"),
        ]

    def test_overage_crosses_as_well(self, user: User, heard: Heard) -> None:
        customer = fund(user)
        with guard(user, 40) as work:
            work.charge(60)
        assert balance(customer) == (40, 0)
        assert [h["available"] for h in heard.of("low_balance")] == [40]

    def test_two_at_once_announce_one_crossing(self, user: User, heard: Heard) -> None:
        customer = fund(user)
        row = Reservation(customer=customer, unit="image_credits", amount=60)
        crossing = type("Balance", (), {"available": 40})()
        meeting = threading.Barrier(4, timeout=60)

        def cross() -> None:
            try:
                meeting.wait()
                low_balance.watch_balance(row, crossing, 60)
            finally:
                connections.close_all()

        threads = [threading.Thread(target=cross) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(heard.of("low_balance")) == 1

    def test_a_crossing_that_is_rolled_back_is_none(
        self, user: User, heard: Heard
    ) -> None:
        fund(user)
        with transaction.atomic():
            with guard(user, 60, durable=False):
                pass
            transaction.set_rollback(True)
        assert heard.of("low_balance") == []
        assert not LowBalance.objects.exists()


def test_on_trust_the_crossing_is_found_when_it_is_settled(
    user: User, remote: Any, heard: Heard, settings: Any
) -> None:
    settings.METERLY = {
        **settings.METERLY,
        "LOW_BALANCE": {"image_credits": 50},
        "UNAVAILABLE_CAP": 60,
    }
    fund(user)
    remote.meet("reserve_credits", "unsent", "unsent")
    with guard(user, 60, on_unavailable="allow"):
        pass
    assert heard.of("low_balance") == []
    sweep()
    assert [h["available"] for h in heard.of("low_balance")] == [40]


class TestOutages:
    @pytest.fixture(autouse=True)
    def customer(self, user: User, remote: Any) -> Customer:
        return fund(user)

    def refused(self, user: User) -> None:
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).reserve()

    def test_it_is_said_once_when_it_begins_and_when_it_ends(
        self,
        user: User,
        remote: Any,
        heard: Heard,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO)
        remote.meet("reserve_credits", "unsent", "lost", "unanswered")
        for _ in range(3):
            self.refused(user)
        said = [r for r in caplog.records if "cannot be reached" in r.message]
        assert [r.levelname for r in said] == ["WARNING"]
        # Every single one is on record, but not loudly.
        quiet = [r for r in caplog.records if "cannot be asked" in r.message]
        assert [r.levelname for r in quiet] == ["INFO"] * 3
        assert not [r for r in caplog.records if "answers again" in r.message]
        for _ in range(2):
            with guard(user, 25):
                pass
        said = [r for r in caplog.records if "answers again" in r.message]
        assert [r.levelname for r in said] == ["INFO"]
        names = [name for name in heard.names() if name.startswith("ledger")]
        assert names == ["ledger_unreachable", "ledger_reachable"]
        assert str(heard.of("ledger_unreachable")[0]["error"]) == "refused"

    @pytest.mark.parametrize(
        "no",
        [
            MeterlyInvalidRequestError("no"),
            MeterlyRateLimitedError("wait"),
            MeterlyIdempotencyInProgressError("wait"),
        ],
        ids=lambda exc: exc.code,
    )
    def test_an_answer_is_no_outage(
        self, user: User, remote: Any, heard: Heard, no: Any
    ) -> None:
        remote.meet("commit_reservation", no)
        with guard(user, 25):
            pass
        assert "ledger_unreachable" not in heard.names()

    def test_a_refusal_ends_an_outage_and_a_busy_ledger_does_not(
        self, user: User, remote: Any, heard: Heard
    ) -> None:
        remote.meet("reserve_credits", "lost", MeterlyRateLimitedError("wait"))
        self.refused(user)
        self.refused(user)
        assert not heard.of("ledger_reachable")
        with pytest.raises(MeterlyInsufficientCreditsError):
            guard(user, 101).reserve()
        assert len(heard.of("ledger_reachable")) == 1

    @pytest.mark.parametrize(
        "no", [MeterlyAuthenticationError("who?"), MeterlyForbiddenError("no scope")]
    )
    def test_a_key_that_is_not_accepted_is_an_outage_and_named(
        self,
        user: User,
        remote: Any,
        heard: Heard,
        caplog: pytest.LogCaptureFixture,
        no: Any,
    ) -> None:
        remote.meet("reserve_credits", no)
        self.refused(user)
        assert heard.of("ledger_unreachable")[0]["error"] is no
        (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert said.startswith(
            f'The ledger refused the API key (METERLY["API_KEY"]): {no.status} '
        )
