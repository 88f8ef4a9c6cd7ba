"""The settings of the tests' child processes; the environment says what differs."""

from __future__ import annotations

import os

from django_meterly.tasks import beat_schedule
from tests.children import broker_options
from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, METERLY, SECRET_KEY, env

DATABASES["default"]["ATOMIC_REQUESTS"] = env.bool("CHILD_ATOMIC_REQUESTS", False)
METERLY.update(env.json("CHILD_METERLY", {}))

CELERY_BROKER_URL = os.environ.get("CHILD_BROKER_URL", "filesystem://")
CELERY_BROKER_TRANSPORT_OPTIONS = env.json("CHILD_BROKER_OPTIONS", {})
if CELERY_BROKER_URL == "filesystem://":
    CELERY_BROKER_TRANSPORT = "tests.broker.Transport"
    CELERY_BROKER_TRANSPORT_OPTIONS = broker_options(os.environ.get("CHILD_BROKER", ""))
CELERY_TASK_DEFAULT_QUEUE = os.environ.get("CHILD_QUEUE", "celery")
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_BEAT_SCHEDULE = beat_schedule(release_every=1, settle_every=1)
SECRET_KEY = env("CHILD_SECRET_KEY", default=SECRET_KEY)
SECRET_KEY_FALLBACKS = env.list("CHILD_SECRET_KEY_FALLBACKS", default=[])
