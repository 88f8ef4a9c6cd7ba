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

# Where everything that changes is kept.
STATE_DIR = Path(env.str("STATE_DIR", default=str(BASE_DIR / "var")))
(STATE_DIR / "broker").mkdir(parents=True, exist_ok=True)

INSTALLED_APPS = [
    # First: its templates come before those of the others.
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
    # Readers next to one writer, and a writer that waits for its turn before it
    # reads. No ATOMIC_REQUESTS: it would keep the one write lock for whole requests.
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }

# The default broker is a folder: enough for one machine, and no server to run.
CELERY_BROKER_URL = env.str("CELERY_BROKER_URL", default="filesystem://")
if CELERY_BROKER_URL.startswith("filesystem:"):
    CELERY_BROKER_TRANSPORT = "studio.broker.Transport"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(STATE_DIR / "broker"),
        "data_folder_out": str(STATE_DIR / "broker"),
        "control_folder": str(STATE_DIR / "broker"),
        "polling_interval": 0.05,
    }
    # Remote control would fill the folder with messages nobody reads.
    CELERY_WORKER_ENABLE_REMOTE_CONTROL = False
CELERY_TASK_IGNORE_RESULT = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1

# How often, in seconds, the sweeper looks for what crashed work left behind.
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

# The ledger is in this very database. METERLY_* in the environment goes first, so
# METERLY_TRANSPORT and METERLY_API_KEY are all that Meterly Cloud takes.
METERLY = {
    "TRANSPORT": "django_meterly.ledger.transport.LedgerTransport",
    "DEFAULT_UNIT": "image_credits",
    # What there is, and what people call it.
    "UNITS": {"image_credits": "image credits", "render_seconds": "render seconds"},
    "TOP_UP_URL": "/credits/",
    **from_env(env),
}

# How long, in seconds, the credits of an animation are held for a worker to come.
# While it is rendered, the job's heartbeat holds them.
ANIMATION_SECONDS = env.int("ANIMATION_SECONDS", default=120)
