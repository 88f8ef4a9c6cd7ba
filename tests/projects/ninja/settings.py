"""django-ninja, with the session of the log-in page."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403

ROOT_URLCONF = "tests.projects.ninja.urls"
