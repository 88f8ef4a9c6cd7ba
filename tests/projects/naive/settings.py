"""``USE_TZ = False``, hours away from UTC."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403

USE_TZ = False
TIME_ZONE = "America/New_York"
