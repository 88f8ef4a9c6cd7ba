"""The settings of the test suite. ``DATABASE_URL`` names another database."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import environ

from django_meterly.ledger import postgresql

env = environ.Env()

# "portable": the path that other databases take, on PostgreSQL as well.
postgresql.enabled = env("LEDGER_PATH", default="") != "portable"

SECRET_KEY = "not a secret: only tests run with it"
USE_TZ = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# In the environment, where conftest.py puts the test database's name.
os.environ.setdefault(
    "DATABASE_URL", f"sqlite:///{tempfile.gettempdir()}/meterly.sqlite3"
)
_database = env.db("DATABASE_URL")
# Two runs at once do not share a test database. On SQLite it is a file, so that
# the threads and processes of a test see the same one.
_name = Path(_database["NAME"])
_database["TEST"] = {"NAME": str(_name.with_name(f"test_{os.getpid()}_{_name.name}"))}
if _database["ENGINE"] == "django.db.backends.sqlite3":
    _database["OPTIONS"] = {
        "timeout": 20,
        # What a killed process has written is the system's to keep.
        "init_command": "PRAGMA synchronous = OFF",
    }
elif _database["ENGINE"] == "django.db.backends.mysql":
    import pymysql

    pymysql.install_as_MySQLdb()
DATABASES = {"default": _database}

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rest_framework",
    "rest_framework.authtoken",
    "django_meterly",
    "django_meterly.ledger",
    # Empties the tables after a test, by its own "flush".
    "tests",
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
        "DIRS": [Path(__file__).parent / "templates"],
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

# It recommends METERLY["UNITS"], but the tests use whatever units they like.
# The second: many a test's METERLY has no DEFAULT_UNIT, which the suite's tasks need.
SILENCED_SYSTEM_CHECKS = ["meterly.I001", "meterly.E015"]

METERLY = {
    "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    "DEFAULT_UNIT": "image_credits",
}
