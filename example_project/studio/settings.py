"""The studio's settings: from the environment, or from a file ``.env`` next to
``manage.py``. Only ``SECRET_KEY`` has no default.
"""

from __future__ import annotations

from pathlib import Path

import environ

from django_meterly.conf import from_env
from django_meterly.tasks import beat_schedule

BASE_DIR = Path(__file__).parent.parent

env = environ.Env()
env.read_env(BASE_DIR / ".env")

SECRET_KEY = env.str("SECRET_KEY")
DEBUG = env.bool("DEBUG", default=False)
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1"])

# The studio writes to this folder only.
STATE_DIR = Path(env.str("STATE_DIR", default=str(BASE_DIR / "var")))
(STATE_DIR / "broker").mkdir(parents=True, exist_ok=True)

INSTALLED_APPS = [
    # First, so that its templates override those of the other apps.
    "studio",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "rest_framework",
    "django_meterly",
    "django_meterly.ledger",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "studio.urls"
WSGI_APPLICATION = "studio.wsgi.application"
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
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "studio"
LOGOUT_REDIRECT_URL = "login"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "static/"
STATIC_ROOT = STATE_DIR / "static"
MEDIA_ROOT = STATE_DIR / "media"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

DATABASES = {
    "default": env.db("DATABASE_URL", default=f"sqlite:///{STATE_DIR / 'db.sqlite3'}")
}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # WAL lets readers work beside the one writer. IMMEDIATE lets a writer wait for its
    # turn before it reads. ATOMIC_REQUESTS stays off: each request would hold the one
    # write lock until its end.
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }

# The default broker is a folder. It needs no server, and is enough for one machine.
CELERY_BROKER_URL = env.str("CELERY_BROKER_URL", default="filesystem://")
if CELERY_BROKER_URL.startswith("filesystem:"):
    CELERY_BROKER_TRANSPORT = "studio.broker.Transport"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(STATE_DIR / "broker"),
        "data_folder_out": str(STATE_DIR / "broker"),
        "control_folder": str(STATE_DIR / "broker"),
        "polling_interval": 0.05,
    }
    # Remote control would fill the folder with messages that nobody reads.
    CELERY_WORKER_ENABLE_REMOTE_CONTROL = False
CELERY_TASK_IGNORE_RESULT = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1

# The sweeper looks for reservations of crashed work at this interval, in seconds.
SWEEP_EVERY = env.float("SWEEP_EVERY", default=15.0)
CELERY_BEAT_SCHEDULE_FILENAME = str(STATE_DIR / "celerybeat-schedule")
CELERY_BEAT_SCHEDULE = {
    **beat_schedule(
        release_every=SWEEP_EVERY,
        settle_every=SWEEP_EVERY,
        ledger=True,
        expire_every=SWEEP_EVERY,
    ),
}

# The ledger is in this database. METERLY_* variables override these settings: for
# Meterly Cloud, set METERLY_TRANSPORT and METERLY_API_KEY.
METERLY = {
    "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    "DEFAULT_UNIT": "image_credits",
    # The units, with names for people.
    "UNITS": {"image_credits": "image credits", "render_seconds": "render seconds"},
    "TOP_UP_URL": "/credits/",
    **from_env(env),
}

# The credits of an animation are held for so many seconds until a worker takes it.
# While it renders, the job's heartbeat keeps them.
ANIMATION_SECONDS = env.int("ANIMATION_SECONDS", default=120)
