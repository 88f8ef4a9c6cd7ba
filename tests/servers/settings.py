"""The settings of a served site: those of the other children, and its own URLs."""

from __future__ import annotations

from tests.child_settings import *  # noqa: F403
from tests.child_settings import MIDDLEWARE

ROOT_URLCONF = "tests.servers.site"
# The requests of these tests come from no form.
MIDDLEWARE.remove("django.middleware.csrf.CsrfViewMiddleware")
