"""A Celery broker in a folder, for one machine. It needs no server.

kombu's own filesystem transport creates a file before it writes the message to it. A
worker that finds the empty file stops, and the message is lost. Here a file appears
with its whole message.
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
        # Workers read files in the order of their names, and only those ending in .msg.
        name = f"{time.time_ns()}_{uuid.uuid4()}.{queue}.msg"
        file = Path(self.data_folder_out, f"{name}.part")
        file.write_text(dumps(payload))
        file.rename(file.with_suffix(""))


class Transport(filesystem.Transport):
    Channel = Channel
