"""The heartbeat of work that takes long: a running job, or a stream being sent."""

from __future__ import annotations

import copy
import logging
import threading
import time
from typing import TYPE_CHECKING

from django.db import Error, connections

from . import journal
from .client import get_client
from .conf import meterly_settings
from .wire import MAX_TTL_SECONDS

if TYPE_CHECKING:
    from .models import Reservation

logger = logging.getLogger(__name__)


class Heart(threading.Thread):
    """Renews the lease of running work, and its hold, until it is stopped.

    It ends by itself when the row has another owner, and after the longest
    time that a hold may last. The first beat comes after a third of ``LEASE_GRACE``,
    so that short work costs no query for it; or *at_once*.
    """

    def __init__(self, row: Reservation, fence: int, *, at_once: bool = False) -> None:
        super().__init__(name=f"meterly-heart-{row.pk}", daemon=True)
        # A copy: the owner goes on with its own.
        self._row = copy.copy(row)
        self._fence = fence
        self._at_once = at_once
        self._stopped = threading.Event()

    def run(self) -> None:
        row = self._row
        begun = extended = time.monotonic()
        extensions = 0
        # The hold is extended when half of it is over, at the next beat.
        interval = min(meterly_settings.LEASE_GRACE, row.ttl_seconds) / 3
        wait = 0 if self._at_once else interval
        try:
            while not self._stopped.wait(wait):
                wait = interval
                now = time.monotonic()
                if now - begun > MAX_TTL_SECONDS or not self._beat():
                    return
                if now - extended > row.ttl_seconds / 2 - interval:
                    extended = now
                    extensions += 1
                    name = f"{self._fence}.{extensions}"
                    journal.extend(get_client(), row, name)
                # This thread's own: none is kept between two beats.
                connections.close_all()
        except Exception:
            logger.exception("The heart of reservation %s has stopped", row.pk)
        finally:
            connections.close_all()

    def _beat(self) -> bool:
        try:
            return journal.beat(self._row, fence=self._fence)
        except Error:
            # There are two more beats in a lease.
            logger.warning("A heartbeat of reservation %s failed", self._row.pk)
            return True

    def stop(self) -> None:
        """End it, after the beat that is under way."""
        self._stopped.set()
