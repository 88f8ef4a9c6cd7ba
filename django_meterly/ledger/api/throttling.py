"""Throttles: calls by API key, and failures by remote address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_framework.throttling import SimpleRateThrottle

from ..conf import ledger_settings

if TYPE_CHECKING:
    from rest_framework.request import Request
    from rest_framework.views import APIView


class KeyThrottle(SimpleRateThrottle):
    """Limits the calls of each key; reads and writes are counted separately.

    The limits are ``METERLY_LEDGER["THROTTLE_RATES"]``. The counts are in Django's
    default cache, so several processes need a shared one.
    """

    def __init__(self) -> None:
        """Do not look up the rate yet: it depends on the request."""

    def allow_request(self, request: Request, view: APIView | None) -> bool:
        self.scope = self.scope_of(request)
        self.rate = ledger_settings.THROTTLE_RATES.get(self.scope)
        self.num_requests, self.duration = self.parse_rate(self.rate)
        return bool(super().allow_request(request, view))  # type: ignore[arg-type]

    def scope_of(self, request: Request) -> str:
        return "read" if request.method == "GET" else "write"

    def get_cache_key(self, request: Request, view: APIView) -> str:
        key: Any = request.auth
        return f"meterly_ledger_throttle_{self.scope}_{key.pk}"

    def wait(self) -> float:
        # Retry-After has whole seconds, and "0" would invite the next try at once.
        return max(1, super().wait() or 0)


class FailureThrottle(KeyThrottle):
    """Limits the failures of each remote address, to ``THROTTLE_RATES["failed"]``.

    The address is the connection's: an attacker could send another ``Forwarded`` header
    each time.
    """

    def scope_of(self, request: Request) -> str:
        return "failed"

    def get_cache_key(self, request: Request, view: Any) -> str:
        return f"meterly_ledger_throttle_failed_{request.META.get('REMOTE_ADDR')}"
