"""What has happened, for receivers that want to know; nothing depends on them."""

from __future__ import annotations

from django.dispatch import Signal

#: The ledger refused a recorded decision too often. Sends *reservation*.
reservation_stuck = Signal()

#: Work was done, but its credits could not be charged: a debt. Sends *reservation*.
reservation_unbilled = Signal()
