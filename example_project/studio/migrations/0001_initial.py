from __future__ import annotations

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = [
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="Poster",
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
                ("title", models.CharField(max_length=80)),
                (
                    "style",
                    models.CharField(
                        choices=[
                            ("suns", "Suns"),
                            ("waves", "Waves"),
                            ("shapes", "Shapes"),
                            ("letters", "Letters"),
                            ("moon", "Moon"),
                        ],
                        default="suns",
                        max_length=20,
                    ),
                ),
                ("reference", models.CharField(max_length=40, unique=True)),
                ("image", models.FileField(upload_to="posters")),
                ("thumbnail", models.FileField(upload_to="posters")),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                (
                    "owner",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="posters",
                        to=settings.AUTH_USER_MODEL,
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Animation",
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
                ("reference", models.CharField(max_length=40, unique=True)),
                ("dies_half_way", models.BooleanField(default=False)),
                ("frames_done", models.PositiveSmallIntegerField(default=0)),
                ("image", models.FileField(blank=True, upload_to="animations")),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                (
                    "poster",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="animations",
                        to="studio.poster",
                    ),
                ),
            ],
        ),
    ]
