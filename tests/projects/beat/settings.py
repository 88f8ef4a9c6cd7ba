"""Celery's beat, with its schedule in the database."""

from __future__ import annotations

from django_meterly.tasks import beat_schedule
from tests.children import broker_options
from tests.projects.base import *  # noqa: F403
from tests.projects.base import FOLDER, INSTALLED_APPS

(FOLDER / "broker").mkdir(exist_ok=True)

INSTALLED_APPS = [*INSTALLED_APPS, "django_celery_beat"]
CELERY_BROKER_URL = "filesystem://"
CELERY_BROKER_TRANSPORT = "tests.broker.Transport"
CELERY_BROKER_TRANSPORT_OPTIONS = broker_options(str(FOLDER / "broker"))
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_SCHEDULE = beat_schedule(
    release_every=1, settle_every=1, expire_every=1, ledger=True
)
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
