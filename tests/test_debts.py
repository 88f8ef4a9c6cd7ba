"""A customer who owes credits pays them before other work begins."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import IntegrityError, connection, connections
from django.http import HttpRequest, HttpResponse
from django.urls import path, reverse
from django.utils import timezone
from rest_framework.decorators import api_view
from rest_framework.response import Response

from django_meterly import (
    MeterlyDebtError,
    MeterlyDuplicateError,
    MeterlyInsufficientCreditsError,
    MeterlyUnavailableError,
    get_client,
    guard,
    journal,
    meterly_guard,
    signals,
)
from django_meterly.errors import MeterlyNotFoundError
from django_meterly.models import MAX_REASON_LENGTH, Customer, Reservation
from django_meterly.testing import assert_books_balance, lapse_leases, sweep
from tests.books import balance, fund, fund_by_grant, states

if TYPE_CHECKING:
    from django.test import Client
    from rest_framework.request import Request

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.test_debts"),
    pytest.mark.database,
]
PROBLEM = "application/problem+json"


@meterly_guard("image_credits", 2)
def draw(request: HttpRequest) -> HttpResponse:
    return HttpResponse("drawn")


@meterly_guard("image_credits", 2)
@api_view(["POST"])
def api(request: Request) -> Response:
    return Response("drawn")


urlpatterns = [path("draw/", draw), path("api/", api)]


@pytest.fixture
def debtor(user: User, any_ledger: Any) -> Customer:
    """The user, who had 10 credits, and has used 15."""
    customer = fund(user, 10)
    owe(customer)
    return customer


def owe(customer: Customer, amount: int = 5, unit: str = "image_credits") -> None:
    """Let *customer* use all credits of *unit*, and *amount* more."""
    held = balance(customer, unit)[0]
    with guard(customer, held, unit) as work:
        work.charge(held + amount)
    assert states()[-1] == "unbilled"


def free(customer: Customer) -> int:
    return balance(customer)[0]


def top_up(customer: Customer, amount: int) -> None:
    """Add credits past this project: nobody here hears of it."""
    get_client().add_credits(
        str(customer.customer_id), amount, "image_credits", f"bought-{amount}"
    )


def test_f50_who_owes_credits_starts_no_work(debtor: Customer) -> None:
    top_up(debtor, 4)
    for _ in range(2):
        with pytest.raises(MeterlyDebtError, match="owes 5 credits") as caught:
            guard(debtor, 2).lifecycle.reserve()
    error = caught.value
    assert (error.owed, error.required, error.available) == (5, 7, 4)
    assert (error.unit, error.code, error.status) == ("image_credits", "debt", 402)
    assert not error.held_by_running_work
    assert isinstance(error, MeterlyInsufficientCreditsError)
    # Whoever asks leaves no rows behind.
    assert states() == ["unbilled"]
    assert balance(debtor) == (4, 0)


def test_f50_a_top_up_made_elsewhere_is_found_by_the_next_guard(
    debtor: Customer,
) -> None:
    top_up(debtor, 8)
    with guard(debtor, 2):
        pass
    assert states() == ["committed", "committed"]
    assert balance(debtor) == (1, 0)
    assert not Customer.objects.get().owes
    assert not debtor.owes
    assert Reservation.objects.filter(owed=None).count() == 2
    assert_books_balance()


def test_f50_a_top_up_that_pays_the_debt_alone_is_a_402_of_its_own(
    debtor: Customer,
) -> None:
    top_up(debtor, 6)
    with pytest.raises(MeterlyInsufficientCreditsError) as caught:
        guard(debtor, 2).lifecycle.reserve()
    assert not isinstance(caught.value, MeterlyDebtError)
    assert states() == ["committed", "denied"]


def test_f50_a_grant_collects_at_once(debtor: Customer) -> None:
    # As the admin does it, with a customer that was read before.
    stale = Customer.objects.get()
    fund_by_grant(stale, 20)
    assert states() == ["committed"]
    assert free(debtor) == 15
    assert not Customer.objects.get().owes


def test_f50_a_grant_is_made_although_the_debt_cannot_be_collected(
    user: User, remote: Any
) -> None:
    customer = fund(user, 10)
    owe(customer)
    remote.meet("use_credits", "unsent")
    fund_by_grant(customer, 20)
    assert states() == ["unbilled"]
    assert free(customer) == 20
    with guard(customer, 1):
        pass
    assert free(customer) == 14


@pytest.mark.parametrize("collector", ["guard", "grant", "retry"])
def test_f50_stuck_debts_are_collected_too(
    collector: str, debtor: Customer, settings: Any
) -> None:
    Reservation.objects.update(stuck_at=timezone.now(), refusals=20)
    if collector == "grant":
        fund_by_grant(debtor, 20)
    elif collector == "guard":
        top_up(debtor, 20)
        with guard(debtor, 1):
            pass
    else:
        top_up(debtor, 20)
        journal.retry_stuck(Reservation.objects.all())
        sweep()
    assert states()[0] == "committed"
    assert Reservation.objects.filter(stuck_at=None).count() == len(states())


def test_f50_the_oldest_debts_are_paid_first_and_the_others_are_still_owed(
    user: User, any_ledger: Any, settings: Any
) -> None:
    customer = fund(user, 10)
    owe(customer, 3)
    settings.METERLY = {**settings.METERLY, "ON_DEBT": "allow"}
    top_up(customer, 1)
    owe(customer, 5)
    top_up(customer, 2)
    owe(customer, 7)
    del settings.METERLY["ON_DEBT"]
    top_up(customer, 4)
    with pytest.raises(MeterlyDebtError) as caught:
        guard(customer, 2).lifecycle.reserve()
    assert (caught.value.owed, caught.value.required) == (12, 14)
    assert caught.value.available == 1
    assert states() == ["committed", "unbilled", "unbilled"]
    fund_by_grant(customer, 100)
    assert states() == ["committed"] * 3
    assert free(customer) == 89
    assert_books_balance()


def test_f50_a_debt_in_one_unit_leaves_the_others_alone(debtor: Customer) -> None:
    fund_by_grant(debtor, 10, "gpu_seconds")
    with guard(debtor, 2, "gpu_seconds"):
        pass
    assert balance(debtor, "gpu_seconds") == (8, 0)
    assert Customer.objects.get(pk=debtor.pk).owes
    with pytest.raises(MeterlyDebtError):
        guard(debtor, 2).lifecycle.reserve()


def test_f50_another_customer_is_not_concerned(debtor: Customer) -> None:
    other = fund("somebody")
    with guard(other, 2):
        pass
    assert balance(other) == (98, 0)


def test_f50_a_key_that_was_used_is_a_duplicate_all_the_same(
    user: User, any_ledger: Any
) -> None:
    customer = fund(user, 10)
    with guard(customer, 10, idempotency_key="k") as work:
        work.charge(15)
    for _ in range(2):
        with pytest.raises(MeterlyDuplicateError):
            guard(customer, 10, idempotency_key="k").lifecycle.reserve()


def test_f50_on_debt_allow_lets_work_begin(debtor: Customer, settings: Any) -> None:
    settings.METERLY = {**settings.METERLY, "ON_DEBT": "allow"}
    top_up(debtor, 4)
    with guard(debtor, 2):
        pass
    assert states() == ["unbilled", "committed"]


def test_f50_shadow_mode_denies_nobody(debtor: Customer) -> None:
    denied = []

    def note(error: Exception, **kwargs: Any) -> None:
        denied.append(type(error))

    signals.would_deny.connect(note)
    try:
        with guard(debtor, 2, enforcement="shadow"):
            pass
    finally:
        signals.would_deny.disconnect(note)
    assert denied == [MeterlyDebtError]
    assert states() == ["unbilled"]


def test_f50_a_ledger_that_cannot_be_asked_for_the_debt_is_a_503(
    user: User, remote: Any
) -> None:
    customer = fund(user, 10)
    owe(customer)
    remote.meet("use_credits", "unsent")
    with pytest.raises(MeterlyUnavailableError):
        guard(customer, 2, on_unavailable="allow").lifecycle.reserve()
    assert states() == ["unbilled"]


def test_f50_a_debt_that_the_ledger_refuses_otherwise_is_owed_all_the_same(
    user: User, remote: Any
) -> None:
    customer = fund(user, 10)
    owe(customer)
    remote.meet("use_credits", MeterlyNotFoundError())
    with pytest.raises(MeterlyDebtError) as caught:
        guard(customer, 2).lifecycle.reserve()
    assert (caught.value.owed, caught.value.available) == (5, 0)


@pytest.mark.parametrize("enforcement", ["enforce", "shadow"])
def test_f50_a_debt_whose_account_the_database_refuses_is_still_a_402(
    enforcement: str, debtor: Customer, refusing: Any, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "MAX_SETTLE_ATTEMPTS": 2}
    stuck = []

    def note(reservation: Reservation, **kwargs: Any) -> None:
        stuck.append(reservation)

    signals.reservation_stuck.connect(note)
    top_up(debtor, 50)
    refusing("image_credits")
    try:
        for _ in range(4):
            if enforcement == "enforce":
                with pytest.raises(MeterlyDebtError):
                    guard(debtor, 2).lifecycle.reserve()
            else:
                with guard(debtor, 2, enforcement="shadow"):
                    pass
    finally:
        signals.reservation_stuck.disconnect(note)
    row = Reservation.objects.get()
    assert (row.state, "refused" in row.last_error) == ("unbilled", True)
    # It is stuck from the second refusal on, and that is said once.
    assert row.stuck_at
    assert stuck == [row]


def test_f50_a_stuck_debt_stays_stuck_while_the_ledger_is_out_of_reach(
    user: User, remote: Any
) -> None:
    customer = fund(user, 10)
    owe(customer)
    Reservation.objects.update(stuck_at=timezone.now(), refusals=1)
    remote.meet("use_credits", "unsent")
    with pytest.raises(MeterlyUnavailableError):
        guard(customer, 2).lifecycle.reserve()
    assert Reservation.objects.get().stuck_at


def test_an_outage_while_another_error_is_handled_is_no_refusal(
    user: User, remote: Any
) -> None:
    customer = fund(user, 10)
    remote.meet("release_reservation", "unsent")
    with pytest.raises(IntegrityError), guard(customer, 2):
        raise IntegrityError("somebody@example.com is there already")
    row = Reservation.objects.get()
    assert (row.state, row.refusals) == ("release_pending", 0)
    assert "example.com" not in row.last_error


def test_f50_a_debit_under_way_while_the_debt_is_written_off_is_logged(
    user: User, remote: Any, caplog: pytest.LogCaptureFixture
) -> None:
    customer = fund(user, 10)
    owe(customer)
    top_up(customer, 20)
    remote.meet("use_credits", lambda: journal.write_off(Reservation.objects.get()))
    journal.collect(get_client(), customer, "image_credits")
    assert "was written off while its debit was under way: 5" in caplog.text
    assert states() == ["committed"]


def test_f50_a_debt_is_never_deleted(debtor: Customer, settings: Any) -> None:
    settings.METERLY = {**settings.METERLY, "JOURNAL_RETENTION": 0.001}
    lapse_leases()
    journal.settle_due(get_client())
    assert Reservation.objects.get().stuck_at
    assert journal.prune() == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("turn", range(4))
def test_f50_a_debt_recorded_while_another_is_paid_is_not_forgotten(
    turn: int, user: User, joined: Any
) -> None:
    customer = fund(user, 10)
    owe(customer)
    top_up(customer, 5)
    barrier = threading.Barrier(2)

    def run(action: Any) -> Any:
        def runner() -> None:
            try:
                barrier.wait(10)
                action()
            finally:
                connections.close_all()

        return threading.Thread(target=runner)

    def collect() -> None:
        try:
            journal.collect(get_client(), Customer.objects.get(), "image_credits")
        except connection.OperationalError:
            pass

    # It costs nothing to hold: only what is charged above it is a debt.
    other = fund(user, 1, "gpu_seconds")
    work = guard(other, 1, "gpu_seconds")
    work.lifecycle.reserve()
    work.charge(9)
    threads = [run(collect), run(work.lifecycle.succeed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    sweep()
    owing = Reservation.objects.debts().exists()
    assert owing
    assert Customer.objects.get().owes


def test_f50_no_debt_costs_no_statement(
    user: User, joined: Any, django_assert_num_queries: Any
) -> None:
    customer = fund(user, 10)
    with guard(customer, 1):
        pass
    with django_assert_num_queries(0):
        assert not customer.owes


# What people are told


def test_f50_the_page_and_the_problem_say_what_is_owed(
    client: Client, user: User, debtor: Customer, settings: Any
) -> None:
    settings.METERLY = {**settings.METERLY, "TOP_UP_URL": "/buy/"}
    client.force_login(user)
    top_up(debtor, 4)
    page = client.post("/draw/", headers={"Accept": "text/html"})
    assert page.status_code == 402
    text = page.content.decode()
    assert "Earlier work is not paid for yet" in text
    assert "You owe 5 image_credits for earlier work, and 4 are available." in text
    assert "Owed for earlier work" in text
    assert "/buy/" in text
    answer = client.post("/draw/", headers={"Accept": PROBLEM})
    assert answer.status_code == 402
    problem = answer.json()
    assert (problem["code"], problem["owed"], problem["required"]) == ("debt", 5, 7)
    assert (problem["available"], problem["unit"]) == (4, "image_credits")
    german = client.post(
        "/draw/", headers={"Accept": "text/html", "Accept-Language": "de"}
    )
    assert german.status_code == 402


def test_f50_django_rest_framework_says_it_in_its_own_format(
    client: Client, user: User, debtor: Customer
) -> None:
    client.force_login(user)
    answer = client.post("/api/", headers={"Accept": "application/json"})
    assert answer.status_code == 402
    assert (answer.json()["code"], answer.json()["owed"]) == ("debt", 5)


# Writing off


@pytest.fixture
def staff(db: None) -> User:
    staff = User.objects.create_user("staff", is_staff=True)
    for codename in ("view_reservation", "write_off_debt"):
        staff.user_permissions.add(
            Permission.objects.get(content_type__app_label="meterly", codename=codename)
        )
    return staff


def post_write_off(client: Client, **data: Any) -> Any:
    pks = [str(pk) for pk in Reservation.objects.values_list("pk", flat=True)]
    return client.post(
        reverse("admin:meterly_reservation_changelist", urlconf="tests.urls"),
        {"action": "write_off", "_selected_action": pks, **data},
        follow=True,
    )


@pytest.mark.urls("tests.urls")
def test_f50_staff_may_write_a_debt_off(
    client: Client, staff: User, debtor: Customer
) -> None:
    client.force_login(staff)
    page = post_write_off(client).content.decode()
    assert "If you write the debt off, it is never charged" in page
    assert "5 image_credits owed" in page
    assert states() == ["unbilled"]
    for reason in ("", "  ", "x" * (MAX_REASON_LENGTH + 1)):
        again = post_write_off(client, confirmed="yes", reason=reason).content.decode()
        assert "Give a reason" in again
        assert states() == ["unbilled"]
    done = post_write_off(client, confirmed="yes", reason="our mistake")
    assert "1 debt was written off." in done.content.decode()
    row = Reservation.objects.get()
    assert (row.state, row.owed, row.charge) == ("committed", 5, 15)
    entry = LogEntry.objects.get()
    assert entry.user == staff
    assert "5 image_credits" in entry.get_change_message()
    assert "our mistake" in entry.get_change_message()
    top_up(debtor, 4)
    with guard(debtor, 2):
        pass
    assert balance(debtor) == (2, 0)
    assert_books_balance()
    nothing = post_write_off(client, confirmed="yes", reason="again")
    assert "None of these reservations is a debt." in nothing.content.decode()


@pytest.mark.urls("tests.urls")
def test_f50_writing_off_needs_its_permission(
    client: Client, staff: User, debtor: Customer
) -> None:
    staff.user_permissions.remove(Permission.objects.get(codename="write_off_debt"))
    client.force_login(staff)
    post_write_off(client, confirmed="yes", reason="mine")
    assert states() == ["unbilled"]
    assert not LogEntry.objects.exists()


def test_f50_a_key_that_was_written_off_stays_used(
    user: User, any_ledger: Any, settings: Any
) -> None:
    customer = fund(user, 10)
    with guard(customer, 10, idempotency_key="k") as work:
        work.charge(15)
    assert journal.write_off(Reservation.objects.get())
    assert not journal.write_off(Reservation.objects.get())
    settings.METERLY = {**settings.METERLY, "JOURNAL_RETENTION": 0.001}
    journal.prune()
    with pytest.raises(MeterlyDuplicateError):
        guard(customer, 10, idempotency_key="k").lifecycle.reserve()
