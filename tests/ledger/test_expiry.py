from __future__ import annotations

import datetime as dt
import weakref

import pytest
from django.core.management import CommandError, call_command
from django.db.models import F

from django_meterly import errors
from django_meterly.db import from_now
from django_meterly.ledger import customers, expiry, grants, spending
from django_meterly.ledger.models import Account, Entry, Hold
from django_meterly.ledger.tasks import expire_holds
from tests.ledger.holds import numbers, reserve

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.usefixtures("any_path"),
    pytest.mark.database,
]


def let_expire():
    Hold.objects.update(expires_at=from_now(-1))


def test_a_hold_lasts_as_long_as_asked_by_the_databases_clock(workspace, customer):
    reserve(workspace, customer, 1, "short", ttl_seconds=60)
    reserve(workspace, customer, 1, "default")
    seconds = [
        hold.expires_at - hold.created_at for hold in Hold.objects.order_by("pk")
    ]
    assert [round(span / dt.timedelta(seconds=1)) for span in seconds] == [60, 300]


def test_f43_300_expired_holds_are_free_after_one_sweep(workspace, customer, capsys):
    grants.add(
        workspace.pk, customer, amount=500, reference="more", idempotency_key="more"
    )
    for number in range(300):
        reserve(workspace, customer, 2, f"reserve-{number}")
    let_expire()

    call_command("meterly_ledger_expire", batch_size=128)

    assert capsys.readouterr().out == "300 reservations expired.\n"
    assert numbers(workspace, customer) == (600, 0)
    assert set(Hold.objects.values_list("status", flat=True)) == {"expired"}
    assert Entry.objects.filter(kind="credits_expired").count() == 300
    call_command("meterly_ledger_verify")


# No function takes part in it.
@pytest.mark.parametrize("any_path", ["portable"], indirect=True)
@pytest.mark.slow("10,000 expired holds")
def test_f43_10000_expired_holds_go_in_one_run_with_bounded_memory(
    workspace, customer, capsys
):
    account = Account.objects.get()
    Account.objects.update(balance=F("balance") + 10_000, reserved=10_000)
    for _ in range(10):
        Hold.objects.bulk_create(
            Hold(account=account, amount=1, reference="job", expires_at=from_now(-1))
            for _ in range(1000)
        )
    live = []
    sizes = []
    expire = expiry._expire

    def watched(account_id, holds):
        live.append(weakref.WeakSet(holds))
        # Those of the batches before are gone.
        sizes.append(sum(map(len, live)))
        return expire(account_id, holds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expiry, "_expire", watched)
        call_command("meterly_ledger_expire", batch_size=500)

    assert capsys.readouterr().out == "10000 reservations expired.\n"
    assert len(sizes) == 20
    assert max(sizes) <= 1000
    assert numbers(workspace, customer) == (10_100, 0)
    assert Entry.objects.filter(kind="credits_expired").count() == 10_000


def test_the_sweep_leaves_what_is_not_due(workspace, customer):
    reserve(workspace, customer)
    assert expire_holds() == 0
    assert numbers(workspace, customer) == (100, 40)


def test_the_sweep_refuses_a_batch_of_nothing():
    with pytest.raises(CommandError, match="at least 1"):
        call_command("meterly_ledger_expire", batch_size=0)


def test_an_account_that_refuses_does_not_stop_the_sweep(workspace, customer, caplog):
    reserve(workspace, customer)
    other = grants.grant(
        workspace.pk,
        external_id="user_2",
        amount=10,
        credit_unit="credits",
        reference="opening",
        idempotency_key="opening-2",
    ).account.customer_id
    reserve(workspace, other, 10, "reserve-2")
    # Somebody wrote to the table by hand: giving back 40 would go below zero.
    Account.objects.filter(customer__public_id=customer).update(reserved=1)
    let_expire()

    assert expiry.expire_due(batch_size=1) == 1
    assert numbers(workspace, other) == (10, 0)
    assert "do not expire" in caplog.text


def test_due_holds_are_given_back_when_their_credits_are_needed(workspace, customer):
    reserve(workspace, customer, 100)
    let_expire()

    assert reserve(workspace, customer, 70, "second").account.available == 30
    assert numbers(workspace, customer) == (100, 70)


def test_live_holds_are_not_given_back_when_credits_are_needed(workspace, customer):
    reserve(workspace, customer, 100)
    with pytest.raises(errors.MeterlyInsufficientCreditsError):
        reserve(workspace, customer, 70, "second")


@pytest.mark.parametrize("close", [spending.commit, spending.release])
def test_closing_a_hold_past_its_time_expires_it(workspace, customer, close):
    held = reserve(workspace, customer)
    let_expire()

    with pytest.raises(errors.MeterlyReservationExpiredError):
        close(workspace.pk, held.reservation_id, idempotency_key="close")

    assert Hold.objects.get().status == "expired"
    assert numbers(workspace, customer) == (100, 0)
    assert Entry.objects.latest("pk").kind == "credits_expired"
    # And again, now that it is recorded.
    with pytest.raises(errors.MeterlyReservationExpiredError):
        close(workspace.pk, held.reservation_id, idempotency_key="close")


def test_a_hold_past_its_time_is_shown_as_expired_before_any_sweep(workspace, customer):
    held = reserve(workspace, customer)
    let_expire()

    shown = spending.get_reservation(workspace.pk, held.reservation_id)
    replayed = reserve(workspace, customer)

    assert shown.status == replayed.status == "expired"


def test_credits_of_an_expired_hold_are_available_before_any_sweep(workspace, customer):
    over = reserve(workspace, customer, 30, "over").reservation_id
    let_expire()
    live = reserve(workspace, customer, 25, "live").reservation_id
    elsewhere = grants.add(
        workspace.pk,
        customer,
        amount=8,
        unit="pages",
        reference="pages",
        idempotency_key="pages",
    )
    reserve(workspace, customer, 7, "pages-over", unit="pages")
    Hold.objects.filter(account__unit="pages").update(expires_at=from_now(-1))
    rows = list(Account.objects.order_by("pk").values())
    entries = Entry.objects.count()

    jobs, pages = customers.balances(workspace.pk, customer)

    assert (jobs.balance, jobs.reserved, jobs.available) == (100, 25, 75)
    assert (pages.balance, pages.reserved, pages.available) == (8, 0, 8)
    assert customers.default_balance(workspace.pk, customer) == jobs
    for hold in (over, live):
        assert spending.get_reservation(workspace.pk, hold).account == jobs
    assert elsewhere.account == pages
    # To read is not to write.
    assert list(Account.objects.order_by("pk").values()) == rows
    assert Entry.objects.count() == entries
    call_command("meterly_ledger_verify")
    assert expiry.expire_due() == 2
    assert customers.balances(workspace.pk, customer) == [jobs, pages]


def test_a_hold_that_is_extended_is_reserved_again(workspace, customer):
    over = reserve(workspace, customer, 30, "over").reservation_id
    reserve(workspace, customer, 5, "other")
    Hold.objects.exclude(public_id=over).update(expires_at=from_now(-1))

    extended = spending.extend(
        workspace.pk, over, ttl_seconds=60, idempotency_key="extend"
    )

    assert (extended.account.balance, extended.account.reserved) == (100, 30)


def test_a_commit_that_moves_nothing_tells_what_is_available_now(workspace, customer):
    held = reserve(workspace, customer, 30).reservation_id
    spending.commit(workspace.pk, held, idempotency_key="commit")
    reserve(workspace, customer, 40, "over")
    let_expire()

    again = spending.commit(workspace.pk, held, idempotency_key="other")

    assert (again.account.balance, again.account.reserved) == (70, 0)


def test_a_movement_answers_with_its_entry_also_when_replayed(workspace, customer):
    reserve(workspace, customer, 30, "over")
    let_expire()

    first, again = (reserve(workspace, customer, 25, "live") for _ in range(2))

    entry = Entry.objects.latest("pk")
    assert (entry.balance_after, entry.reserved_after) == (100, 55)
    for answer in (first, again):
        assert (answer.account.balance, answer.account.reserved) == (100, 55)
    assert numbers(workspace, customer) == (100, 25)


def test_books_that_do_not_balance_are_read_all_the_same(workspace, customer):
    reserve(workspace, customer, 30)
    let_expire()
    # Somebody wrote to the table by hand.
    Account.objects.update(reserved=10)

    assert numbers(workspace, customer) == (100, 0)


@pytest.mark.parametrize("read", [customers.balances, customers.default_balance])
def test_a_balance_is_two_statements(
    workspace, customer, read, django_assert_num_queries
):
    with django_assert_num_queries(2):
        read(workspace.pk, customer)


def test_a_commit_in_time_can_be_replayed_after_the_time(workspace, customer):
    held = reserve(workspace, customer)
    spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")
    let_expire()

    again = spending.commit(workspace.pk, held.reservation_id, idempotency_key="commit")

    assert again.status == "committed"
    assert expiry.expire_due() == 0
