"""The list of grants, and the messages about new ones."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from django.contrib import admin, messages
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from .. import units
from ..models import Grant
from .base import ReadOnlyAdmin, UnitFilter, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@admin.register(Grant)
class GrantAdmin(ReadOnlyAdmin):
    list_display = [
        "created_at",
        "customer",
        "amount",
        "unit_name",
        "state",
        "granted_by",
        "reason",
        "reference",
    ]
    list_filter = ["state", ("unit", UnitFilter), "created_at"]
    list_select_related = ["customer", "actor"]
    readonly_fields = ["granted_by"]
    search_fields = ["reference", "reason", "customer__external_id"]
    fieldsets = [
        (None, {"fields": ["customer", "amount", "unit_name", "reason", "granted_by"]}),
        (
            gettext_lazy("At the ledger"),
            {
                "fields": ["state", "last_error", "reference", "created_at"],
                "description": gettext_lazy(
                    "A pending grant is asked for again, under the same reference, "
                    "until the ledger has said yes or no. A refused one is final."
                ),
            },
        ),
    ]

    @admin.display(description=gettext_lazy("granted by"), ordering="actor")
    def granted_by(self, grant: Grant) -> str:
        return name_of(grant.actor)


def said_of(
    new: Sequence[Grant], repeated: Sequence[Grant]
) -> Iterator[tuple[int, str]]:
    """Yield the messages about the grants of one form, each with its level.

    *repeated* are grants that the same form had made before.
    """
    by_state = defaultdict(list)
    for grant in new:
        by_state[grant.state].append(grant)
    if granted := by_state[Grant.State.GRANTED]:
        yield messages.SUCCESS, _granted(granted)
    if pending := by_state[Grant.State.PENDING]:
        yield messages.WARNING, _pending(pending)
    for grant in by_state[Grant.State.REFUSED]:
        text = _("The ledger refused the grant to %(customer)s: %(error)s")
        named = {"customer": grant.customer, "error": grant.last_error}
        yield messages.ERROR, text % named
    for grant in repeated:
        text = _(
            "This form was sent before and granted nothing new: %(grant)s (%(state)s)."
        )
        yield messages.INFO, text % {"grant": grant, "state": grant.get_state_display()}


def _granted(grants: Sequence[Grant]) -> str:
    first = grants[0]
    return ngettext(
        "Granted %(amount)s %(unit)s to %(customer)s.",
        "Granted %(amount)s %(unit)s to each of %(count)d customers.",
        len(grants),
    ) % {
        "amount": first.amount,
        "unit": units.name_of(first.unit),
        "customer": first.customer,
        "count": len(grants),
    }


def _pending(grants: Sequence[Grant]) -> str:
    return ngettext(
        "The ledger cannot be asked right now. The grant to %(customer)s is on record "
        "and will be made as soon as it can be: do not grant it again.",
        "The ledger cannot be asked right now. The grants to %(count)d customers are "
        "on record and will be made as soon as they can be: do not grant them again.",
        len(grants),
    ) % {"customer": grants[0].customer, "count": len(grants)}
