"""PostgreSQL, with psycopg's pool of connections."""

from __future__ import annotations

import environ

from tests.projects.base import *  # noqa: F403

env = environ.Env()

DATABASES = {
    "default": {
        **env.db("PROJECT_DATABASE_URL"),
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 4}},
    }
}
