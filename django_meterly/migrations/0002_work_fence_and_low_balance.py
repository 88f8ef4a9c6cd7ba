from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models

import django_meterly.db


class Migration(migrations.Migration):
    dependencies = [
        ("meterly", "0001_initial"),
    ]

    operations = [
        migrations.AddField(
            model_name="reservation",
            name="fence",
            field=models.PositiveIntegerField(
                default=0,
                help_text="Counts who has taken the work up; only the last may decide.",
                verbose_name="fence",
            ),
        ),
        migrations.AddField(
            model_name="reservation",
            name="work",
            field=django_meterly.db.ExactCharField(
                blank=True,
                default="",
                help_text="The view or the task that this was reserved for.",
                max_length=255,
                verbose_name="work",
            ),
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
                    models.DateTimeField(null=True, verbose_name="announced at"),
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
