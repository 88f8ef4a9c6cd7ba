"""The ledger's tables in the admin, to read.

An operator can add a workspace and revoke an API key. Nothing here moves credits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from .models import (
    Account,
    ApiKey,
    ApiKeyEvent,
    Entry,
    Hold,
    LedgerCustomer,
    Seal,
    Workspace,
)

if TYPE_CHECKING:
    from django.db.models import QuerySet
    from django.http import HttpRequest

    ModelAdmin = admin.ModelAdmin[Any]
else:
    ModelAdmin = admin.ModelAdmin


class ReadOnlyAdmin(ModelAdmin):
    """Shows rows to users with the view permission; nobody can change them here."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Workspace)
class WorkspaceAdmin(ReadOnlyAdmin):
    list_display = ["name", "is_test"]
    list_filter = ["is_test"]
    search_fields = ["name"]

    def has_add_permission(self, request: HttpRequest) -> bool:
        # Skip ReadOnlyAdmin: users with Django's permission may add a workspace.
        return super(ReadOnlyAdmin, self).has_add_permission(request)


@admin.register(ApiKey)
class ApiKeyAdmin(ReadOnlyAdmin):
    actions = ["revoke"]
    list_display = [
        "name",
        "workspace",
        "shown",
        "scopes",
        "is_active",
        "expires_at",
        "last_used_at",
        "revoked_at",
        "created_at",
    ]
    list_filter = [
        "workspace",
        "is_test",
        "may_spend",
        "may_grant",
        ("expires_at", admin.EmptyFieldListFilter),
        ("revoked_at", admin.EmptyFieldListFilter),
    ]
    search_fields = ["name", "last4", "key_id__exact"]
    fields = [
        "name",
        "workspace",
        "shown",
        "scopes",
        "is_active",
        "is_test",
        "created_at",
        "expires_at",
        "last_used_at",
        "refused_at",
        "revoked_at",
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet[ApiKey]:
        keys: Any = super().get_queryset(request)
        current: QuerySet[ApiKey] = keys.current()
        return current

    @admin.display(description=_("scopes"))
    def scopes(self, key: ApiKey) -> str:
        # Not translated: the words that meterly_ledger_apikey takes.
        return ", ".join(key.scopes)

    @admin.display(description=_("active"), boolean=True)
    def is_active(self, key: ApiKey) -> bool:
        return key.is_active

    @admin.display(description=_("key"))
    def shown(self, key: ApiKey) -> str:
        return key.shown

    def has_revoke_permission(self, request: HttpRequest) -> bool:
        # Skip ReadOnlyAdmin: revoking needs Django's permission to change a key.
        return super(ReadOnlyAdmin, self).has_change_permission(request)

    @admin.action(description=_("Revoke the selected keys"), permissions=["revoke"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        """End the keys, at once and for ever."""
        revoked = 0
        for key in queryset:
            if key.revoke(actor=request.user.get_username()):
                self.log_change(request, key, gettext("Revoked."))
                revoked += 1
        self.message_user(
            request,
            ngettext(
                "%(count)d key was revoked.", "%(count)d keys were revoked.", revoked
            )
            % {"count": revoked},
            messages.SUCCESS if revoked else messages.WARNING,
        )


@admin.register(ApiKeyEvent)
class ApiKeyEventAdmin(ReadOnlyAdmin):
    list_display = [
        "created_at",
        "kind",
        "api_key",
        "actor",
        "remote_address",
        "request_id",
    ]
    list_filter = ["kind", "created_at", "api_key__workspace"]
    list_select_related = ["api_key"]
    search_fields = [
        "api_key__name",
        "api_key__last4",
        "api_key__key_id__exact",
        "actor__exact",
        "remote_address__exact",
        "request_id__exact",
    ]


@admin.register(LedgerCustomer)
class LedgerCustomerAdmin(ReadOnlyAdmin):
    list_display = [
        "external_id",
        "public_id",
        "credit_unit",
        "workspace",
        "created_at",
    ]
    list_filter = ["workspace", "credit_unit"]
    list_select_related = ["workspace"]
    search_fields = ["external_id__exact", "public_id__exact"]


@admin.register(Account)
class AccountAdmin(ReadOnlyAdmin):
    list_display = ["customer", "unit", "balance", "reserved_now", "available"]
    list_filter = ["unit", "customer__workspace"]
    list_select_related = ["customer"]
    search_fields = ["customer__external_id__exact", "customer__public_id__exact"]
    fields = ["customer", "unit", "balance", "reserved_now", "available"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Account]:
        accounts: Any = super().get_queryset(request)
        current: QuerySet[Account] = accounts.current()
        return current

    @admin.display(description=_("reserved"), ordering="present_reserved")
    def reserved_now(self, account: Account) -> int:
        return account.present_reserved

    @admin.display(description=_("available"))
    def available(self, account: Account) -> int:
        return account.balance - account.present_reserved


@admin.register(Hold)
class HoldAdmin(ReadOnlyAdmin):
    list_display = [
        "created_at",
        "account",
        "amount",
        "status",
        "reference",
        "expires_at",
        "closed_at",
        "public_id",
    ]
    list_filter = ["status", "created_at", "account__customer__workspace"]
    list_select_related = ["account__customer"]
    search_fields = [
        "public_id__exact",
        "reference__exact",
        "account__customer__external_id__exact",
        "account__customer__public_id__exact",
    ]


@admin.register(Entry)
class EntryAdmin(ReadOnlyAdmin):
    list_display = [
        "created_at",
        "account",
        "kind",
        "amount",
        "balance_delta",
        "reserved_delta",
        "balance_after",
        "reserved_after",
        "reference",
        "public_id",
    ]
    list_filter = ["kind", "created_at", "workspace"]
    list_select_related = ["account__customer"]
    search_fields = [
        "public_id__exact",
        "reference__exact",
        "hold__public_id__exact",
        "idempotency_key__exact",
        "account__customer__external_id__exact",
        "account__customer__public_id__exact",
    ]
    exclude = ["fingerprint", "unique_reference"]


@admin.register(Seal)
class SealAdmin(ReadOnlyAdmin):
    list_display = ["number", "created_at", "first", "last", "count", "hash"]
    list_filter = ["created_at"]
    search_fields = ["hash__exact"]
