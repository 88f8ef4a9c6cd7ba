"""A small poster studio that charges its users in credits."""

from __future__ import annotations

# So that shared tasks find the app whenever Django is set up.
from .celery import app as celery_app

__all__ = ["celery_app"]
