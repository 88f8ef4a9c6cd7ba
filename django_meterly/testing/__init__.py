"""Helpers for your project's own tests: credits, assertions, and a ledger that fails.

For example::

    class PosterTests(TestCase):
        def test_a_poster_costs_25_credits(self):
            with override_credits(self.user, image_credits=100):
                with assert_charged(self.user, 25, unit="image_credits"):
                    self.client.post("/posters/")
            assert_books_balance()

All helpers work on the embedded ledger, with real calls: nothing is mocked. The package
is for tests only, and no other module imports it. Its own modules are ``credits``,
``books`` (the books, leases and the sweeper), ``failures`` and ``blocks``.
"""

from __future__ import annotations

from .blocks import override_meterly
from .books import assert_books_balance, expire_holds, lapse_leases, sweep
from .credits import assert_charged, assert_not_charged, override_credits
from .failures import Altered, Fault, FaultyTransport, faults

__all__ = [
    "Altered",
    "Fault",
    "FaultyTransport",
    "assert_books_balance",
    "assert_charged",
    "assert_not_charged",
    "expire_holds",
    "faults",
    "lapse_leases",
    "override_credits",
    "override_meterly",
    "sweep",
]
