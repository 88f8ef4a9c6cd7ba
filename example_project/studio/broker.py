"""A Celery broker in a folder, for one machine: nothing to install, nothing to run.

kombu's own filesystem transport creates a message's file before it writes to it. A
worker that looks in between takes the empty file for the message: it stops, and the
message is lost. Here a message appears whole, or not at all.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        # Workers read in the order of the names, and only names that end in .msg.
        name = f"{time.time_ns()}_{uuid.uuid4()}.{queue}.msg"
        file = Path(self.data_folder_out, f"{name}.part")
        file.write_text(dumps(payload))
        file.rename(file.with_suffix(""))


class Transport(filesystem.Transport):
    Channel = Channel
