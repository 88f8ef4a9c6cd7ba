from __future__ import annotations

from typing import TYPE_CHECKING, Any

import django.db.models.deletion
import django.db.models.expressions
from django.db import migrations, models

import django_meterly.db
import django_meterly.ledger.append_only
import django_meterly.ledger.constraints
import django_meterly.ledger.models

from ..constraints import create_shape_function, drop_shape_function
from ..postgresql import create_functions, drop_functions
from ..triggers import create_triggers, drop_triggers

if TYPE_CHECKING:
    from django.db.backends.base.schema import BaseDatabaseSchemaEditor


def make_shape_function(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    create_shape_function(editor.connection)


def unmake_shape_function(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    drop_shape_function(editor.connection)


def make_functions(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    create_functions(editor.connection)


def unmake_functions(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    drop_functions(editor.connection)


def make_triggers(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    create_triggers(editor.connection)


def unmake_triggers(apps: Any, editor: BaseDatabaseSchemaEditor) -> None:
    drop_triggers(editor.connection)


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        # First, because the table of entries has a constraint that calls it.
        migrations.RunPython(make_shape_function, unmake_shape_function),
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
                (
                    "is_test",
                    models.BooleanField(
                        default=False,
                        help_text=(
                            "Only test keys work in it, and they work nowhere else."
                        ),
                        verbose_name="test workspace",
                    ),
                ),
            ],
            options={
                "verbose_name": "workspace",
                "verbose_name_plural": "workspaces",
            },
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
                (
                    "last4",
                    models.CharField(
                        blank=True, max_length=4, verbose_name="last four"
                    ),
                ),
                (
                    "key_hash",
                    django_meterly.db.ExactCharField(
                        max_length=64, null=True, unique=True, verbose_name="key hash"
                    ),
                ),
                (
                    "key_id",
                    django_meterly.db.ExactCharField(
                        max_length=64, null=True, unique=True, verbose_name="key id"
                    ),
                ),
                (
                    "is_test",
                    models.BooleanField(default=False, verbose_name="test key"),
                ),
                (
                    "may_spend",
                    models.BooleanField(default=True, verbose_name="may spend"),
                ),
                (
                    "may_grant",
                    models.BooleanField(default=False, verbose_name="may grant"),
                ),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "expires_at",
                    django_meterly.db.MomentField(
                        blank=True, null=True, verbose_name="expires at"
                    ),
                ),
                (
                    "last_used_at",
                    django_meterly.db.MomentField(
                        editable=False, null=True, verbose_name="last used at"
                    ),
                ),
                (
                    "refused_at",
                    django_meterly.db.MomentField(
                        editable=False, null=True, verbose_name="last refused at"
                    ),
                ),
                (
                    "revoked_at",
                    django_meterly.db.MomentField(
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
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            models.Q(("key_hash__isnull", False), ("key_id", None)),
                            models.Q(("key_hash", None), ("key_id__isnull", False)),
                            _connector="OR",
                        ),
                        name="meterly_ledger_apikey_one_kind",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("name", ""), _negated=True),
                        name="meterly_ledger_apikey_named",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="ApiKeyEvent",
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
                    "kind",
                    models.CharField(
                        choices=[
                            ("created", "created"),
                            ("revoked", "revoked"),
                            ("refused", "refused"),
                        ],
                        max_length=16,
                        verbose_name="kind",
                    ),
                ),
                (
                    "actor",
                    models.CharField(blank=True, max_length=255, verbose_name="by"),
                ),
                (
                    "request_id",
                    models.CharField(
                        blank=True, max_length=64, verbose_name="request id"
                    ),
                ),
                (
                    "remote_address",
                    models.CharField(
                        blank=True, max_length=64, verbose_name="remote address"
                    ),
                ),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "api_key",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="events",
                        to="meterly_ledger.apikey",
                        verbose_name="API key",
                    ),
                ),
            ],
            options={
                "verbose_name": "API key event",
                "verbose_name_plural": "API key events",
            },
            bases=(django_meterly.ledger.append_only.AppendOnly, models.Model),
        ),
        migrations.CreateModel(
            name="LedgerCustomer",
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
                    "workspace",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="customers",
                        to="meterly_ledger.workspace",
                        verbose_name="workspace",
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
                    django_meterly.db.MomentField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
            ],
            options={
                "verbose_name": "customer",
                "verbose_name_plural": "customers",
                "db_table": "meterly_ledger_customer",
                "constraints": [
                    models.UniqueConstraint(
                        fields=("workspace", "external_id"),
                        name="meterly_ledger_customer_unique_external_id",
                    )
                ],
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
                    "customer",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="accounts",
                        to="meterly_ledger.ledgercustomer",
                        verbose_name="customer",
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
            ],
            options={
                "verbose_name": "account",
                "verbose_name_plural": "accounts",
                "constraints": [
                    models.UniqueConstraint(
                        fields=("customer", "unit"),
                        name="meterly_ledger_account_unique_unit",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(
                            ("reserved__gte", 0), ("reserved__lte", models.F("balance"))
                        ),
                        name="meterly_ledger_account_reserved_within_balance",
                    ),
                ],
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
                (
                    "expires_at",
                    django_meterly.db.MomentField(verbose_name="expires at"),
                ),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "closed_at",
                    django_meterly.db.MomentField(
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
                "indexes": [
                    models.Index(
                        fields=["status", "expires_at"], name="meterly_ledger_hold_due"
                    )
                ],
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(("amount__gt", 0)),
                        name="meterly_ledger_hold_amount_positive",
                    )
                ],
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
                    django_meterly.db.MomentField(
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
                        db_constraint=False,
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
                "indexes": [
                    models.Index(
                        fields=["account", "id"], name="meterly_ledger_entry_account"
                    )
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("workspace", "idempotency_key"),
                        name="meterly_ledger_entry_unique_key",
                    ),
                    models.UniqueConstraint(
                        fields=("account", "unique_reference"),
                        name="meterly_ledger_entry_unique_reference",
                    ),
                    django_meterly.ledger.constraints.ShapeConstraint(
                        condition=models.Q(
                            ("amount__gte", 0),
                            models.Q(
                                ("balance_delta", 0),
                                ("reserved_delta", 0),
                                _negated=True,
                            ),
                            models.Q(
                                models.Q(
                                    ("kind__in", ["credits_granted", "credits_added"]),
                                    ("balance_delta", models.F("amount")),
                                    ("reserved_delta", 0),
                                ),
                                models.Q(
                                    ("kind", "credits_used"),
                                    (
                                        "balance_delta",
                                        django.db.models.expressions.CombinedExpression(
                                            models.F("amount"), "*", models.Value(-1)
                                        ),
                                    ),
                                    ("reserved_delta", 0),
                                ),
                                models.Q(
                                    ("kind", "credits_reserved"),
                                    ("balance_delta", 0),
                                    ("reserved_delta", models.F("amount")),
                                ),
                                models.Q(
                                    ("kind", "credits_committed"),
                                    (
                                        "balance_delta",
                                        django.db.models.expressions.CombinedExpression(
                                            models.F("amount"), "*", models.Value(-1)
                                        ),
                                    ),
                                    (
                                        "reserved_delta__lte",
                                        models.F("balance_delta"),
                                    ),
                                ),
                                models.Q(
                                    (
                                        "kind__in",
                                        ["credits_released", "credits_expired"],
                                    ),
                                    ("balance_delta", 0),
                                    (
                                        "reserved_delta",
                                        django.db.models.expressions.CombinedExpression(
                                            models.F("amount"), "*", models.Value(-1)
                                        ),
                                    ),
                                ),
                                _connector="OR",
                            ),
                        ),
                        name="meterly_ledger_entry_shape",
                    ),
                ],
            },
            bases=(django_meterly.ledger.append_only.AppendOnly, models.Model),
        ),
        migrations.CreateModel(
            name="Record",
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
                    "idempotency_key",
                    django_meterly.db.ExactCharField(
                        max_length=255, verbose_name="idempotency key"
                    ),
                ),
                (
                    "fingerprint",
                    django_meterly.db.ExactCharField(
                        max_length=64, verbose_name="request fingerprint"
                    ),
                ),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
                (
                    "workspace",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="records",
                        to="meterly_ledger.workspace",
                        verbose_name="workspace",
                    ),
                ),
            ],
            options={
                "verbose_name": "idempotency record",
                "verbose_name_plural": "idempotency records",
                "indexes": [
                    models.Index(
                        fields=["created_at"], name="meterly_ledger_record_age"
                    )
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("workspace", "idempotency_key"),
                        name="meterly_ledger_record_unique_key",
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="Seal",
            fields=[
                (
                    "number",
                    models.BigIntegerField(
                        primary_key=True, serialize=False, verbose_name="number"
                    ),
                ),
                ("first", models.BigIntegerField(verbose_name="first entry")),
                ("last", models.BigIntegerField(verbose_name="last entry")),
                ("count", models.BigIntegerField(verbose_name="entries")),
                ("gaps", models.JSONField(verbose_name="gaps")),
                ("late", models.JSONField(verbose_name="late entries")),
                ("settled", models.BigIntegerField(verbose_name="settled up to")),
                ("horizon", models.BigIntegerField(null=True, verbose_name="horizon")),
                (
                    "hash",
                    django_meterly.db.ExactCharField(
                        max_length=64, unique=True, verbose_name="hash"
                    ),
                ),
                (
                    "created_at",
                    django_meterly.db.MomentField(
                        editable=False, verbose_name="created at"
                    ),
                ),
            ],
            options={
                "verbose_name": "seal",
                "verbose_name_plural": "seals",
            },
            bases=(django_meterly.ledger.append_only.AppendOnly, models.Model),
        ),
        # On PostgreSQL the functions are also replaced after every migrate, so that
        # a test database that was built without migrations has them. On other
        # databases this does nothing.
        migrations.RunPython(make_functions, unmake_functions),
        migrations.RunPython(make_triggers, unmake_triggers),
    ]
