"""Attacks on real servers use the same servers as ``tests.servers``."""

from __future__ import annotations

from tests.servers.conftest import cookie, customer, own_site, shared, site

__all__ = ["cookie", "customer", "own_site", "shared", "site"]
