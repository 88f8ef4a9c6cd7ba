"""Customers: their balances, and the page that grants credits to them."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import AdminForm
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db import connections, transaction
from django.http import HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.http import urlencode
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from .. import grants, units
from ..client import get_client
from ..errors import MeterlyError, MeterlyReferenceConflictError
from ..forms import CustomerForm, GrantCreditsForm, in_conflict
from ..models import Customer, Grant
from .base import name_of
from .grants import said_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.db.models import QuerySet
    from django.http import HttpRequest, HttpResponse
    from django.urls import URLPattern

    from ..client import MeterlyClient

    CustomerModelAdmin = admin.ModelAdmin[Customer]
else:
    CustomerModelAdmin = admin.ModelAdmin

logger = logging.getLogger(__name__)

#: Seconds a customer's page waits for the ledger.
BALANCES_TIMEOUT = 2.0
#: Customers who can be granted credits at once: each is a call to the ledger.
MAX_CUSTOMERS = 100


@admin.register(Customer)
class CustomerAdmin(CustomerModelAdmin):
    """Shows customers and asks the ledger for their balances.

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
        # Credits stay with their owner. If the owner could be changed, somebody else
        # would take over this customer's credits and history.
        owner = ("owner_name",) if obj.had_owner else ()
        return (*owner, "external_id", "customer_id", "created_at")

    @admin.display(description=gettext_lazy("owner"), ordering="owner")
    def owner_name(self, customer: Customer) -> str:
        return name_of(customer.owner)

    def has_delete_permission(
        self, request: HttpRequest, obj: Customer | None = None
    ) -> bool:
        return False

    def has_grant_credits_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("meterly.grant_credits")

    def get_urls(self) -> list[URLPattern]:
        # Outside any transaction: the grant must stay on record before the ledger is
        # asked for it, even if this request fails afterwards.
        view = self.admin_site.admin_view(self.grant_credits_view)
        for alias in connections:
            view = transaction.non_atomic_requests(alias)(view)
        grant_credits = path(
            "grant-credits/", view, name="meterly_customer_grant_credits"
        )
        return [grant_credits, *super().get_urls()]

    def _url(self, page: str, *args: Any) -> str:
        return reverse(
            f"admin:meterly_customer_{page}",
            args=args,
            current_app=self.admin_site.name,
        )

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
            context.update(self._balances(obj))
        return super().render_change_form(request, context, add, change, form_url, obj)

    def _balances(self, customer: Customer) -> dict[str, Any]:
        """Return the ledger's balances of *customer*, or the error, for the page."""
        if not customer.customer_id:
            return {}
        try:
            client = get_client().within(BALANCES_TIMEOUT, attempts=1)
            return {"balances": client.get_balances(customer.customer_id).balances}
        except (MeterlyError, ImproperlyConfigured, ValueError) as exc:
            # Not only an outage: a wrong setting may prevent the client.
            logger.warning("No balances of customer %s: %s", customer, exc)
            return {"balances_error": str(exc)}

    def save_model(
        self, request: HttpRequest, obj: Customer, form: Any, change: bool
    ) -> None:
        if not change:
            super().save_model(request, obj, form, change)
        elif "owner" in form.changed_data:
            # Only this column: the others are as old as the page.
            unowned = Customer.objects.filter(pk=obj.pk, had_owner=False)
            unowned.update(owner=obj.owner_id)

    # Granting credits

    @admin.action(
        description=gettext_lazy("Grant credits"), permissions=["grant_credits"]
    )
    def grant_credits(
        self, request: HttpRequest, queryset: QuerySet[Customer]
    ) -> HttpResponseRedirect:
        """Go to the page that asks for the amount and the reason."""
        # One more than allowed is enough to make that page refuse.
        chosen = queryset.values_list("pk", flat=True)[: MAX_CUSTOMERS + 1]
        return HttpResponseRedirect(self._grant_credits_url(chosen))

    def _grant_credits_url(self, ids: Iterable[int]) -> str:
        return f"{self._url('grant_credits')}?ids={','.join(map(str, ids))}"

    def grant_credits_view(self, request: HttpRequest) -> HttpResponse:
        """Grant credits to the customers that ``?ids=1,2`` names."""
        if not (
            self.has_view_or_change_permission(request)
            and self.has_grant_credits_permission(request)
        ):
            raise PermissionDenied
        customers, problem = self._chosen(request)
        if problem:
            self.message_user(request, problem, messages.ERROR)
            return HttpResponseRedirect(self._url("changelist"))
        form = GrantCreditsForm(
            request.POST if request.method == "POST" else None, customers=customers
        )
        if not form.is_valid():
            return self._grant_credits_page(request, form)
        self._grant(request, customers, form.cleaned_data)
        if len(customers) > 1:
            return HttpResponseRedirect(self._url("changelist"))
        return HttpResponseRedirect(self._url("change", customers[0].pk))

    def _chosen(self, request: HttpRequest) -> tuple[list[Customer], str]:
        """Return the customers that ``?ids=`` names, or why they are refused."""
        ids = set(request.GET.get("ids", "").split(","))
        if len(ids) > MAX_CUSTOMERS:
            return [], _("Choose at most %(count)d customers at a time.") % {
                "count": MAX_CUSTOMERS
            }
        # Our keys have at most 18 digits. Some databases fail on larger numbers.
        pks = [pk for pk in ids if re.fullmatch("[0-9]{1,18}", pk)]
        customers = list(self.get_queryset(request).filter(pk__in=pks).order_by("pk"))
        if len(customers) < len(ids):
            return [], _("Not all of these customers exist. Nothing was granted.")
        return customers, ""

    def _grant_credits_page(
        self, request: HttpRequest, form: GrantCreditsForm
    ) -> TemplateResponse:
        request.current_app = self.admin_site.name
        title = _("Grant credits")
        return TemplateResponse(
            request,
            "admin/meterly/customer/grant_credits.html",
            {
                **self.admin_site.each_context(request),
                "title": title,
                "opts": self.opts,
                "customers": form.customers,
                "form": form,
                "errors": form.errors,
                "adminform": AdminForm(
                    form,  # type: ignore[arg-type]  # any form will do
                    [(None, {"fields": ["amount", "unit", "reason"]})],
                    {},
                    # Some admin themes read it.
                    model_admin=self,
                ),
            },
        )

    def _grant(
        self, request: HttpRequest, customers: list[Customer], asked: dict[str, Any]
    ) -> None:
        """Grant the *asked* amount to each of *customers*, and report the outcomes."""
        client: MeterlyClient | None = get_client()
        new: list[Grant] = []
        repeated: list[Grant] = []
        for customer in customers:
            try:
                grant, created = grants.grant(
                    client, customer, **asked, actor=request.user
                )
            except MeterlyReferenceConflictError:
                # The form was sent twice at the same moment, with two amounts.
                first = Grant.objects.get(
                    customer=customer, unit=asked["unit"], reference=asked["reference"]
                )
                self.message_user(request, in_conflict(first), messages.ERROR)
                continue
            (new if created else repeated).append(grant)
            if not created:
                continue
            if grant.state == Grant.State.PENDING:
                # The ledger is out of reach: record the other grants without it.
                client = None
            self.log_change(
                request,
                customer,
                _("Grant of %(amount)s %(unit)s (%(state)s): %(reason)s")
                % {
                    **asked,
                    "unit": units.name_of(asked["unit"]),
                    "state": grant.get_state_display(),
                },
            )
        for level, text in said_of(new, repeated):
            self.message_user(request, text, level)
