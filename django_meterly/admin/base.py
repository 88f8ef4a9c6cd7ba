"""Names of units and people, and an admin that changes nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.utils.translation import gettext_lazy

from .. import units

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.models import Model
    from django.http import HttpRequest

    from ..models import Grant, Reservation

    ModelAdmin = admin.ModelAdmin[Any]
else:
    ModelAdmin = admin.ModelAdmin

logger = logging.getLogger(__name__)


def name_of(somebody: Model | None) -> str:
    """Return the name that the project's own model gives *somebody*.

    For example, it is the username of a user, and ``-`` for ``None``.
    """
    if somebody is None:
        return "-"
    try:
        return str(somebody)
    except Exception:
        # One broken row must not break the whole list.
        logger.exception("%s %s has no name", somebody._meta.label, somebody.pk)
        return f"{somebody._meta.verbose_name} {somebody.pk}"


class UnitFilter(admin.AllValuesFieldListFilter):
    """Filters by unit, and shows the units' names for people."""

    def choices(self, changelist: Any) -> Iterator[Any]:
        for choice in super().choices(changelist):
            yield {**choice, "display": units.name_of(str(choice["display"]))}


class ReadOnlyAdmin(ModelAdmin):
    """Shows rows to people who may view them, and lets nobody change them."""

    readonly_fields = ["unit_name"]
    date_hierarchy = "created_at"
    ordering = ["-created_at"]
    show_full_result_count = False

    @admin.display(description=gettext_lazy("unit"), ordering="unit")
    def unit_name(self, row: Grant | Reservation) -> str:
        return units.name_of(row.unit)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
