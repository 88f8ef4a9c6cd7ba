"""The studio's jobs."""

from __future__ import annotations

import io
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from django.core.files.base import ContentFile

from django_meterly.tasks import meterly_task

from . import drawing
from .models import FRAMES, Animation

if TYPE_CHECKING:
    from PIL.Image import Image

#: Held while a job runs. The job charges the seconds that it took.
RENDER_SECONDS = 30
FRAME_SIZE = (600, 800)
FRAME_MILLISECONDS = 90


# By default, Celery acknowledges a message when it is received. If the process is
# killed, the job is lost, and its credits come back. With acks_late and
# reject_on_worker_lost it would run again, and a job that kills its process would do so
# for ever.
@meterly_task("render_seconds", bind=True)
def render_animation(self: Any, pk: int) -> None:
    """Draw an animation frame by frame, and charge the seconds that took."""
    animation = Animation.objects.select_related("poster").get(pk=pk)
    started = time.monotonic()
    frames = []
    for number in range(FRAMES):
        if animation.dies_half_way and number == FRAMES // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        frames.append(
            drawing.draw(
                animation.poster.title,
                animation.poster.style,
                FRAME_SIZE,
                phase=number / FRAMES,
            )
        )
        animation.frames_done = number + 1
        animation.save(update_fields=["frames_done"])
    animation.image.save(f"{animation.reference}.png", _moving(frames))
    self.meterly.charge(math.ceil(time.monotonic() - started))


def _moving(frames: list[Image]) -> ContentFile[bytes]:
    file = io.BytesIO()
    frames[0].save(
        file,
        "PNG",
        save_all=True,
        append_images=frames[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
    )
    return ContentFile(file.getvalue())
