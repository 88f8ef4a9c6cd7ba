"""The tables of the embedded ledger. Only ``operations`` moves credits in them."""

from __future__ import annotations

import secrets
import time
from typing import Any, NoReturn

from django.db import models, router, transaction
from django.db.models.lookups import GreaterThanOrEqual
from django.utils.translation import gettext_lazy as _

from ..db import DatabaseNow, ExactCharField
from ..errors import MeterlyUsageError


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

        A key is active until it is revoked or expires, by the database's clock, in a
        workspace of its own kind: test or live.
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

    Of a bearer key the SHA-256 is stored. Of an HMAC key there is the *key_id*
    only: the secret is derived from it. Every key may read.
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
    created_at = models.DateTimeField(
        _("created at"), default=DatabaseNow, editable=False
    )
    expires_at = models.DateTimeField(_("expires at"), null=True, blank=True)
    last_used_at = models.DateTimeField(_("last used at"), null=True, editable=False)
    refused_at = models.DateTimeField(_("last refused at"), null=True, editable=False)
    revoked_at = models.DateTimeField(_("revoked at"), null=True, editable=False)

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
        """What the key may do."""
        scopes = [self.Scope.READ]
        if self.may_spend:
            scopes.append(self.Scope.SPEND)
        if self.may_grant:
            scopes.append(self.Scope.GRANT)
        return scopes

    @property
    def shown(self) -> str:
        """What of the key may be shown to people."""
        if self.key_id is None:
            return f"{self.prefix}…{self.last4}"
        return f"{self.prefix}{self.key_id}_…"

    def revoke(self, *, actor: str) -> bool:
        """End the key, at once and for ever; return whether that is new.

        The record of it names *actor*: a user name, or what else revoked the key.
        """
        alias = router.db_for_write(ApiKey, instance=self)
        keys = ApiKey.objects.using(alias).filter(pk=self.pk, revoked_at=None)
        with transaction.atomic(using=alias):
            revoked = keys.update(revoked_at=DatabaseNow()) == 1
            if revoked:
                self.events.create(kind=ApiKeyEvent.Kind.REVOKED, actor=actor)
        return revoked


class ApiKeyEventQuerySet(models.QuerySet["ApiKeyEvent"]):
    def update(self, **kwargs: Any) -> NoReturn:
        """Refuse: events are append-only."""
        raise MeterlyUsageError("Events of API keys are append-only.")

    def delete(self) -> NoReturn:
        """Refuse: events are append-only."""
        raise MeterlyUsageError("Events of API keys are append-only.")

    # Django's own marks: not for templates, and not for a related manager.
    update.alters_data = True  # type: ignore[attr-defined]
    delete.alters_data = True  # type: ignore[attr-defined]
    delete.queryset_only = True  # type: ignore[attr-defined]


class ApiKeyEvent(models.Model):
    """What happened to an API key. It is never changed, and never deleted."""

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
    created_at = models.DateTimeField(
        _("created at"), default=DatabaseNow, editable=False
    )

    objects = ApiKeyEventQuerySet.as_manager()

    class Meta:
        verbose_name = _("API key event")
        verbose_name_plural = _("API key events")

    def __str__(self) -> str:
        return f"{self.api_key}: {self.get_kind_display()}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Insert the event. Raises ``MeterlyUsageError`` if it exists already."""
        if not self._state.adding:
            raise MeterlyUsageError("Events of API keys are append-only.")
        super().save(*args, **{**kwargs, "force_insert": True})

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: events are append-only."""
        raise MeterlyUsageError("Events of API keys are append-only.")


class LedgerCustomer(models.Model):
    """Who pays with credits, under the stable id that *you* gave them."""

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
    created_at = models.DateTimeField(
        _("created at"), default=DatabaseNow, editable=False
    )

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


class Account(models.Model):
    """One customer's credits in one unit."""

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

    A hold whose time is over has expired, whether or not a sweep has recorded it.
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


class HoldQuerySet(models.QuerySet["Hold"]):
    def live(self) -> HoldQuerySet:
        return self.filter(status=Hold.Status.RESERVED)

    def due(self) -> HoldQuerySet:
        return self.live().filter(expires_at__lte=DatabaseNow())

    def current(self) -> HoldQuerySet:
        """Return the holds with their account, customer and ``present_status``."""
        holds = self.select_related("account__customer")
        return holds.annotate(present_status=_present_status())  # type: ignore[no-redef]


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
    expires_at = models.DateTimeField(_("expires at"))
    created_at = models.DateTimeField(
        _("created at"), default=DatabaseNow, editable=False
    )
    closed_at = models.DateTimeField(_("closed at"), null=True, editable=False)

    objects = HoldQuerySet.as_manager()

    #: Only set by ``current()``.
    present_status: str

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


class EntryQuerySet(models.QuerySet["Entry"]):
    def current(self) -> EntryQuerySet:
        """Return the entries with account, customer, hold and ``hold_status``."""
        entries = self.select_related("account__customer", "hold")
        return entries.annotate(hold_status=_present_status("hold__"))  # type: ignore[no-redef]

    def update(self, **kwargs: Any) -> NoReturn:
        """Refuse: entries are append-only."""
        raise MeterlyUsageError("Ledger entries are append-only.")

    def delete(self) -> NoReturn:
        """Refuse: entries are append-only."""
        raise MeterlyUsageError("Ledger entries are append-only.")

    # Django's own marks: not for templates, and not for a related manager.
    update.alters_data = True  # type: ignore[attr-defined]
    delete.alters_data = True  # type: ignore[attr-defined]
    delete.queryset_only = True  # type: ignore[attr-defined]


class Entry(models.Model):
    """One line of the ledger. It is never changed, and never deleted.

    It also is the idempotency record of the call that wrote it.
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
        # It is the account's customer's. Checked as well, the one row of the
        # workspace would be locked, shared, by every movement at once: on
        # PostgreSQL each would then need a multixact.
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
    created_at = models.DateTimeField(
        _("created at"), default=DatabaseNow, editable=False
    )

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
        ]

    def __str__(self) -> str:
        return str(self.public_id)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Insert the entry. Raises ``MeterlyUsageError`` if it exists already."""
        if not self._state.adding:
            raise MeterlyUsageError("Ledger entries are append-only.")
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: entries are append-only."""
        raise MeterlyUsageError("Ledger entries are append-only.")


class Record(models.Model):
    """The idempotency key of a call that moved no credits, for a while.

    A movement needs none: its entry is the record.
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
    created_at = models.DateTimeField(
        _("created at"), default=DatabaseNow, editable=False
    )

    class Meta:
        verbose_name = _("idempotency record")
        verbose_name_plural = _("idempotency records")
        indexes = [
            # For the pruning.
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
