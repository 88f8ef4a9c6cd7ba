"""A custom user model, and teams that pay."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403
from tests.projects.base import INSTALLED_APPS, METERLY

INSTALLED_APPS = [*INSTALLED_APPS, "tests.projects.teams"]
AUTH_USER_MODEL = "teams.Member"
METERLY = {
    **METERLY,
    "CUSTOMER_MODEL": "teams.Team",
    "CUSTOMER_RESOLVER": "tests.projects.teams.models.team_of",
    "EXTERNAL_ID": "tests.projects.teams.models.slug",
}
