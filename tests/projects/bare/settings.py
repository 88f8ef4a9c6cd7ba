"""No templates, no admin, no sessions and no Django users: who asks is in a header."""

from __future__ import annotations

from tests.projects.base import *  # noqa: F403

INSTALLED_APPS = [
    "django_meterly",
    "django_meterly.ledger",
    "tests.projects.bare",
]
MIDDLEWARE = [
    "tests.projects.bare.middleware.PersonMiddleware",
    "django_meterly.middleware.MeterlyMiddleware",
]
TEMPLATES = []
ROOT_URLCONF = "tests.projects.bare.urls"
AUTH_USER_MODEL = "bare.Person"
