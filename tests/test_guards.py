"""``guard()`` as a context manager, against both kinds of ledger."""

from __future__ import annotations

import sqlite3
import threading
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.core.exceptions import ImproperlyConfigured
from django.db import (
    IntegrityError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from django_meterly import (
    MeterlyDuplicateError,
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    MeterlyUsageError,
    get_client,
    guard,
    journal,
    resolvers,
    signals,
)
from django_meterly.errors import (
    MeterlyApiError,
    MeterlyAuthenticationError,
    MeterlyIdempotencyInProgressError,
    MeterlyInvalidRequestError,
)
from django_meterly.ledger import expiry, postgresql
from django_meterly.ledger.models import Hold
from django_meterly.ledger.transport import LedgerTransport
from django_meterly.models import Customer, Reservation
from django_meterly.testing import (
    Altered,
    assert_books_balance,
    faults,
    lapse_leases,
    sweep,
)
from tests.books import balance, fund, movements, states


class TestWork:
    pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

    def test_success_charges_what_was_held(self, user: User, customer: Any) -> None:
        with guard(user, 25, reference="poster-1") as work:
            assert work.available == 75
            assert balance(customer) == (100, 25)
        row = Reservation.objects.get()
        assert (row.state, row.charge, row.reference) == ("committed", 25, "poster-1")
        assert row.lease_until is row.next_attempt_at is None
        assert row.settled_at is not None
        assert balance(customer) == (75, 0)
        assert_books_balance()

    @pytest.mark.parametrize(
        "exception", [SystemExit, KeyboardInterrupt, GeneratorExit]
    )
    def test_f23_every_exception_releases(
        self, user: User, customer: Any, exception: type[BaseException]
    ) -> None:
        thrown = exception("this one")
        with pytest.raises(exception) as info, guard(user, 25):
            raise thrown
        assert info.value is thrown
        assert states() == ["released"]
        assert balance(customer) == (100, 0)

    @pytest.mark.parametrize("end", ["succeed", "fail"])
    def test_f35_what_interrupts_the_settlement_leaves_the_decision(
        self,
        user: User,
        customer: Any,
        end: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        work = guard(user, 25, idempotency_key="k")
        work.lifecycle.reserve()

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LedgerTransport, "send", interrupted)
            with pytest.raises(KeyboardInterrupt):
                getattr(work.lifecycle, end)()
        pending = {"succeed": "commit_pending", "fail": "release_pending"}
        assert states() == [pending[end]]
        sweep()
        assert balance(customer) == ((75, 0) if end == "succeed" else (100, 0))

    def test_release_makes_success_free(self, user: User, customer: Any) -> None:
        with guard(user, 25) as work:
            work.release()
        assert states() == ["released"]
        assert balance(customer) == (100, 0)

    def test_a_refusal_is_on_record_and_tells_why(
        self, user: User, customer: Any
    ) -> None:
        with (
            guard(user, 90),
            pytest.raises(MeterlyInsufficientCreditsError) as info,
            guard(user, 25),
        ):
            pytest.fail("ran unpaid")
        exc = info.value
        assert (exc.required, exc.available, exc.reserved) == (25, 10, 90)
        assert (exc.unit, exc.held_by_running_work) == ("image_credits", True)
        assert sorted(states()) == ["committed", "denied"]

    def test_customers_are_owners_customers_or_external_ids(
        self, user: User, customer: Any
    ) -> None:
        for payer in (user, customer, f"user_{user.pk}"):
            with guard(payer, 1):
                pass
        assert balance(customer) == (97, 0)
        with pytest.raises(TypeError, match="A customer is"):
            guard(42, 1).lifecycle.reserve()

    def test_settling_too_late_is_refused(self, user: User, customer: Any) -> None:
        with guard(user, 25) as work:
            pass
        with pytest.raises(MeterlyUsageError, match="too late"):
            work.charge(1)
        with pytest.raises(MeterlyUsageError, match="too late"):
            work.release()
        work.lifecycle.fail()
        assert states() == ["committed"]

    def test_a_customer_known_by_id_first_gets_its_owner(self, user: User) -> None:
        Customer.objects.resolve(f"user_{user.pk}")
        assert Customer.objects.for_owner(user).owner == user
        assert Customer.objects.get().owner == user

    def test_a_guard_guards_once(self, user: User, customer: Any) -> None:
        work = guard(user, 1)
        with work:
            pass
        with pytest.raises(MeterlyUsageError, match="one piece of work"), work:
            pass
        assert balance(customer) == (99, 0)

    def test_first_use_at_once_makes_one_customer(self, user: User, db: None) -> None:
        seen: list[str] = []
        barrier = threading.Barrier(4)

        def first_use() -> None:
            barrier.wait()
            customer = Customer.objects.for_owner(user)
            seen.append(customer.register(get_client(), "image_credits"))
            connections.close_all()

        threads = [threading.Thread(target=first_use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 4
        assert len(set(seen)) == Customer.objects.count() == 1


class TestKeys:
    pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

    def test_a_committed_key_is_refused(self, user: User, customer: Any) -> None:
        with guard(user, 25, idempotency_key="order-1"):
            pass
        with pytest.raises(MeterlyDuplicateError, match="used already") as info:
            guard(user, 25, idempotency_key="order-1").lifecycle.reserve()
        assert (info.value.state, info.value.in_progress) == ("committed", False)
        assert balance(customer) == (75, 0)

    def test_a_running_key_is_refused(self, user: User, customer: Any) -> None:
        with guard(user, 25, idempotency_key="order-1"):
            with pytest.raises(MeterlyDuplicateError, match="right now") as info:
                guard(user, 25, idempotency_key="order-1").lifecycle.reserve()
            assert info.value.in_progress
        assert balance(customer) == (75, 0)

    def test_after_a_refusal_and_a_failure_the_key_may_be_tried_again(
        self, user: User, customer: Any
    ) -> None:
        with pytest.raises(MeterlyInsufficientCreditsError):
            guard(user, 250, idempotency_key="order-1").lifecycle.reserve()
        with (
            pytest.raises(ZeroDivisionError),
            guard(user, 25, idempotency_key="order-1"),
        ):
            raise ZeroDivisionError
        with guard(user, 25, idempotency_key="order-1"):
            pass
        rows = Reservation.objects.order_by("attempt")
        assert [(row.attempt, row.state) for row in rows] == [
            (1, "denied"),
            (2, "released"),
            (3, "committed"),
        ]
        assert balance(customer) == (75, 0)

    def test_wire_keys_cannot_collide(self, user: User, customer: Any) -> None:
        other = fund(User.objects.create_user("bob"))
        for payer, key in [
            (customer, "a"),
            (other, "a"),
            (customer, "a:commit"),
            (customer, "a~1"),
            (customer, "a~1:commit"),
            (customer, "a" * 200),
        ]:
            with guard(payer, 1, idempotency_key=key):
                pass
        assert balance(customer) == (95, 0)
        assert balance(other) == (99, 0)

    def test_two_at_once_run_once(self, user: User, customer: Any) -> None:
        ran: list[str] = []
        barrier = threading.Barrier(4)

        def work() -> None:
            barrier.wait()
            try:
                with guard(user, 25, idempotency_key="order-1"):
                    ran.append("ran")
            except MeterlyDuplicateError:
                ran.append("refused")
            finally:
                connections.close_all()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(ran) == ["ran", "refused", "refused", "refused"]
        assert balance(customer) == (75, 0)


class TestTransactions:
    pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

    def test_f16_an_open_transaction_is_refused_before_anything_happens(
        self, user: User, customer: Any
    ) -> None:
        with transaction.atomic(), pytest.raises(MeterlyUsageError, match="durable"):
            guard(user, 25).lifecycle.reserve()
        assert states() == []
        assert movements() == []

    def test_f16_autocommit_off_is_refused(self, user: User, customer: Any) -> None:
        transaction.set_autocommit(False)
        try:
            with pytest.raises(MeterlyUsageError, match="open transaction"):
                guard(user, 25).lifecycle.reserve()
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)
        assert states() == []

    def test_f16_not_durable_dies_with_the_transaction(
        self, user: User, joined: None
    ) -> None:
        customer = fund(user)
        with transaction.atomic():
            with guard(user, 25, durable=False):
                pass
            assert states() == ["committed"]
            transaction.set_rollback(True)
        assert states() == []
        assert balance(customer) == (100, 0)
        assert_books_balance()

    def test_f16_not_durable_lives_with_the_transaction(
        self, user: User, customer: Any
    ) -> None:
        with transaction.atomic(), guard(user, 25, durable=False):
            pass
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)

    def test_f16_not_durable_tells_a_remote_ledger_after_the_commit(
        self, user: User, remote: Any
    ) -> None:
        fund(user)
        with transaction.atomic():
            with guard(user, 25, durable=False):
                pass
            assert "commit_reservation" not in remote.operations()
        assert remote.operations()[-1] == "commit_reservation"
        assert states() == ["committed"]

    def test_f28_our_integrity_error_does_not_poison_the_callers_transaction(
        self, user: User, customer: Any
    ) -> None:
        with guard(user, 25, idempotency_key="order-1"), transaction.atomic():
            with pytest.raises(MeterlyDuplicateError):
                guard(
                    user, 25, idempotency_key="order-1", durable=False
                ).lifecycle.reserve()
            row = Reservation.objects.get()
            with pytest.raises(IntegrityError), transaction.atomic():
                Reservation.objects.create(
                    customer=row.customer,
                    unit="x",
                    amount=1,
                    key=row.key,
                    attempt=row.attempt,
                    ttl_seconds=1,
                    state="failed",
                )
            Group.objects.create(name="still works")
        assert Group.objects.count() == 1

    def test_the_embedded_ledger_costs_two_transactions(
        self, user: User, joined: None
    ) -> None:
        fund(user)
        with CaptureQueriesContext(connection) as log, guard(user, 25):
            pass
        statements = [query["sql"].partition(" ")[0] for query in log]
        if postgresql.serves("default"):
            # Each is a statement, and a transaction by itself.
            assert statements == ["WITH", "WITH"]
        else:
            assert statements.count("BEGIN") == statements.count("COMMIT") == 2

    def test_an_exception_of_the_ledgers_database_leaves_hold_and_row_or_neither(
        self, user: User, joined: None
    ) -> None:
        customer = fund(user)

        def fails(execute: Any, sql: str, *rest: Any) -> Any:
            result = execute(sql, *rest)
            if "meterly_ledger_entry" in sql or "meterly_spend_1" in sql:
                raise OperationalError("gone")
            return result

        with connection.execute_wrapper(fails), pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        # One statement was durable before its answer was lost.
        assert states() == (["reserved"] if postgresql.serves("default") else [])
        sweep()
        assert balance(customer) == (100, 0)
        assert_books_balance()

    @pytest.mark.parametrize("end", ["succeed", "fail"])
    def test_f33_who_has_lost_the_fence_moves_no_credits(
        self, user: User, customer: Any, end: str
    ) -> None:
        work = guard(user, 25)
        work.lifecycle.reserve()
        Reservation.objects.update(fence=2)
        getattr(work.lifecycle, end)()
        assert states() == ["reserved"]
        assert movements() == ["reserved"]
        assert balance(customer) == (100, 25)
        sweep()
        assert_books_balance()

    def test_a_row_that_cannot_be_written_leaves_no_hold(
        self, user: User, joined: None
    ) -> None:
        customer = fund(user)

        def fails(execute: Any, sql: str, *rest: Any) -> Any:
            if "INSERT INTO" in sql and Reservation._meta.db_table in sql:
                raise OperationalError("gone")
            return execute(sql, *rest)

        with (
            connection.execute_wrapper(fails),
            pytest.raises((OperationalError, MeterlyUnavailableError)),
        ):
            guard(user, 25).lifecycle.reserve()
        assert states() == []
        assert balance(customer) == (100, 0)
        assert_books_balance()

    # Others have more than one write lock.
    if connection.vendor == "sqlite":

        def test_a_reserve_waits_for_the_write_lock(
            self, user: User, joined: None
        ) -> None:
            customer = fund(user)
            other = sqlite3.connect(
                connection.settings_dict["NAME"],
                isolation_level=None,
                check_same_thread=False,
            )
            other.execute("BEGIN IMMEDIATE")
            release = threading.Timer(0.3, other.execute, ["ROLLBACK"])
            release.start()
            guard(user, 25).lifecycle.reserve()
            release.join()
            other.close()
            assert balance(customer) == (100, 25)

    def test_a_remote_ledger_costs_four_writes_and_two_calls(
        self, user: User, remote: Any
    ) -> None:
        fund(user)
        remote.calls.clear()
        with CaptureQueriesContext(connection) as log, guard(user, 25):
            pass
        writes = [
            query["sql"]
            for query in log
            # MySQL quotes names by another mark.
            if query["sql"]
            .replace("`", '"')
            .startswith(
                ('INSERT INTO "meterly_reservation"', 'UPDATE "meterly_reservation"')
            )
        ]
        assert len(writes) == 4
        assert remote.operations() == ["reserve_credits", "commit_reservation"]


@pytest.mark.database
class TestInTestCase(TestCase):
    def test_f16_guards_just_work(self) -> None:
        user = User.objects.create_user("alice")
        customer = fund(user)
        with guard(user, 25):
            pass
        with pytest.raises(ZeroDivisionError), guard(user, 25):
            raise ZeroDivisionError
        assert balance(customer) == (75, 0)
        assert states() == ["committed", "released"]

    def test_f16_an_atomic_block_of_the_test_is_refused(self) -> None:
        user = User.objects.create_user("alice")
        with transaction.atomic(), pytest.raises(MeterlyUsageError):
            guard(user, 25).lifecycle.reserve()


class TestLedgerTrouble:
    pytestmark = pytest.mark.django_db(transaction=True)

    @pytest.fixture
    def customer(self, user: User, remote: Any) -> Customer:
        return fund(user)

    @pytest.mark.parametrize("fault", ["lost", "unanswered"])
    def test_f01_an_unknown_reserve_runs_nothing_and_is_swept(
        self, user: User, customer: Any, remote: Any, fault: str
    ) -> None:
        remote.meet("reserve_credits", fault)
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["intent"]
        assert sweep() == (1, 1)
        assert states() == ["released"]
        assert balance(customer) == (100, 0)
        keys = {
            call.idempotency_key
            for call in remote.calls
            if call.operation == "reserve_credits"
        }
        assert len(keys) == 1

    def test_f02_a_reserve_that_was_not_sent_has_failed(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", "unsent")
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["failed"]
        assert sweep() == (0, 0)

    @pytest.mark.parametrize(
        ("refusal", "raised"),
        [
            (MeterlyAuthenticationError("no"), MeterlyUnavailableError),
            (MeterlyInvalidRequestError("no"), MeterlyInvalidRequestError),
        ],
    )
    def test_other_refusals_run_nothing(
        self,
        user: User,
        customer: Any,
        remote: Any,
        refusal: MeterlyApiError,
        raised: type[Exception],
    ) -> None:
        remote.meet("reserve_credits", refusal)
        with pytest.raises(raised):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["failed"]

    @pytest.mark.parametrize("loss", ["expired", "released"])
    @pytest.mark.parametrize("used", [25, 10, 30, 0])
    def test_f04_a_lost_hold_becomes_one_direct_debit(
        self, user: User, customer: Any, remote: Any, loss: str, used: int
    ) -> None:
        with guard(user, 25) as work:
            work.charge(used)
            _lose_hold(loss)
        assert states() == ["committed"]
        assert balance(customer) == (100 - used, 0)
        assert movements() == ["reserved", loss] + ["used"] * bool(used)
        assert sweep() == (0, 0)
        assert_books_balance()

    @pytest.mark.parametrize("fault", ["lost", "unanswered"])
    def test_f04_the_debit_is_sent_with_one_key(
        self, user: User, customer: Any, remote: Any, fault: str
    ) -> None:
        remote.meet("use_credits", fault, fault)
        with guard(user, 25):
            _lose_hold("expired")
        assert states() == ["commit_pending"]
        sweep()
        sweep()
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
        assert movements().count("used") == 1

    def test_f04_a_refused_debit_is_a_debt_and_is_collected_later(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        announced: list[Any] = []

        def receive(reservation: Reservation, **kwargs: Any) -> None:
            announced.append(reservation.pk)

        signals.reservation_unbilled.connect(receive)
        try:
            with guard(user, 90):
                _lose_hold("expired")
                get_client().use_credits(customer.customer_id, 50)
            row = Reservation.objects.get()
            assert (row.state, announced) == ("unbilled", [row.pk])
            sweep()
            assert states() == ["unbilled"]
            assert len(announced) == 1
        finally:
            signals.reservation_unbilled.disconnect(receive)
        fund(user, 100)
        sweep()
        assert states() == ["committed"]
        assert balance(customer) == (60, 0)
        assert_books_balance()

    def test_f04_work_that_outlives_its_lease_is_charged_once(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        with guard(user, 25):
            assert sweep() == (1, 1)
            assert states() == ["released"]
            assert balance(customer) == (100, 0)
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
        assert movements() == ["reserved", "released", "used"]

    def test_overage_is_charged_as_a_replayable_pair(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("use_credits", "unanswered", "unanswered")
        with guard(user, 25) as work:
            work.charge(40)
        assert states() == ["commit_pending"]
        sweep()
        sweep()
        assert balance(customer) == (60, 0)
        assert movements() == ["reserved", "committed", "used"]

    def test_f05_a_decided_release_that_finds_committed_is_a_conflict(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        with guard(user, 25) as work:
            get_client().commit_reservation(work.reservation.reservation_id)
            work.release()
        assert states() == ["conflict"]
        assert sweep() == (0, 0)

    def test_f05_a_lease_release_that_finds_committed_ends_committed(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        work = guard(user, 25)
        work.lifecycle.reserve()
        get_client().commit_reservation(work.reservation.reservation_id)
        assert sweep() == (1, 1)
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)

    def test_f05_a_reserve_that_comes_back_after_the_sweeper_runs_nothing(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        def swept() -> None:
            lapse_leases()
            assert journal.record_lapsed() == 1

        remote.meet("reserve_credits", swept)
        with pytest.raises(MeterlyUnavailableError, match="given up"):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["release_pending"]
        assert balance(customer) == (100, 0)
        sweep()
        assert states() == ["released"]
        assert movements() == ["reserved", "released"]

    def test_f05_a_hold_the_sweeper_was_refused_is_released_all_the_same(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        def swept() -> None:
            # The sweeper's replay overtakes the reserve, and finds no credits.
            get_client().use_credits(customer.customer_id, 100)
            assert sweep() == (1, 1)
            fund(user, 100)

        remote.meet("reserve_credits", swept)
        with pytest.raises(MeterlyUnavailableError, match="given up"):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["released"]
        assert balance(customer) == (100, 0)
        assert_books_balance()

    def test_a_late_success_takes_a_stuck_release_over(
        self, user: User, customer: Any, remote: Any, settings: Any
    ) -> None:
        settings.METERLY = {**settings.METERLY, "MAX_SETTLE_ATTEMPTS": 1}
        remote.meet("release_reservation", MeterlyInvalidRequestError("no"))
        remote.meet("commit_reservation", "lost")
        with guard(user, 25):
            sweep()
            assert Reservation.objects.stuck().count() == 1
        assert states() == ["commit_pending"]
        sweep()
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)

    def test_a_reserve_that_is_being_served_counts_as_unknown(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        remote.meet("reserve_credits", MeterlyIdempotencyInProgressError("wait"))
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        assert states() == ["intent"]

    def test_a_row_that_is_refused_too_often_is_marked_and_left(
        self, user: User, customer: Any, remote: Any, settings: Any
    ) -> None:
        settings.METERLY = {**settings.METERLY, "MAX_SETTLE_ATTEMPTS": 2}
        announced: list[Any] = []

        def receive(reservation: Reservation, **kwargs: Any) -> None:
            announced.append(reservation.pk)

        signals.reservation_stuck.connect(receive)
        refusal = MeterlyInvalidRequestError("no")
        remote.meet("commit_reservation", "lost", "lost", "lost", refusal, refusal)
        try:
            with guard(user, 25):
                pass
            for _ in range(3):
                sweep()
            assert not Reservation.objects.stuck()
            sweep()
        finally:
            signals.reservation_stuck.disconnect(receive)
        row = Reservation.objects.stuck().get()
        assert (row.state, announced) == ("commit_pending", [row.pk])
        assert "no" in row.last_error
        assert sweep() == (0, 0)

    def test_f29_a_database_that_stays_down_does_not_keep_the_commit_back(
        self,
        user: User,
        customer: Any,
        remote: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def down(*args: Any, **options: Any) -> Any:
            raise OperationalError("the database is down")

        work = guard(user, 25)
        work.lifecycle.reserve()
        row = Reservation.objects.get()
        monkeypatch.setattr(journal, "record_success", down)
        with pytest.raises(OperationalError):
            work.lifecycle.succeed()
        assert remote.operations()[-1] == "commit_reservation"
        assert row.wire_key("commit") in caplog.text
        monkeypatch.undo()
        assert states() == ["reserved"]
        sweep()
        assert states() == ["committed"]
        assert balance(customer) == (75, 0)
        assert movements() == ["reserved", "committed"]

    @pytest.mark.parametrize("name", ["reservationId", "customerId"])
    def test_an_id_that_cannot_be_one_runs_nothing(
        self,
        user: User,
        customer: Any,
        remote: Any,
        name: str,
    ) -> None:
        def odd(answer: Any) -> Any:
            return {**answer, name: "urn:not:ours"} if name in answer else answer

        if name == "customerId":
            Customer.objects.update(customer_id=None)
        with faults(Altered(odd)), pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()

    def test_f38_one_poison_row_does_not_stop_the_others(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        for _ in range(5):
            remote.meet("commit_reservation", "lost")
            with guard(user, 10):
                pass
        remote.meet("commit_reservation", RuntimeError("a bug of somebody's"))
        sweep()
        assert sorted(states()) == ["commit_pending", *["committed"] * 4]
        sweep()
        assert states() == ["committed"] * 5
        assert balance(customer) == (50, 0)

    def test_another_ledger_registers_the_customer_anew(
        self, user: User, customer: Any, remote: Any
    ) -> None:
        Customer.objects.update(customer_id="cus_of_another_ledger")
        with pytest.raises(MeterlyUnavailableError):
            guard(user, 25).lifecycle.reserve()
        with guard(user, 25):
            pass
        assert balance(customer) == (75, 0)


def test_owners_are_named_after_the_customer_model(settings: Any) -> None:
    # Not after their own class, which may be a proxy of it.
    settings.METERLY = {**settings.METERLY, "CUSTOMER_MODEL": "auth.Group"}
    assert resolvers.external_id(User(pk=7)) == "group_7"


class TestArguments:
    @pytest.mark.parametrize(
        "amount",
        [True, 1.5, "10", Decimal(10), float("nan"), 0, -1, 2**63, None],
        ids=repr,
    )
    def test_f11_amounts_are_positive_whole_numbers(self, amount: Any) -> None:
        with pytest.raises(ValueError, match="amount must be"):
            guard("user_1", amount)

    @pytest.mark.parametrize(
        "key", ["", " a", "a b", "é", "a\n", "\x00", "a" * 201, 7], ids=repr
    )
    def test_f11_keys_are_visible_ascii(self, key: Any) -> None:
        with pytest.raises(ValueError, match="idempotency_key must be"):
            guard("user_1", 1, idempotency_key=key)

    @pytest.mark.parametrize(
        "reference", [" a", "a ", "é", "a\nb", "a" * 256, 7], ids=repr
    )
    def test_f11_references_are_printable_ascii(self, reference: Any) -> None:
        with pytest.raises(ValueError, match="reference must be"):
            guard("user_1", 1, reference=reference)

    @pytest.mark.parametrize("ttl", [0, 86401, 1.5, True, "60"], ids=repr)
    def test_f11_hold_times_are_seconds_up_to_a_day(self, ttl: Any) -> None:
        with pytest.raises(ValueError, match="ttl_seconds must be"):
            guard("user_1", 1, ttl_seconds=ttl)

    @pytest.mark.parametrize("amount", [True, 1.5, "10", -1, 2**63], ids=repr)
    def test_f11_settled_amounts_are_whole_numbers(self, amount: Any) -> None:
        with pytest.raises(ValueError, match="amount must be"):
            guard("user_1", 1).charge(amount)

    def test_no_unit_anywhere_names_the_remedy(self, settings: Any) -> None:
        settings.METERLY = {}
        with pytest.raises(ImproperlyConfigured, match="DEFAULT_UNIT"):
            guard("user_1", 1)


def _lose_hold(how: str) -> None:
    hold = Hold.objects.get(status="reserved")
    if how == "released":
        get_client().release_reservation(hold.public_id)
    else:
        Hold.objects.filter(pk=hold.pk).update(expires_at="2020-01-01T00:00:00Z")
        expiry.expire_due()
