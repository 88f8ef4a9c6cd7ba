"""UUIDs as primary keys, and ``ATOMIC_REQUESTS``."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403
from tests.projects.base import DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.projects.uuids"]
AUTH_USER_MODEL = "uuids.Person"
DATABASES["default"]["ATOMIC_REQUESTS"] = True
