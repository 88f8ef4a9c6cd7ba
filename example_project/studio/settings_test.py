"""The settings of the tests: ``manage.py test --settings=studio.settings_test``."""

from __future__ import annotations

import os

os.environ.setdefault("SECRET_KEY", "only tests run with it")

from .settings import *  # noqa: F403

# A job runs in the process that orders it.
CELERY_TASK_ALWAYS_EAGER = True
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.InMemoryStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
