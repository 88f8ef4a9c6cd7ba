"""Celery's beat, with its schedule in the database."""

from __future__ import annotations

from django_meterly.tasks import beat_schedule
from tests.projects.base import *  # noqa: F403
from tests.projects.base import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "django_celery_beat"]
CELERY_BROKER_URL = "memory://"
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_SCHEDULE = beat_schedule(
    release_every=1, settle_every=1, expire_every=1, ledger=True
)
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
