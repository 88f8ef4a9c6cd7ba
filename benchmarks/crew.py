"""Processes that do one thing over and over, and tell how often they did it."""

from __future__ import annotations

import multiprocessing
import time
from typing import TYPE_CHECKING, Any

from django.db import connections

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection

    #: Called in the process, returns what it is to repeat.
    Maker = Callable[[], Callable[[], Any]]


class Crew:
    """*size* processes, each able to run every one of *makers*."""

    def __init__(self, size: int, makers: Mapping[str, Maker]) -> None:
        # A forked process must not speak on its parent's sockets.
        connections.close_all()
        fork = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for _number in range(size):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_work, args=(theirs, makers), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def rate(self, name: str, seconds: float) -> float:
        """Let all run *name* for *seconds*; return how often they did, per second.

        Raises ``RuntimeError`` with the first error of any of them.
        """
        for pipe in self._pipes:
            pipe.send((name, seconds))
        answers = [pipe.recv() for pipe in self._pipes]
        if errors := [answer for answer in answers if isinstance(answer, str)]:
            raise RuntimeError(errors[0])
        return float(sum(answers))

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)


def _work(pipe: Connection, makers: Mapping[str, Maker]) -> None:
    runs: dict[str, Callable[[], Any]] = {}
    while (job := pipe.recv()) is not None:
        name, seconds = job
        try:
            if name not in runs:
                runs[name] = makers[name]()
            run, count = runs[name], 0
            started = now = time.perf_counter()
            while now < started + seconds:
                run()
                count += 1
                now = time.perf_counter()
        except Exception as exc:  # noqa: BLE001 (reported by the parent)
            pipe.send(f"{type(exc).__name__}: {exc}".splitlines()[0])
        else:
            pipe.send(count / (now - started))
