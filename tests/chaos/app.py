"""The Celery app of a chaos run."""

from __future__ import annotations

from celery import Celery

app = Celery("tests.chaos", include=["tests.chaos.work"])
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
