from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models

import django_meterly.db


class Migration(migrations.Migration):
    dependencies = [
        ("meterly_ledger", "0001_initial"),
    ]

    operations = [
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
                    models.DateTimeField(
                        default=django_meterly.db.DatabaseNow,
                        editable=False,
                        verbose_name="created at",
                    ),
                ),
            ],
            options={
                "verbose_name": "idempotency record",
                "verbose_name_plural": "idempotency records",
            },
        ),
        migrations.AddField(
            model_name="apikey",
            name="key_id",
            field=django_meterly.db.ExactCharField(
                max_length=64, null=True, unique=True, verbose_name="key id"
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="last_used_at",
            field=models.DateTimeField(
                editable=False, null=True, verbose_name="last used at"
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="scope",
            field=models.CharField(
                choices=[("read", "read"), ("write", "read and write")],
                default="write",
                max_length=8,
                verbose_name="scope",
            ),
        ),
        migrations.AlterField(
            model_name="apikey",
            name="key_hash",
            field=django_meterly.db.ExactCharField(
                max_length=64, null=True, unique=True, verbose_name="key hash"
            ),
        ),
        migrations.AlterField(
            model_name="apikey",
            name="last4",
            field=models.CharField(blank=True, max_length=4, verbose_name="last four"),
        ),
        migrations.AddConstraint(
            model_name="apikey",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(("key_hash__isnull", False), ("key_id", None)),
                    models.Q(("key_hash", None), ("key_id__isnull", False)),
                    _connector="OR",
                ),
                name="meterly_ledger_apikey_one_kind",
            ),
        ),
        migrations.AddField(
            model_name="record",
            name="workspace",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="records",
                to="meterly_ledger.workspace",
                verbose_name="workspace",
            ),
        ),
        migrations.AddIndex(
            model_name="record",
            index=models.Index(fields=["created_at"], name="meterly_ledger_record_age"),
        ),
        migrations.AddConstraint(
            model_name="record",
            constraint=models.UniqueConstraint(
                fields=("workspace", "idempotency_key"),
                name="meterly_ledger_record_unique_key",
            ),
        ),
    ]
