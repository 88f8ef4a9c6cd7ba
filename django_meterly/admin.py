"""The admin: who has how many credits, granting more, and a window on the journal."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME, AdminForm
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db import connections, transaction
from django.http import HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.http import urlencode
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from . import grants, journal, units
from .client import get_client
from .errors import MeterlyError, MeterlyReferenceConflictError
from .forms import CustomerForm, GrantCreditsForm, in_conflict
from .models import MAX_REASON_LENGTH, Customer, Grant, Reservation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django.db.models import Model, QuerySet
    from django.http import HttpRequest, HttpResponse
    from django.urls import URLPattern
    from django.utils.functional import _StrPromise

    from .client import MeterlyClient
    from .models import ReservationQuerySet

    CustomerModelAdmin = admin.ModelAdmin[Customer]
    ModelAdmin = admin.ModelAdmin[Any]
else:
    CustomerModelAdmin = ModelAdmin = admin.ModelAdmin

logger = logging.getLogger(__name__)

#: Seconds a customer's page waits for the ledger.
BALANCES_TIMEOUT = 2.0
#: Customers who can be granted credits at once: each is a call to the ledger.
MAX_CUSTOMERS = 100
#: Stuck reservations that are listed before they are tried again.
MAX_SHOWN = 20


def _name_of(somebody: Model | None) -> str:
    """Return how the project's own model calls *somebody*; ``-`` for nobody."""
    if somebody is None:
        return "-"
    try:
        return str(somebody)
    except Exception:
        # One row must not take the whole list with it.
        logger.exception("%s %s has no name", somebody._meta.label, somebody.pk)
        return f"{somebody._meta.verbose_name} {somebody.pk}"


@admin.register(Customer)
class CustomerAdmin(CustomerModelAdmin):
    """Customers and their balances, which the ledger is asked for.

    Granting needs ``meterly.grant_credits`` and the right to view customers.
    """

    actions = ["grant_credits"]
    form = CustomerForm
    list_display = ["external_id", "owner_name", "customer_id", "created_at"]
    list_select_related = ["owner"]
    raw_id_fields = ["owner"]
    search_fields = ["external_id", "customer_id"]
    show_full_result_count = False

    def get_fields(
        self, request: HttpRequest, obj: Customer | None = None
    ) -> tuple[str, ...]:
        if obj is None:
            return ("owner", "external_id")
        owner = "owner_name" if obj.had_owner else "owner"
        return (owner, "external_id", "customer_id", "created_at")

    def get_readonly_fields(
        self, request: HttpRequest, obj: Customer | None = None
    ) -> tuple[str, ...]:
        if obj is None:
            return ()
        # Credits stay with their owner: nobody takes over a customer with a history
        # of somebody else.
        owner = ("owner_name",) if obj.had_owner else ()
        return (*owner, "external_id", "customer_id", "created_at")

    @admin.display(description=gettext_lazy("owner"), ordering="owner")
    def owner_name(self, customer: Customer) -> str:
        return _name_of(customer.owner)

    def has_delete_permission(
        self, request: HttpRequest, obj: Customer | None = None
    ) -> bool:
        return False

    def has_grant_credits_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("meterly.grant_credits")

    def get_urls(self) -> list[URLPattern]:
        # Outside any transaction: a grant is on record before the ledger is asked
        # for it, whatever becomes of this request afterwards.
        view = self.admin_site.admin_view(self.grant_credits_view)
        for alias in connections:
            view = transaction.non_atomic_requests(alias)(view)
        grant_credits = path(
            "grant-credits/", view, name="meterly_customer_grant_credits"
        )
        return [grant_credits, *super().get_urls()]

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Customer | None = None,
    ) -> HttpResponse:
        if obj is not None:
            context["of_customer"] = urlencode({"customer__id__exact": obj.pk})
            if self.has_grant_credits_permission(request):
                context["grant_credits_url"] = self._grant_credits_url([obj.pk])
            if obj.customer_id:
                try:
                    context["balances"] = (
                        get_client()
                        .within(BALANCES_TIMEOUT, attempts=1)
                        .get_balances(obj.customer_id)
                        .balances
                    )
                except (MeterlyError, ImproperlyConfigured, ValueError) as exc:
                    # Not only an outage: perhaps the client cannot be set up.
                    logger.warning("No balances of customer %s: %s", obj, exc)
                    context["balances_error"] = str(exc)
        return super().render_change_form(request, context, add, change, form_url, obj)

    def save_model(
        self, request: HttpRequest, obj: Customer, form: Any, change: bool
    ) -> None:
        if not change:
            super().save_model(request, obj, form, change)
        elif "owner" in form.changed_data:
            # The other columns are as of when the page was loaded.
            unowned = Customer.objects.filter(pk=obj.pk, had_owner=False)
            unowned.update(owner=obj.owner_id)

    @admin.action(
        description=gettext_lazy("Grant credits"), permissions=["grant_credits"]
    )
    def grant_credits(
        self, request: HttpRequest, queryset: QuerySet[Customer]
    ) -> HttpResponseRedirect:
        """Ask on a page of its own how many, and why."""
        # One too many is enough for that page to say so.
        chosen = queryset.values_list("pk", flat=True)[: MAX_CUSTOMERS + 1]
        return HttpResponseRedirect(self._grant_credits_url(chosen))

    def _grant_credits_url(self, ids: Iterable[int]) -> str:
        url = reverse(
            "admin:meterly_customer_grant_credits", current_app=self.admin_site.name
        )
        return f"{url}?ids={','.join(map(str, ids))}"

    def grant_credits_view(self, request: HttpRequest) -> HttpResponse:
        """Grant credits to the customers that ``?ids=1,2`` names."""
        if not (
            self.has_view_or_change_permission(request)
            and self.has_grant_credits_permission(request)
        ):
            raise PermissionDenied
        changelist = reverse(
            "admin:meterly_customer_changelist", current_app=self.admin_site.name
        )
        ids = set(request.GET.get("ids", "").split(","))
        if len(ids) > MAX_CUSTOMERS:
            self.message_user(
                request,
                _("Choose at most %(count)d customers at a time.")
                % {"count": MAX_CUSTOMERS},
                messages.ERROR,
            )
            return HttpResponseRedirect(changelist)
        # More digits are no key of ours, and more than some databases can read.
        pks = [pk for pk in ids if re.fullmatch("[0-9]{1,18}", pk)]
        customers = list(self.get_queryset(request).filter(pk__in=pks).order_by("pk"))
        if len(customers) < len(ids):
            self.message_user(
                request,
                _("There is no such customer. Choose again; nothing was granted."),
                messages.ERROR,
            )
            return HttpResponseRedirect(changelist)
        form = GrantCreditsForm(
            request.POST if request.method == "POST" else None, customers=customers
        )
        if form.is_valid():
            self._grant(request, customers, form.cleaned_data)
            if len(customers) > 1:
                return HttpResponseRedirect(changelist)
            return HttpResponseRedirect(
                reverse(
                    "admin:meterly_customer_change",
                    args=[customers[0].pk],
                    current_app=self.admin_site.name,
                )
            )
        request.current_app = self.admin_site.name
        title = _("Grant credits")
        return TemplateResponse(
            request,
            "admin/meterly/customer/grant_credits.html",
            {
                **self.admin_site.each_context(request),
                "title": title,
                "opts": self.opts,
                "customers": customers,
                "form": form,
                "errors": form.errors,
                "adminform": AdminForm(
                    form,  # type: ignore[arg-type]  # any form will do
                    [(None, {"fields": ["amount", "unit", "reason"]})],
                    {},
                    # What themes look into.
                    model_admin=self,
                ),
            },
        )

    def _grant(
        self, request: HttpRequest, customers: list[Customer], asked: dict[str, Any]
    ) -> None:
        """Grant what was *asked* to each of *customers*, and say what came of it."""
        client: MeterlyClient | None = get_client()
        said = {**asked, "unit": units.name_of(asked["unit"])}
        new = defaultdict(list)
        before = []
        for customer in customers:
            try:
                grant, created = grants.grant(
                    client, customer, **asked, actor=request.user
                )
            except MeterlyReferenceConflictError:
                # Sent at the same moment, with another amount.
                first = Grant.objects.get(
                    customer=customer, unit=asked["unit"], reference=asked["reference"]
                )
                self.message_user(request, in_conflict(first), messages.ERROR)
                continue
            if not created:
                before.append(grant)
                continue
            new[grant.state].append(grant)
            if grant.state == Grant.State.PENDING:
                # Out of reach: the others are put on record, and not waited for.
                client = None
            self.log_change(
                request,
                customer,
                _("Grant of %(amount)s %(unit)s (%(state)s): %(reason)s")
                % {**said, "state": grant.get_state_display()},
            )
        granted = new[Grant.State.GRANTED]
        if granted:
            self.message_user(
                request,
                ngettext(
                    "Granted %(amount)s %(unit)s to %(customer)s.",
                    "Granted %(amount)s %(unit)s to each of %(count)d customers.",
                    len(granted),
                )
                % {**said, "customer": granted[0].customer, "count": len(granted)},
                messages.SUCCESS,
            )
        pending = new[Grant.State.PENDING]
        if pending:
            self.message_user(
                request,
                ngettext(
                    "The ledger cannot be asked right now. The grant to %(customer)s "
                    "is on record and will be made as soon as it can be: do not grant "
                    "it again.",
                    "The ledger cannot be asked right now. The grants to %(count)d "
                    "customers are on record and will be made as soon as they can be: "
                    "do not grant them again.",
                    len(pending),
                )
                % {"customer": pending[0].customer, "count": len(pending)},
                messages.WARNING,
            )
        for grant in new[Grant.State.REFUSED]:
            self.message_user(
                request,
                _("The ledger refused the grant to %(customer)s: %(error)s")
                % {"customer": grant.customer, "error": grant.last_error},
                messages.ERROR,
            )
        for grant in before:
            self.message_user(
                request,
                _(
                    "This form was sent before and granted nothing new: %(grant)s "
                    "(%(state)s)."
                )
                % {"grant": grant, "state": grant.get_state_display()},
                messages.INFO,
            )


class UnitFilter(admin.AllValuesFieldListFilter):
    """Filters by unit, and calls it what people do."""

    def choices(self, changelist: Any) -> Iterator[Any]:
        for choice in super().choices(changelist):
            yield {**choice, "display": units.name_of(str(choice["display"]))}


class ReadOnlyAdmin(ModelAdmin):
    """Shows rows to those who may view them, and changes none."""

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
        return _name_of(grant.actor)


class StuckFilter(admin.SimpleListFilter):
    title = gettext_lazy("stuck")
    parameter_name = "stuck"

    def lookups(
        self, request: HttpRequest, model_admin: Any
    ) -> list[tuple[str, _StrPromise]]:
        return [("yes", gettext_lazy("Stuck"))]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        return queryset.stuck() if self.value() == "yes" else queryset


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
        "The credits are to be given back. The ledger has not confirmed it yet."
    ),
    Reservation.State.RELEASED: gettext_lazy(
        "The credits were given back. Nothing was charged."
    ),
    Reservation.State.CONFLICT: gettext_lazy(
        "The credits were to be given back, but the ledger had charged them "
        "already. This is not tried again: look into it, and grant the credits "
        "back if that is right."
    ),
    Reservation.State.COMMIT_PENDING: gettext_lazy(
        "The work is done and is to be charged. The ledger has not confirmed it yet."
    ),
    Reservation.State.COMMITTED: gettext_lazy("The work is done and was charged."),
    Reservation.State.UNBILLED: gettext_lazy(
        "The work is done, but there were too few credits left to charge. This is a "
        "debt: it is paid from the customer's next credits, and until then the "
        "customer starts no other work in this unit."
    ),
}
PRESUMED = gettext_lazy(
    "The work has returned well, and its response is still to be sent. If nobody "
    "decides before the lease ends, it is charged."
)
NOTED = gettext_lazy(
    "The credits were given back, but the work succeeded afterwards. It is charged if "
    "the next attempt at its key is not."
)
STUCK = gettext_lazy(
    "But it is stuck: it is not tried any more until somebody looks into it."
)


@admin.register(Reservation)
class ReservationAdmin(ReadOnlyAdmin):
    """The journal, to read. Two actions change it, each with a permission.

    To try stuck reservations again needs ``meterly.change_reservation``, to write a
    debt off ``meterly.write_off_debt``.
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
    # The id is what log messages name.
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
                    "While nobody has decided whether the work succeeded, the "
                    "reservation has a lease. When it ends (the process died, say), "
                    "the credits are released."
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
                    "A decision is recorded first and then carried out at the "
                    "ledger, again and again until it is confirmed. One that the "
                    "ledger has refused too often is stuck: the decision stands, "
                    "but it is not tried any more. The last error says why."
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
                    "The reservation id is the ledger's; the id above it is the one "
                    "that log messages name. A key whose work came to nothing may "
                    "be used again: that is the next attempt."
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
            # The ones that were shown, and are stuck still.
            rows = list(stuck)
            count = journal.retry_stuck(stuck)
            LogEntry.objects.log_actions(
                request.user.pk,  # type: ignore[arg-type]  # logged in, so it has one
                rows,
                CHANGE,
                _("To be tried again."),
            )
            self.message_user(
                request,
                ngettext(
                    "%(count)d reservation will be tried again.",
                    "%(count)d reservations will be tried again.",
                    count,
                )
                % {"count": count},
                messages.SUCCESS,
            )
            return None
        if not stuck.exists():
            self.message_user(
                request,
                _("None of these is stuck: there is nothing to try again."),
                messages.WARNING,
            )
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
        """Let debts be, after a confirmation that gives a reason."""
        debts = queryset.debts()
        if not debts.exists():
            self.message_user(
                request,
                _("None of these is a debt: there is nothing to write off."),
                messages.WARNING,
            )
            return None
        title = _("Write off")
        if not request.POST.get("confirmed"):
            return self._confirmation(request, "write_off", title, debts)
        reason = request.POST.get("reason", "").strip()
        if not reason or len(reason) > MAX_REASON_LENGTH:
            return self._confirmation(
                request,
                "write_off",
                title,
                debts,
                error=_("Give a reason of at most %(length)d characters.")
                % {"length": MAX_REASON_LENGTH},
            )
        count = 0
        for debt in debts.select_related("customer"):
            # No debt is written off without who did it, and why.
            with transaction.atomic(using=journal.alias()):
                if not journal.write_off(debt):
                    continue
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
            count += 1
        self.message_user(
            request,
            ngettext(
                "%(count)d debt was written off.",
                "%(count)d debts were written off.",
                count,
            )
            % {"count": count},
            messages.SUCCESS,
        )
        return None

    def _confirmation(
        self,
        request: HttpRequest,
        action: str,
        title: str,
        rows: ReservationQuerySet,
        *,
        error: str = "",
    ) -> TemplateResponse:
        """Ask on a page of its own whether *action* is to be done to *rows*."""
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
