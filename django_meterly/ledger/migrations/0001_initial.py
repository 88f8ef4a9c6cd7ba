from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models

import django_meterly.db
import django_meterly.ledger.models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

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
                    "public_id",
                    django_meterly.db.ExactCharField(
                        default=django_meterly.ledger.models.customer_id,
                        max_length=64,
                        unique=True,
                        verbose_name="customer id",
                    ),
                ),
                (
                    "external_id",
                    django_meterly.db.ExactCharField(
                        max_length=255, verbose_name="external id"
                    ),
                ),
                (
                    "credit_unit",
                    django_meterly.db.ExactCharField(
                        max_length=64, verbose_name="credit unit"
                    ),
                ),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
            ],
            options={
                "verbose_name": "customer",
                "verbose_name_plural": "customers",
            },
        ),
        migrations.CreateModel(
            name="Workspace",
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
                    "name",
                    django_meterly.db.ExactCharField(
                        max_length=255, unique=True, verbose_name="name"
                    ),
                ),
            ],
            options={
                "verbose_name": "workspace",
                "verbose_name_plural": "workspaces",
            },
        ),
        migrations.CreateModel(
            name="Account",
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
                        max_length=64, verbose_name="credit unit"
                    ),
                ),
                ("balance", models.BigIntegerField(default=0, verbose_name="balance")),
                (
                    "reserved",
                    models.BigIntegerField(default=0, verbose_name="reserved"),
                ),
                (
                    "customer",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="accounts",
                        to="meterly_ledger.customer",
                        verbose_name="customer",
                    ),
                ),
            ],
            options={
                "verbose_name": "account",
                "verbose_name_plural": "accounts",
            },
        ),
        migrations.CreateModel(
            name="Hold",
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
                    "public_id",
                    django_meterly.db.ExactCharField(
                        default=django_meterly.ledger.models.hold_id,
                        max_length=64,
                        unique=True,
                        verbose_name="reservation id",
                    ),
                ),
                ("amount", models.BigIntegerField(verbose_name="amount")),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("reserved", "reserved"),
                            ("committed", "committed"),
                            ("released", "released"),
                            ("expired", "expired"),
                        ],
                        default="reserved",
                        max_length=16,
                        verbose_name="status",
                    ),
                ),
                (
                    "reference",
                    django_meterly.db.ExactCharField(
                        max_length=255, verbose_name="reference"
                    ),
                ),
                ("expires_at", models.DateTimeField(verbose_name="expires at")),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "closed_at",
                    models.DateTimeField(
                        editable=False, null=True, verbose_name="closed at"
                    ),
                ),
                (
                    "account",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="holds",
                        to="meterly_ledger.account",
                        verbose_name="account",
                    ),
                ),
            ],
            options={
                "verbose_name": "hold",
                "verbose_name_plural": "holds",
            },
        ),
        migrations.CreateModel(
            name="Entry",
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
                    "public_id",
                    django_meterly.db.ExactCharField(
                        default=django_meterly.ledger.models.entry_id,
                        max_length=64,
                        unique=True,
                        verbose_name="entry id",
                    ),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("credits_granted", "granted"),
                            ("credits_added", "added"),
                            ("credits_used", "used"),
                            ("credits_reserved", "reserved"),
                            ("credits_committed", "committed"),
                            ("credits_released", "released"),
                            ("credits_expired", "expired"),
                        ],
                        max_length=32,
                        verbose_name="kind",
                    ),
                ),
                ("amount", models.BigIntegerField(verbose_name="amount")),
                ("balance_delta", models.BigIntegerField(verbose_name="balance delta")),
                (
                    "reserved_delta",
                    models.BigIntegerField(verbose_name="reserved delta"),
                ),
                ("balance_after", models.BigIntegerField(verbose_name="balance after")),
                (
                    "reserved_after",
                    models.BigIntegerField(verbose_name="reserved after"),
                ),
                (
                    "reference",
                    django_meterly.db.ExactCharField(
                        max_length=255, verbose_name="reference"
                    ),
                ),
                (
                    "description",
                    models.CharField(
                        blank=True, max_length=1000, verbose_name="description"
                    ),
                ),
                (
                    "unique_reference",
                    django_meterly.db.ExactCharField(
                        max_length=255, null=True, verbose_name="unique reference"
                    ),
                ),
                (
                    "idempotency_key",
                    django_meterly.db.ExactCharField(
                        max_length=255, null=True, verbose_name="idempotency key"
                    ),
                ),
                (
                    "fingerprint",
                    django_meterly.db.ExactCharField(
                        blank=True, max_length=64, verbose_name="request fingerprint"
                    ),
                ),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "account",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="entries",
                        to="meterly_ledger.account",
                        verbose_name="account",
                    ),
                ),
                (
                    "hold",
                    models.ForeignKey(
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="entries",
                        to="meterly_ledger.hold",
                        verbose_name="hold",
                    ),
                ),
                (
                    "workspace",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="entries",
                        to="meterly_ledger.workspace",
                        verbose_name="workspace",
                    ),
                ),
            ],
            options={
                "verbose_name": "entry",
                "verbose_name_plural": "entries",
            },
        ),
        migrations.AddField(
            model_name="customer",
            name="workspace",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="customers",
                to="meterly_ledger.workspace",
                verbose_name="workspace",
            ),
        ),
        migrations.CreateModel(
            name="ApiKey",
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
                ("name", models.CharField(max_length=255, verbose_name="name")),
                ("prefix", models.CharField(max_length=16, verbose_name="prefix")),
                ("last4", models.CharField(max_length=4, verbose_name="last four")),
                (
                    "key_hash",
                    django_meterly.db.ExactCharField(
                        max_length=64, unique=True, verbose_name="key hash"
                    ),
                ),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "revoked_at",
                    models.DateTimeField(
                        editable=False, null=True, verbose_name="revoked at"
                    ),
                ),
                (
                    "workspace",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="api_keys",
                        to="meterly_ledger.workspace",
                        verbose_name="workspace",
                    ),
                ),
            ],
            options={
                "verbose_name": "API key",
                "verbose_name_plural": "API keys",
            },
        ),
        migrations.AddConstraint(
            model_name="account",
            constraint=models.UniqueConstraint(
                fields=("customer", "unit"), name="meterly_ledger_account_unique_unit"
            ),
        ),
        migrations.AddConstraint(
            model_name="account",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    ("reserved__gte", 0), ("reserved__lte", models.F("balance"))
                ),
                name="meterly_ledger_account_reserved_within_balance",
            ),
        ),
        migrations.AddIndex(
            model_name="hold",
            index=models.Index(
                fields=["status", "expires_at"], name="meterly_ledger_hold_due"
            ),
        ),
        migrations.AddConstraint(
            model_name="hold",
            constraint=models.CheckConstraint(
                condition=models.Q(("amount__gt", 0)),
                name="meterly_ledger_hold_amount_positive",
            ),
        ),
        migrations.AddIndex(
            model_name="entry",
            index=models.Index(
                fields=["account", "id"], name="meterly_ledger_entry_account"
            ),
        ),
        migrations.AddConstraint(
            model_name="entry",
            constraint=models.UniqueConstraint(
                fields=("workspace", "idempotency_key"),
                name="meterly_ledger_entry_unique_key",
            ),
        ),
        migrations.AddConstraint(
            model_name="entry",
            constraint=models.UniqueConstraint(
                fields=("account", "unique_reference"),
                name="meterly_ledger_entry_unique_reference",
            ),
        ),
        migrations.AddConstraint(
            model_name="customer",
            constraint=models.UniqueConstraint(
                fields=("workspace", "external_id"),
                name="meterly_ledger_customer_unique_external_id",
            ),
        ),
    ]
