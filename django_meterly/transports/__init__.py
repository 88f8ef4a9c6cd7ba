"""How a call reaches a ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Call, JoinedTransport, Transport

if TYPE_CHECKING:
    from .http import HttpTransport, Request

__all__ = ["Call", "HttpTransport", "JoinedTransport", "Request", "Transport"]


def __getattr__(name: str) -> Any:
    # Lazily, so that the in-process ledger never imports requests.
    if name in ("HttpTransport", "Request"):
        from . import http

        return getattr(http, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
