"""The settings of every process of a chaos run; the environment says what differs."""

from __future__ import annotations

from django_meterly.tasks import beat_schedule
from tests.child_settings import *  # noqa: F403
from tests.child_settings import DATABASES

if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # As docs/settings.md has it, but longer than any process is stopped: one that
    # is stopped in a transaction keeps all others from writing.
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 60,
        "init_command": "PRAGMA journal_mode=WAL",
    }
ROOT_URLCONF = "tests.chaos.urls"
CELERY_BEAT_SCHEDULE = beat_schedule(release_every=2, settle_every=2)
# A message may outlive its worker, and the site is up in no time again.
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
