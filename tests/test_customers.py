"""Whose wallet it is: customers belong to their owners, and external ids name them."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import AnonymousUser, Group, User
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.db import IntegrityError, connection, connections, transaction
from django.test.utils import CaptureQueriesContext
from django.utils.functional import SimpleLazyObject

from django_meterly import guard
from django_meterly.models import Customer
from tests.books import balance, fund
from tests.children import PATIENCE, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.database]

for_owner = Customer.objects.for_owner


# What the tests set EXTERNAL_ID to.


def email(owner: Any) -> str:
    return str(owner.email)


def username(owner: Any) -> str:
    return str(owner.username)


def everybody(owner: Any) -> str:
    return "everybody"


def longest(owner: Any) -> str:
    return "x" * 255


def unusable(owner: Any) -> str:
    return "é"


def broken(owner: Any) -> str:
    raise RuntimeError(f"no name for {owner.pk}")


@pytest.fixture
def external_ids(settings: Any) -> Callable[[Callable[[Any], str]], None]:
    """What sets ``EXTERNAL_ID`` to a function of this module."""

    def change(function: Callable[[Any], str]) -> None:
        path = f"{__name__}.{function.__name__}"
        settings.METERLY = {**settings.METERLY, "EXTERNAL_ID": path}

    return change


# The same owner: the same wallet


def renamed_model(user: User, settings: Any) -> None:
    Customer.objects.update(external_id=f"account_{user.pk}")


def other_setting(user: User, settings: Any) -> None:
    path = f"{__name__}.username"
    settings.METERLY = {**settings.METERLY, "EXTERNAL_ID": path}


def changed_email(user: User, settings: Any) -> None:
    path = f"{__name__}.email"
    settings.METERLY = {**settings.METERLY, "EXTERNAL_ID": path}
    User.objects.filter(pk=user.pk).update(email="new@example.com")


def broken_setting(user: User, settings: Any) -> None:
    path = f"{__name__}.broken"
    settings.METERLY = {**settings.METERLY, "EXTERNAL_ID": path}


@pytest.mark.parametrize(
    "change", [renamed_model, other_setting, changed_email, broken_setting]
)
def test_f66_the_wallet_stays_whatever_the_owner_is_called(
    user: User, settings: Any, change: Any
) -> None:
    customer = fund(user)
    change(user, settings)
    known_as = Customer.objects.values_list("external_id", flat=True).get()
    for asked in (User.objects.get(), SimpleLazyObject(lambda: User.objects.get())):
        assert for_owner(asked) == customer  # type: ignore[arg-type]
        with guard(asked, 10):
            pass
    assert Customer.objects.get().external_id == known_as
    assert balance(customer) == (80, 0)


def test_the_owner_is_looked_up_by_one_statement_and_an_index(user: User) -> None:
    customer = for_owner(user)
    with CaptureQueriesContext(connection) as queries:
        assert for_owner(user) == customer
    (query,) = queries.captured_queries
    assert "*" not in query["sql"]
    for field in Customer._meta.concrete_fields:
        assert connection.ops.quote_name(str(field.column)) in query["sql"]
    with connection.cursor() as cursor:
        indexes = connection.introspection.get_constraints(
            cursor, Customer._meta.db_table
        )
    assert any(
        each["columns"] == ["owner_id"] and each["unique"] for each in indexes.values()
    )


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have PostgreSQL prepare each statement, whose columns may not change then."""
    if connection.vendor == "postgresql":
        options = {"server_side_binding": True, "prepare_threshold": 0}
        options = {**connection.settings_dict["OPTIONS"], **options}
        monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
    connection.close()
    yield
    connection.close()


@pytest.mark.usefixtures("prepared")
def test_f63_a_column_added_later_breaks_no_old_process(user: User) -> None:
    customer = for_owner(user)
    assert for_owner(user) == Customer.objects.resolve(customer.external_id)
    table = connection.ops.quote_name(Customer._meta.db_table)

    def alter(what: str) -> None:
        # By another process: psycopg forgets what it has prepared when it alters.
        def run() -> None:
            with connection.cursor() as cursor:
                cursor.execute(f"ALTER TABLE {table} {what}")
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    alter("ADD COLUMN later integer")
    try:
        for payer in (user, customer.external_id):
            assert Customer.objects.resolve(payer) == customer
    finally:
        alter("DROP COLUMN later")


# Somebody else: another wallet


@pytest.mark.parametrize(
    "function", [None, everybody, longest, username], ids=lambda each: str(each)[:20]
)
def test_f66_a_deleted_owners_wallet_is_nobodys(
    external_ids: Any, function: Any
) -> None:
    if function is not None:
        external_ids(function)
    old = fund(User.objects.create(pk=7, username="alice"))
    for number in (2, 3, 12):
        User.objects.get(pk=7).delete()
        new = User.objects.create(pk=7, username="alice")
        if number == 12:
            for taken in range(4, 12):
                Customer.objects.create(
                    external_id=old.external_id[: 255 - len(f"~{taken}")] + f"~{taken}"
                )
        heir = for_owner(new)
        suffix = f"~{number}"
        assert heir.external_id == old.external_id[: 255 - len(suffix)] + suffix
        assert heir.owner == new
        assert for_owner(new) == Customer.objects.resolve(new) == heir
        assert balance(fund(new, 5)) == (5, 0)
    old.refresh_from_db()
    assert (old.owner, old.had_owner) == (None, True)
    assert balance(old) == (100, 0)


def test_f66_two_living_owners_never_share_a_wallet(
    external_ids: Any, caplog: pytest.LogCaptureFixture
) -> None:
    external_ids(everybody)
    users = [User.objects.create_user(name) for name in ("alice", "bob", "carol")]
    customers = [for_owner(user) for user in users]
    assert [for_owner(user) for user in reversed(users)] == customers[::-1]
    names = [customer.external_id for customer in customers]
    assert names == ["everybody", "everybody~2", "everybody~3"]
    assert "returns 'everybody' for two owners" in caplog.text


def test_f66_a_recycled_name_is_another_customer(external_ids: Any) -> None:
    external_ids(username)
    alice = User.objects.create_user("alice")
    first = for_owner(alice)
    User.objects.filter(pk=alice.pk).update(username="alice-was-renamed")
    second = for_owner(User.objects.create_user("alice"))
    assert (first.external_id, second.external_id) == ("alice", "alice~2")
    # Somebody whose name looks like that of a second one.
    third = for_owner(User.objects.create_user("alice~2"))
    assert third.external_id == "alice~2~2"


def test_names_that_differ_in_case_differ(external_ids: Any) -> None:
    external_ids(email)
    users = [
        User.objects.create_user(str(number), email=name)
        for number, name in enumerate(["a@example.com", "A@example.com"])
    ]
    assert [for_owner(each).external_id for each in users] == [
        "a@example.com",
        "A@example.com",
    ]


@pytest.mark.parametrize(
    "stranger",
    [
        Group(pk=1, name="x"),
        AnonymousUser(),
        SimpleLazyObject(AnonymousUser),
        None,
        7,
        "user_7",
        User,
        Customer(pk=1),
    ],
    ids=lambda each: type(each).__name__,
)
def test_f66_an_object_of_another_model_is_refused(stranger: Any) -> None:
    User.objects.create(pk=1, username="alice")
    with pytest.raises(TypeError, match=r"instance of auth\.User .*Pass the User that"):
        for_owner(stranger)
    if not isinstance(stranger, str | Customer):
        with pytest.raises(TypeError, match=r"A customer is .* CUSTOMER_RESOLVER|auth"):
            Customer.objects.resolve(stranger)
    assert not Customer.objects.exists()


def test_f66_an_owner_that_is_not_saved_is_refused(user: User) -> None:
    deleted = User.objects.create_user("gone")
    deleted.delete()
    for unsaved in (User(), User(pk=user.pk), deleted):
        with pytest.raises(ValueError, match=r"auth\.User is not in the database"):
            Customer.objects.resolve(unsaved)
    assert not Customer.objects.exists()


def test_an_owner_deleted_meanwhile_gets_no_wallet(user: User) -> None:
    stale = User.objects.get()
    user.delete()
    with pytest.raises(IntegrityError):
        for_owner(stale)
    assert not Customer.objects.exists()


def test_an_unusable_external_id_names_the_setting(
    user: User, external_ids: Any
) -> None:
    external_ids(unusable)
    with pytest.raises(ValueError, match=r"What METERLY\['EXTERNAL_ID'\] returns"):
        for_owner(user)


# Registered beforehand


def test_f66_a_customer_that_never_had_an_owner_is_adopted(user: User) -> None:
    before = fund(f"user_{user.pk}")
    assert not before.had_owner
    assert for_owner(user) == before
    before.refresh_from_db()
    assert (before.owner, before.had_owner) == (user, True)
    # By its external id it is found for ever, whoever owns it.
    user.delete()
    assert Customer.objects.resolve(before.external_id) == before


def test_only_the_own_external_id_is_adopted() -> None:
    old = for_owner(User.objects.create(pk=7, username="alice"))
    User.objects.all().delete()
    fund(f"{old.external_id}~2")
    heir = for_owner(User.objects.create(pk=7, username="bob"))
    assert heir.external_id == "user_7~3"


def created(user: User) -> None:
    Customer.objects.create(external_id="x", owner=user)


def saved(user: User) -> None:
    Customer(external_id="x", owner_id=user.pk).save()


def saved_partly(user: User) -> None:
    customer = Customer.objects.create(external_id="x")
    customer.owner = user
    customer.save(update_fields=["owner"])


def updated(user: User) -> None:
    Customer.objects.create(external_id="x")
    Customer.objects.update(owner=user)


def updated_by_id(user: User) -> None:
    Customer.objects.create(external_id="x")
    Customer.objects.filter(external_id="x").update(owner_id=user.pk)


def aupdated(user: User) -> None:
    Customer.objects.create(external_id="x")
    async_to_sync(Customer.objects.all().aupdate)(owner=user)


def created_in_bulk(user: User) -> None:
    Customer.objects.bulk_create(Customer(external_id="x", owner=u) for u in [user])


def updated_in_bulk(user: User) -> None:
    customer = Customer.objects.create(external_id="x")
    customer.owner = user
    Customer.objects.bulk_update([customer], ["owner"])


def updated_or_created(user: User) -> None:
    Customer.objects.create(external_id="x")
    Customer.objects.update_or_create(external_id="x", defaults={"owner": user})


def validated(user: User) -> None:
    customer = Customer(external_id="x", owner=user)
    customer.full_clean()
    customer.save()


def restored(user: User) -> None:
    customer = Customer.objects.create(external_id="x", owner=user)
    customer.delete()
    customer.save(force_insert=True)


@pytest.mark.parametrize(
    "write",
    [
        created,
        saved,
        saved_partly,
        updated,
        updated_by_id,
        aupdated,
        created_in_bulk,
        updated_in_bulk,
        updated_or_created,
        validated,
        restored,
        for_owner,
    ],
)
def test_f66_every_way_to_set_an_owner_notes_it(write: Any) -> None:
    alice = User.objects.create(pk=7, username="alice")
    write(alice)
    customer = Customer.objects.get()
    assert (customer.owner, customer.had_owner) == (alice, True)
    alice.delete()
    customer.refresh_from_db()
    assert (customer.owner, customer.had_owner) == (None, True)
    Customer.objects.update(external_id="user_7")
    assert for_owner(User.objects.create(pk=7, username="bob")) != customer


def test_other_changes_note_nothing(user: User) -> None:
    customer = Customer.objects.create(external_id="x")
    customer.save()
    Customer.objects.update(owner=None, customer_id="cus_1")
    customer.owner = user
    customer.save(update_fields=["customer_id"])
    customer.save(update_fields=[])
    customer.refresh_from_db()
    assert (customer.owner, customer.had_owner) == (None, False)


def test_f66_the_database_forgets_no_owner(user: User) -> None:
    Customer.objects.create(external_id="x")
    with pytest.raises(IntegrityError):
        Customer._base_manager.update(owner=user)


def test_f66_an_owner_has_one_customer(user: User) -> None:
    for_owner(user)
    second = Customer(external_id="x", owner=user)
    with pytest.raises(ValidationError, match="Owner already exists"):
        second.full_clean()
    with pytest.raises(IntegrityError):
        second.save()
    # Those without an owner are many.
    for name in ("y", "z"):
        Customer.objects.create(external_id=name)


def test_dumped_customers_are_loaded(user: User, tmp_path: Path) -> None:
    customer = for_owner(user)
    dump = tmp_path / "customers.json"
    call_command("dumpdata", "meterly.Customer", output=str(dump), verbosity=0)
    Customer.objects.all().delete()
    call_command("loaddata", str(dump), verbosity=0)
    assert for_owner(user) == customer


# At once


@pytest.fixture(params=[False, True], ids=["autocommit", "atomic"])
def at_once(request: pytest.FixtureRequest) -> Callable[..., list[Customer]]:
    """What returns what calls return, each in a thread and a transaction of its own."""

    def at_once(*calls: Callable[[], Customer]) -> list[Customer]:
        barrier = threading.Barrier(len(calls))
        found: dict[int, Customer] = {}

        def run(number: int, call: Callable[[], Customer]) -> None:
            try:
                barrier.wait()
                with transaction.atomic() if request.param else nullcontext():
                    if connection.vendor == "sqlite":
                        # There, a transaction that has read does not wait to write.
                        Group.objects.update(name="x")
                    found[number] = call()
            finally:
                connections.close_all()

        threads = [
            threading.Thread(target=run, args=(number, call))
            for number, call in enumerate(calls)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[number] for number in range(len(calls))]

    return at_once


@pytest.mark.parametrize("before", ["nothing", "unowned", "retired"])
def test_f66_two_first_uses_make_one_customer(before: str, at_once: Any) -> None:
    user = User.objects.create(pk=7, username="alice")
    if before == "unowned":
        Customer.objects.resolve("user_7")
    if before == "retired":
        for_owner(user)
        user.delete()
        user = User.objects.create(pk=7, username="alice")
    found = at_once(*[lambda: for_owner(user)] * 4)
    assert len(set(found)) == 1
    assert found[0].owner == user
    assert Customer.objects.filter(owner=user).count() == 1
    assert Customer.objects.count() == 1 + (before == "retired")


@pytest.mark.parametrize("before", ["nothing", "unowned", "retired"])
def test_f66_first_uses_of_one_external_id_make_two_customers(
    external_ids: Any, before: str, at_once: Any
) -> None:
    external_ids(everybody)
    if before != "nothing":
        old = Customer.objects.resolve("everybody")
    if before == "retired":
        Customer.objects.filter(pk=old.pk).update(had_owner=True)
    users = [User.objects.create_user(name) for name in ("alice", "bob", "carol")]
    found = at_once(*[lambda user=user: for_owner(user) for user in users])
    assert [customer.owner for customer in found] == users
    first = 2 if before == "retired" else 1
    assert {customer.external_id for customer in found} == {
        "everybody" if number == 1 else f"everybody~{number}"
        for number in range(first, first + 3)
    }


def test_f66_a_customer_that_is_registered_meanwhile_is_adopted() -> None:
    user = User.objects.create(pk=7, username="alice")
    meanwhile: list[Customer] = []

    def register() -> None:
        meanwhile.append(Customer.objects.resolve("user_7"))
        connection.close()

    def insert(execute: Any, sql: str, *args: Any) -> Any:
        if sql.startswith("INSERT") and not meanwhile:
            thread = threading.Thread(target=register)
            thread.start()
            thread.join()
        return execute(sql, *args)

    with connection.execute_wrapper(insert):
        customer = for_owner(user)
    assert meanwhile == [customer] == list(Customer.objects.filter(owner=user))
    assert customer.had_owner


def test_two_first_uses_of_an_external_id_make_one_customer(at_once: Any) -> None:
    found = at_once(*[lambda: Customer.objects.resolve("team_7")] * 4)
    assert len(set(found)) == Customer.objects.count() == 1


# Async code, and models of every kind


def test_async_twins_do_the_same(user: User) -> None:
    customer = for_owner(user)

    async def asked() -> list[Customer]:
        return [
            await Customer.objects.afor_owner(user),
            await Customer.objects.aresolve(user),
            await Customer.objects.aresolve(customer.external_id),
            await Customer.objects.aresolve(customer),
        ]

    assert async_to_sync(asked)() == [customer] * 4
    with pytest.raises(TypeError, match=r"instance of auth\.User"):
        async_to_sync(Customer.objects.all().afor_owner)(Group())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="A customer is"):
        async_to_sync(Customer.objects.all().aresolve)(7)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "model",
    [
        "UuidTeam",
        "NamedTeam",
        "NumberedTeam",
        "Profile",
        "ProxyUser",
        "Member",
        "Person",
    ],
)
def test_f66_owners_may_be_of_any_model(model: str) -> None:
    child = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.owners", model],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda user: Customer.objects.create(owner=user),
        lambda user: Customer.objects.get_or_create(owner=user)[0],
        lambda user: Customer.objects.bulk_create([Customer(owner=user)])[0],
    ],
    ids=["create", "get_or_create", "bulk_create"],
)
def test_a_customer_that_is_made_by_hand_has_the_external_id_of_its_owner(
    user: User, make: Any
) -> None:
    make(user)
    assert for_owner(user).external_id == f"user_{user.pk}"
    fund(user)
    with guard(user, 1):
        pass


@pytest.mark.parametrize("external_id", ["", "ü", " a", "a" * 256])
def test_a_customer_without_a_usable_external_id_is_refused(external_id: str) -> None:
    with pytest.raises(ValueError, match="external_id"):
        Customer.objects.create(external_id=external_id)
    with pytest.raises(ValueError, match="external_id"):
        Customer.objects.bulk_create([Customer(external_id=external_id)])
    assert not Customer.objects.exists()


def test_the_database_refuses_a_customer_without_a_name(user: User) -> None:
    customer = for_owner(user)
    with pytest.raises(IntegrityError), transaction.atomic():
        Customer.objects.filter(pk=customer.pk).update(external_id="")
