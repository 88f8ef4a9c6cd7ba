"""django-cachalot, which leaves Meterly's tables alone."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403
from tests.projects.base import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "cachalot"]
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
CACHALOT_UNCACHABLE_APPS = ["meterly", "meterly_ledger"]
