"""How a call reaches a ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Call, Transport

if TYPE_CHECKING:
    from .http import HttpTransport

__all__ = ["Call", "HttpTransport", "Transport"]


def __getattr__(name: str) -> Any:
    # Lazily, so that the in-process ledger never imports requests.
    if name == "HttpTransport":
        from .http import HttpTransport

        return HttpTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
