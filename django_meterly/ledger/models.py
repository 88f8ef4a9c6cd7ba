"""The tables of the embedded ledger, and the constraints that keep them consistent.

Only ``portable``, ``postgresql``, ``grants`` and ``expiry`` change balances.
"""

from __future__ import annotations

import secrets
import time
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import models, router, transaction
from django.db.models.functions import Coalesce, Greatest
from django.db.models.lookups import GreaterThanOrEqual
from django.utils.translation import gettext_lazy as _

from ..db import DatabaseNow, ExactCharField, MomentField
from .append_only import AppendOnly, AppendOnlyQuerySet
from .constraints import ShapeConstraint

# Every module of the ledger imports this one. If the ledger's app is not installed,
# Django would assign the models to the app around it.
if not apps.is_installed("django_meterly.ledger"):
    raise ImproperlyConfigured(
        "The embedded ledger is not installed. Add 'django_meterly.ledger' to "
        "INSTALLED_APPS and run migrate."
    )


def customer_id() -> str:
    return f"cus_{_unique()}"


def hold_id() -> str:
    return f"res_{_unique()}"


def entry_id() -> str:
    return f"ent_{_unique()}"


def _unique() -> str:
    """Return 32 hexadecimal digits: milliseconds, then 80 random bits.

    New ids come next to each other in their index, so that a movement in a large
    ledger touches as few pages as in a small one.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


class Workspace(models.Model):
    """One tenant of the ledger: customers and keys belong to exactly one."""

    name = ExactCharField(_("name"), max_length=255, unique=True)
    is_test = models.BooleanField(
        _("test workspace"),
        default=False,
        help_text=_("Only test keys work in it, and they work nowhere else."),
    )

    class Meta:
        verbose_name = _("workspace")
        verbose_name_plural = _("workspaces")

    def __str__(self) -> str:
        return str(self.name)


class ApiKeyQuerySet(models.QuerySet["ApiKey"]):
    def current(self) -> ApiKeyQuerySet:
        """Return the keys with their workspace and ``is_active``.

        A key is active until it is revoked or expires, by the database's clock. A test
        key is active in a test workspace only, a live key in a live one.
        """
        unexpired = models.Q(expires_at=None) | models.Q(expires_at__gt=DatabaseNow())
        active = models.When(
            unexpired,
            revoked_at=None,
            is_test=models.F("workspace__is_test"),
            then=models.Value(True),
        )
        keys = self.select_related("workspace")
        return keys.annotate(  # type: ignore[no-redef]
            is_active=models.Case(
                active,
                default=models.Value(False),
                output_field=models.BooleanField(),
            )
        )


class ApiKey(models.Model):
    """A key of a workspace, without its secret.

    For a bearer key the row has the SHA-256. For an HMAC key it has the *key_id* only:
    the secret is derived from it. Every key may read.
    """

    class Scope(models.TextChoices):
        READ = "read"
        SPEND = "spend"
        GRANT = "grant"

    workspace = models.ForeignKey(
        Workspace,
        models.CASCADE,
        related_name="api_keys",
        verbose_name=_("workspace"),
    )
    name = models.CharField(_("name"), max_length=255)
    prefix = models.CharField(_("prefix"), max_length=16)
    last4 = models.CharField(_("last four"), max_length=4, blank=True)
    key_hash = ExactCharField(_("key hash"), max_length=64, unique=True, null=True)
    key_id = ExactCharField(_("key id"), max_length=64, unique=True, null=True)
    is_test = models.BooleanField(_("test key"), default=False)
    may_spend = models.BooleanField(_("may spend"), default=True)
    may_grant = models.BooleanField(_("may grant"), default=False)
    created_at = MomentField(_("created at"), default=DatabaseNow, editable=False)
    expires_at = MomentField(_("expires at"), null=True, blank=True)
    last_used_at = MomentField(_("last used at"), null=True, editable=False)
    refused_at = MomentField(_("last refused at"), null=True, editable=False)
    revoked_at = MomentField(_("revoked at"), null=True, editable=False)

    objects = ApiKeyQuerySet.as_manager()

    #: Only set by ``current()``.
    is_active: bool

    class Meta:
        verbose_name = _("API key")
        verbose_name_plural = _("API keys")
        constraints = [
            models.CheckConstraint(
                condition=models.Q(key_hash__isnull=False, key_id=None)
                | models.Q(key_hash=None, key_id__isnull=False),
                name="meterly_ledger_apikey_one_kind",
            ),
            models.CheckConstraint(
                condition=~models.Q(name=""), name="meterly_ledger_apikey_named"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.shown})"

    @property
    def kind(self) -> str:
        """``"bearer"`` or ``"hmac"``."""
        return "bearer" if self.key_id is None else "hmac"

    @property
    def scopes(self) -> list[ApiKey.Scope]:
        """The scopes of the key; every key may read."""
        scopes = [self.Scope.READ]
        if self.may_spend:
            scopes.append(self.Scope.SPEND)
        if self.may_grant:
            scopes.append(self.Scope.GRANT)
        return scopes

    @property
    def shown(self) -> str:
        """The part of the key that people may see, for example ``mk_live_Ab3…x9Qz``."""
        if self.key_id is None:
            return f"{self.prefix}…{self.last4}"
        return f"{self.prefix}{self.key_id}_…"

    def revoke(self, *, actor: str) -> bool:
        """End the key, at once and for ever. Return ``False`` if it had ended before.

        The event names *actor*: a user name, or the command that revoked the key.
        """
        alias = router.db_for_write(ApiKey, instance=self)
        keys = ApiKey.objects.using(alias).filter(pk=self.pk, revoked_at=None)
        with transaction.atomic(using=alias):
            revoked = keys.update(revoked_at=DatabaseNow()) == 1
            if revoked:
                self.events.create(kind=ApiKeyEvent.Kind.REVOKED, actor=actor)
        return revoked


class ApiKeyEventQuerySet(AppendOnlyQuerySet):
    """The events of a key, in the order in which they were recorded."""


class ApiKeyEvent(AppendOnly, models.Model):
    """An event in the life of an API key. It is never changed, and never deleted."""

    class Kind(models.TextChoices):
        CREATED = "created", _("created")
        REVOKED = "revoked", _("revoked")
        REFUSED = "refused", _("refused")

    api_key = models.ForeignKey(
        ApiKey, models.PROTECT, related_name="events", verbose_name=_("API key")
    )
    kind = models.CharField(_("kind"), max_length=16, choices=Kind.choices)
    actor = models.CharField(_("by"), max_length=255, blank=True)
    request_id = models.CharField(_("request id"), max_length=64, blank=True)
    remote_address = models.CharField(_("remote address"), max_length=64, blank=True)
    created_at = MomentField(_("created at"), default=DatabaseNow, editable=False)

    objects = ApiKeyEventQuerySet.as_manager()

    class Meta:
        verbose_name = _("API key event")
        verbose_name_plural = _("API key events")

    def __str__(self) -> str:
        return f"{self.api_key}: {self.get_kind_display()}"


class LedgerCustomer(models.Model):
    """A customer, with the stable *external_id* that your project gave them."""

    workspace = models.ForeignKey(
        Workspace,
        models.PROTECT,
        related_name="customers",
        # The unique constraint below begins with it.
        db_index=False,
        verbose_name=_("workspace"),
    )
    public_id = ExactCharField(
        _("customer id"), max_length=64, unique=True, default=customer_id
    )
    external_id = ExactCharField(_("external id"), max_length=255)
    credit_unit = ExactCharField(_("credit unit"), max_length=64)
    created_at = MomentField(_("created at"), default=DatabaseNow, editable=False)

    class Meta:
        # The SQL functions name the table.
        db_table = "meterly_ledger_customer"
        verbose_name = _("customer")
        verbose_name_plural = _("customers")
        constraints = [
            models.UniqueConstraint(
                fields=["workspace", "external_id"],
                name="meterly_ledger_customer_unique_external_id",
            ),
        ]

    def __str__(self) -> str:
        return str(self.external_id)


class AccountQuerySet(models.QuerySet["Account"]):
    def affording(self, amount: int) -> AccountQuerySet:
        # Never "reserved + amount": that sum can leave the range of a bigint.
        available = models.F("balance") - models.F("reserved")
        return self.filter(GreaterThanOrEqual(available, amount))

    def current(self) -> AccountQuerySet:
        """Return the accounts with ``present_reserved``."""
        return self.annotate(present_reserved=_present_reserved())  # type: ignore[no-redef]


class Account(models.Model):
    """One customer's credits in one unit.

    *reserved* is the sum that the entries tell: an expired hold counts until its expiry
    is recorded. Show ``present_reserved`` to readers, which leaves such holds out.
    """

    customer = models.ForeignKey(
        LedgerCustomer,
        models.PROTECT,
        related_name="accounts",
        # The unique constraint below begins with it.
        db_index=False,
        verbose_name=_("customer"),
    )
    unit = ExactCharField(_("credit unit"), max_length=64)
    balance = models.BigIntegerField(_("balance"), default=0)
    reserved = models.BigIntegerField(_("reserved"), default=0)

    objects = AccountQuerySet.as_manager()

    #: Only set by ``current()``.
    present_reserved: int

    class Meta:
        verbose_name = _("account")
        verbose_name_plural = _("accounts")
        constraints = [
            models.UniqueConstraint(
                fields=["customer", "unit"],
                name="meterly_ledger_account_unique_unit",
            ),
            models.CheckConstraint(
                condition=models.Q(reserved__gte=0, reserved__lte=models.F("balance")),
                name="meterly_ledger_account_reserved_within_balance",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.customer} {self.unit}"

    @property
    def available(self) -> int:
        return self.balance - self.reserved


def _present_status(hold: str = "") -> models.Case:
    """Return the status of a hold by the database's clock.

    A hold expires at ``expires_at``, whether or not a sweep has recorded it.
    *hold* is the lookup that leads to the hold, for example ``"hold__"``.
    """
    due = {
        f"{hold}status": Hold.Status.RESERVED,
        f"{hold}expires_at__lte": DatabaseNow(),
    }
    return models.Case(
        models.When(**due, then=models.Value(Hold.Status.EXPIRED.value)),
        default=models.F(f"{hold}status"),
    )


def _present_reserved(account: str = "") -> models.Expression:
    """Return the reserved credits of an account by the database's clock.

    An expired hold reserves nothing, whether or not a sweep has recorded it.
    *account* is the lookup that leads to the account, for example ``"account__"``.
    """
    due = Hold.objects.due().filter(account=models.OuterRef(f"{account}pk"))
    total = due.order_by().values("account").values(total=models.Sum("amount"))
    reserved = models.F(f"{account}reserved") - Coalesce(models.Subquery(total), 0)
    # Below zero only if the books do not balance; the page must still show them.
    return Greatest(reserved, 0, output_field=models.BigIntegerField())


class HoldQuerySet(models.QuerySet["Hold"]):
    def live(self) -> HoldQuerySet:
        return self.filter(status=Hold.Status.RESERVED)

    def due(self) -> HoldQuerySet:
        return self.live().filter(expires_at__lte=DatabaseNow())

    def current(self) -> HoldQuerySet:
        """Return the holds with account, customer and the state of this moment.

        That is ``present_status``, and ``present_reserved`` of the account.
        """
        return self.select_related("account__customer").annotate(  # type: ignore[no-redef]
            present_status=_present_status(),
            present_reserved=_present_reserved("account__"),
        )


class Hold(models.Model):
    """Credits set aside for work in progress: a reservation, on the wire."""

    class Status(models.TextChoices):
        RESERVED = "reserved", _("reserved")
        COMMITTED = "committed", _("committed")
        RELEASED = "released", _("released")
        EXPIRED = "expired", _("expired")

    public_id = ExactCharField(
        _("reservation id"), max_length=64, unique=True, default=hold_id
    )
    account = models.ForeignKey(
        Account, models.PROTECT, related_name="holds", verbose_name=_("account")
    )
    amount = models.BigIntegerField(_("amount"))
    status = models.CharField(
        _("status"), max_length=16, choices=Status.choices, default=Status.RESERVED
    )
    reference = ExactCharField(_("reference"), max_length=255)
    expires_at = MomentField(_("expires at"))
    created_at = MomentField(_("created at"), default=DatabaseNow, editable=False)
    closed_at = MomentField(_("closed at"), null=True, editable=False)

    objects = HoldQuerySet.as_manager()

    #: Only set by ``current()``.
    present_status: str
    present_reserved: int

    class Meta:
        verbose_name = _("hold")
        verbose_name_plural = _("holds")
        indexes = [
            # For the sweep. Not a partial one: MySQL would have none at all.
            models.Index(
                fields=["status", "expires_at"], name="meterly_ledger_hold_due"
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(amount__gt=0),
                name="meterly_ledger_hold_amount_positive",
            ),
        ]

    def __str__(self) -> str:
        return str(self.public_id)


class EntryQuerySet(AppendOnlyQuerySet):
    def current(self) -> EntryQuerySet:
        """Return the entries with account, customer, hold and ``hold_status``."""
        entries = self.select_related("account__customer", "hold")
        return entries.annotate(hold_status=_present_status("hold__"))  # type: ignore[no-any-return]


class Shape(NamedTuple):
    """The shape of entries of one kind. The deltas are signs of the amount."""

    balance: int
    reserved: int
    #: Whether it opens or closes a hold.
    hold: bool = False
    #: Whether its reference is unique in the account.
    once: bool = False
    #: Whether the balance may lose less than the hold, which ends as a whole.
    partial: bool = False

    def condition(self) -> models.Q:
        if self.partial:
            reserved = models.Q(reserved_delta__lte=models.F("balance_delta"))
        else:
            reserved = models.Q(reserved_delta=_signed(self.reserved))
        return models.Q(balance_delta=_signed(self.balance)) & reserved


def _signed(sign: int) -> Any:
    """Return the amount with this sign, or 0."""
    amount = models.F("amount")
    return {0: 0, 1: amount}.get(sign, amount * -1)


#: The kinds of entries. A check constraint ties kind, amount and deltas together;
#: ``verification`` checks the rest, too.
SHAPES = {
    "credits_granted": Shape(+1, 0, once=True),
    "credits_added": Shape(+1, 0, once=True),
    "credits_used": Shape(-1, 0),
    "credits_reserved": Shape(0, +1, hold=True),
    "credits_committed": Shape(-1, -1, hold=True, partial=True),
    "credits_released": Shape(0, -1, hold=True),
    "credits_expired": Shape(0, -1, hold=True),
}


def _shaped() -> models.Q:
    """Return the condition that an entry has its kind's shape."""
    kinds: dict[Shape, list[str]] = {}
    for kind, shape in SHAPES.items():
        # The condition does not depend on these two.
        kinds.setdefault(shape._replace(hold=False, once=False), []).append(kind)
    shaped = (
        (models.Q(kind__in=alike) if alike[1:] else models.Q(kind=alike[0]))
        & shape.condition()
        for shape, alike in kinds.items()
    )
    # Each entry moves something, and its amount is never negative.
    moves = models.Q(amount__gte=0) & ~models.Q(balance_delta=0, reserved_delta=0)
    return moves & reduce(or_, shaped)


class Entry(AppendOnly, models.Model):
    """One line of the ledger. It is never changed, and never deleted.

    It is also the idempotency record of the call that wrote it. ``append_only`` says
    why entries stay.
    """

    class Kind(models.TextChoices):
        GRANTED = "credits_granted", _("granted")
        ADDED = "credits_added", _("added")
        USED = "credits_used", _("used")
        RESERVED = "credits_reserved", _("reserved")
        COMMITTED = "credits_committed", _("committed")
        RELEASED = "credits_released", _("released")
        EXPIRED = "credits_expired", _("expired")

    public_id = ExactCharField(
        _("entry id"), max_length=64, unique=True, default=entry_id
    )
    workspace = models.ForeignKey(
        Workspace,
        models.PROTECT,
        related_name="entries",
        # The unique constraint below begins with it.
        db_index=False,
        # The account's customer has the same workspace. With a foreign key, every
        # movement would take a shared lock on the one row of the workspace, and
        # PostgreSQL would need a multixact for each.
        db_constraint=False,
        verbose_name=_("workspace"),
    )
    account = models.ForeignKey(
        Account,
        models.PROTECT,
        related_name="entries",
        # The index below begins with it.
        db_index=False,
        verbose_name=_("account"),
    )
    hold = models.ForeignKey(
        Hold,
        models.PROTECT,
        null=True,
        related_name="entries",
        verbose_name=_("hold"),
    )
    kind = models.CharField(_("kind"), max_length=32, choices=Kind.choices)
    amount = models.BigIntegerField(_("amount"))
    balance_delta = models.BigIntegerField(_("balance delta"))
    reserved_delta = models.BigIntegerField(_("reserved delta"))
    balance_after = models.BigIntegerField(_("balance after"))
    reserved_after = models.BigIntegerField(_("reserved after"))
    reference = ExactCharField(_("reference"), max_length=255)
    description = models.CharField(_("description"), max_length=1000, blank=True)
    # The reference again where it must be unique (grants and adds), null
    # elsewhere: MySQL has no conditional unique constraints.
    unique_reference = ExactCharField(_("unique reference"), max_length=255, null=True)
    idempotency_key = ExactCharField(_("idempotency key"), max_length=255, null=True)
    fingerprint = ExactCharField(_("request fingerprint"), max_length=64, blank=True)
    created_at = MomentField(_("created at"), default=DatabaseNow, editable=False)

    objects = EntryQuerySet.as_manager()

    #: Only set by ``current()``; ``None`` for an entry without a hold.
    hold_status: str | None

    class Meta:
        verbose_name = _("entry")
        verbose_name_plural = _("entries")
        indexes = [
            models.Index(fields=["account", "id"], name="meterly_ledger_entry_account"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["workspace", "idempotency_key"],
                name="meterly_ledger_entry_unique_key",
            ),
            models.UniqueConstraint(
                fields=["account", "unique_reference"],
                name="meterly_ledger_entry_unique_reference",
            ),
            ShapeConstraint(
                condition=_shaped(),
                name="meterly_ledger_entry_shape",
            ),
        ]

    def __str__(self) -> str:
        return str(self.public_id)


class SealQuerySet(AppendOnlyQuerySet):
    """The chain is in the order of its numbers."""


class Seal(AppendOnly, models.Model):
    """One link of a chain of hashes over the entries. See ``seals``.

    It covers the entries from *first* to *last* without the *gaps*, and the *late*
    entries, which appeared in the gaps of earlier seals. Ids are the entries' primary
    keys; gaps and late are lists of ``[first, last]``.
    """

    number = models.BigIntegerField(_("number"), primary_key=True)
    first = models.BigIntegerField(_("first entry"))
    last = models.BigIntegerField(_("last entry"))
    count = models.BigIntegerField(_("entries"))
    gaps = models.JSONField(_("gaps"))
    late = models.JSONField(_("late entries"))
    # Seals up to this one can have no more late entries.
    settled = models.BigIntegerField(_("settled up to"))
    # On PostgreSQL: above the id of every transaction that was open then.
    horizon = models.BigIntegerField(_("horizon"), null=True)
    hash = ExactCharField(_("hash"), max_length=64, unique=True)
    created_at = MomentField(_("created at"), editable=False)

    objects = SealQuerySet.as_manager()

    class Meta:
        verbose_name = _("seal")
        verbose_name_plural = _("seals")

    def __str__(self) -> str:
        return f"{self.number} {self.hash}"


class Record(models.Model):
    """The idempotency key of a call that moved no credits, kept for a while.

    The entry of a movement has the key itself.
    """

    workspace = models.ForeignKey(
        Workspace,
        models.CASCADE,
        related_name="records",
        # The unique constraint below begins with it.
        db_index=False,
        verbose_name=_("workspace"),
    )
    idempotency_key = ExactCharField(_("idempotency key"), max_length=255)
    fingerprint = ExactCharField(_("request fingerprint"), max_length=64)
    created_at = MomentField(_("created at"), default=DatabaseNow, editable=False)

    class Meta:
        verbose_name = _("idempotency record")
        verbose_name_plural = _("idempotency records")
        indexes = [
            # For ``idempotency.prune_records``.
            models.Index(fields=["created_at"], name="meterly_ledger_record_age"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["workspace", "idempotency_key"],
                name="meterly_ledger_record_unique_key",
            ),
        ]

    def __str__(self) -> str:
        return str(self.idempotency_key)
