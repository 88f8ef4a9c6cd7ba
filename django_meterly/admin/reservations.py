"""The journal, to read, and two actions: try again, and write off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, LogEntry
from django.db import transaction
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from .. import journal, units
from ..models import MAX_REASON_LENGTH, Reservation
from .base import ReadOnlyAdmin, UnitFilter

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse
    from django.utils.functional import _StrPromise

    from ..models import ReservationQuerySet

#: Reservations that a confirmation lists; it counts the others.
MAX_SHOWN = 20


class StuckFilter(admin.SimpleListFilter):
    """Filters for the reservations that are stuck."""

    title = gettext_lazy("stuck")
    parameter_name = "stuck"

    def lookups(
        self, request: HttpRequest, model_admin: Any
    ) -> list[tuple[str, _StrPromise]]:
        return [("yes", gettext_lazy("Stuck"))]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        return queryset.stuck() if self.value() == "yes" else queryset


#: Each state, explained to people.
MEANING = {
    Reservation.State.INTENT: gettext_lazy(
        "The ledger is being asked to hold the credits; the work has not started. "
        "Without an answer before the lease ends, the reservation is released."
    ),
    Reservation.State.RESERVED: gettext_lazy(
        "The credits are held and the work is running. If it has not ended before "
        "the lease does, the credits are released."
    ),
    Reservation.State.DENIED: gettext_lazy(
        "There were not enough credits. The work did not run."
    ),
    Reservation.State.FAILED: gettext_lazy(
        "The ledger could not be reached, or refused the request. Nothing is held, "
        "and the work did not run."
    ),
    Reservation.State.RELEASE_PENDING: gettext_lazy(
        "The credits will be given back. The ledger has not confirmed it yet."
    ),
    Reservation.State.RELEASED: gettext_lazy(
        "The credits were given back. Nothing was charged."
    ),
    Reservation.State.CONFLICT: gettext_lazy(
        "The credits were to be given back, but the ledger had already charged them. "
        "This is not tried again. Look into it, and grant the credits back if the "
        "customer should not pay."
    ),
    Reservation.State.COMMIT_PENDING: gettext_lazy(
        "The work is done and will be charged. The ledger has not confirmed it yet."
    ),
    Reservation.State.COMMITTED: gettext_lazy("The work is done and was charged."),
    Reservation.State.UNBILLED: gettext_lazy(
        "The work is done, but there were too few credits left to charge. This is a "
        "debt: it is paid from the customer's next credits, and until then the "
        "customer starts no other work in this unit."
    ),
}
PRESUMED = gettext_lazy(
    "The work has succeeded, but its response has not been sent yet. If nothing is "
    "decided before the lease ends, the work is charged."
)
NOTED = gettext_lazy(
    "The credits were given back, but the work succeeded afterwards. It is charged "
    "unless the next attempt with the same key is charged."
)
STUCK = gettext_lazy(
    "But it is stuck: the ledger has refused it too often, and it is not tried again "
    "until somebody asks for that."
)


@admin.register(Reservation)
class ReservationAdmin(ReadOnlyAdmin):
    """Shows the journal. Two actions change it, and each needs a permission.

    Trying stuck reservations again needs ``meterly.change_reservation``. Writing a debt
    off needs ``meterly.write_off_debt``.
    """

    actions = ["retry_stuck", "write_off"]
    list_display = [
        "created_at",
        "customer",
        "state",
        "amount",
        "charge",
        "unit_name",
        "stuck_at",
        "reference",
    ]
    list_filter = ["state", StuckFilter, ("unit", UnitFilter), "created_at"]
    list_select_related = ["customer"]
    readonly_fields = ["meaning", "unit_name"]
    # Log messages name the id.
    search_fields = [
        "reference",
        "key",
        "customer__external_id",
        "reservation_id",
        "=id",
    ]
    fieldsets = [
        (
            None,
            {
                "fields": [
                    "state",
                    "meaning",
                    "customer",
                    "reference",
                    "unit_name",
                    "amount",
                    "charge",
                    "owed",
                ]
            },
        ),
        (
            gettext_lazy("Lease"),
            {
                "fields": ["lease_until", "lapsed", "ttl_seconds", "fence"],
                "description": gettext_lazy(
                    "The reservation has a lease until it is decided whether the work "
                    "succeeded. If the lease ends first, because the process has died "
                    "for example, the credits are released."
                ),
            },
        ),
        (
            gettext_lazy("Settlement"),
            {
                "fields": [
                    "decided_at",
                    "next_attempt_at",
                    "settle_attempts",
                    "refusals",
                    "stuck_at",
                    "last_error",
                    "settled_at",
                ],
                "description": gettext_lazy(
                    "A decision is recorded first. Then it is sent to the ledger until "
                    "the ledger confirms it. If the ledger refuses it too often, it is "
                    "stuck: the decision stands, but it is not tried any more. The "
                    "last error says why."
                ),
            },
        ),
        (
            gettext_lazy("Identity"),
            {
                "fields": [
                    "id",
                    "name",
                    "key",
                    "attempt",
                    "reservation_id",
                    "created_at",
                ],
                "description": gettext_lazy(
                    "The reservation id comes from the ledger. Log messages name the "
                    "other id. If the work failed, its key may be used again. That is "
                    "the next attempt."
                ),
            },
        ),
    ]

    def has_retry_stuck_permission(self, request: HttpRequest) -> bool:
        # Not has_change_permission(): nobody edits the journal.
        return request.user.has_perm("meterly.change_reservation")

    @admin.action(
        description=gettext_lazy("Try again (stuck reservations)"),
        permissions=["retry_stuck"],
    )
    def retry_stuck(
        self, request: HttpRequest, queryset: ReservationQuerySet
    ) -> HttpResponse | None:
        """Let the sweeper try stuck reservations again, after a confirmation."""
        stuck = queryset.stuck()
        if request.POST.get("confirmed"):
            # Only those that were shown and are still stuck.
            rows = list(stuck)
            count = journal.retry_stuck(stuck)
            LogEntry.objects.log_actions(
                request.user.pk,  # type: ignore[arg-type]  # logged in, so it has one
                rows,
                CHANGE,
                _("To be tried again."),
            )
            text = ngettext(
                "%(count)d reservation will be tried again.",
                "%(count)d reservations will be tried again.",
                count,
            )
            self.message_user(request, text % {"count": count}, messages.SUCCESS)
            return None
        if not stuck.exists():
            problem = _("None of these reservations is stuck.")
            self.message_user(request, problem, messages.WARNING)
            return None
        return self._confirmation(request, "retry_stuck", _("Try again"), stuck)

    def has_write_off_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("meterly.write_off_debt")

    @admin.action(
        description=gettext_lazy("Write off (debts)"), permissions=["write_off"]
    )
    def write_off(
        self, request: HttpRequest, queryset: ReservationQuerySet
    ) -> HttpResponse | None:
        """Write debts off, after a confirmation that asks for a reason."""
        debts = queryset.debts()
        if not debts.exists():
            problem = _("None of these reservations is a debt.")
            self.message_user(request, problem, messages.WARNING)
            return None
        title = _("Write off")
        if not request.POST.get("confirmed"):
            return self._confirmation(request, "write_off", title, debts)
        reason = request.POST.get("reason", "").strip()
        if not reason or len(reason) > MAX_REASON_LENGTH:
            problem = _("Give a reason of at most %(length)d characters.")
            error = problem % {"length": MAX_REASON_LENGTH}
            return self._confirmation(request, "write_off", title, debts, error=error)
        rows = debts.select_related("customer")
        count = sum(self._write_off(request, debt, reason) for debt in rows)
        text = ngettext(
            "%(count)d debt was written off.",
            "%(count)d debts were written off.",
            count,
        )
        self.message_user(request, text % {"count": count}, messages.SUCCESS)
        return None

    def _write_off(self, request: HttpRequest, debt: Reservation, reason: str) -> bool:
        """Write *debt* off and log who did it and why, in one transaction."""
        with transaction.atomic(using=journal.alias()):
            if not journal.write_off(debt):
                return False
            self.log_change(
                request,
                debt,
                _("Debt of %(owed)s %(unit)s written off: %(reason)s")
                % {
                    "owed": debt.owed,
                    "unit": units.name_of(debt.unit),
                    "reason": reason,
                },
            )
        return True

    def _confirmation(
        self,
        request: HttpRequest,
        action: str,
        title: str,
        rows: ReservationQuerySet,
        *,
        error: str = "",
    ) -> TemplateResponse:
        """Return the page that asks for a confirmation of *action* on *rows*."""
        count = rows.count()
        request.current_app = self.admin_site.name
        return TemplateResponse(
            request,
            f"admin/meterly/reservation/{action}.html",
            {
                **self.admin_site.each_context(request),
                "title": title,
                "opts": self.opts,
                "action": action,
                "count": count,
                "shown": rows.select_related("customer")[:MAX_SHOWN],
                "more": max(0, count - MAX_SHOWN),
                "checkbox": ACTION_CHECKBOX_NAME,
                "selected": request.POST.getlist(ACTION_CHECKBOX_NAME),
                "select_across": request.POST.get("select_across", "0"),
                "error": error,
                "reason": request.POST.get("reason", ""),
                "reason_length": MAX_REASON_LENGTH,
            },
        )

    @admin.display(description=gettext_lazy("what this means"))
    def meaning(self, reservation: Reservation) -> str:
        meaning = str(MEANING[Reservation.State(reservation.state)])
        if reservation.is_presumed:
            meaning = str(PRESUMED)
        elif reservation.is_noted:
            meaning = str(NOTED)
        if reservation.stuck_at is None:
            return meaning
        return f"{meaning} {STUCK}"
