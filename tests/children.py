"""Child processes: how tests start them, and how they end them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.conf import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
#: A child may have to import everything on a busy machine.
PATIENCE = 60.0


def environment(*, atomic_requests: bool = False, **meterly: Any) -> dict[str, str]:
    """Return the environment of a child with this test's ``METERLY``, changed."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.child_settings",
        "CHILD_METERLY": json.dumps({**settings.METERLY, **meterly}),
        "CHILD_ATOMIC_REQUESTS": str(atomic_requests),
    }


def dying_transport(transport: str) -> str:
    """Return the dotted path of the *transport* that stops at chosen points."""
    remote = transport.endswith("FaultyTransport")
    return f"tests.dying.{'DyingRemote' if remote else 'DyingLedger'}"


def broker_options(folder: str) -> dict[str, Any]:
    """Return the options of kombu's filesystem transport in *folder*."""
    return {
        "data_folder_in": folder,
        "data_folder_out": folder,
        "control_folder": folder,
        "polling_interval": 0.05,
    }


@contextmanager
def started(
    module: str, *arguments: str, env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[str]]:
    """Run ``python -m module`` in a process group of its own, and end that group."""
    with (
        log.open("a") as output,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that ``started`` yielded, and all its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], object], log: Path) -> None:
    """Wait for *condition*; fail with what the children have said in *log*."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        said = log.read_text() if log.exists() else ""
        assert time.monotonic() < give_up, said
        time.sleep(0.05)
