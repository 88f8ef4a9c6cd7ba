"""The only reader of ``settings.METERLY_LEDGER``.

Every access reads the Django settings anew. Names that do not exist fail, with a
suggestion. ``MAX_TTL`` is a whole number of seconds, or a ``timedelta``.
"""

from __future__ import annotations

import datetime as dt
import difflib
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from ..transports.base import MAX_TTL_SECONDS, check_text, check_ttl

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULTS: dict[str, Any] = {
    "WORKSPACE": "default",
    "MAX_TTL": MAX_TTL_SECONDS,
}

CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "WORKSPACE": check_text,
    "MAX_TTL": check_ttl,
}


class LedgerSettings:
    """``settings.METERLY_LEDGER`` with its defaults, as attributes.

    Raises ``ImproperlyConfigured`` for a ``METERLY_LEDGER`` that is not a dict,
    for a name in it that does not exist, and for a value that cannot be.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise AttributeError(f"There is no setting METERLY_LEDGER[{name!r}].")
        project = getattr(settings, "METERLY_LEDGER", {})
        if not isinstance(project, dict):
            raise ImproperlyConfigured(
                f"METERLY_LEDGER must be a dict, not {type(project).__name__}."
            )
        for key in project:
            if key not in DEFAULTS:
                close = difflib.get_close_matches(str(key).upper(), DEFAULTS, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ImproperlyConfigured(
                    f"There is no setting METERLY_LEDGER[{key!r}].{hint}"
                )
        value = project.get(name, DEFAULTS[name])
        if isinstance(value, dt.timedelta):
            value = value // dt.timedelta(seconds=1)
        try:
            return CHECKS[name](value, f"METERLY_LEDGER[{name!r}]")
        except ValueError as exc:
            raise ImproperlyConfigured(str(exc)) from exc


ledger_settings = LedgerSettings()
