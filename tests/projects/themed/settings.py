"""The admin of django-unfold."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403
from tests.projects.base import INSTALLED_APPS

INSTALLED_APPS = ["unfold", *INSTALLED_APPS]
