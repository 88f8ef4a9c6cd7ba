"""System checks: what ``manage.py check`` finds wrong with a project.

Each subject has a module: ``settings``, ``customers``, ``guards`` (of views and tasks),
``databases`` and ``sweeping``. To add a check, write a function there with
``@register``, give its message the next free id, and list the id in
``docs/settings.md``. Checks of tasks are in ``tasks``, which needs Celery.
"""

from . import customers, databases, guards, settings, sweeping

__all__ = ["customers", "databases", "guards", "settings", "sweeping"]
