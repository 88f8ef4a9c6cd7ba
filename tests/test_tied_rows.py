"""Rows of ours to which a project has tied something: they never stop the others."""

from __future__ import annotations

import datetime as dt
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.db import connection, models, transaction
from django.db.models import signals as model_signals
from django.dispatch import Signal
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_meterly import get_client, grants, guard, journal, signals
from django_meterly.db import from_now
from django_meterly.journal import sweeping
from django_meterly.ledger import expiry, idempotency, seals
from django_meterly.ledger.models import Account, Entry, Hold, Record
from django_meterly.models import Customer, Grant, LowBalance, Reservation
from django_meterly.testing import assert_books_balance, lapse_leases
from tests.books import balance, fund, states
from tests.children import PATIENCE
from tests.refusing import refused

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

OLD = dt.timedelta(days=100)
TIED = "tied"


def table(model: Any) -> str:
    return str(model._meta.db_table)


# What a project can tie to a row


@contextmanager
def tables(*made: type[models.Model]) -> Iterator[None]:
    """Create the tables of models that are for this block only, and forget them."""
    with connection.schema_editor() as editor:
        for model in made:
            editor.create_model(model)
    try:
        yield
    finally:
        with connection.schema_editor() as editor:
            for model in reversed(made):
                editor.delete_model(model)
        for model in made:
            del apps.all_models["tests"][model._meta.model_name]
        apps.clear_cache()


def related(to: Any, on_delete: Any, name: str) -> Any:
    """Return a new model of the project that points *to* one of ours."""
    key = models.ForeignKey(to, on_delete=on_delete, related_name="+")
    meta = type("Meta", (), {"app_label": "tests"})

    def no_name(self: Any) -> str:
        raise RuntimeError("it has no name")

    fields = {"tied": key, "Meta": meta, "__module__": __name__, "__str__": no_name}
    return type(name, (models.Model,), fields)


def foreign_key(on_delete: Any) -> Any:
    @contextmanager
    def tie(row: Any) -> Iterator[None]:
        model = related(type(row), on_delete, "Invoice")
        with tables(model):
            model._base_manager.create(tied=row)
            yield
            model._base_manager.all().delete()

    return tie


@contextmanager
def protected_grandchild(row: Any) -> Iterator[None]:
    child = related(type(row), models.CASCADE, "Invoice")
    grandchild = related(child, models.PROTECT, "Line")
    with tables(child, grandchild):
        grandchild._base_manager.create(tied=child._base_manager.create(tied=row))
        yield
        grandchild._base_manager.all().delete()


def receiver(signal: Any) -> Any:
    @contextmanager
    def tie(row: Any) -> Iterator[None]:
        def refuse(instance: Any, **kwargs: Any) -> None:
            if instance.pk == row.pk:
                raise RuntimeError("the project refuses it")

        signal.connect(refuse, sender=type(row))
        try:
            yield
        finally:
            signal.disconnect(refuse, sender=type(row))

    return tie


def trigger(*events: str, silent: bool = False) -> Any:
    @contextmanager
    def tie(row: Any) -> Iterator[None]:
        pk = row._meta.pk.get_db_prep_value(row.pk, connection)
        condition = f"id = '{pk}'"
        with ExitStack() as ends:
            for event in events:
                ends.enter_context(refused(table(row), event, condition, silent=silent))
            yield

    return tie


UNDELETABLE = {
    "protect": foreign_key(models.PROTECT),
    "restrict": foreign_key(models.RESTRICT),
    "do_nothing": foreign_key(models.DO_NOTHING),
    "grandchild": protected_grandchild,
    "pre_delete": receiver(model_signals.pre_delete),
    "post_delete": receiver(model_signals.post_delete),
    "trigger": trigger("DELETE"),
    "silent trigger": trigger("DELETE", silent=True),
    "trigger for all": trigger("DELETE", "UPDATE"),
}
UNCHANGEABLE = {
    "trigger": trigger("UPDATE"),
    "silent trigger": trigger("UPDATE", silent=True),
}


@pytest.fixture(params=[1, 2, 200])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rows are changed at a time; the loops end with all of them."""
    monkeypatch.setattr(sweeping, "BATCH", request.param)
    return int(request.param)


def worked(customer: Customer, count: int = 3) -> list[Reservation]:
    """Return the rows of some work that succeeded long ago, one of them to be tied."""
    for number in range(count):
        reference = TIED if number == 1 else f"free-{number}"
        with guard(customer, 1, reference=reference):
            pass
    Reservation.objects.update(
        created_at=timezone.now() - OLD, settled_at=timezone.now() - OLD
    )
    return list(Reservation.objects.all())


def tied_one(rows: list[Any]) -> Any:
    (row,) = [row for row in rows if row.reference == TIED]
    return row


# The prune of the journal


@pytest.mark.parametrize("tie", UNDELETABLE.values(), ids=UNDELETABLE)
def test_f71_a_row_that_cannot_be_deleted_is_kept_and_the_others_go(
    user: User, joined: None, tie: Any, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    row = tied_one(worked(fund(user)))
    always = tie is UNDELETABLE["trigger for all"]
    with tie(row):
        assert journal.prune() == 2
        assert list(Reservation.objects.all()) == [row]
        assert f"Reservation {row.pk} is left as it is" in caplog.text
        # It is left alone for a day.
        with CaptureQueriesContext(connection) as queries:
            assert journal.prune() == 0
        deletes = [q["sql"] for q in queries if q["sql"].startswith("DELETE")]
        assert not deletes or always
        assert not journal.prunable().exists() or always
        assert journal.backlog().due == 0
    Reservation.objects.filter(next_attempt_at__gt=timezone.now()).update(
        next_attempt_at=from_now(-1)
    )
    assert journal.prune() == 1


@pytest.mark.parametrize("on_delete", [models.CASCADE, models.SET_NULL])
def test_what_the_project_lets_go_goes(
    user: User, joined: None, on_delete: Any
) -> None:
    rows = worked(fund(user))
    key = {"null": True} if on_delete is models.SET_NULL else {}
    meta = type("Meta", (), {"app_label": "tests"})
    field = models.ForeignKey(Reservation, on_delete, related_name="+", **key)
    fields = {"tied": field, "Meta": meta, "__module__": __name__}
    model: Any = type("Invoice", (models.Model,), fields)
    with tables(model):
        model.objects.create(tied=tied_one(rows))
        assert journal.prune() == 3
        assert model.objects.count() == (on_delete is models.SET_NULL)


# The sweep of the journal


@pytest.mark.parametrize("tie", UNCHANGEABLE.values(), ids=UNCHANGEABLE)
def test_f71_a_row_that_cannot_lapse_leaves_the_others(
    user: User, joined: None, tie: Any, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    customer = fund(user)
    rows = []
    for number in range(5):
        work = guard(customer, 1, reference=TIED if number == 1 else f"free-{number}")
        work.lifecycle.reserve()
        rows.append(work.reservation)
    row = tied_one(rows)
    lapse_leases()
    with tie(row):
        assert journal.record_lapsed() == 4
        assert f"Reservation {row.pk} is left as it is" in caplog.text
        assert journal.settle_due(get_client()).settled == 4
    lapse_leases()
    assert journal.sweep(get_client()) == (1, 1)
    assert states() == ["released"] * 5
    assert_books_balance()


@pytest.mark.parametrize("tie", UNCHANGEABLE.values(), ids=UNCHANGEABLE)
@pytest.mark.parametrize("count", [1, 3])
def test_f71_rows_that_cannot_be_settled_leave_the_others(
    user: User, any_ledger: Any, tie: Any, count: int, batch: int
) -> None:
    customer = fund(user)
    for number in range(6):
        guard(customer, 1, reference=f"{number}").lifecycle.reserve()
    lapse_leases()
    journal.record_lapsed()
    bad = list(Reservation.objects.order_by("reference")[:count])
    lapse_leases()
    with ExitStack() as ties:
        for row in bad:
            ties.enter_context(tie(row))
        done = journal.settle_due(get_client())
        assert (done.settled, done.outage) == (6 - count, False)
        good = Reservation.objects.exclude(pk__in=[row.pk for row in bad])
        assert set(good.values_list("state", flat=True)) == {"released"}
    lapse_leases()
    assert journal.settle_due(get_client()).settled == count
    assert balance(customer) == (100, 0)
    assert_books_balance()


@pytest.mark.parametrize("tie", UNCHANGEABLE.values(), ids=UNCHANGEABLE)
def test_f71_a_stuck_row_that_cannot_change_leaves_the_others(
    user: User, joined: None, tie: Any, batch: int
) -> None:
    customer = fund(user)
    for number in range(3):
        guard(
            customer, 1, reference=TIED if number == 1 else "free"
        ).lifecycle.reserve()
    lapse_leases()
    journal.record_lapsed()
    Reservation.objects.update(stuck_at=timezone.now())
    row = Reservation.objects.get(reference=TIED)
    # As the admin's list has them.
    rows = Reservation.objects.filter(customer__external_id=customer.external_id)
    with tie(row):
        found = rows.select_related("customer").order_by("-created_at")
        assert journal.retry_stuck(found) == 2
    assert list(Reservation.objects.stuck()) == [row]
    assert journal.retry_stuck(Reservation.objects.all()) == 1


@contextmanager
def raising(senders: Any, which: list[Any]) -> Iterator[list[Any]]:
    """Have receivers raise whatever we send in the block; yield what they were sent."""
    sent = []

    def refuse(sender: Any, signal: Any, **kwargs: Any) -> None:
        sent.append(signal)
        raise RuntimeError("a receiver of the project's")

    for signal in which:
        for sender in senders:
            signal.connect(refuse, sender=sender)
    try:
        yield sent
    finally:
        for signal in which:
            for sender in senders:
                signal.disconnect(refuse, sender=sender)


#: Not the ledger's others: a receiver of theirs is a part of a movement, and ends it.
OURS = [*apps.get_app_config("meterly").get_models(), seals.Seal]


def test_f71_no_receiver_stops_a_round(
    user: User, any_ledger: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.METERLY = {**settings.METERLY, "LOW_BALANCE": {"image_credits": 100}}
    customer = fund(user)
    for _ in range(2):
        guard(customer, 1).lifecycle.reserve()
    charged = Reservation.objects.first()
    assert charged is not None
    journal.record_success(charged, 3)
    for number in range(2):
        grants.grant(
            None, customer, 1, "image_credits", reason="x", reference=f"{number}"
        )

    def no_name(owner: Any) -> str:
        raise RuntimeError("this user has no name")

    monkeypatch.setattr(User, "__str__", no_name)
    lapse_leases()
    named = [each for each in vars(signals).values() if isinstance(each, Signal)]
    of_models = [model_signals.pre_save, model_signals.post_save]
    with raising([None], named) as sent, raising(OURS, of_models):
        journal.sweep(get_client())
        assert grants.settle_due(get_client()) == 2
        expiry.expire_due()
        assert seals.seal_entries().entries == Entry.objects.count()
    assert signals.credits_committed in sent
    assert signals.credits_granted in sent
    assert sorted(states()) == ["committed", "released"]
    assert set(Grant.objects.values_list("state", flat=True)) == {"granted"}
    assert balance(customer) == (99, 0)
    assert_books_balance()


def test_f71_a_low_balance_that_cannot_be_recorded_leaves_the_others(
    joined: None, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "LOW_BALANCE": {"image_credits": 98}}
    announced = []

    def note(customer: Customer, **kwargs: Any) -> None:
        announced.append(customer)

    customers = [fund(name) for name in ("team_1", "team_2", "team_3")]
    for customer in customers:
        work = guard(customer, 1)
        work.lifecycle.reserve()
        assert work.reservation is not None
        journal.record_success(work.reservation, 3)
    lapse_leases()
    condition = f"customer_id = {customers[1].pk}"
    signals.low_balance.connect(note)
    try:
        with refused(table(LowBalance), "INSERT", condition):
            assert journal.settle_due(get_client()).settled == 3
    finally:
        signals.low_balance.disconnect(note)
    assert states() == ["committed"] * 3
    assert set(announced) == {customers[0], customers[2]}


if connection.vendor == "mysql":

    def test_f71_many_rows_of_a_locked_account_are_no_outage(joined: None) -> None:
        payers = [fund(f"team_{number}") for number in range(3)]
        # In whatever order, OUTAGE_AFTER of them come in a row.
        count = 2 * journal.OUTAGE_AFTER + 1
        for payer in (*[payers[0]] * count, *payers[1:]):
            guard(payer, 1).lifecycle.reserve()
        lapse_leases()
        journal.record_lapsed()
        lapse_leases()
        account = Account.objects.filter(customer__public_id=payers[0].customer_id)
        locked, over = threading.Event(), threading.Event()

        def lock() -> None:
            with transaction.atomic():
                assert account.select_for_update().get()
                locked.set()
                over.wait(PATIENCE)
            connection.close()

        thread = threading.Thread(target=lock)
        thread.start()
        try:
            assert locked.wait(PATIENCE)
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")
            done = journal.settle_due(get_client())
            assert (done.settled, done.outage) == (2, False)
        finally:
            over.set()
            thread.join()
            connection.close()


# Grants


def grant_to(*customers: Customer, unit: str = "image_credits") -> list[Grant]:
    return [
        grants.grant(None, customer, 5, unit, reason="x", reference="r")[0]
        for customer in customers
    ]


@pytest.mark.parametrize(
    ("model", "event"),
    [(Grant, "UPDATE"), (Customer, "UPDATE")],
    ids=["grant", "customer"],
)
def test_f71_a_grant_that_cannot_be_settled_leaves_the_others(
    any_ledger: Any, model: Any, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    customers = [Customer.objects.resolve(f"team_{number}") for number in range(9)]
    rows = grant_to(*customers)
    bad = rows[:5] if model is Grant else customers[:5]
    with ExitStack() as ties:
        for row in bad:
            ties.enter_context(trigger(event)(row))
        assert grants.settle_due(get_client()) == 9
    assert Grant.objects.filter(state="granted").count() == 4
    for row in rows[:5]:
        assert f"Grant {row.pk} " in caplog.text
    grants.settle_due(get_client())
    assert Grant.objects.filter(state="granted").count() == 9
    assert_books_balance()


def test_f71_grants_whose_account_is_refused_leave_the_others(
    joined: None, refusing: Any
) -> None:
    customers = [fund(f"team_{number}", unit="bad") for number in range(9)]
    grant_to(*customers[:5], unit="bad")
    grant_to(*customers[5:], unit="good")
    refusing("bad")
    assert grants.settle_due(get_client()) == 9
    granted = Grant.objects.filter(state="granted").values_list("unit", flat=True)
    assert list(granted) == ["good"] * 4


# The ledger


def expired_holds(count: int, unit: str = "image_credits") -> list[Hold]:
    customer = fund(f"team_{unit}", unit=unit)
    for _ in range(count):
        get_client().reserve_credits(
            str(customer.customer_id), 1, unit=unit, reference="r", ttl_seconds=60
        )
    Hold.objects.update(expires_at=from_now(-1))
    return list(Hold.objects.filter(account__unit=unit))


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_f71_a_hold_that_cannot_expire_leaves_the_others(
    joined: None, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    holds = [*expired_holds(4, "one"), *expired_holds(2, "other")]
    refuse = trigger("UPDATE")
    with refuse(holds[0]), refuse(holds[-1]):
        assert expiry.expire_due(size) == 4
    for bad in (holds[0], holds[-1]):
        left = f"The holds [{bad.pk}] of account {bad.account_id} do not expire"
        assert left in caplog.text
    assert expiry.expire_due(size) == 2
    assert_books_balance()


def test_f71_an_account_that_cannot_change_leaves_the_others(
    joined: None, refusing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad, _ = expired_holds(2, "bad"), expired_holds(3, "good")
    refusing("bad")
    assert expiry.expire_due() == 3
    assert f"of account {bad[0].account_id} do not expire" in caplog.text
    assert Account.objects.get(unit="good").reserved == 0


@pytest.mark.parametrize(
    "tie", [UNDELETABLE[name] for name in UNDELETABLE], ids=UNDELETABLE
)
def test_f71_a_record_that_cannot_be_deleted_leaves_the_others(
    joined: None, tie: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        get_client().create_customer(f"team_{number}", "image_credits")
    Record.objects.update(created_at=timezone.now() - OLD * 100)
    row = Record.objects.order_by("pk")[1]
    with tie(row):
        assert idempotency.prune_records() == 2
        assert list(Record.objects.all()) == [row]
        assert f"Record {row.pk} is left as it is" in caplog.text
    assert idempotency.prune_records() == 1
