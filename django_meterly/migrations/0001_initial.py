from __future__ import annotations

import uuid

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models

import django_meterly.db
from django_meterly.conf import meterly_settings


class Migration(migrations.Migration):
    initial = True

    dependencies = [
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
        # METERLY["CUSTOMER_MODEL"]: read here and at import, once for all; a system
        # check refuses a later change.
        migrations.swappable_dependency(meterly_settings.CUSTOMER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="Customer",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True,
                        primary_key=True,
                        serialize=False,
                        verbose_name="ID",
                    ),
                ),
                (
                    "external_id",
                    django_meterly.db.ExactCharField(
                        max_length=255, unique=True, verbose_name="external id"
                    ),
                ),
                (
                    "customer_id",
                    django_meterly.db.ExactCharField(
                        blank=True,
                        editable=False,
                        help_text="The ledger's id, known from the first use on.",
                        max_length=64,
                        null=True,
                        unique=True,
                        verbose_name="customer id",
                    ),
                ),
                (
                    "owes",
                    models.BooleanField(
                        default=False,
                        editable=False,
                        help_text=(
                            "Whether a reservation of this customer may be a debt."
                        ),
                        verbose_name="owes credits",
                    ),
                ),
                (
                    "had_owner",
                    models.BooleanField(
                        default=False,
                        editable=False,
                        help_text=(
                            "Then nobody else becomes the owner when this one is "
                            "deleted."
                        ),
                        verbose_name="has had an owner",
                    ),
                ),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        auto_now_add=True, verbose_name="created at"
                    ),
                ),
                (
                    "owner",
                    models.OneToOneField(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to=meterly_settings.CUSTOMER_MODEL,
                        verbose_name="owner",
                    ),
                ),
            ],
            options={
                "verbose_name": "customer",
                "verbose_name_plural": "customers",
                "permissions": [("grant_credits", "Can grant credits")],
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(owner=None) | models.Q(had_owner=True),
                        name="meterly_customer_had_owner",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("external_id", ""), _negated=True),
                        name="meterly_customer_named",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="Grant",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True,
                        primary_key=True,
                        serialize=False,
                        verbose_name="ID",
                    ),
                ),
                (
                    "unit",
                    django_meterly.db.ExactCharField(
                        max_length=64, verbose_name="unit"
                    ),
                ),
                ("amount", models.BigIntegerField(verbose_name="amount")),
                ("reason", models.CharField(max_length=500, verbose_name="reason")),
                (
                    "reference",
                    django_meterly.db.ExactCharField(
                        max_length=255, verbose_name="reference"
                    ),
                ),
                (
                    "state",
                    models.CharField(
                        choices=[
                            ("pending", "pending"),
                            ("granted", "granted"),
                            ("refused", "refused"),
                        ],
                        default="pending",
                        max_length=16,
                        verbose_name="state",
                    ),
                ),
                ("last_error", models.TextField(blank=True, verbose_name="last error")),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        auto_now_add=True, verbose_name="created at"
                    ),
                ),
                (
                    "actor",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="granted by",
                    ),
                ),
                (
                    "customer",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        to="meterly.customer",
                        verbose_name="customer",
                    ),
                ),
            ],
            options={
                "verbose_name": "grant",
                "verbose_name_plural": "grants",
                "indexes": [
                    models.Index(
                        fields=["state", "created_at"], name="meterly_grant_pending"
                    )
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("customer", "unit", "reference"),
                        name="meterly_grant_once",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("amount__gt", 0)),
                        name="meterly_grant_positive",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="Reservation",
            fields=[
                (
                    "id",
                    models.UUIDField(
                        default=uuid.uuid4,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                (
                    "unit",
                    django_meterly.db.ExactCharField(
                        max_length=64, verbose_name="unit"
                    ),
                ),
                ("amount", models.BigIntegerField(verbose_name="amount held")),
                (
                    "charge",
                    models.BigIntegerField(
                        blank=True,
                        help_text="What is to be charged; empty while the work runs.",
                        null=True,
                        verbose_name="amount charged",
                    ),
                ),
                (
                    "owed",
                    models.BigIntegerField(
                        blank=True,
                        help_text=(
                            "What of the charge there were no credits for. Once the "
                            "reservation is committed, this was written off."
                        ),
                        null=True,
                        verbose_name="amount owed",
                    ),
                ),
                (
                    "reference",
                    django_meterly.db.ExactCharField(
                        max_length=255, verbose_name="reference"
                    ),
                ),
                (
                    "name",
                    django_meterly.db.ExactCharField(
                        blank=True,
                        default="",
                        help_text="The view or the task that this was reserved for.",
                        max_length=255,
                        verbose_name="view or task",
                    ),
                ),
                (
                    "key",
                    django_meterly.db.ExactCharField(
                        max_length=200, verbose_name="idempotency key"
                    ),
                ),
                (
                    "attempt",
                    models.PositiveIntegerField(default=1, verbose_name="attempt"),
                ),
                (
                    "ttl_seconds",
                    models.PositiveIntegerField(verbose_name="hold time in seconds"),
                ),
                (
                    "state",
                    models.CharField(
                        choices=[
                            ("intent", "asking the ledger"),
                            ("reserved", "reserved"),
                            ("denied", "denied"),
                            ("failed", "failed"),
                            ("release_pending", "release pending"),
                            ("released", "released"),
                            ("conflict", "conflict"),
                            ("commit_pending", "commit pending"),
                            ("committed", "committed"),
                            ("unbilled", "unbilled"),
                        ],
                        default="intent",
                        max_length=16,
                        verbose_name="state",
                    ),
                ),
                (
                    "reservation_id",
                    django_meterly.db.ExactCharField(
                        blank=True,
                        max_length=64,
                        null=True,
                        verbose_name="reservation id",
                    ),
                ),
                (
                    "lapsed",
                    models.BooleanField(
                        default=False,
                        help_text="The lease ran out before anybody decided.",
                        verbose_name="lapsed",
                    ),
                ),
                (
                    "fence",
                    models.PositiveIntegerField(
                        default=0,
                        help_text=(
                            "Counts who has claimed the work; only the last may decide."
                        ),
                        verbose_name="fence",
                    ),
                ),
                (
                    "lease_until",
                    django_meterly.db.MomentField(
                        blank=True, null=True, verbose_name="lease until"
                    ),
                ),
                (
                    "next_attempt_at",
                    django_meterly.db.MomentField(
                        blank=True, null=True, verbose_name="next attempt at"
                    ),
                ),
                (
                    "settle_attempts",
                    models.PositiveIntegerField(
                        default=0, verbose_name="settle attempts"
                    ),
                ),
                (
                    "refusals",
                    models.PositiveIntegerField(default=0, verbose_name="refusals"),
                ),
                (
                    "stuck_at",
                    django_meterly.db.MomentField(
                        blank=True, null=True, verbose_name="stuck since"
                    ),
                ),
                ("last_error", models.TextField(blank=True, verbose_name="last error")),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        auto_now_add=True, verbose_name="created at"
                    ),
                ),
                (
                    "decided_at",
                    django_meterly.db.MomentField(
                        blank=True, null=True, verbose_name="decided at"
                    ),
                ),
                (
                    "settled_at",
                    django_meterly.db.MomentField(
                        blank=True, null=True, verbose_name="settled at"
                    ),
                ),
                (
                    "customer",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        to="meterly.customer",
                        verbose_name="customer",
                    ),
                ),
            ],
            options={
                "verbose_name": "reservation",
                "verbose_name_plural": "reservations",
                "permissions": [("write_off_debt", "Can write off debts")],
                "indexes": [
                    models.Index(
                        fields=["lease_until"], name="meterly_reservation_lease"
                    ),
                    models.Index(
                        fields=["next_attempt_at"], name="meterly_reservation_due"
                    ),
                    models.Index(
                        fields=["created_at"], name="meterly_reservation_created"
                    ),
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("customer", "key", "attempt"),
                        name="meterly_reservation_attempt",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("amount__gt", 0)),
                        name="meterly_reservation_positive",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(
                            ("charge", None), ("charge__gte", 0), _connector="OR"
                        ),
                        name="meterly_reservation_charge",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(
                            models.Q(("state", "unbilled"), _negated=True),
                            models.Q(("owed__gt", 0), ("owed__isnull", False)),
                            _connector="OR",
                        ),
                        name="meterly_reservation_owed",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(
                            models.Q(
                                ("lease_until__isnull", False),
                                ("state__in", ["intent", "reserved"]),
                            ),
                            models.Q(
                                ("next_attempt_at__isnull", False),
                                (
                                    "state__in",
                                    ["release_pending", "commit_pending", "unbilled"],
                                ),
                            ),
                            models.Q(
                                ("next_attempt_at__isnull", False),
                                ("state", "released"),
                            ),
                            models.Q(("charge", None), ("state", "released")),
                            (
                                "state__in",
                                ["denied", "failed", "conflict", "committed"],
                            ),
                            _connector="OR",
                        ),
                        name="meterly_reservation_swept",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="LowBalance",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True,
                        primary_key=True,
                        serialize=False,
                        verbose_name="ID",
                    ),
                ),
                (
                    "unit",
                    django_meterly.db.ExactCharField(
                        max_length=64, verbose_name="unit"
                    ),
                ),
                (
                    "announced_at",
                    django_meterly.db.MomentField(
                        null=True, verbose_name="announced at"
                    ),
                ),
                (
                    "customer",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        to="meterly.customer",
                        verbose_name="customer",
                    ),
                ),
            ],
            options={
                "verbose_name": "low balance",
                "verbose_name_plural": "low balances",
                "constraints": [
                    models.UniqueConstraint(
                        fields=("customer", "unit"), name="meterly_low_balance_once"
                    )
                ],
            },
        ),
    ]
