"""What the jobs of a chaos run say of themselves, outside of journal and ledger.

Lines of JSON in one file, each written at once and on the disk before the job goes
on: a process that is killed takes none of them along.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("CHAOS_FOLDER", "."))
NOTES = FOLDER / "notes"
#: While there is this file, nobody dies by chance any more.
CALM = FOLDER / "calm"


def note(what: str, **facts: Any) -> None:
    line = json.dumps({"what": what, "at": time.time(), **facts}) + "\n"
    file = os.open(NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read() -> list[dict[str, Any]]:
    if not NOTES.exists():
        return []
    # Not the line that somebody is about to write.
    whole, _, _ = NOTES.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def die_by_chance(point: str) -> None:
    """Kill this process, as often as ``CHAOS_DEATHS`` says (0 to 1)."""
    chance = float(os.environ.get("CHAOS_DEATHS", "0"))
    if random.random() < chance and not CALM.exists():
        note("died", pid=os.getpid(), point=point)
        os.kill(os.getpid(), signal.SIGKILL)
