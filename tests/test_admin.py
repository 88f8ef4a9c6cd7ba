"""The admin, driven as a browser drives it: pages, forms and buttons."""

from __future__ import annotations

import datetime as dt
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone, translation
from django.utils.translation import gettext_lazy

from django_meterly import get_client, grants
from django_meterly.errors import MeterlyReferenceConflictError
from django_meterly.forms import CustomerForm, GrantCreditsForm
from django_meterly.models import Customer, Grant, Reservation
from django_meterly.testing import assert_books_balance
from tests.books import balance, fund_by_grant

if TYPE_CHECKING:
    from django.http import HttpResponse

pytestmark = pytest.mark.django_db

CUSTOMERS = "/admin/meterly/customer/"
GRANTS = "/admin/meterly/grant/"
RESERVATIONS = "/admin/meterly/reservation/"
LOG_IN = "/admin/login/"


def staff(name: str, *permissions: str) -> User:
    user = User.objects.create_user(name, is_staff=True)
    user.user_permissions.set(
        Permission.objects.filter(
            content_type__app_label="meterly", codename__in=permissions
        )
    )
    return user


def browser(user: User, **options: Any) -> Client:
    client = Client(**options)
    client.force_login(user)
    return client


@pytest.fixture
def granter(db: None) -> User:
    return staff("grace", "view_customer", "view_grant", "grant_credits")


@pytest.fixture
def page(granter: User) -> Client:
    return browser(granter)


@pytest.fixture
def everything(db: None) -> Client:
    return browser(User.objects.create_superuser("root"))


@pytest.fixture
def customer(user: User) -> Customer:
    return fund_by_grant(user)


def grant_url(*customers: Customer) -> str:
    return f"{CUSTOMERS}grant-credits/?ids={','.join(str(c.pk) for c in customers)}"


def filled(client: Client, url: str, **values: Any) -> dict[str, Any]:
    """Open the form at *url* and return it filled in, ready to be sent."""
    form = client.get(url).context["form"]
    return {
        "amount": 25,
        "unit": form["unit"].value(),
        "reason": "sorry for the outage",
        "reference": str(form["reference"].value()),
        **values,
    }


def messages(response: Any) -> list[tuple[str, str]]:
    return [(m.level_tag, str(m)) for m in response.context["messages"]]


def granted() -> list[Grant]:
    """Return the grants made through the admin."""
    return list(Grant.objects.filter(reference__startswith="admin-").order_by("pk"))


def reserve(customer: Customer, **fields: Any) -> Reservation:
    return Reservation.objects.create(
        **{
            "customer": customer,
            "unit": "image_credits",
            "amount": 5,
            "reference": "render-1",
            "key": f"key-{Reservation.objects.count()}",
            "ttl_seconds": 300,
            "state": "committed",
            **fields,
        }
    )


# Granting


def test_grant_moves_credits_and_records_who_and_why(
    page: Client, granter: User, customer: Customer
) -> None:
    form = filled(page, grant_url(customer))
    response = page.post(grant_url(customer), form, follow=True)
    assert response.redirect_chain == [(f"{CUSTOMERS}{customer.pk}/change/", 302)]
    assert messages(response) == [
        ("success", f"Granted 25 image_credits to {customer}.")
    ]
    assert balance(customer) == (125, 0)
    assert_books_balance()
    (grant,) = granted()
    assert (grant.actor, grant.reason) == (granter, "sorry for the outage")
    assert grant.reference == f"admin-{form['reference']}"
    (entry,) = LogEntry.objects.all()
    assert (entry.user, entry.get_edited_object()) == (granter, customer)
    assert entry.change_message == (
        "Grant of 25 image_credits (granted): sorry for the outage"
    )


def test_grant_to_several_customers_logs_each(page: Client, customer: Customer) -> None:
    other = fund_by_grant("team_7", 1)
    action = page.post(
        CUSTOMERS,
        {"action": "grant_credits", "_selected_action": [customer.pk, other.pk]},
    )
    assert action.status_code == 302
    form = filled(
        page, action.url, amount=3, unit="gpu_seconds", new_unit="gpu_seconds"
    )
    response = page.post(action.url, form, follow=True)
    assert response.redirect_chain == [(CUSTOMERS, 302)]
    assert messages(response) == [
        ("success", "Granted 3 gpu_seconds to each of 2 customers.")
    ]
    for each in (customer, other):
        assert balance(each, "gpu_seconds") == (3, 0)
    logged = LogEntry.objects.values_list("object_id", flat=True)
    assert sorted(logged) == sorted([str(customer.pk), str(other.pk)])


def test_same_form_sent_twice_grants_once(page: Client, customer: Customer) -> None:
    form = filled(page, grant_url(customer))
    page.post(grant_url(customer), form, follow=True)
    again = page.post(grant_url(customer), form, follow=True)
    once = f"25 image_credits → {customer}"
    assert messages(again) == [
        (
            "info",
            f"This form was sent before and granted nothing new: {once} (granted).",
        )
    ]
    assert balance(customer) == (125, 0)
    assert len(granted()) == LogEntry.objects.count() == 1


def test_same_form_with_another_amount_is_an_error_with_the_first_grants_facts(
    page: Client, customer: Customer
) -> None:
    form = filled(page, grant_url(customer))
    page.post(grant_url(customer), form)
    for _ in range(2):
        again = page.post(grant_url(customer), {**form, "amount": 26})
        (error,) = again.context["form"].non_field_errors()
        assert error == (
            f"This form was sent before, for 25 image_credits → {customer} (granted). "
            "Open a new form to make another grant."
        )
        assert f"25 image_credits → {customer}" in again.content.decode()
    assert balance(customer) == (125, 0)
    assert len(granted()) == LogEntry.objects.count() == 1


def test_bulk_grant_names_the_customers_whose_grant_was_another(
    page: Client, customer: Customer
) -> None:
    others = [fund_by_grant(f"team_{number}", 1) for number in range(3)]
    form = filled(page, grant_url(customer))
    page.post(grant_url(customer), form)
    page.post(grant_url(others[0]), {**form, "amount": 30})
    # And this one is the same as before: no reason to refuse it.
    page.post(grant_url(others[1]), {**form, "amount": 5})
    form["amount"] = 5
    again = page.post(grant_url(customer, *others), form)
    errors = "".join(again.context["form"].non_field_errors())
    for first in (f"25 image_credits → {customer}", "30 image_credits → team_0"):
        assert first in errors
    assert "team_1" not in errors
    assert "team_2" not in errors
    # All or nothing: whoever corrects the form grants to all of them.
    assert len(granted()) == 3


def test_form_whose_grant_was_refused_says_so_when_it_is_sent_again(
    page: Client, customer: Customer
) -> None:
    form = filled(page, grant_url(customer), amount=2**63 - 1)
    page.post(grant_url(customer), form)
    again = page.post(grant_url(customer), form)
    (error,) = again.context["form"].non_field_errors()
    assert f"{customer} (refused)" in error


@pytest.mark.django_db(transaction=True)
def test_same_form_with_two_amounts_at_once_grants_one(
    granter: User, customer: Customer
) -> None:
    form = filled(browser(granter), grant_url(customer))
    start = threading.Barrier(2)
    pages: list[Any] = []

    def click(amount: int) -> None:
        client = browser(granter)
        try:
            start.wait()
            sent = {**form, "amount": amount}
            pages.append(client.post(grant_url(customer), sent, follow=True))
        finally:
            connection.close()

    threads = [threading.Thread(target=click, args=[amount]) for amount in (25, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (grant,) = granted()
    assert [page.status_code for page in pages] == [200, 200]
    shown = [page.content.decode() for page in pages]
    assert sum("This form was sent before, for" in page for page in shown) == 1
    assert balance(customer) == (100 + grant.amount, 0)
    assert_books_balance()


def test_grant_that_another_one_overtakes_is_named(
    page: Client, customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = filled(page, grant_url(customer), amount=30)
    reference = f"admin-{form['reference']}"
    clean = GrantCreditsForm.clean

    def clean_and_be_overtaken(self: GrantCreditsForm) -> Any:
        cleaned = clean(self)
        grants.grant(
            get_client(), customer, 25, "image_credits", reason="x", reference=reference
        )
        return cleaned

    monkeypatch.setattr(GrantCreditsForm, "clean", clean_and_be_overtaken)
    response = page.post(grant_url(customer), form, follow=True)
    ((level, text),) = messages(response)
    assert (level, f"25 image_credits → {customer}" in text) == ("error", True)
    assert balance(customer) == (125, 0)


def test_form_shown_again_grants_again(page: Client, customer: Customer) -> None:
    for _ in range(2):
        page.post(grant_url(customer), filled(page, grant_url(customer)))
    assert balance(customer) == (150, 0)


def test_form_corrected_keeps_its_reference(page: Client, customer: Customer) -> None:
    form = filled(page, grant_url(customer), reason=" ")
    response = page.post(grant_url(customer), form)
    assert response.context["form"]["reference"].value() == form["reference"]
    assert f'value="{form["reference"]}"' in response.content.decode()
    assert granted() == []


@pytest.mark.django_db(transaction=True)
def test_double_click_grants_once(granter: User, customer: Customer) -> None:
    form = filled(browser(granter), grant_url(customer))
    clients = [browser(granter) for _ in range(2)]
    start = threading.Barrier(len(clients))
    statuses: list[int] = []

    def click(client: Client) -> None:
        try:
            start.wait()
            statuses.append(client.post(grant_url(customer), form).status_code)
        finally:
            connection.close()

    threads = [threading.Thread(target=click, args=[client]) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [302, 302]
    assert balance(customer) == (125, 0)
    assert len(granted()) == LogEntry.objects.count() == 1
    assert_books_balance()


def test_new_customer_shows_the_credits_just_granted(page: Client) -> None:
    customer = Customer.objects.resolve("team_7")
    form = filled(page, grant_url(customer), amount=1234)
    response = page.post(grant_url(customer), form, follow=True)
    assert "<td>1234</td>" in response.content.decode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("amount", "0"),
        ("amount", "-5"),
        ("amount", "1.5"),
        ("amount", "NaN"),
        ("amount", str(2**63)),
        ("amount", "9" * 5000),
        ("unit", ""),
        ("unit", "_hidden"),
        ("unit", "a b"),
        ("unit", "x" * 65),
        ("reason", "   "),
        ("reason", "x" * 501),
        ("reference", ""),
        ("reference", "mine"),
    ],
)
def test_grant_out_of_bounds_is_refused_with_a_reason(
    page: Client, customer: Customer, field: str, value: str
) -> None:
    form = filled(page, grant_url(customer), **{field: value})
    response = page.post(grant_url(customer), form)
    assert response.status_code == 200
    assert list(response.context["form"].errors) == [field]
    assert "errorlist" in response.content.decode()
    assert granted() == []


def test_largest_amount_is_granted(page: Client) -> None:
    customer = Customer.objects.resolve("team_7")
    form = filled(page, grant_url(customer), amount=2**63 - 1)
    page.post(grant_url(customer), form)
    assert [grant.state for grant in granted()] == ["granted"]


def test_refused_grant_says_why(page: Client, customer: Customer) -> None:
    form = filled(page, grant_url(customer), amount=2**63 - 1)
    response = page.post(grant_url(customer), form, follow=True)
    ((level, text),) = messages(response)
    assert level == "error"
    assert str(customer) in text
    assert "invalid_request" in text
    assert [grant.state for grant in granted()] == ["refused"]
    assert "(refused)" in LogEntry.objects.get().change_message
    assert balance(customer) == (100, 0)


def test_unreachable_ledger_leaves_a_grant_the_sweeper_makes(
    page: Client, customer: Customer, settings: Any, free_port: int
) -> None:
    here = settings.METERLY
    settings.METERLY = {
        **here,
        "TRANSPORT": "django_meterly.transports.HttpTransport",
        "API_KEY": "mk_test_0123456789abcdefghijklmnopqrstuvwxyz",
        "BASE_URL": f"http://127.0.0.1:{free_port}",
        "DEADLINE": 1,
    }
    form = filled(page, grant_url(customer))
    response = page.post(grant_url(customer), form, follow=True)
    ((level, text),) = messages(response)
    assert level == "warning"
    assert "do not grant it again" in text
    # That page asked the unreachable ledger for the balances, too.
    assert response.status_code == 200
    shown = response.content.decode()
    assert "The balances cannot be shown right now." in shown
    assert "mk_test" not in shown
    again = page.post(grant_url(customer), form, follow=True)
    assert [level for level, _ in messages(again)] == ["info"]
    assert "(pending)" in LogEntry.objects.get().change_message

    settings.METERLY = here
    assert balance(customer) == (100, 0)
    grants.settle_due(get_client())
    assert balance(customer) == (125, 0)
    assert [grant.state for grant in granted()] == ["granted"]


def test_an_unreachable_ledger_is_asked_once_and_every_grant_is_on_record(
    page: Client, customer: Customer, remote: Any
) -> None:
    others = [fund_by_grant(f"team_{number}") for number in range(3)]
    everybody = grant_url(customer, *others)
    form = filled(page, everybody)
    remote.calls.clear()
    remote.meet("grant_credits", "unsent", "unsent")
    page.post(everybody, form)
    assert remote.operations() == ["grant_credits"]
    assert [grant.state for grant in granted()] == ["pending"] * 4
    grants.settle_due(get_client())
    grants.settle_due(get_client())
    assert [grant.state for grant in granted()] == ["granted"] * 4


@pytest.mark.django_db(transaction=True)
def test_atomic_requests_do_not_take_the_record_of_a_grant_away(
    granter: User, customer: Customer, remote: Any, atomic_requests: None
) -> None:
    page = browser(granter, raise_request_exception=False)
    form = filled(page, grant_url(customer))
    remote.meet("grant_credits", RuntimeError("the process is ill"))
    assert page.post(grant_url(customer), form).status_code == 500
    assert [grant.state for grant in granted()] == ["pending"]
    grants.settle_due(get_client())
    assert balance(customer) == (125, 0)


# Units


@pytest.fixture
def units(settings: Any) -> None:
    named = {"image_credits": "image credits", "gpu_seconds": gettext_lazy("Yes")}
    settings.METERLY = {**settings.METERLY, "UNITS": named}


def test_declared_units_are_chosen_by_their_names(
    page: Client, customer: Customer, units: None
) -> None:
    form = page.get(grant_url(customer)).context["form"]
    assert form["unit"].value() == "image_credits"
    html = str(form["unit"])
    assert '<option value="image_credits" selected>image credits</option>' in html
    assert '<option value="gpu_seconds">Yes</option>' in html
    sent = filled(page, grant_url(customer))
    response = page.post(grant_url(customer), sent, follow=True)
    assert messages(response) == [
        ("success", f"Granted 25 image credits to {customer}.")
    ]
    assert LogEntry.objects.get().change_message == (
        "Grant of 25 image credits (granted): sorry for the outage"
    )
    assert balance(customer) == (125, 0)


@pytest.mark.parametrize("unit", ["image_credit", "tokens", "image credits", ""])
def test_undeclared_unit_is_no_choice(
    page: Client, customer: Customer, units: None, unit: str
) -> None:
    form = filled(page, grant_url(customer), unit=unit, new_unit=unit)
    response = page.post(grant_url(customer), form)
    assert list(response.context["form"].errors) == ["unit"]
    assert granted() == []


@pytest.mark.parametrize(
    ("unit", "near"),
    [("image_credit", "image_credits"), ("Image_Credits", "image_credits"), ("x", "")],
)
def test_unit_never_seen_before_is_granted_when_the_form_is_sent_again(
    page: Client, customer: Customer, unit: str, near: str
) -> None:
    url = grant_url(customer)
    form = filled(page, url, unit=unit)
    asked = page.post(url, form)
    (error,) = asked.context["form"].errors["unit"]
    assert f"“{unit}” is a new unit" in error
    assert (f"Did you mean “{near}”?" in error) == bool(near)
    assert granted() == []

    # Another typo is another question.
    form["new_unit"] = asked.context["form"]["new_unit"].value()
    assert f'name="new_unit" value="{unit}"' in asked.content.decode()
    assert page.post(url, {**form, "unit": "y"}).context["form"].errors
    # A mistake elsewhere does not take the answer away.
    again = page.post(url, {**form, "reason": ""})
    assert list(again.context["form"].errors) == ["reason"]
    assert again.context["form"]["new_unit"].value() == unit
    assert granted() == []

    assert page.post(url, form).status_code == 302
    assert [grant.unit for grant in granted()] == [unit]
    assert balance(customer, unit) == (25, 0)
    # Now it is known.
    assert page.post(url, filled(page, url, unit=unit)).status_code == 302


@pytest.mark.parametrize("seen", ["granted", "used", "DEFAULT_UNIT", "LOW_BALANCE"])
def test_unit_that_was_seen_before_is_granted_at_once(
    page: Client, customer: Customer, settings: Any, seen: str
) -> None:
    if seen == "granted":
        fund_by_grant("team_7", 1, "gpu_seconds")
    elif seen == "used":
        reserve(customer, unit="gpu_seconds")
    else:
        value = {"DEFAULT_UNIT": "gpu_seconds", "LOW_BALANCE": {"gpu_seconds": 5}}
        settings.METERLY = {**settings.METERLY, seen: value[seen]}
    form = filled(page, grant_url(customer), unit="gpu_seconds")
    assert page.post(grant_url(customer), form).status_code == 302
    assert balance(customer, "gpu_seconds") == (25, 0)


def test_pages_call_units_what_people_do(
    everything: Client, customer: Customer, units: None
) -> None:
    row = reserve(customer)
    debt = reserve(
        customer,
        state="unbilled",
        charge=5,
        owed=5,
        next_attempt_at=timezone.now(),
    )
    grant = Grant.objects.get()
    for url, name in (
        (GRANTS, "image credits</td>"),
        (RESERVATIONS, "image credits</td>"),
        (f"{GRANTS}{grant.pk}/change/", ">image credits<"),
        (f"{RESERVATIONS}{row.pk}/change/", ">image credits<"),
        (f"{CUSTOMERS}{customer.pk}/change/", '<th scope="row">image credits</th>'),
    ):
        assert name in everything.get(url).content.decode()
    for url in (GRANTS, RESERVATIONS):
        filtered = everything.get(url, {"unit": "image_credits"})
        assert "?unit=image_credits" in filtered.content.decode()
        assert filtered.context["cl"].result_count > 0
        (unit,) = (
            spec for spec in filtered.context["cl"].filter_specs if spec.title == "unit"
        )
        choices = [choice["display"] for choice in unit.choices(filtered.context["cl"])]
        assert choices == ["All", "image credits"]
    action = {"action": "write_off", "_selected_action": [debt.pk]}
    assert (
        "5 image credits owed" in everything.post(RESERVATIONS, action).content.decode()
    )
    confirmed = {**action, "confirmed": "1", "reason": "x"}
    everything.post(RESERVATIONS, confirmed)
    logged = LogEntry.objects.get().change_message
    assert logged == "Debt of 5 image credits written off: x"


# Who may


def test_without_the_permission_there_is_neither_action_nor_button(
    page: Client, customer: Customer
) -> None:
    viewer = browser(staff("victor", "view_customer", "change_customer"))
    change = f"{CUSTOMERS}{customer.pk}/change/"
    for url, mark in ((CUSTOMERS, 'value="grant_credits"'), (change, "grant-credits/")):
        assert mark in page.get(url).content.decode()
        assert mark not in viewer.get(url).content.decode()
    viewer.post(
        CUSTOMERS, {"action": "grant_credits", "_selected_action": [customer.pk]}
    )
    form = filled(page, grant_url(customer))
    assert viewer.get(grant_url(customer)).status_code == 403
    assert viewer.post(grant_url(customer), form).status_code == 403
    assert granted() == []


def test_who_may_not_see_customers_cannot_grant_to_them(customer: Customer) -> None:
    blind = browser(staff("bob", "grant_credits"))
    assert blind.get(grant_url(customer)).status_code == 403


def test_grant_page_is_for_staff(client: Client, customer: Customer) -> None:
    assert client.get(grant_url(customer)).url.startswith(LOG_IN)
    client.force_login(User.objects.get(username="alice"))
    assert client.post(grant_url(customer)).url.startswith(LOG_IN)


def test_grant_without_a_csrf_token_is_refused(
    granter: User, customer: Customer
) -> None:
    careful = browser(granter, enforce_csrf_checks=True)
    form = filled(careful, grant_url(customer))
    assert careful.post(grant_url(customer), form).status_code == 403
    assert granted() == []
    token = careful.cookies["csrftoken"].value
    response = careful.post(grant_url(customer), {**form, "csrfmiddlewaretoken": token})
    assert response.status_code == 302
    assert len(granted()) == 1


@pytest.mark.parametrize(
    "ids", ["", "0", "abc", "1,x", "²", "-1", "9" * 40, "999999999999999999", ","]
)
def test_unknown_customers_are_answered_kindly(
    page: Client, customer: Customer, ids: str
) -> None:
    form = filled(page, grant_url(customer))
    for send in (page.get, lambda url, **kw: page.post(url, form, **kw)):
        response = send(f"{CUSTOMERS}grant-credits/?ids={ids}", follow=True)
        assert response.redirect_chain == [(CUSTOMERS, 302)]
        assert messages(response) == [
            ("error", "Not all of these customers exist. Nothing was granted.")
        ]
    assert granted() == []


def test_too_many_customers_are_answered_kindly(page: Client) -> None:
    Customer.objects.bulk_create(
        Customer(external_id=f"team_{number}") for number in range(101)
    )
    response = page.post(
        CUSTOMERS,
        {
            "action": "grant_credits",
            "_selected_action": [Customer.objects.first().pk],  # type: ignore[union-attr]
            "select_across": "1",
        },
        follow=True,
    )
    assert messages(response) == [("error", "Choose at most 100 customers at a time.")]


def test_customer_outside_the_admins_queryset_cannot_be_granted_to(
    page: Client, customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django_meterly.admin import CustomerAdmin

    monkeypatch.setattr(
        CustomerAdmin, "get_queryset", lambda *args: Customer.objects.none()
    )
    assert page.get(grant_url(customer)).url == CUSTOMERS


# Customers


def test_customer_page_shows_every_balance_with_one_call(
    page: Client, customer: Customer, remote: Any
) -> None:
    client = get_client()
    client.add_credits(str(customer.customer_id), 7, "gpu_seconds", "add-1")
    client.reserve_credits(str(customer.customer_id), 40, unit="image_credits")
    remote.calls.clear()
    shown = page.get(f"{CUSTOMERS}{customer.pk}/change/").content.decode()
    rows = re.findall(
        r'<th scope="row">(\w+)</th>\s+' + r"<td>(\d+)</td>\s+" * 3, shown
    )
    assert sorted(rows) == [
        ("gpu_seconds", "7", "0", "7"),
        ("image_credits", "100", "40", "60"),
    ]
    assert remote.operations() == ["get_balances"]


def test_customer_list_asks_the_ledger_nothing(
    page: Client, customer: Customer, remote: Any
) -> None:
    assert str(customer.customer_id) in page.get(CUSTOMERS).content.decode()
    assert remote.calls == []


def test_unregistered_customer_is_said_to_be_new(page: Client, remote: Any) -> None:
    customer = Customer.objects.resolve("team_7")
    shown = page.get(f"{CUSTOMERS}{customer.pk}/change/").content.decode()
    assert "first grant or use registers it there" in shown
    assert remote.calls == []


@pytest.mark.parametrize(
    "broken",
    [
        {"BASE_URL": "http://ledger.example"},
        {"API_KEY": None, "BASE_URL": "http://127.0.0.1"},
    ],
)
def test_misconfigured_ledger_does_not_break_the_customer_page(
    page: Client, customer: Customer, settings: Any, broken: dict[str, Any]
) -> None:
    settings.METERLY = {
        "TRANSPORT": "django_meterly.transports.HttpTransport",
        "API_KEY": "mk_test_0123456789abcdefghijklmnopqrstuvwxyz",
        **broken,
    }
    response = page.get(f"{CUSTOMERS}{customer.pk}/change/")
    assert response.status_code == 200
    assert "The balances cannot be shown" in response.content.decode()


def test_customer_unknown_to_the_ledger_does_not_break_its_page(page: Client) -> None:
    customer = Customer.objects.create(external_id="team_7", customer_id="cus_lost")
    response = page.get(f"{CUSTOMERS}{customer.pk}/change/")
    assert response.status_code == 200
    assert "404 not_found" in response.content.decode()


def test_customer_page_leads_to_that_customers_rows(everything: Client) -> None:
    alice, bob = fund_by_grant("alice"), fund_by_grant("bob")
    reserve(alice, reference="alices-work")
    reserve(bob, reference="bobs-work")
    shown = everything.get(f"{CUSTOMERS}{alice.pk}/change/").content.decode()
    for path, count in ((GRANTS, 1), (RESERVATIONS, 1)):
        (link,) = re.findall(f'href="({path}[^"]+)"', shown)
        found = everything.get(link.replace("&amp;", "&")).context["cl"].result_list
        assert [row.customer for row in found] == [alice] * count
    outsider = browser(staff("victor", "view_customer"))
    shown = outsider.get(f"{CUSTOMERS}{alice.pk}/change/").content.decode()
    assert "Credits at the ledger" in shown
    assert not re.search(f'href="({GRANTS}|{RESERVATIONS})', shown)


def added(client: Client, **values: Any) -> HttpResponse:
    return client.post(f"{CUSTOMERS}add/", {"owner": "", "external_id": "", **values})


def test_added_customer_gets_the_owners_external_id(everything: Client) -> None:
    alice = User.objects.create_user("alice")
    assert added(everything, owner=alice.pk).status_code == 302
    customer = Customer.objects.get()
    assert (customer.owner, customer.external_id) == (alice, f"user_{alice.pk}")
    assert Customer.objects.for_owner(alice) == customer
    # There is no second one.
    for external_id in ("", "team_7"):
        response = added(everything, owner=alice.pk, external_id=external_id)
        assert response.status_code == 200
        assert "Customer with this Owner already exists" in response.content.decode()
    assert Customer.objects.get() == customer


@pytest.mark.parametrize("owned", [False, True])
def test_added_customer_may_have_an_external_id_of_its_own(
    everything: Client, owned: bool
) -> None:
    alice = User.objects.create_user("alice")
    values = {"owner": alice.pk} if owned else {}
    assert added(everything, external_id="team_7", **values).status_code == 302
    customer = Customer.objects.get()
    assert customer.external_id == "team_7"
    assert (customer.owner, customer.had_owner) == (alice if owned else None, owned)
    if owned:
        assert Customer.objects.for_owner(alice) == customer


def test_added_customer_gets_no_wallet_of_a_deleted_owner(everything: Client) -> None:
    old = Customer.objects.for_owner(User.objects.create(pk=700, username="alice"))
    User.objects.get(pk=700).delete()
    heir = User.objects.create(pk=700, username="bob")
    assert added(everything, owner=heir.pk).status_code == 302
    customer = Customer.objects.get(owner=heir)
    assert (customer.external_id, old.external_id) == ("user_700~2", "user_700")
    assert Customer.objects.for_owner(heir) == customer


def test_customer_registered_beforehand_is_not_added_but_given_its_owner(
    everything: Client,
) -> None:
    alice, bob = User.objects.create_user("alice"), User.objects.create_user("bob")
    customer = Customer.objects.resolve(f"user_{alice.pk}")
    response = added(everything, owner=alice.pk)
    assert "already exists" in response.content.decode()
    url = f"{CUSTOMERS}{customer.pk}/change/"
    # An owner who has a customer already is no choice.
    Customer.objects.for_owner(bob)
    response = everything.post(url, {"owner": bob.pk})
    assert "already exists" in response.content.decode()
    assert everything.post(url, {"owner": alice.pk}).status_code == 302
    customer.refresh_from_db()
    assert (customer.owner, customer.had_owner) == (alice, True)


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "retired"])
def test_the_owner_of_a_customer_is_not_changed_to_somebody_else(
    everything: Client, owned: bool
) -> None:
    alice, bob = User.objects.create_user("alice"), User.objects.create_user("bob")
    customer = Customer.objects.for_owner(alice)
    if not owned:
        alice.delete()
    url = f"{CUSTOMERS}{customer.pk}/change/"
    for owner in (bob.pk, ""):
        assert everything.post(url, {"owner": owner}).status_code == 302
        now = Customer.objects.get()
        assert (now.owner, now.had_owner) == (alice if owned else None, True)
    assert 'name="owner"' not in everything.get(url).content.decode()


def test_a_customers_page_saves_nothing_that_it_does_not_show(
    everything: Client, customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = CustomerForm.is_valid

    def is_valid(form: CustomerForm) -> bool:
        # After the page has loaded the row.
        Customer.objects.update(owes=True, customer_id="cus_new")
        return validate(form)

    monkeypatch.setattr(CustomerForm, "is_valid", is_valid)
    url = f"{CUSTOMERS}{customer.pk}/change/"
    assert everything.post(url, {"owner": ""}).status_code == 302
    customer.refresh_from_db()
    assert (customer.owes, customer.customer_id) == (True, "cus_new")


def nameless(user: User) -> str:
    raise RuntimeError("this user has no name")


def test_f71_an_owner_without_a_name_breaks_no_page(
    everything: Client, customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fund_by_grant("team_7")
    Grant.objects.update(actor=customer.owner)
    monkeypatch.setattr(User, "__str__", nameless)
    pages = [CUSTOMERS, GRANTS, f"{CUSTOMERS}{customer.pk}/change/"]
    pages += [f"{GRANTS}{grant.pk}/change/" for grant in Grant.objects.all()]
    for path in pages:
        response = everything.get(path)
        assert response.status_code == 200
        assert f"user {customer.owner_id}" in response.content.decode()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({}, "Choose an owner, or type an external id."),
        ({"external_id": "été"}, "printable ASCII"),
        ({"owner": "987654321"}, "Select a valid choice"),
        ({"external_id": "x" * 256}, "at most 255 characters"),
    ],
)
def test_customer_without_a_usable_id_is_not_added(
    everything: Client, values: dict[str, str], error: str
) -> None:
    response = added(everything, **values)
    assert response.status_code == 200
    assert error in response.content.decode()
    assert not Customer.objects.exists()


def test_external_id_stays_and_customers_are_not_deleted(
    everything: Client, customer: Customer
) -> None:
    url = f"{CUSTOMERS}{customer.pk}/"
    posted = {"owner": "", "external_id": "other", "customer_id": "cus_other"}
    assert everything.post(f"{url}change/", posted).status_code == 302
    now = Customer.objects.get()
    assert (now.external_id, now.customer_id) == (
        customer.external_id,
        customer.customer_id,
    )
    assert now.owner == customer.owner
    assert everything.post(f"{url}delete/", {"post": "yes"}).status_code == 403
    assert "delete_selected" not in everything.get(CUSTOMERS).content.decode()


def test_customers_are_found_by_either_id(
    everything: Client, customer: Customer
) -> None:
    fund_by_grant("team_7")
    for term in (customer.external_id, customer.customer_id):
        found = everything.get(CUSTOMERS, {"q": term}).context["cl"].result_list
        assert list(found) == [customer]


# Grants and reservations


def test_grants_and_reservations_are_read_only(
    everything: Client, customer: Customer
) -> None:
    for path, row in (
        (GRANTS, Grant.objects.get()),
        (RESERVATIONS, reserve(customer)),
    ):
        assert everything.get(path).status_code == 200
        assert everything.get(f"{path}add/").status_code == 403
        response = everything.get(f"{path}{row.pk}/change/")
        assert response.status_code == 200
        assert 'name="_save"' not in response.content.decode()
        for change in ("change", "delete"):
            answer = everything.post(f"{path}{row.pk}/{change}/", {"post": "yes"})
            assert answer.status_code == 403
        nobody = browser(staff(f"nobody-{path}"))
        assert nobody.get(path).status_code == 403


@pytest.mark.parametrize("model", [Grant, Reservation])
def test_every_field_is_shown(
    everything: Client, customer: Customer, model: Any
) -> None:
    reserve(customer)
    name = model._meta.model_name
    url = reverse(f"admin:meterly_{name}_change", args=[model.objects.get().pk])
    shown = everything.get(url).content.decode()
    for field in model._meta.fields:
        if field.name == "id" and model is Grant:
            continue
        name = {"actor": "granted_by"}.get(field.name, field.name)
        assert f"field-{name}" in shown, name


def meaning_of(everything: Client, row: Reservation) -> str:
    shown = everything.get(f"{RESERVATIONS}{row.pk}/change/").content.decode()
    (meaning,) = re.findall(
        r'What this means:</label>\s*<div class="readonly">([^<]+)<', shown
    )
    return str(meaning)


@pytest.mark.parametrize(
    ("state", "word"), [("reserved", "not been sent yet"), ("released", "afterwards")]
)
def test_a_charge_that_waits_is_explained(
    everything: Client, customer: Customer, state: str, word: str
) -> None:
    now = timezone.now()
    times = {"lease_until": now, "next_attempt_at": now}
    row = reserve(customer, state=state, charge=3, **times)
    assert word in meaning_of(everything, row)
    Reservation.objects.update(charge=None)
    assert word not in meaning_of(everything, row)


@pytest.mark.parametrize("state", Reservation.State.values)
def test_every_state_is_explained(
    everything: Client, customer: Customer, state: str
) -> None:
    now = timezone.now()
    row = reserve(customer, state=state, lease_until=now, next_attempt_at=now, owed=1)
    meaning = meaning_of(everything, row)
    assert len(meaning) > 30
    assert "stuck" not in meaning
    Reservation.objects.update(stuck_at=now)
    shown = everything.get(f"{RESERVATIONS}{row.pk}/change/").content.decode()
    assert "But it is stuck" in shown


def test_reservations_are_found_and_filtered(
    everything: Client, customer: Customer
) -> None:
    stuck = reserve(
        customer,
        key="idem-77",
        reference="render 42",
        reservation_id="res_abc",
        state="commit_pending",
        next_attempt_at=timezone.now(),
        stuck_at=timezone.now(),
    )
    reserve(fund_by_grant("team_7"), unit="gpu_seconds")
    for query in (
        {"q": "render 42"},
        {"q": "idem-77"},
        {"q": "res_abc"},
        {"q": customer.external_id},
        {"q": str(stuck.pk)},
        {"stuck": "yes"},
        {"state__exact": "commit_pending"},
        {"unit": "image_credits"},
    ):
        found = everything.get(RESERVATIONS, query).context["cl"].result_list
        assert list(found) == [stuck], query
    by_age = everything.get(RESERVATIONS).context["cl"].result_list
    assert list(by_age) == list(Reservation.objects.order_by("-created_at"))
    tomorrow = timezone.now() + dt.timedelta(days=1)
    response = everything.get(RESERVATIONS, {"created_at__gte": tomorrow.isoformat()})
    assert list(response.context["cl"].result_list) == []


@pytest.mark.parametrize("path", [CUSTOMERS, GRANTS, RESERVATIONS])
def test_changelists_ask_the_same_number_of_queries_for_any_number_of_rows(
    everything: Client, path: str
) -> None:
    def add(number: int) -> None:
        owner = User.objects.create_user(f"owner-{number}")
        customer = fund_by_grant(owner)
        Grant.objects.filter(customer=customer).update(actor=owner)
        reserve(customer)

    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            assert everything.get(path).status_code == 200
        return len(captured)

    add(0)
    first = queries()
    for number in range(1, 8):
        add(number)
    assert queries() == first


def test_pages_render_in_another_language(
    everything: Client, customer: Customer
) -> None:
    row = reserve(customer)
    with translation.override("de"):
        for url in (
            CUSTOMERS,
            f"{CUSTOMERS}{customer.pk}/change/",
            grant_url(customer),
            f"{RESERVATIONS}{row.pk}/change/",
        ):
            assert everything.get(url).status_code == 200


@pytest.mark.parametrize("count", [1, 2])
def test_conflict_at_the_ledger_is_reported_for_each(
    page: Client, remote: Any, count: int
) -> None:
    customers = [fund_by_grant(f"team_{number}") for number in range(count)]
    remote.meet("grant_credits", MeterlyReferenceConflictError())
    form = filled(page, grant_url(*customers))
    response = page.post(grant_url(*customers), form, follow=True)
    levels = sorted(level for level, _ in messages(response))
    assert levels == ["error", "success"][:count]


# Stuck reservations


@pytest.fixture
def stuck(customer: Customer) -> Reservation:
    now = timezone.now()
    return reserve(
        customer,
        state="commit_pending",
        charge=5,
        next_attempt_at=now,
        stuck_at=now,
        refusals=20,
        last_error="<b>no</b>",
    )


def try_again(client: Client, *rows: Reservation, **data: Any) -> Any:
    return client.post(
        RESERVATIONS,
        {"action": "retry_stuck", "_selected_action": [r.pk for r in rows], **data},
        follow=True,
    )


def test_stuck_reservations_are_tried_again_after_a_confirmation(
    customer: Customer, stuck: Reservation
) -> None:
    user = staff("sam", "view_reservation", "change_reservation")
    client = browser(user)
    fine = reserve(customer)
    asked = try_again(client, stuck, fine)
    page = asked.content.decode()
    assert "will be tried again" in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert fine.get_state_display() not in page
    stuck.refresh_from_db()
    assert stuck.stuck_at

    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
    del hidden["_selected_action"], hidden["csrfmiddlewaretoken"]
    answer = try_again(client, stuck, fine, **hidden)
    assert messages(answer) == [("success", "1 reservation will be tried again.")]
    stuck.refresh_from_db()
    assert (stuck.stuck_at, stuck.refusals) == (None, 0)
    assert list(Reservation.objects.due()) == [stuck]
    (entry,) = LogEntry.objects.all()
    assert (entry.user, entry.object_id) == (user, str(stuck.pk))


def test_trying_again_what_is_not_stuck_is_answered_kindly(
    everything: Client, customer: Customer
) -> None:
    answer = try_again(everything, reserve(customer))
    assert [level for level, _ in messages(answer)] == ["warning"]


def test_stuck_reservations_need_a_permission_to_be_tried_again(
    stuck: Reservation,
) -> None:
    client = browser(staff("victor", "view_reservation"))
    assert "retry_stuck" not in client.get(RESERVATIONS).content.decode()
    try_again(client, stuck, confirmed="yes")
    stuck.refresh_from_db()
    assert stuck.stuck_at


def test_every_stuck_reservation_of_a_search_is_tried_again(
    everything: Client, customer: Customer, stuck: Reservation
) -> None:
    for number in range(25):
        reserve(
            customer,
            state="release_pending",
            reference=f"left-{number}",
            next_attempt_at=timezone.now(),
            stuck_at=timezone.now(),
        )
    asked = everything.post(
        f"{RESERVATIONS}?q=left-&stuck=yes",
        {
            "action": "retry_stuck",
            "_selected_action": [Reservation.objects.latest("created_at").pk],
            "select_across": "1",
        },
    )
    assert (asked.context["count"], asked.context["more"]) == (25, 5)
    everything.post(
        f"{RESERVATIONS}?q=left-&stuck=yes",
        {
            "action": "retry_stuck",
            "_selected_action": [Reservation.objects.latest("created_at").pk],
            "select_across": "1",
            "confirmed": "yes",
        },
    )
    assert list(Reservation.objects.stuck()) == [stuck]
