"""The settings of the test suite. ``DATABASE_URL`` names another database."""

from __future__ import annotations

import tempfile
from pathlib import Path

import environ

env = environ.Env()

SECRET_KEY = "not a secret: only tests run with it"
USE_TZ = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

_folder = Path(tempfile.gettempdir())
DATABASES = {
    "default": env.db(
        "DATABASE_URL", default=f"sqlite:///{_folder}/meterly-dev.sqlite3"
    )
}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # A file, so that threads and processes of a test see one database.
    DATABASES["default"]["TEST"] = {
        "NAME": str(_folder / f"meterly-test-{__import__('os').getpid()}.sqlite3")
    }

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rest_framework",
    "django_meterly",
    "django_meterly.ledger",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
STATIC_URL = "static/"

METERLY = {
    "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    "DEFAULT_UNIT": "image_credits",
}
