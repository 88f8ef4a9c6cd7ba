"""The work that every project sells: it may succeed, fail, or die."""

from __future__ import annotations

import os
import signal
from typing import Any

from django.core.exceptions import PermissionDenied


def draw(how: Any) -> str:
    """Draw a poster; ``how`` may say that it fails, or that its process is killed."""
    if "fail" in how:
        raise PermissionDenied
    if "die" in how:
        os.kill(os.getpid(), signal.SIGKILL)
    return "drawn"
