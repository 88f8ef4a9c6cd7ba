"""Prepaid usage credits for Django: reserve, run, then commit or release."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import MeterlyClient, get_client
    from .decorators import meterly_guard
    from .errors import (
        MeterlyApiError,
        MeterlyDebtError,
        MeterlyDuplicateError,
        MeterlyError,
        MeterlyIdempotencyMismatchError,
        MeterlyInsufficientCreditsError,
        MeterlyNotSentError,
        MeterlyUnavailableError,
        MeterlyUnknownOutcomeError,
        MeterlyUsageError,
    )
    from .guards import guard

__version__ = "0.1.0"

__all__ = [
    "MeterlyApiError",
    "MeterlyClient",
    "MeterlyDebtError",
    "MeterlyDuplicateError",
    "MeterlyError",
    "MeterlyIdempotencyMismatchError",
    "MeterlyInsufficientCreditsError",
    "MeterlyNotSentError",
    "MeterlyUnavailableError",
    "MeterlyUnknownOutcomeError",
    "MeterlyUsageError",
    "get_client",
    "guard",
    "meterly_guard",
]

_HOMES = {
    "MeterlyClient": "client",
    "get_client": "client",
    "guard": "guards",
    "meterly_guard": "decorators",
}


def __getattr__(name: str) -> Any:
    # Lazily, because Django imports this package before models can be imported, and
    # because a script may need the client only.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOMES.get(name, 'errors')}", __name__)
    return getattr(module, name)
