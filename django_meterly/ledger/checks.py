from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error, register
from django.core.exceptions import ImproperlyConfigured

from .conf import DEFAULTS, ledger_settings


@register
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Report what is wrong with ``settings.METERLY_LEDGER``."""
    messages: dict[str, None] = {}
    for name in DEFAULTS:
        try:
            getattr(ledger_settings, name)
        except ImproperlyConfigured as exc:
            messages[str(exc)] = None
    return [Error(message, id="meterly_ledger.E001") for message in messages]
