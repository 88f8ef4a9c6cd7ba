"""A guarded stream: it is charged after its last chunk.

``execution`` replaces the chunks of a streaming response by ``Stream``. Meanwhile a
heart keeps lease and hold alive. Three things can end a stream:

* The last chunk is sent: the work succeeds.
* A chunk raises: the work is cancelled.
* The reader leaves: ``ON_DISCONNECT`` decides (``Execution.disconnect``).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..lifecycle import to_the_end
from . import patches

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from ..heart import Heart
    from .execution import Execution


class Stream:
    """The chunks of *response*, which conclude its *execution*."""

    def __init__(self, execution: Execution, response: Any, *, head: bool) -> None:
        self._execution = execution
        self._lifecycle = execution.lifecycle
        self._response = response
        # A server reads the whole stream that answers a HEAD, and drops it.
        self._head = head
        self._heart: Heart | None = None

    def replace(self) -> None:
        """Send the chunks of the response through this stream."""
        response = self._response
        chunks = response.streaming_content
        send = self._asend(chunks) if response.is_async else self._send(chunks)
        patches.replace_chunks(response, send, self._disconnect)

    def _send(self, chunks: Iterable[Any]) -> Iterator[Any]:
        if self._head:
            return
        self._start_heart()
        left = self._length()
        try:
            for chunk in chunks:
                if left is not None:
                    left -= len(chunk)
                    if left <= 0:
                        # With this chunk the reader has everything.
                        self._succeed()
                yield chunk
        except GeneratorExit:
            self._disconnect()
            raise
        except BaseException:
            self._lifecycle.cancel()
            raise
        else:
            self._succeed()
        finally:
            self._stop_heart()

    async def _asend(self, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
        if self._head:
            return
        await to_the_end(self._start_heart)
        left = self._length()
        try:
            async for chunk in chunks:
                if left is not None:
                    left -= len(chunk)
                    if left <= 0:
                        await to_the_end(self._succeed)
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            await to_the_end(self._disconnect)
            raise
        except BaseException:
            await to_the_end(self._lifecycle.cancel)
            raise
        else:
            await to_the_end(self._succeed)
        finally:
            self._stop_heart()

    def _length(self) -> int | None:
        """Return the number of bytes by ``Content-Length``, if the response has one."""
        length = self._response.get("Content-Length", "")
        return int(length) if length.isdecimal() else None

    def _succeed(self) -> None:
        self._stop_heart()
        self._lifecycle.succeed()

    def _disconnect(self) -> None:
        # Also when the response is closed: a stream that was never begun runs none of
        # the code above, and Python may finalize an abandoned async one much later.
        self._execution.disconnect()
        self._stop_heart()

    def _start_heart(self) -> None:
        # It beats in another thread, so that no chunk waits for it.
        self._heart = self._lifecycle.start_heart(at_once=True)

    def _stop_heart(self) -> None:
        if self._heart is not None:
            self._heart.stop()
