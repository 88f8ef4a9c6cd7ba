"""The admin: customers and their balances, grants, and the journal.

Each model has a module, which holds its list, its page and its actions: ``customers``,
``grants`` and ``reservations``. A column is added to ``list_display`` there. An action
goes into ``actions``; if it asks a question first, its page is a template in
``templates/admin/meterly/``. ``base`` has what the three share.
"""

from __future__ import annotations

from .customers import CustomerAdmin
from .grants import GrantAdmin
from .reservations import ReservationAdmin

__all__ = ["CustomerAdmin", "GrantAdmin", "ReservationAdmin"]
