"""The only reader of ``settings.METERLY_LEDGER``.

Every access reads the Django settings anew, so that ``override_settings`` works. An
unknown name fails, with a suggestion. Durations are whole numbers of seconds, or a
``timedelta``.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from ..transports.base import MAX_TTL_SECONDS, check_text, check_ttl, shown

if TYPE_CHECKING:
    from collections.abc import Callable

#: The longest request body. Every call of the contract is much shorter.
MAX_BODY_BYTES = 64 * 1024
#: The longest retention, a hundred years: every database can subtract it from now.
MAX_RETENTION = 36500 * 86400
#: The rates of calls by kind; ``None`` is unlimited. ``failed`` counts wrong keys.
THROTTLE_RATES = {"read": None, "write": None, "failed": "60/min"}


def _retention(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RETENTION:
        raise ValueError(
            f"{name} must be a whole number of seconds from 1 to {MAX_RETENTION} or a "
            f"timedelta, not {shown(value)}."
        )
    return value


def _rates(value: Any, name: str) -> dict[str, str | None]:
    if not isinstance(value, dict) or not set(value) <= set(THROTTLE_RATES):
        raise ValueError(f'{name} must be a dict with "read", "write" and "failed".')
    for rate in value.values():
        if rate is not None and not (
            isinstance(rate, str) and re.fullmatch(r"[1-9][0-9]{,8}/[smhd][a-z]*", rate)
        ):
            raise ValueError(f'{name} must have rates like "100/s", not {shown(rate)}.')
    return {**THROTTLE_RATES, **value}


DEFAULTS: dict[str, Any] = {
    "WORKSPACE": "default",
    "MAX_TTL": MAX_TTL_SECONDS,
    "RECORD_RETENTION": dt.timedelta(days=30),
    "THROTTLE_RATES": {},
}

CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "WORKSPACE": check_text,
    "MAX_TTL": check_ttl,
    "RECORD_RETENTION": _retention,
    "THROTTLE_RATES": _rates,
}


class LedgerSettings:
    """``settings.METERLY_LEDGER`` with its defaults, as attributes.

    For example, ``ledger_settings.MAX_TTL`` is 86400. Raises ``ImproperlyConfigured``
    if ``METERLY_LEDGER`` is not a dict, has an unknown name or an invalid value.
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
                text = key.upper() if isinstance(key, str) else ""
                close = difflib.get_close_matches(text, DEFAULTS, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ImproperlyConfigured(
                    f"There is no setting METERLY_LEDGER[{shown(key)}].{hint}"
                )
        value = project.get(name, DEFAULTS[name])
        if isinstance(value, dt.timedelta):
            value = value // dt.timedelta(seconds=1)
        try:
            return CHECKS[name](value, f"METERLY_LEDGER[{name!r}]")
        except ValueError as exc:
            raise ImproperlyConfigured(str(exc)) from exc


ledger_settings = LedgerSettings()
