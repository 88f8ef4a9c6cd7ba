"""Do the settings about customers fit the models and the database?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.contrib.auth import get_user_model
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as AnyDatabaseError
from django.db import connections, router

from ..conf import meterly_settings
from ..models import Customer
from ..resolvers import request_user

if TYPE_CHECKING:
    from collections.abc import Sequence


@register("meterly", Tags.database)
def check_customer_model(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Refuse a ``CUSTOMER_MODEL`` that was changed after the first migrate."""
    using = router.db_for_write(Customer)
    if using not in (databases or ()):
        return []
    table = Customer._meta.db_table
    connection = connections[using]
    try:
        expected = apps.get_model(meterly_settings.CUSTOMER_MODEL)._meta.db_table
        with connection.cursor() as cursor:
            if table not in connection.introspection.table_names(cursor):
                return []
            relations = connection.introspection.get_relations(cursor, table)
    except (ImproperlyConfigured, AnyDatabaseError):
        # check_settings reports the former. Django reports the latter.
        return []
    actual = relations.get(Customer._meta.get_field("owner").column)
    if actual is None or actual[1] == expected:
        return []
    return [
        Error(
            f"METERLY['CUSTOMER_MODEL'] is {meterly_settings.CUSTOMER_MODEL!r}, but "
            f"the customers of the database {using!r} belong to the table "
            f"{actual[1]!r}.",
            hint=(
                "CUSTOMER_MODEL is fixed by the first migrate. Set it back, or move "
                "the customers with a migration of your own."
            ),
            id="meterly.E008",
        )
    ]


@register("meterly")
def check_resolver(**kwargs: Any) -> list[CheckMessage]:
    """Warn when the default resolver returns users, but customers are not users."""
    try:
        if meterly_settings.CUSTOMER_RESOLVER is not request_user:
            return []
        user, owner = get_user_model(), Customer.owner_model()
    except ImproperlyConfigured:
        return []  # check_settings and Django report it.
    if issubclass(user, owner):
        return []
    return [
        CheckWarning(
            f"Customers belong to {owner._meta.label}, but "
            "METERLY['CUSTOMER_RESOLVER'] is the default, which returns a "
            f"{user._meta.label}: guarded views will fail.",
            hint=(
                "Set it to the dotted path of a function (request) that returns the "
                f"{owner._meta.object_name} that pays, or None."
            ),
            id="meterly.W012",
        )
    ]
