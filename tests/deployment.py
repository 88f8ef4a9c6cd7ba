"""A project whose database is set up in another way: its settings, and its story.

``python -m tests.deployment`` migrates an empty database and sells something there.
``DATABASE_URL`` names the database, and ``DEPLOYMENT`` is JSON: what to change in
``DATABASES["default"]``. It ends with 0 if everything went as it should. These keys say
more than Django knows:

* ``SETTINGS`` of the project;
* ``COMMANDS`` that make the tables; ``migrate`` by default;
* ``PSYCOPG2``: as if psycopg 3 was not installed.
"""

from __future__ import annotations

import json
import os
import sys

DEPLOYMENT = json.loads(os.environ.get("DEPLOYMENT", "{}"))
if DEPLOYMENT.pop("PSYCOPG2", False):
    sys.modules["psycopg"] = None  # type: ignore[assignment]

if __name__ != "__main__":
    from tests.settings import *  # noqa: F403
    from tests.settings import DATABASES

    globals().update(DEPLOYMENT.pop("SETTINGS", {}))
    COMMANDS = DEPLOYMENT.pop("COMMANDS", [["migrate"]])
    DATABASES["default"].pop("OPTIONS", None)
    DATABASES["default"].update(DEPLOYMENT)


def main() -> None:
    """Tell the story; an ``AssertionError`` is what went wrong."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.deployment"
    import django

    django.setup()

    from django.conf import settings
    from django.core.management import call_command

    for command, *arguments in settings.COMMANDS:
        call_command(command, *arguments, verbosity=0)
    sell()


def sell() -> None:
    """Go once through everything that moves credits, and look at the books."""
    import pytest
    from django.contrib.auth.models import User
    from django.test import Client

    from django_meterly import errors, get_client, guard
    from django_meterly.ledger import checks, expiry
    from django_meterly.testing import assert_books_balance, sweep
    from tests import books

    user = User.objects.create_user("alice")
    customer = books.fund_by_grant(user)
    with guard(user, 10) as work:
        work.charge(4)
    with pytest.raises(RuntimeError), guard(user, 10):
        raise RuntimeError
    with guard(user, 10, idempotency_key="once"):
        pass
    with pytest.raises(errors.MeterlyDuplicateError):
        guard(user, 10, idempotency_key="once").lifecycle.reserve()
    with pytest.raises(errors.MeterlyInsufficientCreditsError):
        guard(user, 1000).lifecycle.reserve()
    guard(user, 10).lifecycle.reserve()
    sweep()
    client = Client()
    client.force_login(user)
    assert client.post("/paid/").status_code == 200
    get_client().use_credits(str(customer.customer_id), 1, "image_credits", "use")
    expiry.expire_due()
    assert books.states() == [
        "committed",
        "released",
        "committed",
        "denied",
        "released",
        "committed",
    ]
    assert books.balance(customer) == (60, 0)
    assert_books_balance()
    assert checks.check_triggers(databases=["default"]) == []


if __name__ == "__main__":
    main()
