"""The message that hands a reservation off to a task, and its signed header.

A worker learns from this header only which reservation it works under. The header is
signed with ``SECRET_KEY`` for one task id of one task.
"""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Any

from django.core.signing import BadSignature, Signer

from .errors import MeterlyUsageError

if TYPE_CHECKING:
    from .models import Reservation

logger = logging.getLogger(__name__)

#: The header of a task's message that names the reservation handed off to it.
HEADER = "meterly_reservation"
#: What the header names instead of an id, for work that nobody is charged for.
UNCHARGED = "uncharged"
#: And for work whose amount was 0.
FREE = "free"
NO_HOLD = (UNCHARGED, FREE)
SALT = "django_meterly.handoffs"


def sign(reservation_id: str, name: str, task_id: str) -> str:
    """Return the header that hands *reservation_id* off to the task *name*[*task_id*].

    The signature does not cover the row's fence: who has claimed the row is a
    condition in the database.
    """
    return Signer(salt=SALT).sign_object([reservation_id, name, task_id])


def read(header: Any, name: str, task_id: str | None) -> str:
    """Return the reservation's id, ``UNCHARGED`` or ``FREE``, as *header* hands off.

    Logs and raises ``MeterlyUsageError`` for a header that was not signed for the task
    *name*[*task_id*] with ``SECRET_KEY`` or one of ``SECRET_KEY_FALLBACKS``.
    """
    signed: Any = None
    if isinstance(header, str):
        try:
            signed = Signer(salt=SALT).unsign_object(header)
        except (BadSignature, ValueError):
            # ValueError: a text that UTF-8 cannot encode.
            pass
    if not isinstance(signed, list) or signed[1:] != [name, task_id]:
        refused = MeterlyUsageError(_REFUSED.format(name, task_id))
        logger.error("%s", refused)
        raise refused
    return str(signed[0])


def header_of(request: Any) -> Any:
    """Return the header in a task's *request*, or ``None`` without one.

    ``request.headers`` holds all custom headers, unless the message itself has a dict
    named ``headers``, as sentry-sdk sends it. Then our header is beside that dict. It
    is copied into the dict, because a retry sends only that.
    """
    headers = request.headers if isinstance(request.headers, dict) else {}
    if HEADER in headers:
        # A header without a value is refused, too, not treated as absent.
        return headers[HEADER] or ""
    header = request.get(HEADER)
    if header is not None:
        request.headers = {**headers, HEADER: header}
    return header


class Message:
    """A task that is sent when the work that hands it off is committed.

    For example, ``Message(render_video, (job.pk,), {})``. Raises ``TypeError`` for a
    task that is not guarded, or for wrong arguments.
    """

    def __init__(self, task: Any, args: Any, kwargs: Any) -> None:
        # A signature has a type, and its own options.
        guarded = getattr(task, "type", task)
        if not getattr(guarded, "meterly_guarded", False):
            raise TypeError(
                f"{task!r} is not a meterly_task, so it would not settle what is "
                "handed off."
            )
        if guarded is task:
            self._signature = task.s(*args, **kwargs)
        else:
            self._signature = task.clone(args, kwargs)
        if guarded.typing:
            guarded.__header__(*self._signature.args, **self._signature.kwargs)
        self._name = guarded.name
        self.task_id = str(self._signature.options.get("task_id") or uuid.uuid4())

    def send(self, row: Reservation | None, amount: int) -> None:
        """Send it with the signed id of the reservation *row* in its header.

        Without a row, the work is free: its *amount* is 0, or guards are not enforced.
        """
        headers = self._signature.options.get("headers") or {}
        no_hold = UNCHARGED if amount else FREE
        named = no_hold if row is None else str(row.pk)
        signed = sign(named, self._name, self.task_id)
        self._signature.apply_async(
            task_id=self.task_id, headers={**headers, HEADER: signed}
        )


_REFUSED = (
    "What was handed off to {}[{}] is refused: its header was not signed for this "
    "task. Web and workers need the same SECRET_KEY; after a change the old one has to "
    "stay in SECRET_KEY_FALLBACKS until the queues are empty."
)
