from __future__ import annotations

import os
import sys
from typing import Any

import pytest


def tell(name: str) -> None:
    """Tell the story of the model *name*; an ``AssertionError`` is what went wrong."""
    from django.apps import apps
    from django.contrib.auth.models import AnonymousUser, Group
    from django.core.checks import run_checks
    from django.utils.functional import SimpleLazyObject

    from django_meterly import guard
    from django_meterly.models import Customer
    from django_meterly.testing import assert_books_balance
    from tests.books import balance, fund
    from tests.owners.models import new

    model = apps.get_model("owners", name)
    for_owner = Customer.objects.for_owner

    messages = run_checks(tags=["meterly"])
    ids = [message.id for message in messages if not message.is_silenced()]
    assert ids == ([] if name == "ProxyUser" else ["meterly.W012"])

    first, second = new(name, 1), new(name, 2)
    wallets = [fund(first), fund(second, 50)]
    assert Customer.objects.count() == 2
    loaded: list[Any] = [
        first,
        SimpleLazyObject(lambda: first),
        model._base_manager.get(pk=first.pk) if name != "Person" else first,
        type(first)._base_manager.only("pk").get(pk=first.pk),
    ]
    for owner in loaded:
        assert for_owner(owner) == Customer.objects.resolve(owner) == wallets[0]
        with guard(owner, 1):
            pass
    assert [balance(wallet) for wallet in wallets] == [(96, 0), (50, 0)]

    # The key comes again, and the wallet does not.
    second.delete()
    heir = for_owner(new(name, 2))
    assert heir.external_id == f"{wallets[1].external_id}~2"
    assert heir not in wallets
    assert for_owner(first) == wallets[0]

    # Nobody else's objects, whatever their key is.
    for stranger in (Group.objects.create(pk=1, name="x"), AnonymousUser(), None, 1):
        with pytest.raises(TypeError, match=model._meta.concrete_model._meta.label):
            for_owner(stranger)
        with pytest.raises(TypeError, match=f"owners.{name}"):
            Customer.objects.resolve(stranger)
    # One that is not saved has no wallet yet, even if it has a key.
    for unsaved in (model(), model(pk=first.pk)):
        with pytest.raises(ValueError, match="save it"):
            for_owner(unsaved)
    assert Customer.objects.count() == 3
    assert_books_balance()


def main() -> None:
    os.environ["OWNER"] = name = sys.argv[1]
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.owners.settings"
    import django

    django.setup()
    from django.db import connection

    database = connection.settings_dict["NAME"]
    connection.creation.create_test_db(verbosity=0, autoclobber=True)
    try:
        tell(name)
    finally:
        connection.creation.destroy_test_db(database, verbosity=0)


if __name__ == "__main__":
    main()
