"""The settings the benchmarks run with: as a new project would have them."""

from __future__ import annotations

import importlib.util

import environ

SECRET_KEY = "not a secret: only benchmarks run with it"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": environ.Env().db("DATABASE_URL")}
# A worker process keeps its connection, as a web server's does.
DATABASES["default"]["CONN_MAX_AGE"] = None

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django_meterly",
    "django_meterly.ledger",
    # The peers that are Django apps, where they could be installed.
    *(
        name
        for name in ("dj_wallet", "ai_tokens", "waffle")
        if importlib.util.find_spec(name)
    ),
]
METERLY = {"TRANSPORT": "django_meterly.ledger.transport.LedgerTransport"}
