"""Two databases, the second a replica that is read from."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403
from tests.projects.base import DATABASES

# The same file: a replica that is never behind.
DATABASES = {**DATABASES, "replica": {**DATABASES["default"]}}
DATABASE_ROUTERS = ["tests.projects.replica.routers.ReadReplica"]
