from __future__ import annotations

from functools import partial

import pytest
from django.db import IntegrityError, transaction

from django_meterly import errors
from django_meterly.db import from_now
from django_meterly.ledger import customers, expiry, grants, spending
from django_meterly.ledger.idempotency import Request
from django_meterly.ledger.models import (
    Account,
    AccountQuerySet,
    Entry,
    Hold,
    LedgerCustomer,
    Record,
    Workspace,
)
from django_meterly.wire import MAX_AMOUNT
from tests.ledger.holds import numbers, reserve

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("any_path"),
    pytest.mark.database,
]


# Customers


def test_the_same_call_twice_is_one_customer(workspace):
    first, again = (
        customers.create_customer(
            workspace.pk,
            external_id="user_1",
            credit_unit="credits",
            idempotency_key="create-1",
        )
        for _ in range(2)
    )

    assert not first.replayed
    assert again.replayed
    assert again.customer_id == first.customer_id


@pytest.mark.parametrize("unit", ["credits", "pages"])
def test_a_customer_exists_whatever_its_unit(workspace, customer, unit):
    with pytest.raises(errors.MeterlyCustomerExistsError) as caught:
        customers.create_customer(
            workspace.pk,
            external_id="user_1",
            credit_unit=unit,
            idempotency_key="create-3",
        )
    assert caught.value.customer_id == customer


def test_f40_ids_that_differ_in_case_are_two_customers(workspace, customer):
    other = customers.create_customer(
        workspace.pk,
        external_id="USER_1",
        credit_unit="credits",
        idempotency_key="create-4",
    )
    assert other.customer_id != customer
    found = customers.find_customer(workspace.pk, external_id="USER_1")
    assert found is not None
    assert found.customer_id == other.customer_id


def test_f40_keys_that_differ_in_case_are_two_movements(workspace, customer):
    first = reserve(workspace, customer, 10, "key")
    second = reserve(workspace, customer, 10, "KEY")

    assert first.reservation_id != second.reservation_id
    assert numbers(workspace, customer) == (100, 20)


def test_a_new_customer_has_an_empty_account_of_its_unit(workspace):
    record = customers.create_customer(
        workspace.pk,
        external_id="user_1",
        credit_unit="credits",
        idempotency_key="create-5",
    )
    (account,) = customers.balances(workspace.pk, record.customer_id)
    assert (account.unit, account.balance, account.reserved) == ("credits", 0, 0)


def test_f42_the_key_of_a_created_customer_is_remembered(workspace):
    def create(external_id):
        return customers.create_customer(
            workspace.pk,
            external_id=external_id,
            credit_unit="credits",
            idempotency_key="create",
        )

    first = create("user_1")

    assert create("user_1").customer_id == first.customer_id
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        create("user_2")
    assert customers.find_customer(workspace.pk, external_id="user_2") is None


def test_a_refused_creation_leaves_no_record_of_its_key(workspace, customer):
    def create(external_id):
        return customers.create_customer(
            workspace.pk,
            external_id=external_id,
            credit_unit="pages",
            idempotency_key="create",
        )

    with pytest.raises(errors.MeterlyCustomerExistsError):
        create("user_1")
    assert not create("user_2").replayed


@pytest.mark.parametrize("movement_first", [True, False])
def test_f42_a_key_is_for_one_call_whether_or_not_it_moves_credits(
    workspace, customer, movement_first
):
    calls = [
        lambda: spending.use(
            workspace.pk, customer, amount=1, reference="page", idempotency_key="key"
        ),
        lambda: customers.create_customer(
            workspace.pk,
            external_id="user_2",
            credit_unit="credits",
            idempotency_key="key",
        ),
    ]
    first, second = calls if movement_first else reversed(calls)
    first()
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        second()


# Grants and adds


def test_a_grant_with_the_same_reference_and_values_is_the_first_one(
    workspace, customer
):
    again = grants.grant(
        workspace.pk,
        external_id="user_1",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="another key",
    )

    assert again.replayed
    assert again.entry_id == Entry.objects.get().public_id
    assert numbers(workspace, customer) == (100, 0)


@pytest.mark.parametrize("other", [{"amount": 99}, {"description": "a gift"}])
def test_a_grant_with_the_same_reference_and_other_values_conflicts(
    workspace, customer, other
):
    with pytest.raises(errors.MeterlyReferenceConflictError):
        grants.grant(
            workspace.pk,
            external_id="user_1",
            credit_unit="credits",
            reference="opening",
            idempotency_key="another key",
            **{"amount": 100, **other},
        )
    assert numbers(workspace, customer) == (100, 0)


def test_an_add_with_the_reference_of_a_grant_conflicts(workspace, customer):
    with pytest.raises(errors.MeterlyReferenceConflictError):
        grants.add(
            workspace.pk,
            customer,
            amount=100,
            reference="opening",
            idempotency_key="add",
        )


def test_a_reference_is_free_in_another_unit(workspace, customer):
    movement = grants.add(
        workspace.pk,
        customer,
        amount=7,
        unit="pages",
        reference="opening",
        idempotency_key="add",
    )
    assert movement.account.balance == 7
    assert [a.unit for a in customers.balances(workspace.pk, customer)] == [
        "credits",
        "pages",
    ]


def test_a_balance_past_the_largest_integer_is_refused(workspace, customer):
    room = MAX_AMOUNT - 100
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        grants.add(
            workspace.pk,
            customer,
            amount=room + 1,
            reference="much",
            idempotency_key="much",
        )
    assert "amount" in caught.value.fields

    # The refusal left no record, so the same key and reference are free.
    movement = grants.add(
        workspace.pk,
        customer,
        amount=room,
        reference="much",
        idempotency_key="much",
    )
    assert movement.account.balance == MAX_AMOUNT
    # And a full account can still be spent from.
    reserve(workspace, customer, MAX_AMOUNT)
    with pytest.raises(errors.MeterlyInsufficientCreditsError):
        reserve(workspace, customer, MAX_AMOUNT, "one more")


# Spending


def test_use_takes_credits(workspace, customer):
    movement = spending.use(
        workspace.pk, customer, amount=30, reference="page", idempotency_key="use"
    )
    assert (movement.kind, movement.balance_delta) == ("credits_used", -30)
    assert movement.account.available == 70


def test_use_does_not_take_what_is_held(workspace, customer):
    reserve(workspace, customer, 80)
    with pytest.raises(errors.MeterlyInsufficientCreditsError) as caught:
        spending.use(
            workspace.pk, customer, amount=30, reference="page", idempotency_key="use"
        )

    error = caught.value
    assert error.details == {
        "required": 30,
        "available": 20,
        "reserved": 80,
        "unit": "credits",
    }
    assert error.held_by_running_work
    assert numbers(workspace, customer) == (100, 80)


def test_f41_of_two_holds_on_a_balance_for_one_the_second_is_denied(
    workspace, customer
):
    reserve(workspace, customer, 60)
    with pytest.raises(errors.MeterlyInsufficientCreditsError):
        reserve(workspace, customer, 60, "second")
    assert numbers(workspace, customer) == (100, 60)


def test_a_unit_without_an_account_has_no_credits(workspace, customer):
    with pytest.raises(errors.MeterlyInsufficientCreditsError) as caught:
        reserve(workspace, customer, 1, unit="pages")
    assert (caught.value.available, caught.value.unit) == (0, "pages")


def test_a_refused_key_succeeds_after_a_top_up(workspace, customer):
    with pytest.raises(errors.MeterlyInsufficientCreditsError):
        reserve(workspace, customer, 150)
    grants.add(
        workspace.pk, customer, amount=50, reference="top-up", idempotency_key="top-up"
    )
    assert reserve(workspace, customer, 150).account.available == 0


# Closing holds


def test_commit_charges_the_hold(workspace, customer):
    held = reserve(workspace, customer)
    done = spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")
    assert done.status == "committed"
    assert numbers(workspace, customer) == (60, 0)
    assert Hold.objects.get().closed_at is not None


@pytest.mark.parametrize("charged", [0, 15, 40])
def test_commit_of_less_gives_the_rest_back_in_one_entry(workspace, customer, charged):
    held = reserve(workspace, customer)
    spending.commit(
        workspace.pk, held.reservation_id, amount=charged, idempotency_key="commit"
    )

    assert numbers(workspace, customer) == (100 - charged, 0)
    entry = Entry.objects.latest("pk")
    assert entry.amount == charged
    assert (entry.balance_delta, entry.reserved_delta) == (-charged, -40)


def test_commit_of_more_than_the_hold_is_refused(workspace, customer):
    held = reserve(workspace, customer)
    with pytest.raises(errors.MeterlyInvalidRequestError) as caught:
        spending.commit(
            workspace.pk, held.reservation_id, amount=41, idempotency_key="commit"
        )
    assert "amount" in caught.value.fields
    assert numbers(workspace, customer) == (100, 40)


def test_release_gives_the_hold_back(workspace, customer):
    held = reserve(workspace, customer)
    done = spending.release(
        workspace.pk, held.reservation_id, idempotency_key="release"
    )
    assert done.status == "released"
    assert numbers(workspace, customer) == (100, 0)


@pytest.mark.parametrize("close", [spending.commit, spending.release])
def test_closing_twice_moves_once_even_with_another_key(workspace, customer, close):
    held = reserve(workspace, customer)
    first = close(workspace.pk, held.reservation_id, idempotency_key="one")
    before = Entry.objects.count()

    again = close(workspace.pk, held.reservation_id, idempotency_key="two")

    assert again.replayed
    assert again.status == first.status
    assert Entry.objects.count() == before


def test_the_same_commit_key_with_another_amount_is_a_mismatch(workspace, customer):
    held = reserve(workspace, customer)
    spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        spending.commit(
            workspace.pk, held.reservation_id, amount=1, idempotency_key="commit"
        )


def test_a_released_hold_cannot_be_committed(workspace, customer):
    held = reserve(workspace, customer)
    spending.release(workspace.pk, held.reservation_id, idempotency_key="release")
    with pytest.raises(errors.MeterlyReservationReleasedError):
        spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")
    assert numbers(workspace, customer) == (100, 0)


def test_a_committed_hold_cannot_be_released(workspace, customer):
    held = reserve(workspace, customer)
    spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")
    with pytest.raises(errors.MeterlyReservationCommittedError):
        spending.release(workspace.pk, held.reservation_id, idempotency_key="release")
    assert numbers(workspace, customer) == (60, 0)


# Idempotency


def test_f42_a_replay_answers_with_the_balance_after_that_movement(workspace, customer):
    first = reserve(workspace, customer)
    spending.use(
        workspace.pk, customer, amount=5, reference="page", idempotency_key="use"
    )

    again = reserve(workspace, customer)

    assert again.replayed
    assert again.reservation_id == first.reservation_id
    assert again.account == first.account
    assert numbers(workspace, customer) == (95, 40)


def test_a_replayed_reserve_shows_the_present_status(workspace, customer):
    held = reserve(workspace, customer)
    spending.release(workspace.pk, held.reservation_id, idempotency_key="release")

    again = reserve(workspace, customer)

    assert again.status == "released"
    assert (again.account.balance, again.account.reserved) == (100, 40)


@pytest.mark.parametrize(
    "other", [{"amount": 41}, {"ttl_seconds": 60}, {"unit": "pages"}]
)
def test_f42_the_same_key_with_another_body_is_a_mismatch(workspace, customer, other):
    reserve(workspace, customer)
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        reserve(workspace, customer, **other)
    assert numbers(workspace, customer) == (100, 40)


def test_the_same_key_for_another_operation_is_a_mismatch(workspace, customer):
    reserve(workspace, customer)
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        spending.use(
            workspace.pk,
            customer,
            amount=40,
            reference="job-1",
            idempotency_key="reserve",
        )


def test_the_same_key_is_free_in_another_workspace(workspace, customer):
    other = Workspace.objects.create(name="other")
    movement = grants.grant(
        other.pk,
        external_id="user_1",
        amount=5,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening",
    )
    assert not movement.replayed
    assert movement.account.balance == 5


def test_f45_another_workspace_finds_nothing(workspace, customer):
    held = reserve(workspace, customer)
    other = Workspace.objects.create(name="other").pk

    for call in (
        lambda: customers.balances(other, customer),
        lambda: customers.default_balance(other, customer),
        lambda: customers.entries(other, customer),
        lambda: spending.get_reservation(other, held.reservation_id),
        lambda: spending.commit(other, held.reservation_id, idempotency_key="c"),
        lambda: spending.release(other, held.reservation_id, idempotency_key="r"),
        lambda: spending.use(
            other, customer, amount=1, reference="x", idempotency_key="u"
        ),
        lambda: grants.add(
            other, customer, amount=1, reference="x", idempotency_key="a"
        ),
        lambda: spending.reserve(
            other, customer, amount=1, reference="x", idempotency_key="v"
        ),
    ):
        with pytest.raises(errors.MeterlyNotFoundError):
            call()
    assert customers.find_customer(other, external_id="user_1") is None
    assert numbers(workspace, customer) == (100, 40)


# What the database itself refuses


def test_entries_cannot_be_changed_or_deleted(customer):
    entry = Entry.objects.get()
    for change in (
        entry.save,
        entry.delete,
        Entry.objects.all().delete,
        lambda: Entry.objects.update(amount=1),
        lambda: Entry.objects.bulk_update([entry], ["amount"]),
        Account.objects.get().entries.all().delete,
    ):
        with (
            pytest.raises(errors.MeterlyUsageError, match="append-only"),
            transaction.atomic(),
        ):
            change()
    assert Entry.objects.get().amount == 100


@pytest.mark.parametrize("change", [{"reserved": -1}, {"reserved": 101}])
def test_the_database_refuses_an_account_that_holds_more_than_it_has(customer, change):
    with pytest.raises(IntegrityError), transaction.atomic():
        Account.objects.update(**change)


def test_a_customer_with_entries_cannot_be_deleted(customer):
    with pytest.raises(IntegrityError), transaction.atomic():
        LedgerCustomer.objects.all().delete()


# Inside a caller's transaction


def test_a_movement_stands_or_falls_with_the_callers_transaction(workspace, customer):
    with transaction.atomic():
        reserve(workspace, customer)
        transaction.set_rollback(True)
    assert numbers(workspace, customer) == (100, 0)
    assert not Hold.objects.exists()


def test_f28_a_lost_race_for_a_key_does_not_poison_the_callers_transaction(
    workspace, customer, monkeypatch
):
    first = reserve(workspace, customer)
    # The first look finds nothing, as when the other call commits right after it.
    known = Request.known
    looks = iter([lambda request: None])
    monkeypatch.setattr(Request, "known", lambda request: next(looks, known)(request))

    with transaction.atomic():
        again = reserve(workspace, customer)
        assert numbers(workspace, customer) == (100, 40)

    assert again.replayed
    assert again.reservation_id == first.reservation_id
    assert Hold.objects.count() == 1


def test_a_lost_race_for_a_reference_answers_with_the_first_grant(
    workspace, customer, monkeypatch
):
    # The first look for the reference finds nothing, the unique constraint decides.
    referred = grants._referred
    looks = iter([lambda *args: None])
    monkeypatch.setattr(grants, "_referred", lambda *args: next(looks, referred)(*args))

    again = grants.grant(
        workspace.pk,
        external_id="user_1",
        amount=100,
        credit_unit="credits",
        reference="opening",
        idempotency_key="another key",
    )

    assert again.replayed
    assert numbers(workspace, customer) == (100, 0)


def test_the_last_credits_taken_by_the_same_key_are_no_refusal(
    workspace, customer, monkeypatch
):
    first = reserve(workspace, customer, 100)
    known = Request.known
    looks = iter([lambda request: None])
    monkeypatch.setattr(Request, "known", lambda request: next(looks, known)(request))

    again = reserve(workspace, customer, 100)

    assert again.reservation_id == first.reservation_id


@pytest.mark.parametrize("any_path", ["portable"], indirect=True)
def test_f75_credits_that_arrive_while_a_call_is_refused_are_spent(
    workspace, customer, monkeypatch
):
    # The first UPDATE comes too early.
    affording = AccountQuerySet.affording
    monkeypatch.setattr(
        AccountQuerySet, "affording", lambda accounts, amount: TooEarly(accounts)
    )

    class TooEarly:
        def __init__(self, accounts):
            self.accounts = accounts
            self.updates = 0

        def update(self, **change):
            self.updates += 1
            return self.updates > 1 and affording(self.accounts, 40).update(**change)

    assert reserve(workspace, customer).account.reserved == 40
    assert numbers(workspace, customer) == (100, 40)


def test_f75_a_neighbour_who_expires_the_hold_first_is_no_refusal(
    workspace, customer, monkeypatch
):
    reserve(workspace, customer, 100)
    Hold.objects.update(expires_at=from_now(-1))
    expire_due = expiry.expire_matching

    def outrun(**lookup):
        assert expiry.expire_due() == 1
        return expire_due(**lookup)

    monkeypatch.setattr(expiry, "expire_matching", outrun)

    assert reserve(workspace, customer, 70, "second").account.available == 30


# Keys of calls that are answered by an earlier call's result


def _granted(workspace, customer, *, key, amount=100, reference="opening"):
    return grants.grant(
        workspace.pk,
        external_id="user_1",
        amount=amount,
        credit_unit="credits",
        reference=reference,
        idempotency_key=key,
    )


def _added(workspace, customer, *, key, amount=7, reference="added"):
    return grants.add(
        workspace.pk,
        customer,
        amount=amount,
        reference=reference,
        idempotency_key=key,
    )


def _closed(close, workspace, customer, *, key, **options):
    # The same hold, or with another amount another hold.
    hold = "first" if options.get("amount") is None else "second"
    reservation_id = reserve(workspace, customer, 10, key=hold).reservation_id
    return close(workspace.pk, reservation_id, idempotency_key=key)


@pytest.mark.parametrize(
    "call",
    [
        _granted,
        _added,
        partial(_closed, spending.commit),
        partial(_closed, spending.release),
    ],
    ids=["grant", "add", "commit", "release"],
)
def test_f76_a_key_that_an_earlier_result_has_answered_is_remembered(
    workspace, customer, call
):
    call(workspace, customer, key="one")
    before = numbers(workspace, customer)
    for _ in range(3):
        assert call(workspace, customer, key="other").replayed
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        call(workspace, customer, key="other", amount=3)
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        spending.use(
            workspace.pk, customer, amount=1, reference="r", idempotency_key="other"
        )
    held = 10 * Hold.objects.filter(public_id__isnull=False, status="reserved").count()
    assert numbers(workspace, customer) == (before[0], held)
    assert call(workspace, customer, key="other").replayed
    assert Record.objects.filter(idempotency_key="other").count() == 1


def test_f76_a_key_answered_by_the_winner_of_a_race_is_remembered(
    workspace, customer, monkeypatch
):
    referred = grants._referred
    looks = iter([lambda *args: None])
    monkeypatch.setattr(grants, "_referred", lambda *args: next(looks, referred)(*args))
    assert _granted(workspace, customer, key="other").replayed
    with pytest.raises(errors.MeterlyIdempotencyMismatchError):
        _granted(workspace, customer, key="other", reference="a second one")
    assert numbers(workspace, customer) == (100, 0)
